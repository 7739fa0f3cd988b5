"""What Ego4D's metadata say of its videos counts: silent, redacted, stereoscopic, and recorded at the same time."""

import copy
import json
import pathlib
import shutil

import pytest
import simplejpeg

from data_prep import ego4d, narrations
from data_prep.sources import ego4d_json
from tests.data_prep import test_media
from tests.data_prep.converted import Converted

TIMES_S = (1.0, 2.5, 4.0)
PLAIN, DOUBLE = "v1", "v2"  # by their hash, one is trained on and the other tested on
VIDEO = {"video_uid": PLAIN, "video_metadata": {"audio_duration_sec": 6.0}, "is_stereo": False}
METADATA = {
    "version": "v2", "videos": [VIDEO, {**VIDEO, "video_uid": DOUBLE}],
    "concurrent_video_sets": [{"valid": True, "videos": [{"video_uid": PLAIN}]}],
}  # fmt: skip
REDACTED = "redacted by Ego4D"


def narration_of(uid: str, time_s: float) -> dict:
    return {"timestamp_sec": time_s, "narration_text": f"#C C stirs {time_s}", "annotation_uid": f"a{uid}"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """An Ego4D folder of a plain and a stereoscopic video, both with three narrations, whose metadata mark neither."""
    folder = tmp_path_factory.mktemp("ego4d")
    annotations, videos = folder / "v2" / "annotations", folder / "v2" / "video_540ss"
    annotations.mkdir(parents=True)
    videos.mkdir()
    test_media.write(videos / f"{PLAIN}.mp4", seconds=6.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_media, "picture_of", test_media.two_views)
        test_media.write(videos / f"{DOUBLE}.mp4", seconds=6.0, size=(2 * test_media.WIDTH, test_media.HEIGHT))
    for kind in ("verb", "noun"):
        (annotations / f"narration_{kind}_taxonomy.csv").write_text("label,group\nstir,['stir']\n")
    lines = {uid: {"narrations": [narration_of(uid, time_s) for time_s in TIMES_S]} for uid in (PLAIN, DOUBLE)}
    passes = {uid: {"narration_pass_1": found} for uid, found in lines.items()}
    (annotations / "narration.json").write_text(json.dumps({"videos": passes}))
    (folder / "ego4d.json").write_text(json.dumps(METADATA))
    return folder


@pytest.fixture
def folder(root, tmp_path) -> pathlib.Path:
    """A copy of `root` that a test may change."""
    return pathlib.Path(shutil.copytree(root, tmp_path / "ego4d"))


def describe(folder: pathlib.Path, **changes) -> None:
    """Writes `METADATA` with `changes` to the stereoscopic video's entry; `concurrent_video_sets` belongs to no video."""
    content = copy.deepcopy(METADATA)
    content |= {name: changes.pop(name) for name in ("concurrent_video_sets",) if name in changes}
    content["videos"][1] |= changes
    (folder / "ego4d.json").write_text(json.dumps(content))


def convert(folder: pathlib.Path, out: pathlib.Path, *args) -> Converted:
    ego4d.main(["--root", str(folder), "--out", str(out), "--num_workers", "1", "--num_shards", "2", *map(str, args)])
    return Converted(folder, out)


def plan(folder: pathlib.Path, capsys, *args) -> str:
    """Returns what a dry run prints."""
    ego4d.main(["--root", str(folder), "--out", str(folder / "out"), "--dry_run", "--num_workers", "1", *map(str, args)])
    return capsys.readouterr().out


def test_the_file_is_read_as_ego4d_writes_it(tmp_path):
    component = {"canonical_video_start_sec": 10, "canonical_video_end_sec": 20.5}
    videos = [
        VIDEO,
        {"video_uid": "b", "video_metadata": {"audio_duration_sec": None}, "is_stereo": True, "has_redacted_regions": True,
         "redacted_intervals": [{"start_sec": 0.0, "end_sec": 1.5, "start_frame": 0, "end_frame": 45}],
         "video_components": [{**component, "redacted": True}, {**component, "redacted": False}, component,
                              {"redacted": True, "canonical_video_start_sec": None}]},
        {"video_uid": "c", "is_stereo": None, "redacted_intervals": None, "video_components": None, "video_metadata": None},
    ]  # fmt: skip
    sets = [
        {"valid": valid, "videos": [{"video_uid": uid, "video_start_offset_sec": 0.0} for uid in ids]}
        for ids, valid in (("ed", True), ("dg", True), ("ba", False), ("c", True), ("gf", True), ("ih", True))
    ]  # fmt: skip
    path = tmp_path / "ego4d.json"
    path.write_text(json.dumps({"videos": videos, "concurrent_video_sets": sets}))
    found = ego4d_json.read(path)
    assert (found.silent, found.stereo) == ({"b"}, {"b"})
    assert found.redacted_s == {"b": [(0.0, 1.5), (10.0, 20.5)]}
    assert found.groups == dict.fromkeys("defg", "d") | dict.fromkeys("hi", "h")
    for start_s, stop_s, expected in (
        (1.4, 2.9, True), (1.5, 3.0, False), (8.5, 10.0, False), (9.0, 10.5, True), (12.0, 13.0, True), (9.0, 30.0, True),
        (20.5, 22.0, False), (float("nan"), float("nan"), False),
    ):  # fmt: skip
        assert found.is_redacted("b", start_s, stop_s) == expected, start_s
    assert not found.is_redacted("a", 0.0, 1.0)
    path.write_text('{"videos": []}')
    assert ego4d_json.read(path) == ego4d_json.Metadata()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "must hold a list `videos`"),
        ({"videos": {}}, "must hold a list `videos`"),
        ({"videos": [VIDEO, 3]}, "video 2 must be an object, got 3"),
        ({"videos": [{}]}, "video 1: video_uid must be text, got None"),
        ({"videos": [{**VIDEO, "video_metadata": 3}]}, "video 1: video_metadata must be an object, got 3"),
        ({"videos": [{**VIDEO, "is_stereo": "no"}]}, "video 1: is_stereo must be true or false, got 'no'"),
        ({"videos": [{**VIDEO, "redacted_intervals": {}}]}, "video 1: redacted_intervals must be a list, got {}"),
        ({"videos": [{**VIDEO, "redacted_intervals": [[1, 2]]}]}, r"redacted_intervals 1 must be an object, got \[1, 2\]"),
        (
            {"videos": [{**VIDEO, "redacted_intervals": [{"start_sec": 1, "end_sec": None}]}]},
            "video 1, redacted_intervals 1: start_sec and end_sec must be two times in this order, got 1 and None",
        ),
        (
            {"videos": [{**VIDEO, "redacted_intervals": [{"start_sec": 2, "end_sec": 1}]}]},
            "start_sec and end_sec must be two times in this order, got 2 and 1",
        ),
        (
            {"videos": [{**VIDEO, "redacted_intervals": [{"start_sec": "soon", "end_sec": 1}]}]},
            "video 1, redacted_intervals 1: start_sec must be seconds, got 'soon'",
        ),
        ({"videos": [{**VIDEO, "video_components": [{"redacted": 1}]}]}, "components 1: redacted must be true or false"),
        (
            {"videos": [{**VIDEO, "video_components": [{"redacted": True, "canonical_video_end_sec": 3}]}]},
            "video_components 1: canonical_video_start_sec and canonical_video_end_sec must be two times",
        ),
        ({"videos": [], "concurrent_video_sets": 3}, "concurrent_video_sets must be a list, got 3"),
        ({"videos": [], "concurrent_video_sets": [{"valid": 1}]}, "video_sets 1: valid must be true or false, got 1"),
        (
            {"videos": [], "concurrent_video_sets": [{"valid": True, "videos": [{}]}]},
            "concurrent_video_sets 1, videos 1: video_uid must be text, got None",
        ),
    ],
)
def test_metadata_of_another_shape_are_one_line_with_the_entry(folder, capsys, content, words):
    (folder / "ego4d.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        ego4d_json.read(folder / "ego4d.json")
    with pytest.raises(SystemExit) as ended:
        plan(folder, capsys)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {error.value}\n"


INTERVAL = {"redacted_intervals": [{"start_sec": 3.0, "end_sec": 3.4}]}
COMPONENT = {
    "video_components": [{"redacted": True, "canonical_video_start_sec": 3.0, "canonical_video_end_sec": 3.4}]
}  # fmt: skip


@pytest.mark.parametrize("changes", [INTERVAL, COMPONENT])
def test_clips_over_redacted_pictures_are_left_out_and_listed(folder, changes):
    describe(folder, **changes)
    made = convert(folder, folder / "out")
    # The windows are [0.5, 2.0], [2.0, 3.5] and [3.5, 5.0].
    assert made.reasons(DOUBLE) == {REDACTED: 1}
    assert ["_00002500000_" in row["clip_id"] for row in made.rejected] == [True]
    assert sorted(clip.time_us for clip in made.clips.values() if clip.video_uid == DOUBLE) == [1_000_000, 4_000_000]
    assert sum(clip.video_uid == PLAIN for clip in made.clips.values()) == len(TIMES_S)


def test_the_window_decides_what_is_redacted_and_a_sample_is_drawn_from_the_rest(folder, capsys):
    describe(folder, **INTERVAL)
    assert REDACTED not in plan(folder, capsys, "--window", 0.5, 0.5)
    assert f"  2 {REDACTED}\n" in plan(folder, capsys, "--window", 1.5, 1.0)
    splits = folder / "v2" / "annotations" / "splits.csv"
    splits.write_text(f"video_uid,split\n{PLAIN},test\n{DOUBLE},train\n")
    assert "clips: 5 (2 train, 0 validation, 3 test)" in plan(folder, capsys, "--max_train_clips", 3)


def test_labels_and_other_lists_of_narrations_lose_redacted_clips_too(folder, capsys):
    describe(folder, redacted_intervals=[{"start_sec": 0.0, "end_sec": 10.0}])
    columns = ["video_uid", "narration_source", "narration_ind", "narration_time", "clip_text", "tag_verb", "tag_noun"]
    rows = [[uid, "narration_pass_1", "0", "2.0", "#C C stirs", "[]", "[]"] for uid in (PLAIN, DOUBLE)]

    def table(name: str, header: list[str], rows: list[list[str]], delimiter: str) -> pathlib.Path:
        path = folder / name
        path.write_text("".join(delimiter.join(row) + "\n" for row in [header, *rows]))
        return path

    egoclip = table("egoclip.csv", columns, rows, "\t")
    sounds = table("sounds.csv", [*columns, "positive"], [[*row, "1"] for row in rows], "\t")
    header = ["video_uid", "annotation_uid", "narration_pass", "timestamp_sec", "narration_text", "positive"]
    labels = table("labels.csv", header, [[row[0], "a", "p", "2.0", row[4], "1"] for row in rows], ",")
    for options in (["--narrations", egoclip], ["--labels", sounds, "--labels_only"], ["--labels", labels, "--labels_only"]):
        told = plan(folder, capsys, *options)
        assert told.startswith("clips: 1 ("), options
        assert f"rejected so far: 1\n  1 {REDACTED}\n" in told, options


def test_of_a_stereoscopic_video_clips_show_the_left_view_and_only_its_shard_is_made_again(folder, capsys):
    both = convert(folder, folder / "out")
    assert both.info.canvas_px == (96, 384)
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*array_record*")}
    describe(folder, is_stereo=True)
    capsys.readouterr()
    left = convert(folder, folder / "out")
    assert "1 of 2 shards exist, 1 to redo (settings, videos or files changed)\n" in capsys.readouterr().out
    assert sum(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items()) == 1
    assert left.info.canvas_px == (96, 192)
    assert left.clips.keys() == both.clips.keys()
    for clip_id, clip in left.clips.items():
        assert (clip.frame_height, clip.frame_width) == (96, 192)
        number = round((clip.start_us / 1e6 + 1.5 / 8) * 30 - 0.5)  # the middle of the first interval, at 30 fps
        assert test_media.number_in(clip.frames[2]) == number, clip_id
        assert simplejpeg.decode_jpeg(clip.frames[2], colorspace="RGB")[:, 150:, 0].max() < 60  # the right view is red
    assert convert(folder, folder / "out").clips.keys() == both.clips.keys()
    assert "2 of 2 shards exist\n" in capsys.readouterr().out


def test_videos_recorded_at_the_same_time_are_in_one_split(folder, capsys):
    assert (narrations.split_by_hash(PLAIN), narrations.split_by_hash(DOUBLE)) == ("train", "test")
    assert "clips: 6 (3 train, 0 validation, 3 test)" in plan(folder, capsys)
    together = {"valid": True, "videos": [{"video_uid": DOUBLE}, {"video_uid": PLAIN}]}
    describe(folder, concurrent_video_sets=[together])
    assert "clips: 6 (6 train, 0 validation, 0 test)" in plan(folder, capsys)
    describe(folder, concurrent_video_sets=[{**together, "valid": False}])
    assert "clips: 6 (3 train, 0 validation, 3 test)" in plan(folder, capsys)


def test_without_the_file_a_line_says_what_is_not_known_and_no_sample_is_drawn(folder, capsys):
    (folder / "ego4d.json").unlink()
    ego4d.main(["--root", str(folder), "--out", str(folder / "out"), "--dry_run"])
    told, (line,) = (text.splitlines() for text in capsys.readouterr())
    assert told[0].startswith("clips: 6 (")
    assert line.startswith(f"warning: no file {folder / 'ego4d.json'}: it is not known which videos are silent, redacted, ")
    with pytest.raises(SystemExit) as ended:
        plan(folder, capsys, "--max_train_clips", 2)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: no file {folder / 'ego4d.json'}: --max_train_clips needs it, so as not to draw clips of ")
