"""Annotation files: those in Ego4D's layout are read whole; anything else is one line with file, row and value."""

import collections
import csv
import json
import math
import pathlib

import pytest

from data_prep import narrated, narrations
from data_prep.soundworld import taxonomy as soundworld
from data_prep.sources import narration_json, sounding_labels
from mc3_jax.data import records

REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "ego4dsounds" / "test_clips_11k.csv"


def line(time_s, text="#C C stirs", uid="a1"):
    return {"timestamp_sec": time_s, "timestamp_frame": 0, "narration_text": text, "annotation_uid": uid}


def write_json(tmp_path, content) -> pathlib.Path:
    path = tmp_path / "narration.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_csv(tmp_path, *rows, name="file.csv") -> pathlib.Path:
    path = tmp_path / name
    with path.open("w", newline="") as f:
        csv.writer(f).writerows(rows)
    return path


def passes(*lines, number=1):
    return {f"narration_pass_{number}": {"narrations": list(lines), "summaries": []}}


@pytest.mark.parametrize("wrapped", [False, True])
def test_both_passes_are_read_in_order_of_video_and_time(tmp_path, wrapped):
    videos = {
        "v2": passes(line(7.0), line(2.0, "#O man X walks")),
        "v1": passes(line(5.0, uid="a2"), number=2) | passes(line(5.0), line(9)),
        "v3": {"status": "redacted"},
        "v4": {"narration_pass_1": None, "narration_pass_2": {"narrations": None}},
        "v5": {"narration_pass_1": {"narrations": []}, "narration_pass_2": {}},
    }
    found = narration_json.read(write_json(tmp_path, {"videos": videos, "version": "1"} if wrapped else videos))
    assert [(n.video_uid, n.time_s, n.source, n.annotation_uid) for n in found] == [
        ("v1", 5.0, "narration_pass_1", "a1"),
        ("v1", 5.0, "narration_pass_2", "a2"),
        ("v1", 9.0, "narration_pass_1", "a1"),
        ("v2", 2.0, "narration_pass_1", "a1"),
        ("v2", 7.0, "narration_pass_1", "a1"),
    ]
    assert found[3].text == "#O man X walks"
    assert {n.label for n in found} == {records.UNKNOWN}


def test_a_third_pass_is_read_too_and_summaries_are_not(tmp_path):
    video = passes(line(1.0)) | passes(line(2.0), number=3) | {"narration_pass_x": {"narrations": [line(3.0)]}}
    found = narration_json.read(write_json(tmp_path, {"v": video}))
    assert [(n.source, n.time_s) for n in found] == [("narration_pass_1", 1.0), ("narration_pass_3", 2.0)]
    with pytest.raises(ValueError, match="video v, narration_pass_3 must be an object, got 5"):
        narration_json.read(write_json(tmp_path, {"v": {"narration_pass_3": 5}}))


def test_ids_differ_though_one_annotation_uid_covers_a_pass():
    lines = [narrations.Narration("v", "a", "narration_pass_1", t, "x") for t in (1.0, 1.000001, 100.0)]
    assert len({n.clip_id for n in lines}) == 3
    assert [n.clip_id for n in lines] == sorted(n.clip_id for n in lines)


@pytest.mark.parametrize("time_s", ["null", "NaN", "Infinity", "-Infinity", "1e999"])
def test_a_narration_without_time_or_text_is_kept_and_ends_with_its_reason(tmp_path, time_s):
    content = json.dumps({"v": passes(line("TIME"), line(3.0, None), line(4.0, "  "), line(5.0))})
    path = write_json(tmp_path, content.replace('"TIME"', time_s))
    found = narration_json.read(path)
    assert [n.time_s for n in found[:3]] == [3.0, 4.0, 5.0]  # without a time it comes last, the others are in order
    assert math.isnan(found[3].time_s)
    chosen, rejects = narrated.choose(found, [], {"v": "train"})
    assert [n.time_s for n in chosen["train"]] == [5.0]
    counts = collections.Counter(r.reason for r in rejects)
    assert counts == {"narration has no time": 1, "narration has no text": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", r"object of videos, got \[\]"),
        ("3", "object of videos, got 3"),
        ("null", "object of videos, got None"),
        ({"videos": [{"video_uid": "v"}]}, r"object of videos, got \[\{'video_uid'"),
        ({"videos": "v"}, "object of videos, got 'v'"),
        ({"v": "text"}, "video v must be an object, got 'text'"),
        ({"v": [1]}, r"video v must be an object, got \[1\]"),
        ({"v": {"narration_pass_1": [line(1.0)]}}, "video v, narration_pass_1 must be an object"),
        ({"v": {"narration_pass_2": "none"}}, "video v, narration_pass_2 must be an object, got 'none'"),
        ({"v": {"narration_pass_1": {"narrations": {"0": line(1.0)}}}}, "pass_1: narrations must be a list"),
        ({"v": {"narration_pass_1": {"narrations": 7}}}, "narrations must be a list, got 7"),
        ({"v": passes(line(1.0), "text")}, "video v, narration_pass_1, row 2 must be an object, got 'text'"),
        ({"v": passes(None)}, "row 1 must be an object, got None"),
        ({"v": passes(line("soon"))}, "row 1: timestamp_sec must be seconds, got 'soon'"),
        ({"v": passes(line([1.0]))}, r"timestamp_sec must be seconds, got \[1.0\]"),
        ({"v": passes(line({}))}, r"timestamp_sec must be seconds, got \{\}"),
        ({"v": passes(line(True))}, "timestamp_sec must be seconds, got True"),
        ({"v": passes(line(10**400))}, "timestamp_sec must be seconds, got 1000"),
        ({"v": passes(line(1.0, 5))}, "narration_text must be text, got 5"),
        ({"v": passes(line(1.0, ["#C C stirs"]))}, "narration_text must be text, got"),
        ({"v": passes(line(1.0, uid=["a"]))}, r"annotation_uid must be text, got \['a'\]"),
        ({"v": passes(line(1.0, uid=False))}, "annotation_uid must be text, got False"),
    ],
)
def test_json_of_another_shape_is_one_line_that_names_file_row_and_value(tmp_path, content, words):
    path = write_json(tmp_path, content)
    with pytest.raises(ValueError, match=words) as error:
        narration_json.read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < len(str(path)) + 250


def test_bytes_that_are_no_text_are_named_too(tmp_path):
    for name, read in (
        ("narration.json", narration_json.read),
        ("labels.csv", sounding_labels.read),
        ("splits.csv", narrations.read_splits),
        ("taxonomy.csv", narrations.read_taxonomy),
    ):
        (tmp_path / name).write_bytes(b"video_uid,split\nv,\xff\xfe\n")
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
        with pytest.raises(ValueError, match="no file .*absent"):
            read(tmp_path / "absent")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_bytes_that_are_no_text_are_named_with_the_row_they_stand_in_however_far_down(tmp_path, newline):
    path, rows = tmp_path / "splits.csv", ["video_uid,split", *(f"v{i},train" for i in range(5000))]
    content = [row.encode() for row in rows]
    content[3210] = "é,train".encode("latin-1")
    path.write_bytes(newline.encode().join(content))
    with pytest.raises(ValueError, match=r"splits.csv, row 3211 can't be read: byte 0xe9 is not UTF-8"):
        narrations.read_splits(path)


@pytest.mark.parametrize(
    "content",
    [
        '{"v": {"narration_pass_1": {"narrations": []}}, "v": {}}',
        '{"videos": {"a": {"v": 1, "v": 1}}}',
        r'{"v": {}, "\u0076": {}}',
    ],
)
def test_an_object_with_a_key_twice_is_refused_as_one_of_its_values_would_be_lost(tmp_path, content):
    with pytest.raises(ValueError, match="narration.json names 'v' twice in one object"):
        narration_json.read(write_json(tmp_path, content))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#C C stirs the pot", "wearer"),
        ("#c C stirs", "wearer"),
        ("#C c stirs", "wearer"),
        ("#c c stirs", "wearer"),
        ("# C C stirs", "wearer"),
        ("#C  C stirs", "wearer"),
        ("  #C C stirs", "wearer"),
        ("#CC stirs", "wearer"),
        ("#C stirs", "wearer"),
        ("C C stirs", "wearer"),
        ("3C C stirs", "wearer"),
        ("@C C stirs", "wearer"),
        ("#O man X stirs", "other"),
        ("#o woman Y stirs", "other"),
        ("# O person A stirs", "other"),
        ("#OO stirs", "other"),
        ("#unsure", "unsure"),
        ("#Unsure something falls", "unsure"),
        ("#C C stirs the #unsure", "unsure"),
        ("#C C stirs # unsure", "unsure"),
        ("#C C stirs #unsre", "unsure"),
        ("#O man X #unsure", "unsure"),
        ("stirs the pot", "unknown"),
        ("#Carl stirs", "unknown"),
        ("#Other stirs", "unknown"),
        ("cc stirs", "unknown"),
        ("", "unknown"),
    ],
)
def test_tags_say_whose_action_it_is_slips_of_the_pen_included(text, expected):
    assert narrations.who(text) == expected


@pytest.mark.skipif(not REAL.is_file(), reason=f"no file {REAL}")
def test_of_11449_real_narrations_809_do_not_start_with_the_wearers_tag_and_most_of_those_are_told_apart():
    with REAL.open(newline="", encoding="utf-8") as f:
        texts = [row["clip_text"] for row in csv.DictReader(f, delimiter="\t")]
    plain = [text for text in texts if text.startswith("#C")]
    rest = [text for text in texts if not text.startswith("#C")]
    assert (len(texts), len(rest)) == (11_449, 809)
    counts = collections.Counter(map(narrations.who, plain))
    assert counts == {"wearer": 10_274, "unsure": 366}
    counts = collections.Counter(map(narrations.who, rest))
    # 289 are slips such as "#c c", "# C c" and "3C C"; 16 have an unknown tag, most of them "#Person X".
    assert counts == {"wearer": 289, "other": 473, "unsure": 31, "unknown": 16}
    leading = collections.Counter(narrations.words_of(t)[0] for t in texts if narrations.who(t) == "wearer")
    assert leading["c"] < 5  # the tag is removed
    assert leading.most_common(1)[0][0] in ("picks", "puts", "drops", "moves", "places")


def taxonomy(**groups) -> narrations.Taxonomy:
    forms = {}
    for i, group in enumerate(groups.values()):
        forms |= {tuple(form.split("_")): i for form in group}
    return narrations.Taxonomy(list(groups), forms)


VERBS = taxonomy(
    take=["take", "pick", "pick_up"], turn_on=["turn_on"], cut=["cut", "chop", "slice"], carry=["carry"],
    turn=["turn", "rotate"], put=["put"], wash=["wash"],
)  # fmt: skip
NOUNS = taxonomy(
    board=["board"], cutting_board=["cutting_board", "chopping_board"], carrot=["carrot"], knife=["knife"],
    glass=["glass"], berry=["berry"], tap=["tap", "water_tap"],
)  # fmt: skip
# Verbs whose stems differ only by an "e" but mean different things.
VERBS_E = taxonomy(
    tap=["tap"], tape=["tape"], plan=["plan"], plane=["plane"], scrap=["scrap"], scrape=["scrape"], add=["add", "ad"],
    pick=["pick"],
)  # fmt: skip
NOUNS_E = taxonomy(
    tap=["tap"], tape=["tape"], tub=["tub"], tube=["tube"], can=["can"], cane=["cane"], glass=["glass"], box=["box"],
    knife=["knife"], shoe=["shoe"], stove=["stove"], potato=["potato"], cookie=["cookie"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "verb", "noun"),
    [
        ("#C C picks the carrot", "take", "carrot"),
        ("#C C picks up a carrot", "take", "carrot"),
        ("#C C turns on the water tap", "turn_on", "tap"),  # its first word alone means something else
        ("#C C turns the tap", "turn", "tap"),
        ("#C C Cuts the Carrots with a knife", "cut", "carrot"),  # the first noun after the verb
        ("#C C washes the glasses", "wash", "glass"),
        ("#C C slices berries", "cut", "berry"),
        ("#C C is slicing a carrot", "cut", "carrot"),
        ("#C C chopping carrots", "cut", "carrot"),
        ("#C C sliced the carrot", "cut", "carrot"),
        ("#C C chopped the carrot", "cut", "carrot"),
        ("#C C carries the knives", "carry", "knife"),
        ("#C C carried the knives", "carry", "knife"),
        ("#C C puts the cutting board on the board", "put", "cutting_board"),  # the longest form that begins there
        ("#C C washes the cutting boards", "wash", "cutting_board"),
        ("#C C with the knife cuts the carrot", "cut", "carrot"),
        ("#C C cuts", "cut", None),
        ("#C C the knife", None, "knife"),  # without a verb, any noun
        ("#C C looks around", None, None),
        ("#C C", None, None),
        ("", None, None),
        ("#O man X picks the glass", "take", "glass"),
        ("#unsure C picks the glass", "take", "glass"),
        ("#C C picks the #unsure glass", "take", "glass"),
        ("3C C picks the glass", "take", "glass"),
        ("picks the glass.", "take", "glass"),
    ],
)
def test_verb_and_noun_are_found_by_their_surface_forms(text, verb, noun):
    expected = (VERBS.labels.index(verb) if verb else -1, NOUNS.labels.index(noun) if noun else -1)
    assert narrations.find_verb_and_noun(text, VERBS, NOUNS) == expected


@pytest.mark.parametrize(
    ("text", "verb", "noun"),
    [
        ("#C C picks the tapes", "pick", "tape"),
        ("#C C picks the taps", "pick", "tap"),
        ("#C C picks two tubes", "pick", "tube"),
        ("#C C picks two tubs", "pick", "tub"),
        ("#C C picks canes", "pick", "cane"),
        ("#C C picks cans", "pick", "can"),
        ("#C C picks glasses", "pick", "glass"),
        ("#C C picks knives", "pick", "knife"),
        ("#C C picks shoes", "pick", "shoe"),
        ("#C C picks stoves", "pick", "stove"),
        ("#C C picks potatoes", "pick", "potato"),
        ("#C C picks cookies", "pick", "cookie"),
        ("#C C tapes the boxes", "tape", "box"),
        ("#C C is taping the box", "tape", "box"),
        ("#C C taped the box", "tape", "box"),
        ("#C C taps the box", "tap", "box"),
        ("#C C tapping the box", "tap", "box"),
        ("#C C tapped the box", "tap", "box"),
        ("#C C planing", "plane", None),
        ("#C C planed", "plane", None),
        ("#C C planning", "plan", None),
        ("#C C scraped", "scrape", None),
        ("#C C scrapped", "scrap", None),
        ("#C C picking", "pick", None),
        ("#C C adding", "add", None),
    ],
)
def test_of_stems_that_differ_by_an_e_the_one_is_found_that_the_form_comes_from(text, verb, noun):
    expected = (VERBS_E.labels.index(verb), NOUNS_E.labels.index(noun) if noun else -1)
    assert narrations.find_verb_and_noun(text, VERBS_E, NOUNS_E) == expected


def test_every_form_of_soundworld_is_found_alone_and_inflected():
    verbs, nouns = (
        narrations.Taxonomy(
            [e.name for e in entries], {(form,): i for i, e in enumerate(entries) for form in (e.name, *e.forms)}
        )
        for entries in (soundworld.VERBS, soundworld.NOUNS)
    )
    for v, verb in enumerate(soundworld.VERBS):
        for n, noun in enumerate(soundworld.NOUNS):
            for text in (f"#C C {verb.forms[0]} the {noun.forms[1]}", f"#c C {verb.forms[1]} a {noun.forms[0]}s"):
                assert narrations.find_verb_and_noun(text, verbs, nouns) == (v, n), text


def test_a_taxonomy_is_read_with_its_labels_in_order_and_the_first_of_two_meanings(tmp_path):
    path = write_csv(
        tmp_path, ["label", "group"], ["take_(pick,_grab)", "['take', 'Pick_up', 'grab']"], ["hold", "['hold', 'grab']"],
        ["none", "[]"],
    )  # fmt: skip
    found = narrations.read_taxonomy(path)
    assert found.labels == ["take_(pick,_grab)", "hold", "none"]
    assert found.forms == {("take",): 0, ("pick", "up"): 0, ("grab",): 0, ("hold",): 1}
    assert narrations.Taxonomy([], {}).find(["take"]) == (-1, 0)


@pytest.mark.parametrize(
    "group",
    [
        "take",
        "'take'",
        "3",
        "None",
        "{'take': 1}",
        "[1]",
        "['a', None]",
        "[",
        "__import__('os')",
        "(" * 300,
        "-'a'",
        "",
    ],
)
def test_a_group_that_is_no_list_of_forms_is_named_with_its_row(tmp_path, group):
    path = write_csv(tmp_path, ["label", "group"], ["hold", "['hold']"], ["take", group])
    with pytest.raises(ValueError, match="row 3: group .* is not a list of forms") as error:
        narrations.read_taxonomy(path)
    assert str(path) in str(error.value)
    assert repr(group[:60]) in str(error.value)


LABEL_COLUMNS = ["video_uid", "annotation_uid", "narration_pass", "timestamp_sec", "narration_text", "vote_1"]
LABEL_COLUMNS += ["vote_2", "vote_3"]


def label_row(*votes, time_s="1.5", text="#C C stirs, and more"):
    return ["v", "a", "narration_pass_1", time_s, text, *votes]


def test_labels_are_the_majority_of_the_votes(tmp_path):
    votes = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    path = write_csv(tmp_path, LABEL_COLUMNS, *(label_row(*v, time_s=i) for i, v in enumerate(votes)))
    found = sounding_labels.read(path)
    assert [n.label for n in found] == [int(sum(v) >= 2) for v in votes]
    assert [n.time_s for n in found] == list(range(8))
    assert found[0].text == "#C C stirs, and more"
    assert (found[0].video_uid, found[0].annotation_uid, found[0].source) == ("v", "a", "narration_pass_1")


def test_one_vote_is_enough_and_a_spreadsheets_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = write_csv(tmp_path, LABEL_COLUMNS[:6], label_row(1))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [n.label for n in sounding_labels.read(path)] == [1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (label_row(1, 2, 1), r"row 3: votes \['1', '2', '1'\] have no majority"),
        (label_row(1, "", 0), r"row 3: votes \['1', '', '0'\]"),
        (label_row("yes", "no", "no"), r"row 3: votes \['yes', 'no', 'no'\]"),
        (label_row(1, 0.5, 1), "row 3: votes"),
        (label_row(1, 1, 1, time_s="soon"), "row 3: timestamp_sec must be seconds, got 'soon'"),
        (label_row(1, 1, 1, time_s=""), "row 3: timestamp_sec must be seconds, got ''"),
        (label_row(1, 1, 1, time_s="nan"), "row 3: timestamp_sec must be seconds, got 'nan'"),
        (label_row(1, 1, 1, time_s="inf"), "row 3: timestamp_sec must be seconds, got 'inf'"),
        (label_row(1, 1), r"row 3: it does not have one value per column: \['v', 'a'"),
        (label_row(1, 1, 1, 1), r"row 3: it does not have one value per column: \['v', 'a'"),
        (["v"], "row 3: it does not have one value per column"),
        (label_row(1, 1, 1, text="x" * 200_000), "row 3 can't be read: field larger than field limit"),
    ],
)
def test_a_label_row_that_is_wrong_is_named_with_its_number_and_value(tmp_path, row, words):
    path = write_csv(tmp_path, LABEL_COLUMNS, label_row(1, 1, 1), row, label_row(1, 1, 1))
    with pytest.raises(ValueError, match=words) as error:
        sounding_labels.read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 250


def test_an_even_vote_is_no_majority(tmp_path):
    path = write_csv(tmp_path, LABEL_COLUMNS[:7], label_row(1, 0))
    with pytest.raises(ValueError, match=r"row 2: votes \['1', '0'\] have no majority of 0 or 1"):
        sounding_labels.read(path)


def test_rows_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "splits.csv"
    path.write_text("video_uid,split\n\nv1,train\n\nv2,dev\n")
    with pytest.raises(ValueError, match="row 5: split 'dev' is not one of train, validation, test"):
        narrations.read_splits(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "lacks the column.s. split, video_uid; it has none"),
        ("video_uid\nv\n", "lacks the column.s. split; it has 'video_uid'"),
        ("video_uid;split\nv;train\n", "it has 'video_uid;split': separate the values by ',' instead of ';'"),
        ("video_uid,split\nv\n", "row 2: it does not have one value per column"),
        ("video_uid,split\nv,Train\n", "row 2: split 'Train' is not one of"),
        ("video_uid,split\nv,train\nw,test\nv,test\n", "row 4: video v is in 'test', but was in 'train' before"),
    ],
)
def test_splits_that_are_wrong_are_named(tmp_path, content, words):
    path = tmp_path / "splits.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        narrations.read_splits(path)
    assert str(path) in str(error.value)


def test_splits_are_read_and_a_video_may_stand_twice_in_one(tmp_path):
    path = write_csv(tmp_path, ["split", "video_uid"], ["train", "v1"], ["test", "v2"], ["train", "v1"])
    assert narrations.read_splits(path) == {"v1": "train", "v2": "test"}


def test_splits_by_hash_have_about_their_shares_and_never_change():
    uids = [f"video-{i}" for i in range(20_000)]
    counts = collections.Counter(map(narrations.split_by_hash, uids))
    assert set(counts) == set(records.SPLITS)
    for name, share in (("train", 0.90), ("validation", 0.02), ("test", 0.08)):
        deviation = math.sqrt(share * (1 - share) * len(uids))
        assert abs(counts[name] - share * len(uids)) < 4 * deviation, name
    assert collections.Counter(narrations.split_by_hash(u, (0.0, 0.5, 0.5)) for u in uids)["train"] == 0
    # Golden: a video must not change its split from one version to the next.
    first = {name: [u for u in uids[:100] if narrations.split_by_hash(u) == name] for name in ("validation", "test")}
    assert first == {
        "validation": ["video-69"],
        "test": ["video-13", "video-23", "video-45", "video-60", "video-70"],
    }
