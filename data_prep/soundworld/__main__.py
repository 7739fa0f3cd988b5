"""Makes a SoundWorld: `python -m data_prep.soundworld --out DIR --videos 160 --seed 0`.

The files have the layout of Ego4D's CLI, so `python -m data_prep.ego4d --root DIR` reads a SoundWorld as it reads Ego4D:
`v2/video_540ss/{uid}.mp4`, `ego4d.json`, `v2/annotations/{narration.json, narration_{verb,noun}_taxonomy.csv,
sounding_labels.csv, splits.csv}`. `truth.json` says what really happened; training never reads it.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import sys
import time

from tqdm import tqdm

from data_prep import interrupts
from data_prep.soundworld import annotate, plan, video_file
from mc3_jax import terminal

_RECORDINGS = (".wav", ".ogg", ".flac", ".mp3")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_prep.soundworld", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder to write the data set to")
    parser.add_argument("--videos", type=int, default=160, help="number of videos")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world")
    parser.add_argument("--video_seconds", type=float, default=60.0, help="mean length of a video, seconds")
    parser.add_argument("--short_side", type=int, default=112, help="height of the pictures, px; even")
    parser.add_argument("--num_workers", type=int, default=0, help="number of processes; 0 means one per core")
    parser.add_argument("--ambience", type=pathlib.Path, help="folder of real recordings to mix in quietly")
    args = parser.parse_args(argv)
    if args.videos < 1:
        parser.error(f"--videos must be at least 1, got {args.videos}")
    if args.short_side < 64 or args.short_side % 2:
        parser.error(f"--short_side must be even and at least 64, got {args.short_side}")
    if not 8 <= args.video_seconds <= 36_000:
        parser.error(f"--video_seconds must be from 8 to 36000, got {args.video_seconds}")
    if args.num_workers < 0 or args.seed < 0:
        parser.error(f"--num_workers and --seed must not be negative, got {args.num_workers} and {args.seed}")
    if args.ambience is not None and not args.ambience.is_dir():
        parser.error(f"--ambience: no folder {args.ambience}: choose another")
    return args


def main(argv: list[str] | None = None) -> None:
    """Makes the world that the command line describes; an error ends it with one line and status 2, Ctrl-C with 130."""
    args = _arguments(argv)
    with terminal.errors_in_one_line(), terminal.interrupts("interrupted: run the same command again to continue"):
        make(args)


def make(args: argparse.Namespace) -> None:
    """Makes the videos and annotations of a world, on all cores unless told otherwise; existing videos are kept.

    Raises:
      ValueError: The folder already holds another world, or the ambience folder no recording or one that can't be read.
    """
    found = sorted(args.ambience.rglob("*")) if args.ambience else []
    ambience = [str(p) for p in found if p.suffix.lower() in _RECORDINGS]
    if args.ambience and not ambience:
        raise ValueError(f"--ambience: no {', '.join(_RECORDINGS)} files in {args.ambience}")
    names = [os.path.relpath(path, args.ambience) for path in ambience]
    videos = [plan.plan_video(args.seed, i, args.video_seconds, args.short_side) for i in range(args.videos)]
    annotate.check_same_world(args.out, videos, args.seed, names)
    folder = args.out / "v2" / "video_540ss"
    folder.mkdir(parents=True, exist_ok=True)
    annotate.write_annotations(args.out, videos, args.seed, names)
    workers = args.num_workers or len(os.sched_getaffinity(0))
    began = time.monotonic()
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    with pool, interrupts.ending_children(pool):
        with interrupts.held_back():
            jobs = [pool.submit(video_file.write_video, video, str(folder), ambience) for video in videos]
        done = concurrent.futures.as_completed(jobs)
        bar = tqdm(done, total=len(jobs), unit="video", desc="SoundWorld", disable=not sys.stderr.isatty())
        try:
            seconds = sum(job.result() for job in bar)
        except Exception:
            pool.shutdown(cancel_futures=True)  # otherwise the error is reported only after all other videos
            raise
    elapsed = time.monotonic() - began
    actions = sum(len(v.segments) for v in videos)
    rate = seconds / elapsed / workers
    print(f"{len(videos)} videos, {actions} actions, {seconds:.0f} s of video in {elapsed:.0f} s "
          f"({rate:.1f} video-seconds per core-second) -> {args.out}")  # fmt: skip


if __name__ == "__main__":
    main()
