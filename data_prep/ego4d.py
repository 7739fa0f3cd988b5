"""Ego4D to clips: `python -m data_prep.ego4d --root EGO4D --out CLIPS`.

Reads the folder that Ego4D's own CLI (or `data_prep.soundworld`) makes. `ego4d.json` in it says which videos are silent,
redacted, stereoscopic or recorded at the same time. Narrations of the camera wearer, all of them or a sample
(`--max_train_clips`), become clips [t - 0.5 s, t + 1.0 s] in ArrayRecord shards. If there is a label list, all of it is used
and becomes validation and test. Its videos are not trained on unless `--splits` or `--labels_split` says so. Narrations and
labels may also come from files of other projects: `--narrations egoclip.csv`, `--labels test_clips_11k.csv`
(`data_prep/sources`). Every row of these files becomes a clip or a row of rejected.jsonl, and the sums are checked. If a
narration is in both lists, the label list's row becomes the clip. `data_prep.guard` keeps a bad video from harming others.
With `--runner=DataflowRunner` or the like, options that this command doesn't know are passed to Beam. Folders and files may
be `gs://` or `s3://`.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable

from data_prep import command, narrated, narrations, storage, video_files
from data_prep.sources import ego4d_json, ego4dsounds, egoclip, files, narration_json, sounding_labels
from mc3_jax.data import records

_DOWNLOADS = "v2"
_ANNOTATIONS = f"{_DOWNLOADS}/annotations"
_CUT = "clips"  # Ego4D's folder of cut pieces of videos; they have uids of their own, which no narration uses
_HELD_OUT = "validation+test"
_UID = re.compile(r"[\w-]+", re.ASCII)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("ego4d", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--root", required=True, type=storage.parse, help="folder made by Ego4D's CLI; holds ego4d.json and v2/")
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
        help=f"label list: sounding-action labels or Ego4DSounds; default {_ANNOTATIONS}/sounding_labels.csv if it exists",
    )
    add("--labels_only", action="store_true", help="make clips only of the label list")
    add(
        "--labels_split",
        choices=(*records.SPLITS, _HELD_OUT),
        help="split for the label list's videos that --splits does not name; "
        f"default {_HELD_OUT}, with one video in eleven in validation",
    )
    add(
        "--splits",
        type=storage.parse,
        help=f"CSV with columns video_uid, split; default {_ANNOTATIONS}/splits.csv if it exists; videos it does not name "
        "go to validation and test if they are in the label list, else to train; without a label list a hash decides",
    )
    return parser


def _check(args: argparse.Namespace, beam_args: list[str]) -> None:
    narrated.check_options(args, beam_args)
    folder = args.root / args.video_dir
    if not storage.is_folder(folder):
        for above in (args.root, args.root / _DOWNLOADS):
            if not storage.is_folder(above):
                raise ValueError(f"no folder {above}: point --root at the folder made by Ego4D's CLI")
        there = {path.parent.name for path in (args.root / _DOWNLOADS).glob("*/*.mp4")} - {_CUT}
        names = " or ".join(f"--video_dir {_DOWNLOADS}/{name}" for name in sorted(there))
        fix = f"mp4 files are elsewhere, use {names}" if there else "download videos, or name their folder by --video_dir"
        raise ValueError(f"no folder {folder}: {fix}")
    # In a bucket the files are searched for. In a local folder `glob` would hide that the folder can't be listed.
    names = [path.name for path in folder.glob("*.mp4")] if storage.is_remote(folder) else os.listdir(folder)
    if not any(name.endswith(".mp4") for name in names):
        raise ValueError(f"no mp4 files in {args.root / args.video_dir}: choose another --video_dir")


def read_annotations(
    args: argparse.Namespace, verbs: narrations.Taxonomy, nouns: narrations.Taxonomy
) -> tuple[list[narrations.Narration], list[narrations.Narration], dict[str, str]]:
    """Returns (narrations, label list, video uid → split) from the files that the command line names.

    The layout of each file is recognised from its suffix or content.

    Raises:
      ValueError: Files are missing, damaged or about other videos, or options contradict each other.
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
        raise ValueError(
            f"--labels_only and --labels_split need a label list: name one by --labels (there is no file {labels_path})"
        )
    found = []
    narrations_path = args.narrations or folder / "narration.json"
    if args.labels_only:
        if args.narrations:
            raise ValueError("--labels_only reads no narrations: drop one of --labels_only and --narrations")
    elif narrations_path.suffix == ".json":
        found = narration_json.read(narrations_path)
    else:
        found = egoclip.read(narrations_path, verbs, nouns)
    named = narrations.read_splits(splits_path) if args.splits or storage.is_file(splits_path) else None
    splits = named or {}
    if args.labels_split in records.SPLITS:  # otherwise `narrated.choose` puts them into validation and test
        splits = {n.video_uid: args.labels_split for n in labelled} | splits
    found, labelled = _with_known_uids(found), _with_known_uids(labelled)
    if (args.labels or storage.is_file(labels_path)) and all(n.problem for n in labelled):
        first = f"{labelled[0].problem} (first row, video {labelled[0].video_uid!r})" if labelled else "it has no rows"
        raise ValueError(f"no row of {labels_path} can be used: {first}; correct it, or convert without a label list")
    if named is not None:
        narrated.check_splits(splits_path, named, splits, found + labelled)
    return found, labelled, splits


def _with_known_uids(found: list[narrations.Narration]) -> list[narrations.Narration]:
    """Returns the narrations, with a `problem` set on those whose video uid does not look like one of Ego4D's.

    "a.mp4" and "./a" mean the same file as "a", but would be put into splits of their own.
    """

    def problem_of(n: narrations.Narration) -> str:
        if re.fullmatch(_UID, n.video_uid):
            return n.problem
        return n.problem or video_files.problem_of(n.video_uid) or "video name is not an Ego4D uid"

    return _with_problems(found, problem_of)


def _with_problems(
    found: list[narrations.Narration], problem_of: Callable[[narrations.Narration], str]
) -> list[narrations.Narration]:
    return [n if n.problem == (problem := problem_of(n)) else dataclasses.replace(n, problem=problem) for n in found]


def _read_metadata(args: argparse.Namespace) -> ego4d_json.Metadata:
    """Returns what `ego4d.json` says; nothing, with a warning, if the file is missing.

    Raises:
      ValueError: The file is damaged, or missing although `--max_train_clips` needs it.
    """
    path = args.root / "ego4d.json"
    if storage.is_file(path):
        return ego4d_json.read(path)
    fix = "download it with Ego4D's CLI (--datasets annotations)"
    if args.max_train_clips:
        raise ValueError(
            f"no file {path}: --max_train_clips needs it, so as not to draw clips of videos without audio; {fix} or convert "
            "all clips"
        )
    print(
        f"warning: no file {path}: it is not known which videos are silent, redacted, stereoscopic or of the same moment, so "
        f"blank pictures and double views may become clips; {fix}",
        file=sys.stderr,
    )
    return ego4d_json.Metadata()


def _with_metadata(
    found: list[narrations.Narration], metadata: ego4d_json.Metadata, args: argparse.Namespace
) -> list[narrations.Narration]:
    """Returns the narrations, with a `problem` set on those whose clip would hold redacted pictures.

    If a sample is drawn, those of videos without audio get a `problem` too: 1,487 of the 3,600 hours have no audio, so a
    sample of all narrations would lose the same share of its clips.
    """
    before_s, after_s = args.window
    silent = metadata.silent if args.max_train_clips else ()

    def problem_of(n: narrations.Narration) -> str:
        if n.problem:
            return n.problem
        if n.video_uid in silent:
            return "no audio stream"
        return "redacted by Ego4D" if metadata.is_redacted(n.video_uid, n.time_s - before_s, n.time_s + after_s) else ""

    return _with_problems(found, problem_of)


def convert(args: argparse.Namespace, beam_args: list[str]) -> records.ClipsInfo:
    """Converts the data that the command line names; returns the content of `clips.json`.

    Raises:
      ValueError: Bad options, missing or damaged annotation files, or lost records.
    """
    _check(args, beam_args)
    verbs, nouns = (
        narrations.read_taxonomy(args.root / _ANNOTATIONS / f"narration_{kind}_taxonomy.csv") for kind in ("verb", "noun")
    )
    metadata = _read_metadata(args)
    found, labelled, splits = read_annotations(args, verbs, nouns)
    found, labelled = (_with_metadata(rows, metadata, args) for rows in (found, labelled))
    chosen, rejects = narrated.choose(found, labelled, splits, groups=metadata.groups, clean_text=args.clean_text)
    num_in = len(found) + len(labelled)  # all rows read; a narration in both lists counts twice
    video_dir = storage.absolute(args.root / args.video_dir)
    stereo = metadata.stereo
    return narrated.write_clips(args, beam_args, video_dir, chosen, rejects, num_in, verbs, nouns, stereo=stereo)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; after an error the process ends with one line and status 2."""
    command.run(_parser(), convert, argv)


if __name__ == "__main__":
    main()
