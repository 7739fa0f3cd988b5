"""Ego4D to clips: `python -m data_prep.ego4d --root EGO4D --out CLIPS`.

Reads the folder that Ego4D's own CLI makes (or `data_prep.soundworld`): narrations of the camera wearer become clips
[t - 0.5 s, t + 1.0 s] in ArrayRecord shards. Labelled narrations, where there are any, are taken whole and become the
validation and test splits' labels. Both may come from others' files: `--narrations egoclip.csv`, `--labels
test_clips_11k.csv` (`data_prep/sources`). Every narration ends as a clip or as a row of rejected.jsonl, and the sums are
checked; `data_prep.guard` keeps a video's harm to the video. With `--runner=DataflowRunner` or the like, options it doesn't
know go to Beam.
"""

import argparse
import collections
import dataclasses
import itertools
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator

from absl import logging

from data_prep import guard, media, narrations, shards, video_files
from data_prep.sources import ego4dsounds, egoclip, files, narration_json, sounding_labels
from mc3_jax.data import records

_ANNOTATIONS = "v2/annotations"
_MAX_WINDOW_S = 60.0  # a shard's spool and a batch would burst long before
_MAX_LIMIT_S = 86400


def make_clips(item: dict, settings: dict) -> Iterator[records.Clip | shards.Reject]:
    """Yields a clip or a reject for every narration of a video.

    Args:
      item: {"video_uid", "narrations": [{"clip_id", "source", "time_s", "text", "label", "verb_id", "noun_id"}]}; see
        `plan_tasks`.
      settings: Of the command line; see `convert`.
    """
    uid, lines = item["video_uid"], item["narrations"]
    before, after = settings["window_s"]
    windows = []
    for line in lines:
        start, stop = line["time_s"] - before, line["time_s"] + after
        times = media.frame_times(start, stop, settings["num_intervals"], settings["num_candidates"])
        windows.append(media.Window(start, stop, times))
    path = _video_path(settings["video_dir"], uid)
    limits = guard.Limits(*settings["cpu_limit_s"], settings["memory_limit_mb"])
    for i, cut in guard.cut_windows(
        path, windows, short_side_px=settings["short_side_px"], quality=settings["jpeg_quality"], limits=limits
    ):
        line = lines[i]
        if isinstance(cut, str):
            reason, _, detail = cut.partition(": ")
            yield shards.Reject(line["clip_id"], uid, reason, detail)
            continue
        yield records.Clip(
            clip_id=line["clip_id"],
            video_uid=uid,
            narration=line["text"],
            source=line["source"],
            time_us=round(line["time_s"] * 1e6),
            start_us=round(windows[i].start_s * 1e6),
            stop_us=round(windows[i].stop_s * 1e6),
            frames=cut.frames,
            frame_times_us=cut.frame_times_us,
            frame_height=cut.height,
            frame_width=cut.width,
            audio=cut.audio,
            verb_id=line["verb_id"],
            noun_id=line["noun_id"],
            label=line["label"],
        )


def choose(
    found: list[narrations.Narration],
    labelled: list[narrations.Narration],
    splits: dict[str, str],
    *,
    clean_text: bool = False,
) -> tuple[dict[str, list[narrations.Narration]], list[shards.Reject]]:
    """Returns the narrations of each split and those left out, every narration once.

    Training takes the camera wearer's; a label list is taken whole; in validation and test only what the label list holds
    counts where there is one, else the wearer's. Of narrations with one video, time and text the first counts.

    Args:
      found: All narrations.
      labelled: The label list; a narration that is in both lists counts once.
      splits: Video uid → split; videos it lacks are split by the hash of their uid.
      clean_text: Whether tags and spare white space are taken off the texts.
    """
    chosen: dict[str, list[narrations.Narration]] = {name: [] for name in records.SPLITS}
    rejects = []
    ids = {n.clip_id for n in labelled}
    seen: set[str | tuple[str, int, str]] = set()
    listed = ((n, True) for n in labelled), ((n, False) for n in found if n.clip_id not in ids)
    for narration, whole in itertools.chain(*listed):
        split = splits.get(narration.video_uid) or narrations.split_by_hash(narration.video_uid)
        text = narrations.clean(narration.text) if clean_text else narration.text
        names: list[str | tuple[str, int, str]] = [narration.clip_id]
        if math.isfinite(narration.time_s):
            names.append((narration.video_uid, round(narration.time_s * 1e6), narration.text))
        reason = "same narration twice" if any(name in seen for name in names) else _problem(narration, text)
        if reason is None and not whole:
            speaker = narrations.who(narration.text)
            if speaker != "wearer":
                reason = {"other": "somebody else's action", "unsure": "narrator is unsure"}.get(
                    speaker, "nobody's tag"
                )
            elif labelled and split != "train":
                reason = f"no label, though in the {split} split"
        seen.update(names)
        if reason:
            rejects.append(shards.Reject(narration.clip_id, narration.video_uid, reason))
        else:
            chosen[split].append(dataclasses.replace(narration, text=text))
    return chosen, rejects


def _problem(narration: narrations.Narration, text: str) -> str | None:
    """Returns why a narration can't become a clip whoever tells it, or None; `text` is what the clip would say."""
    problem = narration.problem or video_files.problem_of(narration.video_uid)
    if problem:
        return problem
    if not text.strip():
        return "narration has no text"
    if re.search("[\ud800-\udfff]", text):
        return "narration is no valid Unicode"  # half a character, which JSON can escape and no file can hold
    return None if math.isfinite(narration.time_s) else "narration has no time"


def plan_tasks(
    chosen: dict[str, list[narrations.Narration]],
    verbs: narrations.Taxonomy,
    nouns: narrations.Taxonomy,
    num_shards: int,
    video_dir: pathlib.Path,
) -> list[shards.ShardTask]:
    """Returns the shards to write: `num_shards` over all splits, by their size, at least one each that has videos.

    The size of each video file is part of its shard's task, so a rerun after more videos came redoes their shards.
    """
    total = sum(map(len, chosen.values()))
    tasks = []
    for split, lines in chosen.items():
        by_video = collections.defaultdict(list)
        for n in lines:
            verb_id, noun_id = narrations.find_verb_and_noun(n.text, verbs, nouns, n.verb_tags, n.noun_tags)
            by_video[n.video_uid].append(
                {"clip_id": n.clip_id, "source": n.source, "time_s": n.time_s, "text": n.text, "label": n.label,
                 "verb_id": verb_id, "noun_id": noun_id}
            )  # fmt: skip
        count = max(round(num_shards * len(lines) / max(total, 1)), 1)
        groups = shards.assign_shards(list(by_video), count)
        for i, uids in enumerate(groups):
            items = tuple(
                {"video_uid": uid, "video_bytes": _size(_video_path(video_dir, uid)), "narrations": by_video[uid]}
                for uid in uids
            )
            tasks.append(shards.ShardTask(split, i, len(groups), items))
    return tasks


def _video_path(video_dir: str | pathlib.Path, uid: str) -> pathlib.Path:
    """Returns the video's file: own videos' uids are file names, Ego4D's lack the suffix."""
    path = pathlib.Path(video_dir) / uid
    return path if os.path.isfile(path) else path.with_name(f"{path.name}.mp4")


def _size(path: pathlib.Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # not there, or a name that no file can have
        return None


def add_clip_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options of what clips are and where they go; `name` is the data set's default."""
    add = parser.add_argument
    add("--out", required=True, type=pathlib.Path, help="folder of the data set to write")
    add("--name", default=name, help="name of the data set; shard files begin with it")
    add("--clean_text", action="store_true", help="store narrations without tags (#C C, #unsure) and spare white space")
    add(
        "--window", nargs=2, type=float, default=(0.5, 1.0), metavar=("BEFORE", "AFTER"), help="seconds around the time"
    )
    add("--num_intervals", type=int, default=4, help="T: equal intervals of a clip, one frame of each is used")
    add("--num_candidates", type=int, default=4, help="C: frames stored per interval; training draws one")
    add("--short_side", type=int, default=256, help="of the stored frames, px")
    add("--jpeg_quality", type=int, default=90)
    add("--num_shards", type=int, default=0, help="over all splits; 0 means one per 512 clips, at least 4 per worker")
    add("--num_workers", type=int, default=0, help="local processes; 0 means one per core")
    limits = guard.Limits()
    add(
        "--cpu_limit", nargs=2, type=float, default=(limits.video_cpu_s, limits.clip_cpu_s), metavar=("VIDEO", "CLIP"),
        help="CPU seconds that decoding may take: VIDEO and for each clip of it CLIP more (default %(default)s); "
        "of wall clock three times as many",
    )  # fmt: skip
    add("--memory_limit", type=int, default=limits.memory_mb, help="of a decoder, MiB (default %(default)s)")


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    # No abbreviations: a Beam option that begins like one of ours is Beam's.
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.ego4d", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--root", required=True, type=pathlib.Path, help="folder that Ego4D's CLI filled; holds ego4d.json and v2/")
    add_clip_options(parser, "ego4d_clips")
    add("--video_dir", default="v2/video_540ss", help="folder of mp4 files under --root")
    add(
        "--narrations",
        type=pathlib.Path,
        help=f"narration.json, all_narrations_redacted.json or egoclip.csv; default {_ANNOTATIONS}/narration.json",
    )
    add(
        "--labels",
        type=pathlib.Path,
        help=f"sounding-action labels or an Ego4DSounds list; default {_ANNOTATIONS}/sounding_labels.csv if there",
    )
    add("--labels_only", action="store_true", help="make clips of the label list alone")
    add(
        "--labels_split", choices=records.SPLITS, help="of the label list's videos where --splits does not name them"
    )
    add(
        "--splits", type=pathlib.Path, help=f"video_uid,split; default {_ANNOTATIONS}/splits.csv if there, else by hash"
    )
    return parser.parse_known_args(argv)


def check_clip_options(args: argparse.Namespace, beam_args: list[str]) -> None:
    """Checks the options of `add_clip_options` and that all others are Beam's.

    Raises:
      ValueError: One of them is wrong or unknown.
    """
    if beam_args and not any(arg.split("=")[0] == "--runner" for arg in beam_args):
        raise ValueError(f"unknown option(s) {' '.join(beam_args)}; Beam's own are taken together with --runner only")
    for name, least in (("num_intervals", 1), ("num_candidates", 1), ("num_shards", 0), ("num_workers", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.short_side < 16 or args.short_side % 2:
        raise ValueError(f"--short_side must be even and at least 16, got {args.short_side}")
    if not 1 <= args.jpeg_quality <= 100:
        raise ValueError(f"--jpeg_quality must be from 1 to 100, got {args.jpeg_quality}")
    if not (min(args.window) >= 0 and 0 < sum(args.window) <= _MAX_WINDOW_S):
        raise ValueError(
            f"--window must not be negative, empty or longer than {_MAX_WINDOW_S:g} s, got {tuple(args.window)}"
        )
    if not (0 < args.cpu_limit[0] <= _MAX_LIMIT_S and 0 <= args.cpu_limit[1] <= _MAX_LIMIT_S):
        raise ValueError(
            f"--cpu_limit must be seconds above 0 and at least 0, each at most {_MAX_LIMIT_S}, got {tuple(args.cpu_limit)}"
        )
    if not guard.MIN_MEMORY_MB <= args.memory_limit <= 1 << 20:
        raise ValueError(f"--memory_limit must be from {guard.MIN_MEMORY_MB} to {1 << 20} MiB, got {args.memory_limit}")
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", args.name):
        raise ValueError(f"--name must be letters, digits and _, got {args.name!r}")


def _check(args: argparse.Namespace, beam_args: list[str]) -> None:
    check_clip_options(args, beam_args)
    for folder in (args.root, args.root / args.video_dir):
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: point --root at what Ego4D's CLI filled")
    if next((args.root / args.video_dir).glob("*.mp4"), None) is None:
        raise ValueError(f"no mp4 files in {args.root / args.video_dir}: choose another --video_dir")


def read_annotations(
    args: argparse.Namespace, verbs: narrations.Taxonomy, nouns: narrations.Taxonomy
) -> tuple[list[narrations.Narration], list[narrations.Narration], dict[str, str]]:
    """Returns (narrations, label list, splits) of the files that the command line names; layouts are told from the files.

    Raises:
      ValueError: Missing or damaged files, or options that contradict each other.
    """
    folder = args.root / _ANNOTATIONS
    labels_path, splits_path = args.labels or folder / "sounding_labels.csv", args.splits or folder / "splits.csv"
    labelled = []
    if args.labels or labels_path.is_file():
        if files.is_tab_separated(labels_path):
            labelled = ego4dsounds.read(labels_path, verbs, nouns)
        else:
            labelled = sounding_labels.read(labels_path)
    elif args.labels_only or args.labels_split:
        raise ValueError(f"--labels_only and --labels_split want a label list: name one by --labels, no file {labels_path}")
    found = []
    narrations_path = args.narrations or folder / "narration.json"
    if args.labels_only:
        if args.narrations:
            raise ValueError("--labels_only reads no narrations: leave one of --labels_only and --narrations")
    elif narrations_path.suffix == ".json":
        found = narration_json.read(narrations_path)
    else:
        found = egoclip.read(narrations_path, verbs, nouns)
    splits = narrations.read_splits(splits_path) if args.splits or splits_path.is_file() else {}
    if args.labels_split:
        splits = {n.video_uid: args.labels_split for n in labelled} | splits
    return found, labelled, splits


def convert(args: argparse.Namespace, beam_args: list[str]) -> records.ClipsInfo:
    """Converts what the command line names; returns what `clips.json` says.

    Raises:
      ValueError: Bad options, missing or damaged annotation files, or lost records.
    """
    _check(args, beam_args)
    verbs, nouns = (
        narrations.read_taxonomy(args.root / _ANNOTATIONS / f"narration_{kind}_taxonomy.csv") for kind in ("verb", "noun")
    )
    found, labelled, splits = read_annotations(args, verbs, nouns)
    chosen, rejects = choose(found, labelled, splits, clean_text=args.clean_text)
    ids = {n.clip_id for n in labelled}
    num_in = len(labelled) + sum(n.clip_id not in ids for n in found)
    return write_clips(args, beam_args, (args.root / args.video_dir).absolute(), chosen, rejects, num_in, verbs, nouns)


def write_clips(
    args: argparse.Namespace,
    beam_args: list[str],
    video_dir: pathlib.Path,
    chosen: dict[str, list[narrations.Narration]],
    rejects: list[shards.Reject],
    num_in: int,
    verbs: narrations.Taxonomy,
    nouns: narrations.Taxonomy,
) -> records.ClipsInfo:
    """Writes the data set, prints what became of the narrations, and returns what `clips.json` says.

    Args:
      args: Has the options of `add_clip_options`.
      beam_args: Beam's own options.
      video_dir: Absolute path of the videos.
      chosen, rejects: See `choose`.
      num_in: Narrations read.
      verbs, nouns: Taxonomies, maybe empty.

    Raises:
      ValueError: Nothing to write, or lost records.
    """
    if not any(chosen.values()):
        raise ValueError(f"none of {num_in} narrations can become a clip: {_counts(rejects)}")
    workers = args.num_workers or os.cpu_count() or 1
    num_shards = args.num_shards or max(sum(map(len, chosen.values())) // 512, 4 * workers)
    tasks = plan_tasks(chosen, verbs, nouns, num_shards, video_dir)
    settings = {
        "video_dir": str(video_dir), "window_s": list(args.window),
        "num_intervals": args.num_intervals, "num_candidates": args.num_candidates, "short_side_px": args.short_side,
        "jpeg_quality": args.jpeg_quality, "cpu_limit_s": list(args.cpu_limit), "memory_limit_mb": args.memory_limit,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    reports = shards.run(tasks, str(args.out.absolute()), args.name, make_clips, settings, workers, beam_args)
    info = records.ClipsInfo(
        name=args.name, window_s=tuple(args.window), num_intervals=args.num_intervals,
        num_candidates=args.num_candidates, short_side_px=args.short_side, canvas_px=(args.short_side, args.short_side),
        num_samples=media.num_samples(sum(args.window)), verbs=verbs.labels, nouns=nouns.labels, splits={},
    )  # fmt: skip
    info = shards.finish(reports, args.out, info, rejects, num_in)
    left_out = rejects + [shards.Reject(**r) for report in reports for r in report["rejects"]]
    print(f"{num_in} narrations: " + ", ".join(f"{s.num_clips} {name}" for name, s in info.splits.items()))
    print(f"left out {len(left_out)} ({records.REJECTED_FILE}): {_counts(left_out)}")
    test = info.splits["test"]
    if test.num_labelled:
        print(f"test: {test.num_labelled} labelled, {test.num_positive / test.num_labelled:.1%} of them positive")
    return info


def _counts(rejects: list[shards.Reject]) -> str:
    counted = collections.Counter(r.reason for r in rejects)
    return ", ".join(f"{n} {reason}" for reason, n in counted.most_common()) or "none"


def main(argv: list[str] | None = None) -> None:
    """Converts, or ends with one line and status 2."""
    logging.set_verbosity(logging.WARNING)
    args, beam_args = _arguments(argv)
    try:
        convert(args, beam_args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
