"""Beam's graph holds names only, however large the annotations; progress counts what is on the disk."""

import argparse
import dataclasses
import errno
import io
import json
import pathlib
import re
import threading
import time

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from data_prep import command, estimate, pieces, pipeline, progress, shards, storage
from mc3_jax.data import records
from tests.data_prep import test_shards
from tests.data_prep.test_shards import make_small, small_tasks, workers_find_this_module  # noqa: F401


def graph_bytes(planned: list[tuple[str, str]], folder: str) -> int:
    built = beam.Pipeline(options=PipelineOptions([]))
    pipeline.build(built, planned, folder, "clips", make_small, {})
    return len(built.to_runner_api().SerializeToString())


def test_a_jobs_graph_does_not_grow_with_the_narrations(tmp_path):
    few, many = (
        [
            shards.ShardTask("train", i, 500, ({"uid": f"v{i}", "narrations": ["#C C stirs" * 10] * num},), num)
            for i in range(500)
        ]
        for num in (1, 500)
    )
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    sizes = [
        graph_bytes(pipeline._plan(tasks, folder, "clips", {}), str(folder))
        for tasks, folder in ((few, tmp_path / "few"), (many, tmp_path / "many"))
    ]
    assert abs(sizes[1] - sizes[0]) < 1000
    assert sum(path.stat().st_size for path in (tmp_path / "many" / "plan").iterdir()) > 20_000_000


def test_the_graph_of_ego4d_is_a_tenth_of_what_dataflow_takes():
    # 3.8 million narrations, 512 per shard.
    files = [shards.ShardTask("train", i, 7400, (), 512).file("ego4d_clips") for i in range(7400)]
    planned = [(file, shards.fingerprint(file)) for file in files]
    assert 7400 * 64 < graph_bytes(planned, "gs://some-bucket/ego4d_clips") < 1_000_000


def test_a_plan_that_another_run_changed_is_not_followed(tmp_path):
    [(file, fingerprint), *_] = pipeline._plan(small_tasks(), tmp_path, "clips", {})
    pipeline._plan(small_tasks(), tmp_path, "clips", {"tone": 1})
    with pytest.raises(ValueError, match=f"the plan of {file} has changed: is a conversion with other options running"):
        pipeline._write((file, fingerprint), str(tmp_path), "clips", make_small, {})


def make_while_another_works(item: dict, settings: dict):
    """Like `make_small`, but while the first shard is made, another worker begins and works until it finds no more."""
    if item == settings["first"]:
        pipeline._write_claimed(1, settings["claims"], settings["planned"], *settings["where"], make_small, {})
    yield from make_small(item, settings)


def test_a_shard_that_takes_long_holds_up_no_other_and_large_ones_come_first(tmp_path):
    tasks, folder, claims, calls = small_tasks(), tmp_path / "out", tmp_path / "claims", tmp_path / "calls"
    folder.mkdir()
    claims.mkdir()
    tasks[2] = dataclasses.replace(tasks[2], items=tuple({**item, "texts": "#C C stirs" * 9} for item in tasks[2].items))
    planned = pipeline._plan(tasks, folder, "clips", {"calls": str(calls)})
    assert planned[0][0] == tasks[2].file("clips")
    where = (str(folder), "clips")
    passing = {"first": tasks[2].items[0], "claims": str(claims), "planned": planned, "where": where}
    pipeline._write_claimed(0, str(claims), planned, *where, make_while_another_works, passing)
    made = calls.read_text().split()
    assert sorted(made) == [f"v{i}" for i in range(7)]
    assert set(made[-len(tasks[2].items) :]) == {item["uid"] for item in tasks[2].items}
    assert sorted(path.name for path in (folder / "reports").iterdir()) == sorted(f"{file}.json" for file, _ in planned)


def test_after_an_error_no_worker_begins_another_shard(tmp_path):
    tasks = [shards.ShardTask("train", i, 3, ({"error": "file", "uid": i},), 1) for i in range(3)]
    planned = pipeline._plan(tasks, tmp_path, "clips", {})
    (tmp_path / "claims").mkdir()
    with pytest.raises(FileNotFoundError, match="/absent/file"):
        pipeline._write_claimed(0, str(tmp_path / "claims"), planned, str(tmp_path), "clips", make_error, {})
    pipeline._write_claimed(1, str(tmp_path / "claims"), planned, str(tmp_path), "clips", make_error, {})


def make_last(item: dict, settings: dict):
    """Like `make_small`, but the items of the first shard wait until all others are written."""
    deadline = time.monotonic() + 60
    while item["uid"] in settings["last"] and len(list(pathlib.Path(settings["reports"]).glob("[!.]*"))) < settings["num"]:
        assert time.monotonic() < deadline, "the others are in the list of this worker"
        time.sleep(0.05)
    yield from make_small(item, settings)


@pytest.mark.slow
def test_two_workers_take_shards_when_they_are_free(tmp_path):
    tasks = small_tasks(num_shards=7)
    settings = {"last": [item["uid"] for item in tasks[3].items], "reports": str(tmp_path / "out" / "reports"), "num": 6}
    assert len(test_shards.run(tasks, tmp_path / "out", settings, 2, make_last)) == 7


@pytest.mark.parametrize("count", [8, 0])
def test_a_shard_that_lost_or_gained_an_annotation_is_reported(tmp_path, count):
    task = shards.ShardTask("train", 0, 1, ({"uid": "v", "count": 7},), count)
    with pytest.raises(ValueError, match=f"-of-00001: {count} annotations gave 6 clips and 1 rejects, which do not add up"):
        shards.write_shard(task, str(tmp_path), "clips", make_small, {})


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_worker_that_fails_prints_no_traceback(tmp_path, capfd, num_workers):
    with pytest.raises(ValueError, match="a worker failed: two clips have the id same"):
        test_shards.run([shards.ShardTask("train", 0, 1, ({},), 2)], tmp_path, {}, num_workers, test_shards.make_doubles)
    told = capfd.readouterr()
    assert "Traceback" not in told.out + told.err


GOES_ON = "Run the same command again to resume after the last finished video"
ERRORS = {
    "letter": lambda: "half \ud800".encode(),
    "number": lambda: int("12\n3x"),
    "file": lambda: pathlib.Path("/absent/file").read_bytes(),
    "interrupt": KeyboardInterrupt(),
    "killed": ChildProcessError("the decoder of a.mp4 was killed"),
    "disk": OSError(errno.ENOSPC, "No space left on device", "/out"),
}


def make_error(item: dict, settings: dict):
    error = ERRORS[item["error"]]
    if isinstance(error, BaseException):
        raise error
    error()
    yield


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("letter", "a worker failed: 'utf-8' codec can't encode character '\\ud800' in position 5: surrogates not allowed"),
        ("number", r"a worker failed: invalid literal for int() with base 10: '12\n3x'"),
        ("file", "a worker failed: [Errno 2] No such file or directory: '/absent/file'"),
        ("killed", f"a worker failed: the decoder of a.mp4 was killed. {GOES_ON}"),
        ("disk", f"a worker failed: [Errno 28] No space left on device: '/out'. {GOES_ON}"),
    ],
)
def test_a_workers_message_is_reported_unchanged(tmp_path, error, words):
    task = shards.ShardTask("train", 0, 1, ({"error": error},), 1)
    with pytest.raises(ValueError, match="^" + re.escape(words) + "$"):
        test_shards.run([task], tmp_path, {}, 1, make_error)


def test_an_interrupt_is_one_line_and_says_that_a_rerun_resumes(tmp_path, capsys):
    task = shards.ShardTask("train", 0, 1, ({"error": "interrupt"},), 1)

    def convert(args, beam_args):
        test_shards.run([task], tmp_path, {}, 1, make_error)

    with pytest.raises(SystemExit) as ended:
        command.run(argparse.ArgumentParser(), convert, [])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to resume after the last finished video\n"


def test_progress_counts_finished_videos_and_shards_once_and_nobody_elses(tmp_path):
    tasks = small_tasks()
    counts = {item["uid"]: item["count"] for task in tasks for item in task.items}
    rejects = {uid: count // 5 for uid, count in counts.items()}  # `make_small`
    for folder in ("reports", "spool"):
        (tmp_path / folder).mkdir()
    count = progress.Count(tasks, tmp_path, "clips", {})
    assert count.look() == (0, 0)
    shards.write_shard(tasks[0], str(tmp_path), "clips", make_small, {})
    done = [item["uid"] for item in tasks[0].items]
    expected = (sum(counts[uid] - rejects[uid] for uid in done), sum(rejects[uid] for uid in done))
    assert count.look() == expected
    item = tasks[1].items[0]
    pieces.make(item, {}, make_small, tmp_path / "spool", {}, tmp_path / "spool")
    pieces.make({"uid": "another", "count": 3}, {}, make_small, tmp_path / "spool", {}, tmp_path / "spool")
    more = (expected[0] + item["count"] - rejects[item["uid"]], expected[1] + rejects[item["uid"]])
    assert count.look() == more
    # A piece of a finished shard that its writer has not removed yet.
    pieces.make(tasks[0].items[0], {}, make_small, tmp_path / "spool", {}, tmp_path / "spool")
    assert count.look() == more


def test_progress_is_a_bar_on_a_terminal_and_a_line_a_minute_elsewhere(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(progress, "_BAR_S", 0.01)
    tasks = small_tasks()
    for stream, words, others in (
        (Terminal(), "42/42", "of them"), (io.StringIO(), "42 of 42 clips, 5 of them rejected, ", "convert:"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.stderr", stream)
        folder = tmp_path / type(stream).__name__
        monkeypatch.setattr(progress, "_LINE_S", 0.0)
        list(pipeline_run(tasks, folder))
        assert words in stream.getvalue()
        assert "rejected" in stream.getvalue()
        assert others not in stream.getvalue()
    assert progress.line(90, 10, 400, 50, 10.0) == "100 of 400 clips, 10 of them rejected, 5.0 clips/s, 01:00 to go"
    assert progress.line(0, 0, 400, 0, 10.0) == "0 of 400 clips, 0 of them rejected, 0.0 clips/s"


class Looks(progress.Count):
    """Counts nothing, and remembers how often it was asked to; the first `num_faults` times the bucket fails."""

    def __init__(self, num_faults: int = 0):
        self.num, self._num_faults = 0, num_faults

    def look(self) -> tuple[int, int]:
        self.num += 1
        if self.num <= self._num_faults:
            raise OSError("gs://mine: no answer")
        return 30 + self.num, 0


def tell(count: Looks, seconds: float) -> str:
    """Returns what a log says while a conversion runs for so many seconds."""
    stop, stream = threading.Event(), io.StringIO()
    threading.Timer(seconds, stop.set).start()
    progress._tell(count, 100, stop, True, stream)
    return stream.getvalue()


def test_progress_looks_at_the_files_only_when_it_writes_a_line(monkeypatch):
    monkeypatch.setattr(progress, "_BAR_S", 0.001)
    count = Looks()
    assert tell(count, 0.3) == ""
    assert count.num == 2  # at the beginning and the end
    monkeypatch.setattr(progress, "_LINE_S", 0.1)
    told = tell(count, 0.35).splitlines()
    assert told
    assert count.num <= 2 + 1 + len(told)


def test_a_bucket_that_fails_for_a_moment_does_not_end_the_progress(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_S", 0.02)
    told = tell(Looks(num_faults=2), 0.2).splitlines()
    assert told[0].startswith("33 of 100 clips, 0 of them rejected, 0.0 clips/s")  # what was there is not of this run
    assert len(told) > 1


def test_progress_and_shards_ask_for_names_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "files", None)
    list(pipeline_run(small_tasks(), tmp_path / "out"))


def pipeline_run(tasks, folder):
    folder.mkdir()
    return pipeline.run(tasks, str(folder), "clips", make_small, {}, 1, [])


@pytest.mark.slow
def test_rejects_stand_in_the_file_in_an_order_that_no_run_changes(tmp_path):
    tasks = small_tasks()
    early = [shards.Reject(f"c{i}", "v", "no text") for i in (2, 1)]
    files = []
    for number, workers in enumerate((1, 2)):
        folder = tmp_path / str(number)
        test_shards.finish(test_shards.run(tasks, folder, {}, workers), folder, rejects=early)
        files.append((folder / records.REJECTED_FILE).read_text())
    assert files[0] == files[1]
    rows = [json.loads(line) for line in files[0].splitlines()]
    assert [row["clip_id"] for row in rows[:2]] == ["c1", "c2"]
    assert len(rows) == 2 + sum(item["count"] // 5 for task in tasks for item in task.items)


def test_the_estimate_scales_with_clips_pictures_and_cores():
    info = records.ClipsInfo(
        name="clips", window_s=(0.5, 1.0), num_intervals=4, num_candidates=4, short_side_px=256, canvas_px=(256, 256),
        num_samples=24_000, verbs=[], nouns=[], splits={},
    )  # fmt: skip
    task = shards.ShardTask("train", 0, 1, ({"video_uid": "v", "video_bytes": 2_000_000_000},), 250_000)
    told = estimate.tell([task], info, [], 32)
    gigabytes = 250_000 * (16 * 256 * 256 * 16 / 9 * estimate._BYTES_PER_PX + 48_000) / 1e9
    assert f"about {gigabytes:.1f} GB" in told
    assert f"about {250_000 * estimate._CLIP_CPU_S / 32 / 3600:.1f} h on 32 cores" in told
    assert "videos: 1, 2.0 GB to read" in told
