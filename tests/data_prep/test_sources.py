"""Foreign annotation files are read, real ones and made-up ones in their layouts, or refused with file, row and value."""

import collections
import csv
import json
import math
import pathlib

import pytest

from data_prep import ego4d, narrated, narrations
from data_prep.sources import ego4dsounds, egoclip, narration_json, sounding_labels
from mc3_jax.data import records
from tests.data_prep import test_media
from tests.data_prep.converted import Converted

REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "ego4dsounds" / "test_clips_11k.csv"
VERBS = narrations.Taxonomy(["take", "cut", "stir"], {("take",): 0, ("pick",): 0, ("cut",): 1, ("stir",): 2})
NOUNS = narrations.Taxonomy(["bag", "cloth", "floor"], {("bag",): 0, ("clothes",): 1, ("floor",): 2})
NONE = narrations.Taxonomy([], {})
CLIP = {
    "clip_idx": 0, "video_uid": "v", "video_dur": 128.03, "narration_source": "narration_pass_1", "narration_ind": 0,
    "narration_time": 3.3445, "clip_start": 2.967651, "clip_end": 3.721266, "clip_text": "#C C picks a bag of clothes",
    "tag_verb": "[0]", "tag_noun": "[2, 1, 0]",
}  # fmt: skip
SOUND = {
    **{name: value for name, value in CLIP.items() if name != "clip_idx"}, "video_dur": -1, "tag_verb": "[]",
    "tag_noun": "[]", "positive": 1.0, "clip_file": "v/v_0.mp4", "speech": 0.02, "background_music": 0.01,
    "traffic_noise": 5.8e-05, "wind_noise": 4e-04,
}  # fmt: skip


def write(path: pathlib.Path, base: dict, *changes: dict, delimiter: str = "\t") -> pathlib.Path:
    """Writes a table with a row for each of `changes`, applied to `base` and numbered by `narration_ind`; returns `path`."""
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, base, delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**base, "narration_ind": i, **change} for i, change in enumerate(changes))
    return path


def test_egoclips_narrations_have_their_time_text_and_tags_and_an_id_that_other_lists_share(tmp_path):
    path = write(tmp_path / "egoclip.csv", CLIP, {}, {"narration_time": 7, "tag_verb": "[]", "tag_noun": ""})
    first, second = egoclip.read(path, VERBS, NOUNS)
    assert (first.video_uid, first.source, first.time_s) == ("v", "narration_pass_1", 3.3445)
    assert (first.text, first.label) == ("#C C picks a bag of clothes", records.UNKNOWN)
    assert (first.verb_tags, first.noun_tags) == ((0,), (2, 1, 0))
    assert (second.verb_tags, second.noun_tags, second.time_s) == ((), (), 7.0)
    sounds = ego4dsounds.read(write(tmp_path / "sounds.csv", SOUND, {}), VERBS, NOUNS)
    assert [n.clip_id for n in sounds] == [first.clip_id]
    assert second.clip_id != first.clip_id


@pytest.mark.parametrize(
    ("text", "verb_tags", "noun_tags", "expected"),
    [
        ("#C C picks a bag of clothes", (), (), (0, 0)),
        ("#C C picks a bag of clothes", (0,), (2, 1, 0), (0, 0)),  # tags are unordered: the text decides which is first
        ("#C C picks a bag of clothes", (0,), (2, 1), (0, 1)),
        ("#C C picks a bag and cuts", (1,), (), (1, -1)),  # without a tag only a noun after the verb counts
        ("#C C picks a bag and cuts", (1,), (0,), (1, 0)),
        ("#C C lifts it", (0,), (2, 1), (0, 2)),  # neither is in the text
        ("#C C lifts it", (), (2,), (-1, 2)),
        ("#C C stirs a bag", (0, 2), (), (2, 0)),
        ("", (1,), (2,), (1, 2)),
    ],
)
def test_verb_and_noun_come_from_the_tags_where_there_are_any_and_else_from_the_text(text, verb_tags, noun_tags, expected):
    assert narrations.find_verb_and_noun(text, VERBS, NOUNS, verb_tags, noun_tags) == expected


def test_training_takes_egoclips_wearer_and_counts_what_it_leaves_out(tmp_path):
    path = write(
        tmp_path / "egoclip.csv", CLIP, {}, {"clip_text": "#O man X walks"}, {"clip_text": "#unsure"}, {"narration_time": ""},
        {"narration_time": "nan"}, {"clip_text": ""}, {"video_uid": ""}, {"video_uid": "../v"}, {"video_uid": "/etc/v"},
        {"video_uid": "v\0"}, {"narration_source": "narration_pass_2"}, {"narration_time": 9.0},
    )  # fmt: skip
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, "12\tv\t1.0\n", lines[1].rstrip("\r\n") + "\tone more\r\n"]), newline="")
    chosen, rejects = narrated.choose(egoclip.read(path, VERBS, NOUNS), [], dict.fromkeys(("v", ""), "train"))
    assert [n.time_s for n in chosen["train"]] == [3.3445, 9.0]
    assert collections.Counter(r.reason for r in rejects) == {
        "somebody else's action": 1, "narrator is unsure": 1, "narration has no time": 2, "narration has no text": 1,
        "narration names no video": 1, "video name points outside the folder": 2, "video name can't be a file name": 1,
        "same narration twice": 1, "row does not have one value per column": 2,
    }  # fmt: skip
    assert len({r.clip_id for r in rejects}) == len(rejects)
    assert "row_14_no_time" in {r.clip_id.rpartition("_")[0] for r in rejects}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"narration_time": "soon"}, "row 3: narration_time must be seconds, got 'soon'"),
        ({"narration_time": "1_000"}, "row 3: narration_time must be seconds, got '1_000'"),  # a number only for Python
        ({"narration_time": "\uff19"}, "row 3: narration_time must be seconds, got '\uff19'"),
        ({"tag_verb": "[3]"}, "row 3: tag_verb has the id 3, but the taxonomy has only 3 labels: use the taxonomy"),
        ({"tag_noun": "[0, 17]"}, "row 3: tag_noun has the id 17"),
        ({"tag_noun": "[-1]"}, r"row 3: tag_noun must be a list of ids such as \[93\], got '\[-1\]'"),
        ({"tag_verb": "['take']"}, "row 3: tag_verb must be a list of ids"),
        ({"tag_verb": "0"}, "row 3: tag_verb must be a list of ids"),
        ({"tag_verb": "[1 2]"}, "row 3: tag_verb must be a list of ids"),
        ({"tag_verb": "[1,]"}, "row 3: tag_verb must be a list of ids"),
        ({"tag_verb": "__import__('os').abort()"}, "row 3: tag_verb must be a list of ids"),
        ({"tag_verb": "[" + " " * 50_000}, "row 3: tag_verb must be a list of ids"),
        ({"tag_verb": "[" + "9" * 5_000 + "]"}, "row 3: tag_verb must be a list of ids"),
    ],
)
@pytest.mark.parametrize("source", [egoclip, ego4dsounds])
def test_a_value_that_is_wrong_is_named_with_its_row(tmp_path, change, words, source):
    path = write(tmp_path / "list.csv", CLIP if source is egoclip else SOUND, {}, change, {})
    with pytest.raises(ValueError, match=words) as error:
        source.read(path, VERBS, NOUNS)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 250


def test_missing_or_repeated_columns_and_loose_quotation_marks_are_reported(tmp_path):
    path = tmp_path / "list.csv"
    for content, words in (
        ("", "lacks the column.s. clip_text, narration_ind, .*it has none"),
        ("video_uid,clip_text\nv,t\n", r"it has 'video_uid,clip_text': separate the values by '\\t' instead of ','"),
        ("\t".join([*CLIP, "clip_text"]) + "\n", "has the column 'clip_text' more than once"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            egoclip.read(path, VERBS, NOUNS)
    # Inside a text a quotation mark has no meaning; at its beginning it would swallow the rows that follow.
    write(path, CLIP, {}, {"narration_time": 5})
    content = path.read_text()
    path.write_text(content.replace("picks a", 'picks "a'))
    assert [n.text for n in egoclip.read(path, VERBS, NOUNS)] == ['#C C picks "a bag of clothes'] * 2
    path.write_text(content.replace("#C C", '"#C C', 1))
    with pytest.raises(ValueError, match="row 3: a value runs over several rows: a quotation mark before it is not closed"):
        egoclip.read(path, VERBS, NOUNS)


def test_a_list_of_ego4dsounds_is_taken_whole_with_the_label_it_gives(tmp_path):
    path = write(
        tmp_path / "sounds.csv", SOUND, {}, {"clip_text": "#O man X walks", "positive": "0.0"},
        {"clip_text": "walks", "positive": ""}, {"clip_text": "#unsure", "positive": 1},
    )  # fmt: skip
    rows = ego4dsounds.read(path, VERBS, NOUNS)
    assert [n.label for n in rows] == [1, 0, -1, 1]
    chosen, rejects = narrated.choose([], rows, {"v": "test"})
    assert [(n.text, n.label) for n in chosen["test"]] == [(n.text, n.label) for n in rows]
    assert rejects == []


@pytest.mark.parametrize("value", ["2", "0.5", "yes", "-1", "nan", "inf", "True", "0_1", "\uff11"])
def test_a_label_that_is_neither_1_nor_0_nor_empty_is_refused(tmp_path, value):
    words = f"row 3: positive must be 1, 0 or empty, got '{value}'"
    with pytest.raises(ValueError, match=words):
        ego4dsounds.read(write(tmp_path / "a.csv", SOUND, {}, {"positive": value}), VERBS, NOUNS)
    base = {"video_uid": "v", "annotation_uid": "a", "narration_pass": "p", "timestamp_sec": 1, "narration_text": "t"}
    base |= {"narration_ind": 0, "positive": 1}
    with pytest.raises(ValueError, match=words):
        sounding_labels.read(write(tmp_path / "b.csv", base, {}, {"positive": value}, delimiter=","))


def test_sounding_labels_may_say_positive_in_place_of_votes_but_not_beside_them(tmp_path):
    base = {"video_uid": "v", "annotation_uid": "a", "narration_pass": "p", "timestamp_sec": 1, "narration_text": "t"}
    base["narration_ind"] = 0
    rows = [{"positive": value} for value in ("1", "1.0", "0", "0.0", "")]
    path = write(tmp_path / "labels.csv", base | {"positive": 1}, *rows, delimiter=",")
    assert [n.label for n in sounding_labels.read(path)] == [1, 1, 0, 0, -1]
    for more in ({}, {"positive": 1, "vote_1": 1}):
        path = write(tmp_path / "labels.csv", base | more, {}, delimiter=",")
        with pytest.raises(ValueError, match="row 2: there must be either votes .* or a column positive, not both"):
            sounding_labels.read(path)


@pytest.mark.slow  # 11,449 rows
@pytest.mark.skipif(not REAL.is_file(), reason=f"no file {REAL}")
def test_the_11449_real_rows_of_ego4dsounds_all_become_labelled_narrations_of_481_videos():
    rows = ego4dsounds.read(REAL, NONE, NONE)
    assert len(rows) == len({n.clip_id for n in rows}) == 11_449
    assert {n.label for n in rows} == {1}
    assert {(n.verb_tags, n.noun_tags) for n in rows} == {((), ())}
    assert sum(not n.text.startswith("#C") for n in rows) == 809
    uids = {n.video_uid for n in rows}
    assert len(uids) == 481
    for clean in (False, True):
        chosen, rejects = narrated.choose([], rows, dict.fromkeys(uids, "test"), clean_text=clean)
        assert ([len(lines) for lines in chosen.values()], rejects) == ([0, 0, 11_449], [])
    chosen, rejects = narrated.choose([], rows, {})
    assert ([len(lines) for lines in chosen.values()], rejects) == ([0, 1_059, 10_390], [])
    # As training narrations, only those of the wearer would be kept.
    chosen, rejects = narrated.choose(egoclip.read(REAL, NONE, NONE), [], dict.fromkeys(uids, "train"))
    assert len(chosen["train"]) == 10_563
    counts = collections.Counter(r.reason for r in rejects)
    assert counts == {"somebody else's action": 473, "narrator is unsure": 397, "no tag says who acts": 16}
    assert collections.Counter(n.text == narrations.clean(n.text) for n in rows)[True] < 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#C C stirs  the\tpot ", "stirs the pot"),
        ("# c C stirs", "stirs"),
        ("3C C stirs", "stirs"),
        ("#O man X stirs", "man X stirs"),
        ("#O a man picks a cup", "a man picks a cup"),  # an article is no tag
        ("#O A waves", "A waves"),
        ("#C a cup falls", "a cup falls"),
        ("#unsure C picks", "picks"),
        ("#unsure", ""),
        ("#C C", ""),
        ("#C C picks the #unsure glass", "picks the glass"),
        ("C stirs", "C stirs"),
        ("stirs #2 of the pots", "stirs #2 of the pots"),
        ("Stirs, and pours.", "Stirs, and pours."),
    ],
)
def test_cleaning_takes_off_tags_and_spare_white_space_and_nothing_else(text, expected):
    assert narrations.clean(text) == expected


def test_texts_stay_raw_unless_asked_and_what_cleaning_leaves_empty_is_counted(tmp_path):
    lines = [narrations.Narration("v", str(i), "p", i, t) for i, t in enumerate(("#C C  stirs", "#C C", "#O man X cuts"))]

    def choose(clean_text: bool) -> tuple[dict[str, str], list[str]]:
        """Returns (clip id → text that the clip would have, reasons of the others)."""
        chosen, rejects = narrated.choose(lines, [], {"v": "train"}, clean_text=clean_text)
        [task] = narrated.plan_tasks(chosen, VERBS, NOUNS, 1, tmp_path, clean_text=clean_text)
        [item] = task.items
        return {line["clip_id"]: line["text"] for line in item["narrations"]}, [r.reason for r in rejects]

    ids = [line.clip_id for line in lines]
    assert choose(False) == ({ids[0]: "#C C  stirs", ids[1]: "#C C"}, ["somebody else's action"])
    # Tags are read before they are removed, so nobody else's action gets in. Cleaning does not change a clip's id.
    assert choose(True) == ({ids[0]: "stirs"}, ["narration has no text", "somebody else's action"])


def test_one_video_time_and_text_count_once_whoever_wrote_them_and_the_label_list_comes_first():
    def line(annotation, time_s=1.0, text="#C C stirs", label=-1):
        return narrations.Narration("v", annotation, "p", time_s, text, label)

    found = [line("a"), line("b"), line("c", text="#C C cuts"), line("d", 1.000001)]
    chosen, rejects = narrated.choose(found, [], {"v": "train"})
    assert [n.annotation_uid for n in chosen["train"]] == ["a", "c", "d"]
    assert [(r.clip_id[2:3], r.reason) for r in rejects] == [("b", "same narration twice")]
    chosen, rejects = narrated.choose(found, [line("e", label=1)], {"v": "train"})
    assert [n.annotation_uid for n in chosen["train"]] == ["e", "c", "d"]
    assert [(r.clip_id[2:3], r.reason) for r in rejects] == [(name, "is also in the label list") for name in "ab"]
    # Texts that become equal only by cleaning are no doubles, as their tags differ in meaning.
    found = [line("a"), line("b", text="#O C stirs"), line("c", text="stirs")]
    chosen, rejects = narrated.choose(found, [], {"v": "train"}, clean_text=True)
    assert [n.annotation_uid for n in chosen["train"]] == ["a"]
    assert [r.reason for r in rejects] == ["somebody else's action", "no tag says who acts"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_redacted_narrations_of_version_2_are_one_list_a_video(tmp_path, wrapped):
    videos = {
        "v2": {
            "narrations": [
                {"time": 7.0, "text": "#C C cuts", "_clip_time_start": 6.0, "annotator": 1},
                {"time": 7.0, "text": "#C C stirs"},
                {"time": 2.5, "text": "#O man X walks", "annotation_uid": "a1"},
                {"time": None, "text": None},
            ],
            "summaries": [{"start_time": 0, "end_time": 9, "text": "#summary C cooks"}],
        },
        "v1": {"status": "redacted"},
        "v0": None,
    }
    path = tmp_path / "all_narrations_redacted.json"
    path.write_text(json.dumps({"videos": videos, "version": "2"} if wrapped else videos))
    found = narration_json.read(path)
    assert [n.time_s for n in found[:3]] == [2.5, 7.0, 7.0]
    assert math.isnan(found[3].time_s)
    assert {(n.video_uid, n.source) for n in found} == {("v2", "narrations")}
    assert (found[0].text, found[0].annotation_uid) == ("#O man X walks", "a1")
    assert {n.text for n in found[1:3]} == {"#C C cuts", "#C C stirs"}
    assert len({n.clip_id for n in found}) == 4  # two at the same moment differ
    chosen, rejects = narrated.choose(found, [], {"v2": "train"})
    assert len(chosen["train"]) == 2
    assert sorted(r.reason for r in rejects) == ["narration has no text", "somebody else's action"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"0": {}}, "video v: narrations must be a list"),
        (["text"], "video v, row 1 must be an object, got 'text'"),
        ([{}, {"time": "soon", "text": "t"}], "video v, row 2: time must be seconds, got 'soon'"),
        ([{"time": 1.0, "text": 5}], "video v, row 1: text must be text, got 5"),
    ],
)
def test_redacted_narrations_of_another_shape_are_named(tmp_path, lines, words):
    path = tmp_path / "all_narrations_redacted.json"
    path.write_text(json.dumps({"videos": {"v": {"narrations": lines}}}))
    with pytest.raises(ValueError, match=words):
        narration_json.read(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """An Ego4D folder of two videos, with taxonomies and metadata but without narrations."""
    folder = tmp_path_factory.mktemp("ego4d")
    (folder / "v2" / "annotations").mkdir(parents=True)
    (folder / "v2" / "video_540ss").mkdir()
    (folder / "ego4d.json").write_text('{"videos": []}')
    for uid in ("v", "w"):
        test_media.write(folder / "v2" / "video_540ss" / f"{uid}.mp4", seconds=6.0)
    for kind, taxonomy in (("verb", VERBS), ("noun", NOUNS)):
        groups = collections.defaultdict(list)
        for form, i in taxonomy.forms.items():
            groups[taxonomy.labels[i]].append("_".join(form))
        with (folder / "v2" / "annotations" / f"narration_{kind}_taxonomy.csv").open("w", newline="") as f:
            csv.writer(f).writerows([("label", "group"), *groups.items()])
    return folder


def convert(root: pathlib.Path, out: pathlib.Path, *args) -> dict[str, list[records.Clip]]:
    """Returns split → the clips that the command makes."""
    ego4d.main(["--root", str(root), "--out", str(out), "--num_workers", "1", "--num_shards", "2", *map(str, args)])
    return Converted(root, out).splits


def test_egoclip_and_ego4dsounds_become_clips_training_from_one_test_from_the_other(root, tmp_path, capsys):
    narrated = write(
        tmp_path / "egoclip.csv", CLIP, {"narration_time": 2.0}, {"narration_time": 3.0, "clip_text": "#O man X walks"},
        {"video_uid": "w", "narration_time": 2.0, "narration_ind": 0}, {"video_uid": "w", "narration_time": 4.0},
    )  # fmt: skip
    labels = write(
        tmp_path / "sounds.csv", SOUND, {"video_uid": "w", "narration_time": 2.0},
        {"video_uid": "w", "narration_time": 2.5, "clip_text": "#O man X cuts the bag", "positive": 0.0},
    )  # fmt: skip
    splits = tmp_path / "splits.csv"
    splits.write_text("video_uid,split\nv,train\n")
    args = ("--labels", labels, "--labels_split", "test", "--splits", splits)
    clips = convert(root, tmp_path / "out", "--narrations", narrated, *args)
    assert [(c.video_uid, c.time_us, c.label, c.verb_id, c.noun_id) for c in clips["train"]] == [("v", 2_000_000, -1, 0, 0)]
    assert [(c.time_us, c.label, c.verb_id, c.noun_id) for c in clips["test"]] == [
        (2_000_000, 1, 0, 0), (2_500_000, 0, 1, 0),
    ]  # fmt: skip
    assert {c.video_uid for c in clips["test"]} == {"w"}
    assert test_media.number_in(clips["test"][0].frames[2]) == 50  # 2 s less 0.5 s, and the middle of the first interval
    told = capsys.readouterr().out
    assert told.startswith("6 annotations: 1 train, 0 validation, 2 test\n")  # rows of both files
    assert "rejected 3 (rejected.jsonl): 1 somebody else's action, 1 is also in the label list, 1 no label, " in told
    clips = convert(root, tmp_path / "only", "--labels_only", *args, "--clean_text")
    assert [c.narration for c in clips["test"]] == ["picks a bag of clothes", "man X cuts the bag"]
    assert clips["train"] == []
    clips = convert(root, tmp_path / "held_out", "--narrations", narrated, "--labels", labels, "--labels_split",
                    "validation+test")  # fmt: skip
    assert {c.video_uid for c in clips[narrations.held_out_by_hash("w")]} == {"w"}
    assert [c.video_uid for c in clips["train"]] == ["v"]  # whatever its hash is
    clips = convert(root, tmp_path / "train", "--labels_only", "--labels", labels, "--labels_split", "train")
    assert [(c.narration, c.label) for c in clips["train"]] == [("#C C picks a bag of clothes", 1)]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--labels_only"], "--labels_only and --labels_split need a label list: name one by --labels"),
        (["--labels_split", "test"], "need a label list"),
        (["--labels", "LABELS", "--labels_only", "--narrations", "x.csv"], "--labels_only reads no narrations"),
        (["--narrations", "absent.csv"], "no file absent.csv"),
        (["--narrations", "LABELS", "--labels", "absent.csv"], "no file absent.csv"),
    ],
)
def test_options_that_contradict_each_other_or_files_that_lack_are_one_line(root, tmp_path, capsys, args, words):
    labels = write(tmp_path / "sounds.csv", SOUND, {})
    with pytest.raises(SystemExit) as ended:
        convert(root, tmp_path / "out", *(labels if arg == "LABELS" else arg for arg in args))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert words in err
