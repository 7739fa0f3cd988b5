"""Which narrations become clips of which split, which reason every other row gets, and how clips are dealt out to shards."""

import collections
import dataclasses
import math

import pytest

from data_prep import narrated, narrations

DOUBLE = "is also in the label list"


def narration(text="#C C stirs", uid="v", time_s=1.0, label=-1, annotation="a") -> narrations.Narration:
    return narrations.Narration(uid, annotation, "narration_pass_1", time_s, text, label)


def choose(found, labelled=(), split="train", **options):
    """Returns ((text, label) of narrations chosen in a split, (reason, text) of the others); asserts that no row is lost."""
    chosen, rejects = narrated.choose(list(found), list(labelled), dict.fromkeys("vuw", split), **options)
    texts = {n.clip_id: n.words for n in (*labelled, *found)}
    assert sum(map(len, chosen.values())) == len(chosen[split])
    assert len(chosen[split]) + len(rejects) == len(found) + len(labelled)
    assert len({n.clip_id for n in chosen[split]}) == len(chosen[split])
    return [(n.text, n.label) for n in chosen[split]], sorted((r.reason, texts[r.clip_id]) for r in rejects)


def test_of_a_narration_in_both_lists_the_labelled_one_counts_and_the_other_row_is_reported():
    found = [narration(), narration("#C C cuts", time_s=2.0), narration("#O man X stirs"), narration("#C C stirs ")]
    for labels in ([1], [0], [-1]):
        labelled = [narration(label=label) for label in labels]
        # A double gets that reason rather than that it is another's action or has no label.
        assert choose(found, labelled, "test") == (
            [("#C C stirs", labels[0])],
            [(DOUBLE, "#C C stirs"), (DOUBLE, "#C C stirs"), ("no label, but in the test split", "#C C cuts"),
             ("somebody else's action", "#O man X stirs")],
        )  # fmt: skip
        assert choose(found, labelled) == (
            [("#C C stirs", labels[0]), ("#C C cuts", -1)],
            [(DOUBLE, "#C C stirs"), (DOUBLE, "#C C stirs"), ("somebody else's action", "#O man X stirs")],
        )
    labelled = [narration("#O man X stirs", label=0)]
    assert choose(found[:1], labelled + found[1:2], "test")[0] == [("#O man X stirs", 0), ("#C C cuts", -1)]
    # Training takes the camera wearer's actions only, whichever list a narration is in.
    other = ("somebody else's action", "#O man X stirs")
    assert choose(found[:3], labelled) == ([("#C C stirs", -1), ("#C C cuts", -1)], [other, other])
    assert choose([], labelled + found[1:2], own_table=True)[0] == [("#O man X stirs", 0), ("#C C cuts", -1)]


def test_two_lines_of_one_annotation_and_moment_are_both_reported():
    waves, chops, empty = narration("#O B waves"), narration("#C C chops the onion"), narration("")
    assert len({n.clip_id for n in (waves, chops, empty)}) == 3
    told = ("somebody else's action", "#O B waves")
    assert choose([waves, chops]) == ([("#C C chops the onion", -1)], [told])
    label = narration("#O B waves", label=1)
    assert choose([waves, chops], [label], "test") == (
        [("#O B waves", 1)], [(DOUBLE, "#O B waves"), ("no label, but in the test split", "#C C chops the onion")]
    )  # fmt: skip
    assert choose([waves, chops], [label]) == ([("#C C chops the onion", -1)], [told, told])
    # A narration that is left out itself makes no other a double.
    assert choose([empty, chops, empty]) == (
        [("#C C chops the onion", -1)], [("narration has no text", ""), ("narration has no text", "")]
    )  # fmt: skip
    assert choose([waves, waves]) == ([], [told, told])
    assert choose([waves, chops, chops], clean_text=True) == (
        [("#C C chops the onion", -1)], [("same narration twice", "#C C chops the onion"), told]
    )  # fmt: skip


def test_of_a_label_given_twice_one_counts_and_of_labels_that_contradict_each_other_none():
    one, zero, none = (narration(label=label) for label in (1, 0, -1))
    twice, contradict = ("same narration twice", "#C C stirs"), ("labels contradict each other", "#C C stirs")
    assert choose([], [one, one], "test") == ([("#C C stirs", 1)], [twice])
    assert choose([], [none, zero], "test") == ([("#C C stirs", 0)], [twice])
    assert choose([], [none, none], "test") == ([("#C C stirs", -1)], [twice])
    assert choose([], [one, none, zero, one], "test") == ([], [contradict] * 4)
    assert choose([narration()], [one, zero], "test") == (
        [], [contradict, contradict, ("no label, but in the test split", "#C C stirs")]
    )  # fmt: skip
    assert choose([narration()], [one, zero]) == ([("#C C stirs", -1)], [contradict, contradict])


def test_videos_with_labels_are_held_out_by_hash_and_all_others_are_trained_on():
    uids = [f"v{i}" for i in range(1100)]
    labelled = [narration(uid=uid, label=1) for uid in uids]
    found = [narration(uid=uid, time_s=2.0) for uid in [*uids, *(f"w{i}" for i in range(100))]]
    chosen, rejects = narrated.choose(found, labelled, {"v0": "train", "w0": "test"})
    assert 70 < len(chosen["validation"]) < 130  # one in eleven of 1,100
    assert {n.video_uid for n in chosen["validation"] + chosen["test"]} == set(uids[1:])
    assert {n.video_uid for n in chosen["train"]} == {"v0", *(f"w{i}" for i in range(1, 100))}  # --splits wins
    assert all(n.label == 1 for n in chosen["validation"] + chosen["test"])
    # In a user's own table, videos with any label count as those of the label list.
    table = [labelled[1], found[1], found[-1]]
    chosen, rejects = narrated.choose([], table, {}, own_table=True)
    assert (chosen["train"], rejects) == ([found[-1]], [])
    assert chosen[narrations.held_out_by_hash("v1")] == [labelled[1], found[1]]


def test_videos_of_the_same_moments_are_in_one_split_where_no_file_says_otherwise():
    uids = [f"v{i}" for i in range(300)]
    groups = {name: uid for uid in uids for name in (uid, f"w{uid}")}
    found = [narration(uid=uid, time_s=2.0) for uid in groups]

    def homes(labelled=(), splits=None) -> dict[str, str]:
        """Returns video → split of those narrations that become clips, and "none" for the others."""
        chosen, rejects = narrated.choose(found, list(labelled), splits or {}, groups=groups)
        assert sum(map(len, chosen.values())) + len(rejects) == len(found) + len(labelled)
        return {n.video_uid: "none" for n in found} | {n.video_uid: s for s, lines in chosen.items() for n in lines}

    assert homes() == {name: narrations.split_by_hash(uid) for name, uid in groups.items()}
    # A video goes with a labelled one of its group, out of training, and has no labels for evaluation itself.
    of_labels = homes([narration(uid="wv7", label=1)])
    assert (of_labels["wv7"], of_labels["v7"]) == (narrations.held_out_by_hash("v7"), "none")
    assert {split for uid, split in of_labels.items() if groups[uid] != "v7"} == {"train"}
    # What the user says about a video counts for it, and for others of its group about which nothing is said.
    groups |= {"xv1": "v1", "xv2": "v2"}
    found += [narration(uid=uid) for uid in ("xv1", "xv2")]
    said = homes(splits={"v0": "test", "wv1": "train", "v1": "validation", "wv2": "test", "v2": "train", "v3": "train"})
    assert [said[uid] for uid in ("v0", "wv0")] == ["test", "test"]
    assert [said[uid] for uid in ("wv1", "v1", "xv1")] == ["train", "validation", "validation"]
    assert [said[uid] for uid in ("wv2", "v2", "xv2")] == ["test", "train", "test"]  # in any order of the file
    assert [said[uid] for uid in ("v3", "wv3")] == ["train", "train"]


def test_splits_that_name_none_of_the_videos_are_refused_and_those_that_name_some_say_so(tmp_path, capsys):
    rows = [narration(uid="b"), narration(uid="a"), narration(uid="c"), narrations.Narration("../x", "", "", 1.0, "x", -1)]
    rows[-1] = dataclasses.replace(rows[-1], problem="video name points outside the folder")
    path = tmp_path / "splits.csv"
    with pytest.raises(ValueError, match="splits.csv names none of .*: it begins with 'a.mp4', the narrations name 'a': "):
        narrated.check_splits(path, {"a.mp4": "test"}, {"a.mp4": "test"}, rows)
    with pytest.raises(ValueError, match="names none of the narrations' videos: it is empty"):
        narrated.check_splits(path, {}, {}, rows)
    narrated.check_splits(path, {"a": "test"}, {"a": "test"}, rows)
    assert capsys.readouterr().out == f"2 of 3 videos are not in {path}: they are split as if there were no such file\n"
    narrated.check_splits(path, {"x": "test"}, dict.fromkeys("abc", "test"), rows)  # by --labels_split
    narrated.check_splits(path, {}, {}, rows[-1:])
    assert capsys.readouterr().out == ""


def test_a_sample_is_the_same_in_any_order_and_a_larger_one_holds_it():
    lines = [narration(uid=f"v{i % 7}", time_s=float(i)) for i in range(1000)]
    taken, others = narrations.sample(lines, 100, 0)
    assert (len(taken), len(others)) == (100, 900)
    assert sorted([*taken, *others], key=lambda n: n.time_s) == lines
    again, _ = narrations.sample(lines[::-1], 100, 0)
    assert again == taken[::-1]
    assert set(taken) < set(narrations.sample(lines, 300, 0)[0])
    assert len(set(taken) & set(narrations.sample(lines, 100, 1)[0])) < 30  # 10 are expected
    without = [n for n in lines if n is not taken[50]]  # one row less changes one row of the sample
    assert len(set(taken) & set(narrations.sample(without, 100, 0)[0])) == 99
    assert [narrations.sample(lines, num, 0) for num in (0, 1000, 2000)] == [(lines, [])] * 3


def test_equal_ids_cost_the_later_row_and_nothing_else():
    lines = [narration(uid="v", annotation="u_w"), narration(uid="v_u", annotation="w")]
    assert lines[0].clip_id == lines[1].clip_id
    chosen, rejects = narrated.choose(lines, [], {"v": "train", "v_u": "test"})
    assert chosen == {"train": lines[:1], "validation": [], "test": []}
    assert [(r.reason, r.video_uid) for r in rejects] == [("another narration has this id", "v_u")]


@pytest.mark.parametrize("field", ["video_uid", "annotation_uid", "source", "text"])
def test_half_a_character_anywhere_costs_its_own_row(field):
    bad = dataclasses.replace(narration(), **{field: "#C C \ud800"})
    chosen, rejects = narrated.choose([bad, narration()], [bad], {"v": "train"})
    assert chosen["train"] == [narration()]
    reason = "video name can't be a file name" if field == "video_uid" else "narration is not valid Unicode"
    assert [r.reason for r in rejects] == [reason] * 2


def test_narrations_without_a_time_are_each_counted():
    lines = [narration(time_s=float("nan"), annotation=a) for a in "ab"]
    _, rejects = narrated.choose(lines, [], {})
    assert [r.reason for r in rejects] == ["narration has no time"] * 2
    assert len({r.clip_id for r in rejects}) == 2


def test_shards_are_shared_out_by_the_splits_sizes_and_none_is_without_a_video(tmp_path):
    empty = narrations.Taxonomy([], {})
    chosen = {
        "train": [narration(uid=f"t{i}", time_s=t) for i in range(30) for t in (1.0, 2.0, 3.0)],
        "validation": [narration(uid="v0")],
        "test": [],
    }
    (tmp_path / "v0.mp4").write_bytes(b"12345")
    for num_shards in (1, 8, 1000):
        tasks = narrated.plan_tasks(chosen, empty, empty, num_shards, tmp_path)
        counts = collections.Counter(t.split for t in tasks)
        assert counts == {"train": min(max(math.floor(num_shards * 90 / 91 + 0.5), 1), 30), "validation": 1}
        assert all(task.items for task in tasks)
        assert all(task.num_shards == counts[task.split] for task in tasks)
        written = [line["clip_id"] for task in tasks for item in task.items for line in item["narrations"]]
        assert sorted(written) == sorted(n.clip_id for lines in chosen.values() for n in lines)
        version = str((tmp_path / "v0.mp4").stat().st_mtime_ns)
        assert all(i["video_version"] == version for t in tasks for i in t.items if i["video_bytes"])
        assert {i["video_uid"]: i["video_bytes"] for t in tasks for i in t.items if t.split != "train"} == {"v0": 5}
