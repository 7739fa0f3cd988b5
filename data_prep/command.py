"""What the commands that write clips share: their options, the writing of the data set, and error messages and statuses."""

import argparse
import collections
import difflib
import os
import pathlib
import re
from collections.abc import Callable, Iterator

from absl import logging

from data_prep import estimate, guard, pipeline, shards, storage, streams
from mc3_jax import terminal
from mc3_jax.data import records

_MAX_LIMIT_S = 86400
_MAX_SHORT_SIDE_PX = 4320  # that of 8K; a canvas has at most 65,535 px, and a panorama is many times wider than high
# Workers take whole shards. There are many, so that nobody waits long for the last one. Their number does not depend on the
# number of workers, so that a run resumed with another number of workers finishes the same shards.
_SHARD_CLIPS, _MIN_SHARDS = 512, 32


def parser_of(module: str, description: str) -> argparse.ArgumentParser:
    """Returns the parser of `python -m data_prep.<module>`."""
    # No abbreviations, since a Beam option may be the beginning of one of ours.
    return argparse.ArgumentParser(prog=f"python -m data_prep.{module}", description=description, allow_abbrev=False)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options that all commands share; `name` is the data set's default name."""
    add = parser.add_argument
    add("--out", required=True, type=storage.parse, help="folder to write the data set to; may be gs:// or s3://")
    add("--name", default=name, help="name of the data set; the names of shard files begin with it")
    add(
        "--num_shards", type=int, default=0,
        help=f"number of shards, all splits together; 0 means one per {_SHARD_CLIPS} clips, but at least {_MIN_SHARDS}",
    )  # fmt: skip
    add("--num_workers", type=int, default=0, help="number of local processes; 0 means one per core")
    limits = guard.Limits()
    add(
        "--cpu_limit", nargs=2, type=float, default=(limits.video_cpu_s, limits.clip_cpu_s), metavar=("VIDEO", "CLIP"),
        help="limit of CPU seconds for decoding a video: VIDEO plus CLIP for each of its clips (default "
        f"{limits.video_cpu_s:g} and {limits.clip_cpu_s:g}); the limit of wall-clock time is three times as long",
    )  # fmt: skip
    add("--memory_limit", type=int, default=limits.memory_mb, help="memory limit of a decoder, MiB (default %(default)s)")
    add("--dry_run", action="store_true", help="print what would be done, without decoding or writing anything")
    add(
        "--part", metavar="I/N",
        help="write only shards I, I + N, I + 2 N, ...; afterwards the same command without --part assembles the data set",
    )  # fmt: skip
    add(
        "--scratch", type=_folder,
        help="local folder for temporary copies of files in buckets; default: the system's temporary folder",
    )  # fmt: skip


def _folder(text: str) -> pathlib.Path:
    return pathlib.Path(storage.parse(text))


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for video frames, of commands whose clips hold some."""
    add = parser.add_argument
    add("--num_intervals", type=int, default=4, help="number T of equal intervals per clip; a model sees one frame of each")
    add("--num_candidates", type=int, default=4, help="number C of frames stored per interval; training draws one of them")
    add("--short_side", type=int, default=256, help="short side of the stored frames, px")
    add("--jpeg_quality", type=int, default=90, help="JPEG quality of the stored frames, 1 to 100 (default %(default)s)")


def check_picture_options(args: argparse.Namespace) -> None:
    """Checks the options of `add_picture_options`.

    Raises:
      ValueError: One of them is wrong.
    """
    for name in ("num_intervals", "num_candidates"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 16 <= args.short_side <= _MAX_SHORT_SIDE_PX or args.short_side % 2:
        raise ValueError(f"--short_side must be even and from 16 to {_MAX_SHORT_SIDE_PX}, got {args.short_side}")
    if not 1 <= args.jpeg_quality <= 100:
        raise ValueError(f"--jpeg_quality must be from 1 to 100, got {args.jpeg_quality}")


def check_options(args: argparse.Namespace, beam_args: list[str]) -> None:
    """Checks the options of `add_options`, and Beam's.

    Raises:
      ValueError: One of them is wrong, or Beam's job server or Docker does not answer.
    """
    if beam_args and not args.dry_run:
        pipeline.check_place(beam_args)
    for name in ("num_shards", "num_workers"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be at least 0, got {getattr(args, name)}")
    if not (0 < args.cpu_limit[0] <= _MAX_LIMIT_S and 0 <= args.cpu_limit[1] <= _MAX_LIMIT_S):
        raise ValueError(
            f"--cpu_limit must be two numbers of seconds, the first above 0, the second at least 0, both at most "
            f"{_MAX_LIMIT_S}, got {tuple(args.cpu_limit)}"
        )
    if not guard.MIN_MEMORY_MB <= args.memory_limit <= 1 << 20:
        raise ValueError(f"--memory_limit must be from {guard.MIN_MEMORY_MB} to {1 << 20} MiB, got {args.memory_limit}")
    part_of(args)
    if args.scratch and not args.scratch.is_dir():
        raise ValueError(f"no folder {args.scratch}: make it or choose another --scratch")
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", args.name):
        raise ValueError(f"--name must be a letter followed by letters, digits and _, got {args.name!r}")


def _check_names(parser: argparse.ArgumentParser, others: list[str]) -> None:
    """Checks that the options which the parser does not know are Beam's.

    Raises:
      ValueError: Beam does not know one of them either, or `--runner` is not among them.
    """
    ours = sorted(parser._option_string_actions)
    if others and not any(arg.split("=")[0] == "--runner" for arg in others):
        close = difflib.get_close_matches(others[0].split("=")[0], ours, 1)
        raise ValueError(
            f"unknown option(s) {' '.join(others)}; Beam's own are accepted only together with --runner"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    if others:
        pipeline.check_names(others, ours)


def write(
    args: argparse.Namespace, beam_args: list[str], tasks: list[shards.ShardTask], make_clips: shards.MakeClips,
    settings: dict, info: records.ClipsInfo, rejects: list[shards.Reject], num_in: int,
) -> records.ClipsInfo:  # fmt: skip
    """Writes the data set, prints the numbers of clips and rejects, and returns the content of `clips.json`.

    With `--dry_run` it only prints what would be done, with `--part` it writes some of the shards. Both return `info`.

    Args:
      args: Parsed options, those of `add_options` among them.
      beam_args: Beam's own options.
      tasks, make_clips, settings: See `shards.write_shard`.
      info: Description of the data set; splits and canvas are filled in here.
      rejects: Annotations rejected before any shard is written.
      num_in: Number of annotations read.

    Raises:
      ValueError: There is nothing to write, `--out` is a file, records were lost, the folder holds another data set, or
        this machine limits processes to less than a decoder needs.
    """
    left_out = collections.Counter(r.reason for r in rejects)
    if not tasks:
        folder = settings.get("video_dir", settings.get("media_dir"))
        first = f"; the first belongs to {rejects[0].video_uid!r} in {folder}" if rejects else ""
        raise ValueError(f"none of {num_in} annotations can become a clip: {_told(left_out)}{first}")
    out = storage.absolute(args.out)
    if not storage.is_remote(out) and out.is_file():
        raise ValueError(f"--out {args.out} is a file: name a folder")
    first, step = part_of(args)
    mine = tasks[first::step]
    if args.dry_run:
        shards.prepare(out, args.name)
        if args.part:
            print(f"part {args.part}: {len(mine)} of {len(tasks)} shards")
        if mine:
            print(estimate.tell(mine, info, rejects, num_workers(args)))
        return info
    storage.make_folder(out)
    if not beam_args:
        items = (item for task in mine for item in task.items)
        most = max((len(item.get("narrations") or item["sounds"]) for item in items), default=0)
        guard.check_machine(guard.Limits(*args.cpu_limit, args.memory_limit), most)
    settings = settings | {"scratch": str(args.scratch or "")}
    reports = pipeline.run(mine, str(out), args.name, make_clips, settings, num_workers(args), beam_args)
    if args.part:
        written = sum(1 for _ in reports)
        print(f"part {args.part}: {written} of {len(tasks)} shards written; after all parts, run the command without --part")
        return info
    info = shards.finish(_counted(reports, left_out), out, info, rejects, num_in)
    print(f"{num_in} annotations: " + ", ".join(f"{s.num_clips} {name}" for name, s in info.splits.items()))
    print(f"rejected {left_out.total()} ({records.REJECTED_FILE}): {_told(left_out)}")
    if left_out[streams.UNREADABLE]:
        print("run the same command again to retry the files that could not be read")
    for name, split in info.splits.items():
        if split.num_labelled:
            print(f"{name}: {split.num_labelled} labelled, {split.num_positive / split.num_labelled:.1%} of them positive")
    return info


def _counted(reports: Iterator[dict], left_out: collections.Counter) -> Iterator[dict]:
    """Yields the reports and counts the reasons of their rejects in `left_out`."""
    for report in reports:
        left_out.update(r["reason"] for r in report["rejects"])
        yield report


def part_of(args: argparse.Namespace) -> tuple[int, int]:
    """Returns (I, N) of `--part I/N`, or (0, 1) without the option.

    Raises:
      ValueError: The option's value has another form, or I is not below N.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", args.part or "0/1")
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--part must be I/N with I from 0 to N - 1, got {args.part!r}")
    return int(found[1]), int(found[2])


def num_workers(args: argparse.Namespace) -> int:
    """Returns the number of local processes: `--num_workers`, or one per core."""
    return args.num_workers or len(os.sched_getaffinity(0))


def num_shards(args: argparse.Namespace, num_clips: int) -> int:
    """Returns the number of shards over all splits: `--num_shards`, or a default that depends on the number of clips."""
    return args.num_shards or max(num_clips // _SHARD_CLIPS, _MIN_SHARDS)


def _told(counted: collections.Counter) -> str:
    return ", ".join(f"{n} {terminal.printable(reason)}" for reason, n in counted.most_common()) or "none"


def run(
    parser: argparse.ArgumentParser, convert: Callable[[argparse.Namespace, list[str]], records.ClipsInfo],
    argv: list[str] | None,
) -> None:  # fmt: skip
    """Runs a command. An error ends the process with one line and status 2, Ctrl-C with status 130.

    Args:
      parser: Parser of the command line. Options that it does not know are taken for Beam's.
      convert: Function (options, Beam's options) → content of `clips.json`.
      argv: Command line; None takes the process's own.
    """
    logging.set_verbosity(logging.WARNING)
    args, beam_args = parser.parse_known_args(argv)
    resume = "interrupted: run the same command again to resume after the last finished video"
    with terminal.errors_in_one_line(), terminal.interrupts(resume):
        _check_names(parser, beam_args)
        convert(args, beam_args)
