"""Verification finds no problem in an intact data set, and reports every kind of damage."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep import shards, verify
from mc3_jax.data import records
from tests.data_prep import dying_readers

ROOT = pathlib.Path(__file__).parents[2]
JPEG = simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8))


def make_clips(item: dict, settings: dict):
    """Yields three clips of a video and a reject."""
    for number in range(3):
        yield records.Clip(
            clip_id=f"{item['uid']}_{number}", video_uid=item["uid"], narration="#C C taps", source="mine", time_us=5,
            start_us=0, stop_us=9, frames=[JPEG, JPEG], frame_times_us=np.array([1, 2]), frame_height=16, frame_width=24,
            audio=np.arange(100, dtype=np.int16), verb_id=0, label=number - 1,
        )  # fmt: skip
    yield shards.Reject(f"{item['uid']}_3", item["uid"], "not today")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> pathlib.Path:
    """Folder of an undamaged data set: three videos in train and one in test, in three shards."""
    folder = tmp_path_factory.mktemp("clips")
    tasks = [
        shards.ShardTask("train", 0, 2, ({"uid": "a"}, {"uid": "b"}), 8),
        shards.ShardTask("train", 1, 2, ({"uid": "c"},), 4),
        shards.ShardTask("test", 0, 1, ({"uid": "d"},), 4),
    ]
    reports = [shards.write_shard(task, str(folder), "mine", make_clips, {}) for task in tasks]
    info = records.ClipsInfo("mine", (0.5, 1.0), 2, 1, 16, (16, 16), 100, ["tap"], [], {})
    shards.finish(reports, folder, info, [], 16)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> pathlib.Path:
    return shutil.copytree(sound, tmp_path / "clips")


def problems(folder: pathlib.Path) -> list[str]:
    return verify.verify(folder, 1)[0]


def change_info(folder: pathlib.Path, change) -> None:
    info = json.loads((folder / "clips.json").read_text())
    del info["sha256"]
    change(info)
    (folder / "clips.json").write_text(records.manifest(info))


def rewrite(folder: pathlib.Path, clips: list[records.Clip], shard: int = 0) -> None:
    """Puts other records in a shard of the training split, and its new size and digest in `clips.json`."""
    path = folder / f"mine-train.array_record-{shard:05d}-of-00002"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for clip in clips:
        writer.write(records.encode(clip))
    writer.close()

    def change(info):
        entry = info["splits"]["train"]["shards"][shard]
        entry |= {"bytes": path.stat().st_size, "sha256": shards.sha256(path)}

    change_info(folder, change)


def originals(*uids: str) -> list[records.Clip]:
    return [clip for uid in uids for clip in make_clips({"uid": uid}, {}) if isinstance(clip, records.Clip)]


def test_a_sound_data_set_has_no_problem_and_is_counted(sound):
    found, unread, counts = verify.verify(sound, 2)
    assert found == unread == []
    assert {name: counts[name] for name in ("clips", "videos", "shards")} == {"clips": 12, "videos": 4, "shards": 3}


def test_every_flipped_byte_is_found(folder):
    path = folder / "mine-test.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(len(content), size=12):
        content[place] ^= 1
        path.write_bytes(content)
        assert any("mine-test" in line and "SHA-256" in line for line in problems(folder)), place
        content[place] ^= 1
    path.write_bytes(content)
    assert problems(folder) == []


@pytest.mark.parametrize("length", [0, 1, 1000, -1])
def test_a_truncated_shard_is_found(folder, length):
    path = folder / "mine-test.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:length])
    assert any("mine-test" in line and "bytes" in line for line in problems(folder))


def test_a_shard_that_cannot_be_read_is_found_and_hides_no_other(folder):
    path = folder / "mine-train.array_record-00000-of-00002"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading it is an input error
    (folder / "mine-test.array_record-00000-of-00001").unlink()
    change_info(folder, lambda info: info["splits"]["train"]["shards"][0].update(bytes=0))
    found = problems(folder)
    assert "mine-train.array_record-00000-of-00002: can't be read: [Errno 5] Input/output error" in found
    assert "mine-test.array_record-00000-of-00001: is missing" in found


def test_missing_stray_and_miscounted_files_are_found(folder):
    (folder / "mine-test.array_record-00000-of-00001").rename(folder / "mine-test.array_record-00000-of-00007")
    change_info(folder, lambda info: info["splits"]["train"]["shards"][0].update(video_clips=[2, 4]))
    (folder / "rejected.jsonl").write_text('{"clip_id": "x"}\n')
    (folder / "dataset_info.json").unlink()
    found = "\n".join(problems(folder))
    for line in (
        "mine-test.array_record-00000-of-00001: is missing", "00000-of-00007: is not listed in clips.json",
        "its numbers of clips per video", "rejected.jsonl, row 1", "dataset_info.json can't be read",
    ):  # fmt: skip
        assert line in found


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label", 7, "label is 7"), ("verb_id", 1, "verb_id is 1"), ("frames", [JPEG], "holds 1 frames"),
        ("frames", [JPEG, JPEG[:200]], "frame 1 can't be decoded"), ("frame_height", 15, "the record says (15, 24)"),
        ("audio", np.zeros(99, np.int16), "holds 99 samples"), ("time_us", 10, "its time 10"),
        ("clip_id", "c_0", "clip c_0 occurs 2 times"), ("video_uid", "c", "video c is in 2 shards"),
    ],
)  # fmt: skip
def test_a_record_that_breaks_its_promise_is_found_though_its_digest_is_right(folder, field, value, message):
    clips = originals("a", "b")
    values = {field: value} | ({"frame_times_us": np.array([1])} if field == "frames" and len(value) == 1 else {})
    clips[2] = dataclasses.replace(clips[2], **values)
    rewrite(folder, clips)
    assert message in "\n".join(problems(folder))


def test_lost_records_and_wrong_sums_are_found(folder):
    rewrite(folder, originals("a"))
    assert "3 records, clips.json says 6" in "\n".join(problems(folder))
    rewrite(folder, originals("a", "b"))
    change_info(folder, lambda info: info["splits"]["train"].update(num_positive=4))
    assert "split train: (clips, labelled, positive) are (9, 6, 3), clips.json says (9, 6, 4)" in problems(folder)


def test_a_shard_named_outside_of_the_folder_is_not_read(folder):
    name = "mine-test.array_record-00000-of-00001"
    (folder / name).rename(folder.parent / name)
    change_info(folder, lambda info: info["splits"]["test"]["shards"][0].update(file=f"../{name}"))
    assert f"../{name}: is missing" in problems(folder)


def test_the_command_says_so_by_its_status(folder):
    def run():
        command = [sys.executable, "-m", "data_prep.verify", str(folder), "--num_workers", "1"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"12 clips, 4 videos.*; intact$", done.stdout)
    (folder / "mine-test.array_record-00000-of-00001").unlink()
    done = run()
    assert done.returncode == 1
    assert "is missing" in done.stdout
    change_info(folder, lambda info: info.update(schema_version=1))
    done = run()
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search("schema version 1.*\n.*not read; 1 problem", done.stdout)
    shutil.rmtree(folder)
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: no data folder .*\n", done.stderr)


TRAIN, TEST = "mine-train.array_record-00000-of-00002", "mine-test.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("dying", "status", "lines"),
    [
        ({TRAIN: "once"}, 0, []),  # as when memory ran out for a moment
        ({TRAIN: "SIGSEGV"}, 1, [f"{TRAIN}: reading it ended the process (SIGSEGV)"]),
        (
            {TRAIN: "SIGKILL", TEST: "MemoryError"},
            3,
            [
                f"{file}: was not read and may be intact: its reader ended early ({how}), perhaps because memory ran out: "
                "use fewer --num_workers"
                for file, how in ((TRAIN, "SIGKILL"), (TEST, "status 0"))
            ],
        ),
    ],
)
def test_of_the_shards_that_a_dead_reader_leaves_only_one_that_ends_another_reader_is_damaged(
    folder, monkeypatch, capsys, dying, status, lines
):
    (folder / dying_readers.FILE).write_text(json.dumps(dying))
    monkeypatch.setattr(verify, "verify_shard", dying_readers.verify_shard)
    with pytest.raises(SystemExit) as ended:
        verify.main([str(folder), "--num_workers", "2"])
    *found, last = capsys.readouterr().out.splitlines()
    assert (ended.value.code, found) == (status, lines)
    assert last.endswith({0: "; intact", 1: "; 1 problem(s)", 3: "; 2 shard(s) not read"}[status])


INTERRUPTED = """import signal, sys
from data_prep import verify
from tests.data_prep import dying_readers
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
verify.verify_shard = dying_readers.verify_shard
verify.main([sys.argv[1], "--num_workers", "1"])
"""


ALL_HANG = {TRAIN: "hang", TRAIN.replace("00000", "00001"): "hang", TEST: "hang"}


@pytest.mark.parametrize("dying", [ALL_HANG, {TRAIN: "SIGSEGV", TEST: "hang"}], ids=["together", "alone"])
def test_ctrl_c_ends_all_readers_at_once_and_says_so_in_one_line(folder, dying):
    (folder / dying_readers.FILE).write_text(json.dumps(dying))
    command = [sys.executable, "-c", INTERRUPTED, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until((folder / dying_readers.HANGS).exists)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.communicate(timeout=30) == (None, "interrupted\n")
    assert process.returncode == 130
    wait_until(lambda: not is_group_alive(process.pid))  # multiprocessing's resource tracker ends last


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_by_default_there_are_as_many_processes_as_cores_that_it_may_use(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})
    monkeypatch.setattr(verify, "verify", lambda clips, num_workers: (asked.append(num_workers), ([], [], {}))[1])
    with pytest.raises(SystemExit):
        verify.main([str(folder)])
    assert asked == [3]


@pytest.mark.parametrize("name", ["rejected.jsonl", "features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [None, "", "[" * 100_000, "{}\n"], ids=["missing", "empty", "deep", "other"])
def test_damage_of_the_files_beside_the_shards_is_found(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert any(line.startswith(name) for line in problems(folder))


def test_a_row_that_is_gone_from_the_rejects_is_found_though_its_digest_is_right(folder):
    rows = (folder / "rejected.jsonl").read_text().splitlines(keepends=True)
    (folder / "rejected.jsonl").write_text("".join(rows[1:]))
    change_info(folder, lambda info: info["files"].update({"rejected.jsonl": shards.sha256(folder / "rejected.jsonl")}))
    assert problems(folder) == ["rejected.jsonl: 3 rows, clips.json says 4"]
    change_info(folder, lambda info: info.update(num_rejected=3))
    assert problems(folder) == ["clips.json: 16 annotations, but 12 clips and 3 rejects"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "other schema"])
def test_damage_of_the_manifest_is_damage(folder, damage):
    path = folder / "clips.json"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-200])
    elif damage == "flipped":
        path.write_bytes(content.replace(b'"tap"', b'"tip"'))
    else:
        change_info(folder, lambda info: info.update(schema_version=1))
    [line] = problems(folder)
    assert "clips.json" in line
