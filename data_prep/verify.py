"""Reads a clips data set whole and says what is wrong with it: `python -m data_prep.verify CLIPS`.

It checks every shard's size and SHA-256, every record and every JPEG, the counts in `clips.json`, that no id occurs twice,
and the metadata that TFDS reads. Exit status 0 means an intact data set, 1 damage, with one line per problem, 2 a wrong
command line, 3 that shards were not read, e.g. because memory ran out, and nothing else is wrong, and 130 Ctrl-C.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable

import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from data_prep import interrupts
from mc3_jax import terminal
from mc3_jax.data import records

_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what reading a damaged JSON file may raise
# Signals by which others end a process: a user, or the kernel or Slurm when memory runs out. No shard is to blame for them.
_FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
# Held while a thread starts a process or takes its exit status. Starting one, Python takes those of all that have ended.
_starting = threading.Lock()
_MAX_TOLD = 20  # bad records listed per shard: in a shard of another schema every record is bad


@dataclasses.dataclass
class ShardReport:
    """What was found in a shard.

    Attributes:
      problems: Descriptions of the problems, one line each.
      clip_ids: Clip id of every record that could be read.
      video_uids: Video uid of each of these records.
      clip_samples: Number of audio samples of each of these records.
      num_labelled, num_positive: Number of clips with a label, and with label 1.
      unread: Why the shard was not read, one line, or "" if it was.
    """

    problems: list[str]
    clip_ids: list[str]
    video_uids: list[str]
    clip_samples: list[int] = dataclasses.field(default_factory=list)
    num_labelled: int = 0
    num_positive: int = 0
    unread: str = ""


def verify_shard(folder: pathlib.Path, shard: records.Shard, info: records.ClipsInfo) -> ShardReport:
    """Returns the problems of one shard and what it holds; reads all of it."""
    report = ShardReport([], [], [])
    path = folder / shard.file
    if path.name != shard.file or not path.is_file():
        report.problems.append(f"{shard.file}: is missing")
        return report
    found, wrong = 0, []
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            report.problems.append(f"{shard.file}: has {size} bytes, {records.CLIPS_FILE} says {shard.bytes}")
        else:
            with path.open("rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
            if digest != shard.sha256:
                report.problems.append(f"{shard.file}: its SHA-256 is {digest}, {records.CLIPS_FILE} says {shard.sha256}")
        with contextlib.closing(ArrayRecordReader(str(path))) as reader:  # reports a failed opening only when it is closed
            found = reader.num_records()
            wrong = [problem for i in range(found) if (problem := _verify_record(reader, i, info, report))]
    except (RuntimeError, ValueError, OSError) as error:
        report.problems.append(f"{shard.file}: can't be read: {_short(error)}")
    if found != shard.num_clips:
        report.problems.append(f"{shard.file}: has {found} records, {records.CLIPS_FILE} says {shard.num_clips}")
    report.problems += [f"{shard.file}: {problem}" for problem in wrong[:_MAX_TOLD]]
    if len(wrong) > _MAX_TOLD:
        report.problems.append(f"{shard.file}: {len(wrong) - _MAX_TOLD} more records are wrong")
    counts = [len(list(group)) for _, group in itertools.groupby(report.video_uids)]
    if not wrong and found == shard.num_clips and counts != shard.video_clips:
        report.problems.append(f"{shard.file}: its numbers of clips per video differ from {records.CLIPS_FILE}")
    if not wrong and found == shard.num_clips and info.max_samples and report.clip_samples != shard.clip_samples:
        report.problems.append(f"{shard.file}: its numbers of samples per clip differ from {records.CLIPS_FILE}")
    return report


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _verify_record(reader, index: int, info: records.ClipsInfo, report: ShardReport) -> str | None:
    """Returns the problem of a record, or None; adds what the record holds to the report."""
    try:
        [record] = reader.read([index])
        clip = records.decode(record)
    except (RuntimeError, ValueError, IndexError, UnicodeDecodeError) as error:
        return f"record {index}: {_short(error)}"
    report.clip_ids.append(clip.clip_id)
    report.video_uids.append(clip.video_uid)
    report.clip_samples.append(len(clip.audio))
    report.num_labelled += clip.label != records.UNKNOWN
    report.num_positive += clip.label == 1
    try:
        records.check(clip, info)
        _check_values(clip, info)
    except ValueError as error:
        return f"record {index}: {_short(error)}"
    return None


def _check_values(clip: records.Clip, info: records.ClipsInfo) -> None:
    """Checks what `records.check` does not: every JPEG, the ids and the clip's times.

    Raises:
      ValueError: One of them is wrong; the message names the clip and the fault.
    """
    name = f"clip {clip.clip_id}"
    for i, jpeg in enumerate(clip.frames):
        try:
            size = simplejpeg.decode_jpeg_header(jpeg)[:2]
            # The size in the header is checked before decoding, since a forged one would take gigabytes.
            if size == (clip.frame_height, clip.frame_width):
                simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=True)
        except ValueError as error:
            raise ValueError(f"{name}: frame {i} can't be decoded: {error}") from error
        if size != (clip.frame_height, clip.frame_width):
            raise ValueError(f"{name}: frame {i} has {size} px, the record says {(clip.frame_height, clip.frame_width)}")
    if not clip.frames and (clip.frame_height, clip.frame_width) != (0, 0):
        raise ValueError(f"{name}: has no frames but a frame size of {(clip.frame_height, clip.frame_width)}")
    for field, value, num in (
        ("verb_id", clip.verb_id, len(info.verbs)), ("noun_id", clip.noun_id, len(info.nouns)), ("label", clip.label, 2),
        ("class_id", clip.class_id, len(info.classes)), ("fold", clip.fold, 1 << 31),
    ):  # fmt: skip
        if not records.UNKNOWN <= value < num:
            raise ValueError(f"{name}: {field} is {value} but must be from {records.UNKNOWN} to {num - 1}")
    if not clip.start_us <= clip.time_us <= clip.stop_us:
        raise ValueError(f"{name}: its time {clip.time_us} µs is not in [{clip.start_us}, {clip.stop_us}]")


def verify(folder: pathlib.Path, num_workers: int) -> tuple[list[str], list[str], dict[str, int]]:
    """Returns (problems, shards that were not read, counts of clips, videos, shards and bytes) of a data set.

    Problems and unread shards are described in one line each. An unread shard may be intact.

    Args:
      folder: Folder of the data set.
      num_workers: Number of processes.

    Raises:
      ValueError: The folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"no data folder {folder}")
    try:
        info = records.ClipsInfo.load(folder)
    except (ValueError, OSError) as error:
        return [_short(error)], [], {}
    parts = [(split, shard) for split, value in info.splits.items() for shard in value.shards]
    reports = _read(folder, [shard for _, shard in parts], info, num_workers)
    problems = [problem for report in reports for problem in report.problems]
    for name, split in info.splits.items():
        mine = [report for (own, _), report in zip(parts, reports, strict=True) if own == name]
        if not any(report.problems or report.unread for report in mine):
            found = tuple(sum(getattr(r, key) for r in mine) for key in ("num_labelled", "num_positive"))
            found = (sum(len(r.clip_ids) for r in mine), *found)
            expected = (split.num_clips, split.num_labelled, split.num_positive)
            if found != expected:
                problems.append(
                    f"split {name}: (clips, labelled, positive) are {found}, {records.CLIPS_FILE} says {expected}"
                )
    problems += _find_doubles(reports) + _find_strays(folder, info) + _verify_files(folder, info)
    counts = {
        "clips": sum(len(r.clip_ids) for r in reports),
        "videos": len({uid for r in reports for uid in r.video_uids}),
        "shards": len(parts),
        "bytes": sum(shard.bytes for _, shard in parts),
    }
    return problems, [report.unread for report in reports if report.unread], counts


def _read(
    folder: pathlib.Path, shards: list[records.Shard], info: records.ClipsInfo, num_workers: int
) -> list[ShardReport]:
    """Returns the report of each shard, read in `num_workers` processes.

    If one of these dies, what the others were reading or had yet to read is lost too. Each of these shards is then read in a
    process of its own, so that a shard that ends its reader can be told from the others.
    """
    slim = dataclasses.replace(info, splits={})  # small, since it is sent to a process with every shard
    reports: dict[int, ShardReport] = {}
    with tqdm(total=len(shards), unit="shard", desc="verify", disable=not sys.stderr.isatty()) as bar:
        pool = concurrent.futures.ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"))
        with pool, interrupts.ending_children(pool):
            jobs = {}
            with interrupts.held_back(), contextlib.suppress(concurrent.futures.BrokenExecutor):
                jobs.update((pool.submit(verify_shard, folder, shard, slim), i) for i, shard in enumerate(shards))
            for job in concurrent.futures.as_completed(jobs):
                with contextlib.suppress(concurrent.futures.BrokenExecutor, MemoryError):
                    reports[jobs[job]] = job.result()
                    bar.update()
        left = [i for i in range(len(shards)) if i not in reports]
        threads = concurrent.futures.ThreadPoolExecutor(num_workers, initializer=interrupts.block)
        with threads, interrupts.ending_children(threads):
            for i, report in zip(left, threads.map(lambda i: _read_alone(folder, shards[i], slim), left), strict=True):
                reports[i] = report
                bar.update()
    return [reports[i] for i in range(len(shards))]


def _read_alone(folder: pathlib.Path, shard: records.Shard, info: records.ClipsInfo) -> ShardReport:
    """Returns the report of a shard that a process of its own reads, even if this process dies."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_report, args=(theirs, verify_shard, folder, shard, info))
    with _starting:
        process.start()
    theirs.close()
    report = None
    with ours, contextlib.suppress(EOFError, OSError):  # the process died before or while it sent the report
        report = ours.recv()
    with _starting:
        process.join()
    if report is not None:
        return report
    status = process.exitcode
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    if status < 0 and -status not in _FROM_OUTSIDE:
        return ShardReport([f"{shard.file}: reading it ended the process ({how})"], [], [])
    why = f"its reader ended early ({how}), perhaps because memory ran out"
    told = f"{shard.file}: was not read and may be intact: {why}: use fewer --num_workers"
    return ShardReport([], [], [], unread=told)


def _send_report(pipe, read: Callable[..., ShardReport], *args) -> None:
    with contextlib.suppress(MemoryError):  # the pipe is then closed without a report
        pipe.send(read(*args))


def _find_doubles(reports: list[ShardReport]) -> list[str]:
    """Returns a line for every clip id that occurs twice and every video in more than one shard."""
    ids = collections.Counter(clip_id for report in reports for clip_id in report.clip_ids)
    homes = collections.Counter(uid for report in reports for uid in set(report.video_uids))
    problems = [f"clip {clip_id} occurs {n} times" for clip_id, n in ids.items() if n > 1]
    return problems + [f"video {uid} is in {n} shards: in two splits or twice in one" for uid, n in homes.items() if n > 1]


def _find_strays(folder: pathlib.Path, info: records.ClipsInfo) -> list[str]:
    """Returns a line for every shard file that `clips.json` does not name."""
    known = {shard.file for split in info.splits.values() for shard in split.shards}
    names = sorted(path.name for path in folder.glob("*.array_record-*") if not path.name.startswith("."))
    return [f"{name}: is not listed in {records.CLIPS_FILE}" for name in names if name not in known]


def _verify_files(folder: pathlib.Path, info: records.ClipsInfo) -> list[str]:
    """Returns the problems of the files other than shards, of the counts for TFDS, and of the sum of clips and rejects."""
    problems = []
    for name, expected in info.files.items():
        try:
            with (folder / pathlib.Path(name).name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected:
                problems.append(f"{name}: its SHA-256 is {digest}, {records.CLIPS_FILE} says {expected}")
        except OSError as error:
            problems.append(f"{name} can't be read: {_short(error)}")
    written = sum(split.num_clips for split in info.splits.values())
    if written + info.num_rejected != info.num_annotations:
        problems.append(
            f"{records.CLIPS_FILE}: {info.num_annotations} annotations, but {written} clips and "
            f"{info.num_rejected} rejects"
        )
    try:
        content = json.loads((folder / "dataset_info.json").read_text())
        lengths = {s["name"]: [int(n) for n in s["shardLengths"]] for s in content["splits"]}
        expected = {name: [s.num_clips for s in split.shards] for name, split in info.splits.items() if split.shards}
        if lengths != expected:
            problems.append(f"dataset_info.json counts {lengths}, {records.CLIPS_FILE} says {expected}")
    except _DAMAGE as error:
        problems.append(f"dataset_info.json can't be read: {type(error).__name__}: {_short(error)}")
    try:
        rows = (folder / records.REJECTED_FILE).read_text().splitlines()
        for i, line in enumerate(rows):
            if not {"clip_id", "video_uid", "reason"} <= set(json.loads(line)):
                problems.append(f"{records.REJECTED_FILE}, row {i + 1} lacks clip_id, video_uid or reason")
        if len(rows) != info.num_rejected:
            problems.append(f"{records.REJECTED_FILE}: {len(rows)} rows, {records.CLIPS_FILE} says {info.num_rejected}")
    except _DAMAGE as error:
        problems.append(f"{records.REJECTED_FILE} can't be read: {type(error).__name__}: {_short(error)}")
    return problems


def main(argv: list[str] | None = None) -> None:
    """Verifies the data set of the command line and ends the process with status 0, 1, 2, 3 or, after Ctrl-C, 130."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description=__doc__.split("\n")[0])
    parser.add_argument("clips", type=pathlib.Path, help="folder of a data set")
    parser.add_argument("--num_workers", type=int, default=0, help="number of processes; 0 means one per core")
    args = parser.parse_args(argv)
    if args.num_workers < 0:
        parser.error(f"--num_workers must not be negative, got {args.num_workers}")
    with terminal.errors_in_one_line(), terminal.interrupts():
        problems, unread, counts = verify(args.clips, args.num_workers or len(os.sched_getaffinity(0)))
    for line in problems + unread:
        print(terminal.printable(line))  # ids from the file may hold any characters
    told = ", ".join(f"{value:,} {name}" for name, value in counts.items())
    found = [f"{len(problems)} problem(s)"] * bool(problems) + [f"{len(unread)} shard(s) not read"] * bool(unread)
    print(f"{args.clips}: {told or 'not read'}; {', '.join(found) or 'intact'}")
    sys.exit(1 if problems else 3 if unread else 0)


if __name__ == "__main__":
    main()
