"""Shards hold exactly the records given, with any number of workers and after any interruption, and sums prove it."""

import collections
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import grain.python as grain
import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader

from data_prep import pieces, pipeline, shards, verify
from mc3_jax.data import records

ROOT = pathlib.Path(__file__).parents[2]
JPEG = simplejpeg.encode_jpeg(np.full((16, 24, 3), 90, np.uint8))


def small_clip(clip_id: str, uid: str, number: int, tone: int = 0) -> records.Clip:
    return records.Clip(
        clip_id=clip_id, video_uid=uid, narration=f"#C C does {number}", source="narration_pass_1", time_us=number,
        start_us=number - 1, stop_us=number + 1, frames=[JPEG, JPEG], frame_times_us=np.array([number, number + 1]),
        frame_height=16, frame_width=24 + number, audio=np.arange(100, dtype=np.int16) + tone, label=number % 3 - 1,
    )  # fmt: skip


def make_small(item: dict, settings: dict):
    """Yields an item's clips, the last first, and rejects every fifth; writes its uid to the file `calls` when called."""
    if settings.get("calls"):
        with open(settings["calls"], "a") as f:
            f.write(f"{item['uid']}\n")
    for number in reversed(range(item["count"])):
        clip_id = f"{item['uid']}_{number:03d}"
        if number % 5 == 4:
            yield shards.Reject(clip_id, item["uid"], "not today")
        else:
            yield small_clip(clip_id, item["uid"], number, settings.get("tone", 0))


FAULTS = {"v1": "decoder took too long", "v2": "decoder ran out of memory", "v3": "video file can't be read"}


def make_faulty(item: dict, settings: dict):
    """Like `make_small`, but a video in `FAULTS` loses its first clip for that reason, unless the file `mended` names it."""
    mended = pathlib.Path(settings["mended"]).read_text().split()
    for one in make_small(item, settings):
        if one.clip_id.endswith("000") and item["uid"] in FAULTS and item["uid"] not in mended:
            one = shards.Reject(one.clip_id, item["uid"], FAULTS[item["uid"]])
        yield one


def make_doubles(item: dict, settings: dict):
    for uid in ("v", "w"):
        yield small_clip("same", uid, 1)


def make_slowly(item: dict, settings: dict):
    pathlib.Path(settings["started"]).touch()
    for number in range(10_000):
        time.sleep(0.05)
        yield small_clip(f"{number}", "v", 1)


def make_beside_another(item: dict, settings: dict):
    """Like `make_small`, but once, at the item `at`, another worker first writes the shard `settings["theirs"]`."""
    first = settings["theirs"] and item["uid"] == settings["at"] and not pathlib.Path(settings["met"]).exists()
    if first:
        pathlib.Path(settings["met"]).touch()
        theirs, _ = shards.read_plan(settings["theirs"])
        shards.write_shard(theirs, settings["folder"], "clips", make_beside_another, settings)
    yield from make_small(item, {})


def payload(uid: str, number: int, num_bytes: int) -> bytes:
    """Returns random bytes, which can't be compressed."""
    return np.random.default_rng([int(uid), number]).bytes(num_bytes)


def make_large(item: dict, settings: dict):
    for number in range(item["count"]):
        content = payload(item["uid"], number, settings["num_bytes"])
        yield records.Clip(
            clip_id=f"{item['uid']}_{number:04d}", video_uid=item["uid"], narration="#C C", source="s", time_us=number,
            start_us=0, stop_us=1, frames=[content[:-48_000]], frame_times_us=np.zeros(1, np.int64), frame_height=1,
            frame_width=1, audio=np.frombuffer(content[-48_000:], np.int16),
        )  # fmt: skip


def task_of(split: str, index: int, num_shards: int, items: tuple) -> shards.ShardTask:
    """Returns the task of items for `make_small`."""
    return shards.ShardTask(split, index, num_shards, items, sum(item["count"] for item in items))


def small_tasks(split: str = "train", num_shards: int = 3, num_videos: int = 7) -> list[shards.ShardTask]:
    uids = [f"v{i}" for i in range(num_videos)]
    groups = shards.assign_shards(uids, num_shards)
    items = [tuple({"uid": uid, "count": 3 + int(uid[1:])} for uid in group) for group in groups]
    return [task_of(split, i, len(groups), part) for i, part in enumerate(items)]


def run(tasks, folder: pathlib.Path, settings: dict, num_workers: int = 1, make=make_small, name: str = "clips"):
    folder.mkdir(exist_ok=True)
    return list(pipeline.run(tasks, str(folder), name, make, settings, num_workers, []))


def finish(reports, folder: pathlib.Path, name: str = "clips", rejects=(), num_in: int | None = None):
    info = records.ClipsInfo(
        name=name, window_s=(0.5, 1.0), num_intervals=2, num_candidates=1, short_side_px=16, canvas_px=(16, 16),
        num_samples=100, verbs=["do"], nouns=[], splits={},
    )  # fmt: skip
    total = sum(r["num_clips"] + len(r["rejects"]) for r in reports) + len(rejects)
    return shards.finish(reports, folder, info, list(rejects), total if num_in is None else num_in)


def read(folder: pathlib.Path, reports: list[dict]) -> list[records.Clip]:
    clips = []
    for report in reports:
        reader = ArrayRecordReader(str(folder / report["file"]))
        clips += [records.decode(record) for record in reader.read_all()]
        reader.close()
    return clips


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*array_record*"))}


@pytest.fixture(autouse=True)
def workers_find_this_module(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_videos_are_dealt_out_whole_and_no_shard_is_without_one():
    uids = [f"video-{i}" for i in range(23)]
    for num_shards in (1, 4, 22, 23, 24, 1000):
        groups = shards.assign_shards(uids, num_shards)
        assert len(groups) == min(num_shards, 23)
        assert sorted(uid for group in groups for uid in group) == sorted(uids)
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        assert shards.assign_shards(uids[::-1], num_shards) == groups
    assert shards.assign_shards([], 4) == []


def test_what_goes_in_comes_out_and_the_report_counts_it(tmp_path):
    tasks = small_tasks()
    reports = run(tasks, tmp_path, {})
    clips = read(tmp_path, reports)
    expected = [clip for task in tasks for item in task.items for clip in make_small(item, {})]
    left_out = {c.clip_id for c in expected if isinstance(c, shards.Reject)}
    expected = {c.clip_id: c for c in expected if isinstance(c, records.Clip)}
    assert len(clips) == len(expected)
    for clip in clips:
        assert records.encode(clip) == records.encode(expected[clip.clip_id])
    for report in reports:
        part = read(tmp_path, [report])
        assert [c.clip_id for c in part] == sorted(c.clip_id for c in part)
        assert report["num_clips"] == len(part)
        assert report["num_labelled"] == sum(c.label != records.UNKNOWN for c in part)
        assert report["num_positive"] == sum(c.label == 1 for c in part)
        assert report["canvas_px"] == [max(c.frame_height for c in part), max(c.frame_width for c in part)]
        content = (tmp_path / report["file"]).read_bytes()
        assert (report["bytes"], report["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert {r["clip_id"] for report in reports for r in report["rejects"]} == left_out


def test_one_worker_and_two_write_the_same_bytes(tmp_path):
    tasks = small_tasks() + small_tasks("test", 2, 4)
    reports = [run(tasks, tmp_path / str(n), {}, num_workers=n) for n in (1, 2)]
    assert reports[0] == reports[1]
    one, two = digests(tmp_path / "1"), digests(tmp_path / "2")
    assert len(one) == 5
    assert one == two


@pytest.mark.parametrize("theirs", [0, 1], ids=["at the same shard", "at a shard with the same video"])
def test_a_piece_that_another_worker_takes_away_is_made_again(tmp_path, theirs):
    items = tuple({"uid": uid, "count": 6} for uid in ("v0", "v1", "v2"))
    tasks = [task_of("train", 0, 1, items), task_of("test", 0, 1, items[:1])]
    settings = {"theirs": shards.plan_of(tasks[theirs], {}), "at": "v1", "met": str(tmp_path / "met")}
    settings["folder"] = str(tmp_path)
    report = shards.write_shard(tasks[0], str(tmp_path), "clips", make_beside_another, settings)
    assert (tmp_path / "met").exists()
    (tmp_path / "alone").mkdir()
    expected = shards.write_shard(tasks[0], str(tmp_path / "alone"), "clips", make_small, {})
    assert report["sha256"] == expected["sha256"] == digests(tmp_path)[tasks[0].file("clips")]


def test_a_file_that_is_missing_for_good_is_reported(tmp_path):
    def make(item: dict, settings: dict):
        yield small_clip("c", "v", 1)
        for piece in (tmp_path / "spool").iterdir():  # as if somebody cleaned up
            piece.unlink()

    with pytest.raises(FileNotFoundError, match="spool"):
        shards.write_shard(small_tasks()[0], str(tmp_path), "clips", make, {})
    assert not list(tmp_path.glob("clips-*"))


@pytest.mark.large
def test_two_gigabytes_by_two_workers_are_all_there(tmp_path):
    # TFDS's own Beam writer lost two fifths of this much and reported success.
    num_videos, count, num_bytes = 40, 150, 350_000
    groups = shards.assign_shards([str(i) for i in range(num_videos)], 8)
    tasks = [
        task_of("train", i, 8, tuple({"uid": uid, "count": count} for uid in group))
        for i, group in enumerate(groups)
    ]
    try:
        reports = run(tasks, tmp_path / "out", {"num_bytes": num_bytes}, num_workers=2, make=make_large)
        info = finish(reports, tmp_path / "out", num_in=num_videos * count)
        assert info.splits["train"].num_clips == num_videos * count == 6_000
        assert sum(s.bytes for s in info.splits["train"].shards) > 2_000_000_000
        seen = collections.Counter()
        for path in info.shard_paths(tmp_path / "out", "train"):
            reader = ArrayRecordReader(path)
            for start in range(0, reader.num_records(), 50):
                for record in reader.read(start, min(start + 50, reader.num_records())):
                    clip = records.decode(record)
                    expected = payload(clip.video_uid, clip.time_us, num_bytes)
                    assert clip.frames[0] + clip.audio.tobytes() == expected, clip.clip_id
                    assert clip.clip_id == f"{clip.video_uid}_{clip.time_us:04d}"
                    seen[clip.clip_id] += 1
            reader.close()
        assert seen == {f"{uid}_{k:04d}": 1 for uid in range(num_videos) for k in range(count)}
    finally:
        for path in (tmp_path / "out").glob("*"):
            if path.is_file():
                path.unlink()


@pytest.mark.parametrize(("count", "words"), [(4, r"\[Errno 28\] .*: '.*/spool'"), (2, "write.* failed: .*/out/.clips-")])
def test_a_full_disk_is_one_line_that_names_the_folder_and_says_that_a_rerun_resumes(small_disk, count, words):
    task = task_of("train", 0, 1, ({"uid": "0", "count": count},))
    with pytest.raises(ValueError, match=f"^a worker failed: {words}.*. Run the same command again to resume after"):
        run([task], small_disk / "out", {"num_bytes": 60_000}, make=make_large)


def test_a_rerun_takes_finished_shards_and_redoes_the_others(tmp_path):
    folder, calls = tmp_path / "out", tmp_path / "calls"
    tasks, settings = small_tasks(), {"calls": str(calls)}
    first = run(tasks, folder, settings)
    whole = digests(folder)

    def rerun(damage) -> set[str]:
        """Returns the videos that are read again after the damage; asserts that the shards are then whole again."""
        calls.write_text("")
        damage()
        assert run(tasks, folder, settings) == first
        assert digests(folder) == whole
        return set(calls.read_text().split())

    shard, report = folder / tasks[1].file("clips"), folder / "reports" / f"{tasks[1].file('clips')}.json"
    mine = {item["uid"] for item in tasks[1].items}

    def flip():
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)

    assert rerun(lambda: None) == set()
    assert rerun(shard.unlink) == mine
    assert rerun(report.unlink) == mine
    assert rerun(lambda: os.truncate(shard, 1000)) == mine
    assert rerun(lambda: os.truncate(shard, 0)) == mine
    assert rerun(flip) == mine  # of the same size, so only the report's sha256 shows it
    assert rerun(lambda: report.write_text("")) == mine  # as when a machine loses power
    assert rerun(lambda: report.write_text("[]")) == mine
    assert rerun(lambda: report.write_text("{}")) == mine


def test_other_limits_or_folders_redo_no_shard_but_what_they_cost_is_tried_again(tmp_path, capsys):
    folder, calls, mended = tmp_path / "out", tmp_path / "calls", tmp_path / "mended"
    tasks = small_tasks()
    home = {item["uid"]: task.index for task in tasks for item in task.items}
    assert len({home[uid] for uid in FAULTS}) == 2
    mended.write_text("")
    settings = {"calls": str(calls), "mended": str(mended), "video_dir": "here", "cpu_limit_s": [60.0, 10.0],
                "memory_limit_mb": 2048, "scratch": ""}  # fmt: skip

    def rerun(**changes) -> tuple[set[int], str]:
        """Returns (indices of the shards that were made, what was printed)."""
        settings.update(changes)
        calls.write_text("")
        reports = run(tasks, folder, settings, make=make_faulty)
        made = {home[uid] for uid in calls.read_text().split()}
        assert (folder / "clips.json").exists() == (not made)  # a finished data set stays finished
        finish(reports, folder)
        return made, capsys.readouterr().out

    assert rerun() == ({0, 1, 2}, "")
    before = digests(folder)
    mended.write_text("v3")
    assert rerun() == (
        {home["v3"]}, "2 of 3 shards exist, 1 to retry (videos could not be read, or limits were raised)\n"
    )  # fmt: skip
    whole = digests(folder)
    assert {name for name in whole if whole[name] != before[name]} == {tasks[home["v3"]].file("clips")}
    # Smaller limits, which the error of a killed worker advises, or another folder.
    for changes in ({"memory_limit_mb": 512}, {"cpu_limit_s": [1.0, 10.0]}, {"video_dir": "there"}):
        assert rerun(**changes) == (set(), "3 of 3 shards exist\n")
    assert digests(folder) == whole
    mended.write_text("v1 v2 v3")
    assert rerun(memory_limit_mb=2048, cpu_limit_s=[60.0, 10.0])[0] == set()
    assert rerun(cpu_limit_s=[60.0, 11.0])[0] == {home["v1"]}
    assert rerun(memory_limit_mb=4096)[0] == {home["v2"]} - {home["v1"]}
    assert rerun(tone=1) == (
        {0, 1, 2}, "0 of 3 shards exist, 3 to redo (settings, videos or files changed)\n"
    )  # fmt: skip


def test_a_piece_of_what_could_not_be_read_is_made_again_and_others_are_not(tmp_path):
    (tmp_path / "mended").write_text("")
    settings = {"calls": str(tmp_path / "calls"), "mended": str(tmp_path / "mended"), "cpu_limit_s": [60.0, 10.0]}

    def make(uid: str) -> pieces.Piece:
        (tmp_path / "calls").write_text("")
        known = pieces.find(os.listdir(tmp_path))
        return pieces.make({"uid": uid, "count": 3}, settings, make_faulty, tmp_path, known, tmp_path)

    for uid in ("v0", "v1", "v3"):
        first = make(uid)
        (tmp_path / "mended").write_text("v1 v3")
        again = make(uid)
        assert (tmp_path / "calls").read_text() == ("v3\n" if uid == "v3" else "")
        assert (len(first.rejects), len(again.rejects)) == {"v0": (0, 0), "v1": (1, 1), "v3": (1, 0)}[uid]
        (tmp_path / "mended").write_text("")
    settings["cpu_limit_s"] = [61.0, 10.0]
    make("v1")
    assert (tmp_path / "calls").read_text() == "v1\n"
    assert len(list(tmp_path.glob("*.piece"))) == 3


def test_other_settings_or_videos_redo_the_shards_they_change(tmp_path):
    folder, calls = tmp_path / "out", tmp_path / "calls"
    tasks = small_tasks()
    run(tasks, folder, {"calls": str(calls)})
    before = digests(folder)
    calls.write_text("")
    run(tasks, folder, {"calls": str(calls), "tone": 5})
    assert len(set(calls.read_text().split())) == 7
    after = digests(folder)
    assert all(before[name] != after[name] for name in before)
    assert {int(c.audio[0]) for c in read(folder, [{"file": name} for name in after])} == {5}
    calls.write_text("")
    more = ({**tasks[0].items[0], "count": 1}, *tasks[0].items[1:])
    changed = [task_of("train", 0, 3, more), *tasks[1:]]
    run(changed, folder, {"calls": str(calls), "tone": 5})
    assert set(calls.read_text().split()) == {item["uid"] for item in tasks[0].items}


def test_nothing_of_an_earlier_conversion_is_in_the_data_set_or_stays(tmp_path):
    keep = [tmp_path / "notes.txt", tmp_path / "clips-train.txt", tmp_path / "reports" / "mine.json"]
    (tmp_path / "reports").mkdir()
    for path in keep:
        path.write_text("mine")
    finish(run(small_tasks(num_shards=5) + small_tasks("validation", 2, 4), tmp_path, {}), tmp_path)
    reports = run(small_tasks(num_shards=2) + small_tasks("test", 1, 2), tmp_path, {"tone": 1})
    info = finish(reports, tmp_path)
    files = {"train": 2, "validation": 0, "test": 1}
    assert {name: len(split.shards) for name, split in info.splits.items()} == files
    written = {f"clips-{name}.array_record-{i:05d}-of-{n:05d}" for name, n in files.items() for i in range(n)}
    assert {p.name for p in tmp_path.glob("*array_record*")} == written
    assert {p.name for p in (tmp_path / "reports").iterdir()} == {f"{file}.json" for file in written} | {"mine.json"}
    assert all(path.read_text() == "mine" for path in keep)
    assert sum(s.num_clips for s in info.splits.values()) == len(read(tmp_path, reports))
    assert opened_by_tfds(tmp_path) == {
        "train": ids_of(tmp_path, info, "train"),
        "test": ids_of(tmp_path, info, "test"),
    }


def test_two_data_sets_do_not_share_a_folder(tmp_path):
    finish(run(small_tasks(), tmp_path, {}), tmp_path)
    before = digests(tmp_path)
    with pytest.raises(ValueError, match="already holds the data set 'clips': choose another folder for 'others'"):
        run(small_tasks(), tmp_path, {}, name="others")
    assert digests(tmp_path) == before
    records.ClipsInfo.load(tmp_path)


def test_while_shards_change_the_folder_is_no_data_set(tmp_path):
    finish(run(small_tasks(), tmp_path, {}), tmp_path)
    run(small_tasks(), tmp_path, {})
    records.ClipsInfo.load(tmp_path)  # nothing changed: still a data set
    run(small_tasks(), tmp_path, {"tone": 1})  # and here the converter is killed
    with pytest.raises(ValueError, match="holds no clips.json"):
        records.ClipsInfo.load(tmp_path)
    assert not (tmp_path / "dataset_info.json").exists()


def test_a_shard_that_was_not_written_is_not_taken_from_an_earlier_conversion(tmp_path, monkeypatch):
    run(small_tasks(), tmp_path, {})
    monkeypatch.setattr(pipeline, "_write", lambda *args: None)  # a pipeline that silently loses its elements
    run(small_tasks(), tmp_path, {})
    with pytest.raises(ValueError, match="00000-of-00003 was not written though Beam reports success: run"):
        run(small_tasks(), tmp_path, {"tone": 1})


def test_a_killed_writer_leaves_no_shard_and_the_rerun_clears_up(tmp_path):
    started = tmp_path / "started"
    code = f"""
from tests.data_prep import test_shards
task, settings = test_shards.small_tasks()[0], {{"started": {str(started)!r}}}
test_shards.shards.write_shard(task, {str(tmp_path)!r}, "clips", test_shards.make_slowly, settings)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not list(tmp_path.glob("clips-*"))
    tasks = small_tasks()
    # Also left by writers that were killed in their last step, while they wrote the file.
    half = [tmp_path / f".{tasks[0].file('clips')}.{word}.tmp" for word in ("123", "0a1b")]
    for path in half:
        path.write_bytes(b"half a shard")
    reports = run(tasks, tmp_path, {})
    finish(reports, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(read(tmp_path, reports)) == sum(r["num_clips"] for r in reports) > 0


@pytest.mark.parametrize("num_workers", [1, 2])
def test_two_clips_of_one_id_are_refused_in_one_line(tmp_path, num_workers):
    with pytest.raises(ValueError, match="two clips have the id same: ids must differ") as error:
        run([shards.ShardTask("train", 0, 1, ({},), 2)], tmp_path, {}, num_workers, make=make_doubles)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.glob("clips-*"))


def test_a_shard_whose_videos_all_fail_is_empty_and_harms_no_reader(tmp_path):
    items = [({"uid": "v0", "count": 3},), ({"uid": "v1", "count": 0},), ({"uid": "v2", "count": 2},)]
    tasks = [task_of("train", i, 3, item) for i, item in enumerate(items)]
    info = finish(run(tasks, tmp_path, {}), tmp_path)
    assert [s.num_clips for s in info.splits["train"].shards] == [3, 0, 2]
    expected = ["v0_000", "v0_001", "v0_002", "v2_000", "v2_001"]
    assert opened_by_tfds(tmp_path) == {"train": expected}
    source = grain.ArrayRecordDataSource(  # as the loader reads
        info.shard_paths(tmp_path, "train")
    )
    assert [records.decode(source[i]).clip_id for i in range(len(source))] == expected


def test_a_split_whose_videos_all_fail_has_no_shards_until_one_does_not(tmp_path):
    items = [({"uid": "v0", "count": 0},), ({"uid": "v1", "count": 0},)]
    tests = [task_of("test", i, 2, item) for i, item in enumerate(items)]
    train = [task_of("train", 0, 1, ({"uid": "v2", "count": 1},))]
    calls = tmp_path / "calls"
    settings, files = {"calls": str(calls)}, [task.file("clips") for task in tests]
    info = finish(run(train + tests, tmp_path, settings), tmp_path)
    empty = {name: (split.num_clips, len(split.shards)) for name, split in info.splits.items()}
    assert empty == {"train": (1, 1), "validation": (0, 0), "test": (0, 0)}
    assert not [file for file in files if (tmp_path / file).exists()]
    assert opened_by_tfds(tmp_path) == {"train": ["v2_000"]}
    assert verify.verify(tmp_path, 1)[0] == []
    calls.write_text("")
    assert finish(run(train + tests, tmp_path, settings), tmp_path) == info
    assert calls.read_text() == ""
    # One video works now: the other's shard is written again, as it was.
    more = [tests[0], task_of("test", 1, 2, ({"uid": "v1", "count": 1},))]
    info = finish(run(train + more, tmp_path, settings), tmp_path)
    assert [shard.num_clips for shard in info.splits["test"].shards] == [0, 1]
    assert verify.verify(tmp_path, 1)[0] == []


def test_a_lost_record_is_noticed(tmp_path):
    reports = run(small_tasks(), tmp_path, {})
    total = sum(r["num_clips"] + len(r["rejects"]) for r in reports)
    early = [shards.Reject("x", "v", "no text")]
    for num_in in (total, total + 2):
        with pytest.raises(ValueError, match=f"{num_in} annotations gave .* which do not add up"):
            finish(reports, tmp_path, rejects=early, num_in=num_in)
    with pytest.raises(ValueError, match="which do not add up"):
        finish(reports[1:], tmp_path, num_in=total)
    assert not (tmp_path / "clips.json").exists()
    finish(reports, tmp_path, rejects=early, num_in=total + 1)
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + sum(len(r["rejects"]) for r in reports)
    assert {line["reason"] for line in lines} == {"no text", "not today"}


def test_without_a_single_clip_there_is_no_data_set_but_the_reasons(tmp_path):
    rejects = [shards.Reject(f"c{i}", "v", "video file is missing") for i in range(3)]
    reports = run([task_of("train", 0, 1, ({"uid": "v", "count": 0},))], tmp_path, {})
    with pytest.raises(ValueError, match=r"none of 3 annotations became a clip \(3 video file is missing\)"):
        finish(reports, tmp_path, rejects=rejects)
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "clips.json").exists()


def test_the_canvas_holds_the_tallest_and_the_widest_frame_of_all_shards(tmp_path):
    reports = run(small_tasks(), tmp_path, {})
    reports[1]["canvas_px"] = [40, 8]  # as from a phone held upright
    info = finish(reports, tmp_path)
    assert info.canvas_px == (40, 24 + 8)  # by `small_clip`: the eighth clip of the longest video
    assert records.ClipsInfo.load(tmp_path) == info


def ids_of(folder, info, split) -> list[str]:
    return [c.clip_id for c in read(folder, [{"file": s.file} for s in info.splits[split].shards])]


def opened_by_tfds(folder: pathlib.Path) -> dict[str, list[str]]:
    """Returns the clip ids of each split as TFDS reads them, in a process that does not import TensorFlow."""
    code = f"""
import json, sys
import numpy as np
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(folder)!r})
found = {{}}
for name in builder.info.splits:
    source = builder.as_data_source(split=name)
    assert len(source) == builder.info.splits[name].num_examples
    clips = [source[i] for i in range(len(source))]
    for clip in clips:
        assert [np.asarray(f).shape for f in clip["frames"]] == [(16, 24, 3)] * 2
        assert np.frombuffer(clip["audio"], "<i2").shape == (100,)
        assert list(clip["frame_times_us"]) == [clip["time_us"], clip["time_us"] + 1]
    found[name] = [clip["clip_id"].decode() for clip in clips]
assert "tensorflow" not in sys.modules
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_folder_opens_with_tfds_and_yields_the_clips_without_tensorflow(tmp_path):
    info = finish(run(small_tasks() + small_tasks("validation", 1, 2), tmp_path, {}), tmp_path)
    assert opened_by_tfds(tmp_path) == {name: ids_of(tmp_path, info, name) for name in ("train", "validation")}
