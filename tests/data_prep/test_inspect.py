"""Inspection: the counts are those of the clips, and pictures are drawn whatever the clips hold."""

import contextlib
import json
import pathlib
import re
import resource
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from data_prep import inspect, shards
from mc3_jax.data import records

ROOT = pathlib.Path(__file__).parents[2]
VERBS, NOUNS = ["tap_(taps)", "cut", "never"], ["cup", "can"]


def make_clips(item: dict, settings: dict):
    """Yields seven clips of a video: five of tapping a cup, two of which sound; one of cutting a can; one without either."""
    colour = np.full((16, 24, 3), 20, np.uint8)
    for number in range(7):
        colour[..., 0] = 120 + 20 * number  # red, unlike text and axes
        verb, noun = (0, 0) if number < 5 else (1, 1) if number == 5 else (-1, -1)
        yield records.Clip(
            clip_id=f"{item['uid']}_{number}", video_uid=item["uid"], narration="#C C taps $x_ the <b>cup</b> \u2603\u65e5",
            source="mine", time_us=500_000, start_us=0, stop_us=1_500_000,
            frames=[simplejpeg.encode_jpeg(colour)] * 4, frame_times_us=np.arange(4), frame_height=16, frame_width=24,
            audio=np.zeros(24_000, np.int16), verb_id=verb, noun_id=noun,
            label=item["label"] and (int(number < 2) if number < 6 else -1),
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("clips")
    tasks = [
        shards.ShardTask("train", 0, 1, ({"uid": "a", "label": 0}, {"uid": "b", "label": 0}), 14),
        shards.ShardTask("test", 0, 1, ({"uid": "c", "label": 1},), 7),
    ]
    reports = [shards.write_shard(task, str(folder), "mine", make_clips, {}) for task in tasks]
    info = records.ClipsInfo("mine", (0.5, 1.0), 2, 2, 16, (16, 16), 24_000, VERBS, NOUNS, {})
    shards.finish(reports, folder, info, [], 21)
    return folder


def test_counts_are_those_of_the_clips(folder):
    info = records.ClipsInfo.load(folder)
    found = inspect.count(inspect.open_split(folder, info, "test"), info)
    assert found == inspect.Statistics(
        num_clips=7, num_videos=1, hours=7 * 1.5 / 3600, num_labelled=6, num_positive=2,
        verbs={"tap_(taps)": 5, "cut": 1}, nouns={"cup": 5, "can": 1}, num_pairs=2, sounding_rates={"tap_(taps)": (0.4, 5)},
    )  # fmt: skip
    train = inspect.count(inspect.open_split(folder, info, "train"), info)
    assert (train.num_clips, train.num_videos, train.verbs["tap_(taps)"]) == (14, 2, 10)
    assert "tap 5, cut 1" in inspect.describe("test", found)
    assert "sounding rates: tap 0.40 (n = 5)" in inspect.describe("test", found)
    found.sounding_rates = {}
    assert "sounding rates" not in inspect.describe("test", found)


def test_the_command_writes_pictures_and_numbers(folder, tmp_path):
    command = [sys.executable, "-m", "data_prep.inspect", str(folder), "--out", str(tmp_path / "o"), "--num_clips", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "test: 7 clips of 1 videos" in done.stdout
    assert f"written to {tmp_path / 'o'}: contact_sheet.png (train), statistics.png, statistics.json" in done.stdout
    sheet = np.asarray(Image.open(tmp_path / "o" / "contact_sheet.png").convert("RGB"))
    assert min(sheet.shape[:2]) > 200
    drawn = {tuple(colour) for colour in sheet.reshape(-1, 3)[::7].tolist()}
    assert any(red > 110 and green < 40 and blue < 40 for red, green, blue in drawn)  # pixels of the frames
    assert np.asarray(Image.open(tmp_path / "o" / "statistics.png")).std() > 1
    assert json.loads((tmp_path / "o" / "statistics.json").read_text())["train"]["num_clips"] == 14


def test_clips_are_shown_by_their_ids_whichever_split_they_are_in(folder, tmp_path, capsys):
    inspect.main([str(folder), "--out", str(tmp_path / "o"), "--clip_id", "c_1", "--clip_id", "b_5", "--clip_id", "c_1"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": #C C")[0] for line in said[:-1]] == ["test: c_1", "train: b_5"]
    assert "[sounds, 0.5 s of c]" in said[0]
    assert "[no label" not in said[0]
    assert said[-1].endswith("o: chosen_clips.png")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["chosen_clips.png"]
    sheet = np.asarray(Image.open(tmp_path / "o" / "chosen_clips.png").convert("RGB")).reshape(-1, 3)
    drawn = {int(red) for red, green, blue in sheet if red > 110 and green < 40 and blue < 40}
    assert any(abs(red - 140) < 8 for red in drawn)  # c_1
    assert any(abs(red - 220) < 8 for red in drawn)  # b_5
    assert not any(150 < red < 210 for red in drawn)  # those between


def test_a_split_without_clips_is_left_out_and_the_folder_for_pictures_is_made_first(folder, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    info = records.ClipsInfo.load(copy)
    shard = info.splits["test"].shards[0]
    with contextlib.closing(ArrayRecordWriter(str(copy / shard.file), "group_size:1")):
        shard.num_clips, shard.video_clips = 0, []  # as earlier versions did for a split without clips
    info.splits["test"] = records.SplitInfo(0, 0, 0, [shard])
    info.dump(copy)
    with pytest.raises(SystemExit):
        inspect.main([str(copy), "--out", str(tmp_path), "--split", "test"])
    assert "no clips in the split 'test', only in train" in capsys.readouterr().err
    monkeypatch.setattr(inspect, "count", None)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        inspect.main([str(copy), "--out", str(tmp_path / "file" / "out")])
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip_id", "c_1", "--clip_id", "c\x1b_9"], r"error: no clip 'c\\x1b_9' in train, test: clip ids .*embeddings"),
        (["--clip_id", "c_1", "--split", "train"], "error: no clip 'c_1' in train: clip ids"),
        (["--clip_id", "c_1"] * 101, "--clip_id must be given at most 100 times, got 101"),
        (["--split", "validation"], "has no clips in the split 'validation'"), (["--num_clips", "0"], "--num_clips must be"),
        (["--seed", "-1"], "--seed must not be negative"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(folder, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        inspect.main([str(folder), "--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("size", "canvas", "words"),
    [
        ((60_000, 60_000), (16, 24), r"it has \(60000, 60000\) px, the record says \(16, 24\)"),
        ((24, 16), (16, 24), r"it has \(24, 16\) px, the record says \(16, 24\)"),
        ((60_000, 60_000), (60_000, 60_000), r"it has \(60000, 60000\) px, more than"),
        (None, (16, 24), ""),
    ],
)
def test_a_frame_that_is_forged_is_one_line_and_takes_no_memory(folder, tmp_path, capsys, size, canvas, words):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    info = records.ClipsInfo.load(copy)
    info.canvas_px = canvas
    info.dump(copy)
    path = copy / info.splits["test"].shards[0].file
    with contextlib.closing(ArrayRecordReader(str(path))) as reader:
        clips = [records.decode(record) for record in reader.read_all()]
    with contextlib.closing(ArrayRecordWriter(str(path), "group_size:1")) as writer:
        for clip in clips:
            jpeg = bytearray(clip.frames[1])
            if size is None:
                jpeg = jpeg[:-200]
                del jpeg[: len(jpeg) // 2]
            else:
                at = jpeg.index(b"\xff\xc0") + 5
                jpeg[at : at + 4] = struct.pack(">HH", *size)
            if canvas[0] > 24:
                clip.frame_height, clip.frame_width = size
            clip.frames[1] = bytes(jpeg)
            writer.write(records.encode(clip))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            inspect.main([str(copy), "--out", str(tmp_path / "out"), "--split", "test", "--num_clips", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(r"error: clip c_\d: frame 1 can't be decoded: " + words, err), err


def test_no_data_set_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        inspect.main([str(tmp_path)])
    assert len(capsys.readouterr().err.splitlines()) == 1
