"""Ego4D to clips: `python -m data_prep.ego4d --root EGO4D --out CLIPS`.

Reads the folder that Ego4D's own CLI (or `data_prep.soundworld`) makes. Narrations of the camera wearer, all of them or a
sample (`--max_train_clips`), become clips [t - 0.5 s, t + 1.0 s] in ArrayRecord shards. A label list, if there is one, is
taken whole and becomes validation and test; its videos are not trained on unless you say so. Both may come from others'
files: `--narrations egoclip.csv`, `--labels test_clips_11k.csv` (`data_prep/sources`). Every row of these files ends as a
clip or as a row of rejected.jsonl, and the sums are checked; of a narration in both lists, the label list's row is the clip.
`data_prep.guard` keeps a bad video from harming others. With `--runner=DataflowRunner` or the like, options that this command
doesn't know go to Beam; folders and files may be `gs://` or `s3://`.
"""

import argparse
import dataclasses
import os
import re

from data_prep import command, narrated, narrations, storage, video_files
from data_prep.sources import ego4d_json, ego4dsounds, egoclip, files, narration_json, sounding_labels
from mc3_jax.data import records

_DOWNLOADS = "v2"
_ANNOTATIONS = f"{_DOWNLOADS}/annotations"
_CUT = "clips"  # Ego4D's folder of pieces with uids of their own, by which no narration names a video
_HELD_OUT = "validation+test"
_UID = re.compile(r"[\w-]+", re.ASCII)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("ego4d", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--root", required=True, type=storage.parse, help="folder that Ego4D's CLI filled; holds ego4d.json and v2/")
    narrated.add_options(parser, "ego4d_clips")
    add("--video_dir", default=f"{_DOWNLOADS}/video_540ss", help="folder of mp4 files under --root, such as v2/full_scale")
    add(
        "--narrations",
        type=storage.parse,
        help=f"narration.json, all_narrations_redacted.json or egoclip.csv; default {_ANNOTATIONS}/narration.json",
    )
    add(
        "--labels",
        type=storage.parse,
        help=f"sounding-action labels or an Ego4DSounds list; default {_ANNOTATIONS}/sounding_labels.csv if there",
    )
    add("--labels_only", action="store_true", help="make clips of the label list alone")
    add(
        "--labels_split",
        choices=(*records.SPLITS, _HELD_OUT),
        help="split of those of the label list's videos that --splits does not name; "
        f"default {_HELD_OUT}, one in eleven in validation",
    )
    add(
        "--splits",
        type=storage.parse,
        help=f"CSV with columns video_uid, split; default {_ANNOTATIONS}/splits.csv if there; videos it does not name are "
        "held out if they are in the label list and trained on otherwise; without a label list all are split by hash",
    )
    return parser


def _check(args: argparse.Namespace, beam_args: list[str]) -> None:
    narrated.check_options(args, beam_args)
    folder = args.root / args.video_dir
    if not storage.is_folder(folder):
        for above in (args.root, args.root / _DOWNLOADS):
            if not storage.is_folder(above):
                raise ValueError(f"no folder {above}: point --root at what Ego4D's CLI filled")
        there = {path.parent.name for path in (args.root / _DOWNLOADS).glob("*/*.mp4")} - {_CUT}
        names = " or ".join(f"--video_dir {_DOWNLOADS}/{name}" for name in sorted(there))
        fix = f"mp4 files are elsewhere, say {names}" if there else "download videos, or name their folder by --video_dir"
        raise ValueError(f"no folder {folder}: {fix}")
    # A bucket's files are asked for; `glob` takes a local folder that may not be listed for an empty one.
    names = [path.name for path in folder.glob("*.mp4")] if storage.is_remote(folder) else os.listdir(folder)
    if not any(name.endswith(".mp4") for name in names):
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
    if args.labels or storage.is_file(labels_path):
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
    named = narrations.read_splits(splits_path) if args.splits or storage.is_file(splits_path) else None
    splits = named or {}
    if args.labels_split in records.SPLITS:  # else `narrated.choose` holds them out
        splits = {n.video_uid: args.labels_split for n in labelled} | splits
    found, labelled = _with_known_uids(found), _with_known_uids(labelled)
    if (args.labels or storage.is_file(labels_path)) and all(n.problem for n in labelled):
        first = f"of {labelled[0].video_uid!r}, which stands first: {labelled[0].problem}" if labelled else "it has no rows"
        raise ValueError(f"no row of {labels_path} can be used: {first}; mend it, or convert without a label list")
    if named is not None:
        narrated.check_splits(splits_path, named, splits, found + labelled)
    return found, labelled, splits


def _with_known_uids(found: list[narrations.Narration]) -> list[narrations.Narration]:
    """Returns narrations, those whose video has no uid such as Ego4D's with that as their problem.

    "a.mp4" and "./a" mean the file of "a", and would come into splits of their own.
    """

    def problem_of(n: narrations.Narration) -> str:
        if re.fullmatch(_UID, n.video_uid):
            return n.problem
        return n.problem or video_files.problem_of(n.video_uid) or "video name is no Ego4D uid"

    return [n if n.problem == (problem := problem_of(n)) else dataclasses.replace(n, problem=problem) for n in found]


def _without_silent(found: list[narrations.Narration], path: storage.Path) -> list[narrations.Narration]:
    """Returns narrations, those of videos without audio by Ego4D's own word with that as their problem.

    Of 3,600 hours 1,487 have none, and a sample of all would lose as much of itself.
    """
    silent = ego4d_json.read_silent(path) if storage.is_file(path) else set()
    return [
        n if n.problem or n.video_uid not in silent else dataclasses.replace(n, problem="no audio stream") for n in found
    ]


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
    if args.max_train_clips:
        found = _without_silent(found, args.root / "ego4d.json")
    chosen, rejects = narrated.choose(found, labelled, splits, clean_text=args.clean_text)
    num_in = len(found) + len(labelled)  # counted before anything is chosen; one in both is two rows
    video_dir = storage.absolute(args.root / args.video_dir)
    return narrated.write_clips(args, beam_args, video_dir, chosen, rejects, num_in, verbs, nouns)


def main(argv: list[str] | None = None) -> None:
    """Converts, or ends with one line and status 2."""
    command.run(_parser(), convert, argv)


if __name__ == "__main__":
    main()
