"""Writes clips into ArrayRecord shards and turns their folder into a TFDS data set, without TensorFlow.

A shard holds the clips of a fixed set of items, e.g. videos. Its task writes the clips of each item to a file of their own
(`data_prep.pieces`), joins these pieces in the order of videos and clip ids, and writes a report next to the shard. Shards,
pieces and reports get their names only when they are complete, so a killed run resumes after the last finished item. A rerun
keeps finished shards: those whose items, settings and bytes match their report. The numbers of clips written and annotations
rejected must add up to the annotations read, and files of an earlier conversion are removed. `data_prep.pipeline` runs the
tasks by Beam.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_prep import pieces, storage
from mc3_jax.data import records

_ATTEMPTS = 3  # to write a shard whose pieces another worker removes
REPORTS, PLANS = "reports", "plan"  # folders inside the data set, with one JSON file per shard
# Groups of one record suit random access. JPEG barely compresses further: Zstandard makes the files of a video data set
# 0.6 % smaller, but reading takes 1.4 times as long.
_OPTIONS = "group_size:1,uncompressed"
_SHARD_FILE = rf"(?P<name>\w+)-({'|'.join(records.SPLITS)})\.array_record-\d+-of-\d+"
# Files that make a folder a data set. They exist only while all shards that they name exist.
INDEX_FILES = (records.CLIPS_FILE, "dataset_info.json")
_METADATA = (*INDEX_FILES, "features.json", records.REJECTED_FILE)


@dataclasses.dataclass(frozen=True)
class Reject:
    """An annotation that gave no clip, and why. Rejects are counted by `reason`; `detail` holds what is particular to one."""

    clip_id: str
    video_uid: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
      split, index, num_shards: The shard's split, its number in this split, and the number of shards in the split.
      items: Inputs of `make_clips`, which gets one at a time; plain JSON values. Items of videos hold "video_bytes", the
        file's size or None if there is no file, and "video_version" (see `storage.File`).
      num_annotations: Number of clips and rejects that the items must give together.
    """

    split: str
    index: int
    num_shards: int
    items: tuple
    num_annotations: int

    def file(self, name: str) -> str:
        """Returns the shard's file name, in TFDS's format."""
        return f"{name}-{self.split}.array_record-{self.index:05d}-of-{self.num_shards:05d}"


# Function (item, settings) → the item's clips and rejects.
MakeClips = Callable[[object, dict], Iterator[records.Clip | Reject]]


def assign_shards(uids: list[str], num_shards: int) -> list[list[str]]:
    """Returns the uids of each shard, dealt out in turn in the order of their hashes, so that no shard is empty."""
    order = sorted(uids, key=lambda uid: hashlib.sha256(uid.encode()).digest())
    return [sorted(order[i::num_shards]) for i in range(min(num_shards, len(order)))]


def plan_of(task: ShardTask, settings: dict) -> str:
    """Returns everything that a shard's bytes depend on, as JSON; `read_plan` reads it."""
    content = {
        "schema_version": records.SCHEMA_VERSION,
        "task": dataclasses.asdict(task),
        "settings": pieces.lasting(settings),
    }
    return json.dumps(content, sort_keys=True)


def read_plan(content: str) -> tuple[ShardTask, dict]:
    """Returns the task and settings in JSON that `plan_of` made."""
    plan = json.loads(content)
    return ShardTask(**{**plan["task"], "items": tuple(plan["task"]["items"])}), plan["settings"]


def fingerprint(plan: str) -> str:
    return hashlib.sha256(plan.encode()).hexdigest()


def read_report(folder: storage.Path, file: str, fingerprint: str) -> dict | None:
    """Returns a shard's report if the shard exists and was made by the plan with this fingerprint, or else None.

    Of the shard only the file size is checked, its bytes are not read. A shard without clips need not exist, since `finish`
    removes the shards of a split without clips.
    """
    try:
        report = json.loads(storage.read(folder / REPORTS / f"{file}.json"))
        there = storage.size(folder / file)
        fits = report["fingerprint"] == fingerprint and (report["bytes"] == there or _is_gone(report, there))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):  # no report, or not one of ours
        return None
    return report if fits else None


def _is_gone(report: dict, there: int | None) -> bool:
    return there is None and report["num_clips"] == 0


def write_shard(task: ShardTask, folder: str, name: str, make_clips: MakeClips, settings: dict) -> dict:
    """Writes one shard unless it exists already, and returns its report.

    Args:
      task: The shard to write.
      folder: Folder of the data set, on a file system that all workers share or in a bucket.
      name: Name of the data set.
      make_clips: Function that cuts the clips of an item.
      settings: Settings for `make_clips`, plain JSON values. "scratch", if given, is the local folder for copies.

    Raises:
      ValueError: Two clips have the same id, the number of clips and rejects is not what the task says, or the shard read
        back holds another number of records than were written.
      OSError: A disk or bucket fails.
    """
    home, file = storage.as_path(folder), task.file(name)
    of_plan = fingerprint(plan_of(task, settings))
    report = read_report(home, file, of_plan)
    # A local shard is read in full, since a flipped byte would otherwise be found only in training. This takes as long as
    # the disk reads, far less than decoding again. Of a shard in a bucket only the size is checked.
    if report is not None and (
        storage.is_remote(home) or _is_gone(report, storage.size(home / file)) or report["sha256"] == sha256(home / file)
    ):
        return report
    storage.make_folder(home / pieces.FOLDER)
    storage.make_folder(home / REPORTS)
    for attempt in itertools.count(1):
        try:
            return _write(task, home, name, make_clips, settings, of_plan)
        except FileNotFoundError:
            # Another worker wrote this shard too, or another shard with the same item. It finished and removed a piece.
            report = read_report(home, file, of_plan)
            if report is not None:
                return report
            if attempt == _ATTEMPTS:
                raise


def _write(task: ShardTask, home: storage.Path, name: str, make_clips: MakeClips, settings: dict, of_plan: str) -> dict:
    """Writes one shard and its report, and removes its pieces; see `write_shard`."""
    spool, file, scratch = home / pieces.FOLDER, task.file(name), settings.get("scratch", "")
    known = pieces.find(storage.names(spool))
    with storage.scratch_folder(scratch) if storage.is_remote(home) else contextlib.nullcontext(spool) as local:
        made = [pieces.make(item, settings, make_clips, spool, known, local) for item in task.items]
        report = _summary(task, file, made) | {"fingerprint": of_plan}
        limits = pieces.limits_of(report["rejects"], settings)
        if limits:
            report["limits"] = limits
        with storage.writing(home / file, scratch) as aside:
            _join(made, aside)
            found = _num_records(aside)
            if found != report["num_clips"]:
                raise ValueError(
                    f"{file}: wrote {report['num_clips']} records but {found} can be read: is the disk full?"
                )
            report |= {"bytes": aside.stat().st_size, "sha256": sha256(aside)}
    storage.write(home / REPORTS / f"{file}.json", json.dumps(report).encode())
    for item, piece in zip(task.items, made, strict=True):
        storage.remove(spool / pieces.name_of(pieces.key_of(item, settings), piece))
    return report


def _summary(task: ShardTask, file: str, made: list[pieces.Piece]) -> dict:
    """Returns the report of a shard without its fingerprint, size and hash.

    Raises:
      ValueError: Two clips have the same id, or the number of clips and rejects is not what the task says.
    """
    clips = [clip for piece in made for clip in piece.clips]
    rejects = [reject for piece in made for reject in piece.rejects]
    twice = [clip_id for clip_id, n in collections.Counter(clip["clip_id"] for clip in clips).items() if n > 1]
    if twice:
        raise ValueError(f"two clips have the id {twice[0]}: ids must differ")
    if task.num_annotations != len(clips) + len(rejects):
        raise ValueError(
            f"{file}: {task.num_annotations} annotations gave {len(clips)} clips and {len(rejects)} rejects, which do not "
            "add up"
        )
    in_order = sorted(clips, key=_place)
    return {
        "schema_version": records.SCHEMA_VERSION, "split": task.split, "index": task.index, "file": file,
        "num_clips": len(clips), "num_labelled": sum(clip["label"] != records.UNKNOWN for clip in clips),
        "num_positive": sum(clip["label"] == 1 for clip in clips),
        "canvas_px": [max((clip["size_px"][i] for clip in clips), default=0) for i in (0, 1)],
        "video_clips": list(collections.Counter(clip["video_uid"] for clip in in_order).values()),
        "clip_samples": [clip["samples"] for clip in in_order],
        "rejects": sorted(rejects, key=lambda r: r["clip_id"]),
    }  # fmt: skip


def _place(clip: dict) -> tuple[str, str]:
    """Returns the key by which the clips of a shard are sorted."""
    return clip["video_uid"], clip["clip_id"]


def _join(made: list[pieces.Piece], path: pathlib.Path) -> None:
    """Writes the records of all pieces into one ArrayRecord file, sorted by video and clip id.

    Raises:
      OSError: A disk fails.
    """
    order = sorted(
        (*_place(clip), number, clip["start"], clip["length"])
        for number, piece in enumerate(made) for clip in piece.clips
    )  # fmt: skip
    try:
        with contextlib.closing(ArrayRecordWriter(str(path), _OPTIONS)) as writer:
            for number, part in itertools.groupby(order, key=lambda place: place[2]):
                with made[number].path.open("rb") as file:
                    for _, _, _, start, length in part:
                        file.seek(start)
                        writer.write(file.read(length))
    except RuntimeError as error:  # raised by the writer; holds the file's name and the kernel's message
        raise OSError(str(error)) from error


def _num_records(path: pathlib.Path) -> int:
    with contextlib.closing(ArrayRecordReader(str(path))) as reader:
        return reader.num_records()


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def prepare(folder: storage.Path, name: str) -> None:
    """Checks that the data set can be written to a folder.

    Raises:
      ValueError: The folder holds a data set with another name.
    """
    names = [re.fullmatch(_SHARD_FILE, file) for file in storage.names(folder)]
    others = {found["name"] for found in names if found} - {name}
    if others:
        raise ValueError(f"{folder} already holds the data set {min(others)!r}: choose another folder for {name!r}")


def feature_spec(info: records.ClipsInfo) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a clip, as `records.encode` writes it."""
    num_frames = info.num_intervals * info.num_candidates
    text = {key: tfds.features.Text() for key in ("clip_id", "video_uid", "narration", "source")}
    number = {
        key: tfds.features.Scalar(np.int64)
        for key in (
            "time_us", "start_us", "stop_us", "frame_height", "frame_width", "verb_id", "noun_id", "label", "class_id",
            "fold",
        )
    }  # fmt: skip
    return tfds.features.FeaturesDict(
        {
            **text,
            **number,
            "frames": tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg"), length=num_frames or None),
            "frame_times_us": tfds.features.Sequence(np.int64, length=num_frames or None),
            "audio": tfds.features.Text(),  # bytes: little-endian int16
        }
    )


def finish(
    reports: Iterable[dict], folder: storage.Path, info: records.ClipsInfo, rejects: list[Reject], num_in: int
) -> records.ClipsInfo:
    """Checks the sums, writes `clips.json`, `rejected.jsonl` and the TFDS metadata, and returns the completed info.

    Removes plans, pieces, and the shards and reports that an earlier conversion left in the folder.

    Args:
      reports: Reports of all shards; iterated over once.
      folder: Folder of the data set.
      info: Description of the data set; splits, canvas, files and counts are filled in here.
      rejects: Annotations rejected before any shard was written.
      num_in: Number of annotations read.

    Raises:
      ValueError: Clips and rejects do not add up to the annotations read, or there is no clip at all.
    """
    slim, counted = _write_rejects(reports, folder, rejects, num_in, info)
    for split in records.SPLITS:
        mine = sorted((r for r in slim if r["split"] == split), key=lambda r: r["index"])
        shards = [records.Shard(**{f.name: r[f.name] for f in dataclasses.fields(records.Shard)}) for r in mine]
        if not info.max_samples:  # all clips have `info.num_samples` samples
            shards = [dataclasses.replace(shard, clip_samples=[]) for shard in shards]
        sums = [sum(r[key] for r in mine) for key in ("num_clips", "num_labelled", "num_positive")]
        info.splits[split] = records.SplitInfo(*sums, shards if sums[0] else [])
        _settle_empty(shards, folder, there=sums[0] > 0)
    height, width = (max(report["canvas_px"][i] for report in slim) for i in (0, 1))
    info.canvas_px = (height, width)
    info.num_annotations, info.num_rejected = num_in, counted
    _remove_leftovers(folder, info.name, {report["file"] for report in slim})
    _write_index(folder, info)
    return info


def _settle_empty(shards: list[records.Shard], folder: storage.Path, there: bool) -> None:
    """Writes or removes those shards of a split that hold no clip, so that they exist only if `there`."""
    for path in (folder / shard.file for shard in shards if not shard.num_clips):
        if not there:
            storage.remove(path)
        elif storage.size(path) is None:  # removed when the whole split was without clips
            with storage.writing(path) as aside:
                _join([], aside)


def _write_rejects(
    reports: Iterable[dict], folder: storage.Path, rejects: list[Reject], num_in: int, info: records.ClipsInfo
) -> tuple[list[dict], int]:
    """Writes `rejected.jsonl` and its digest into `info`; returns the reports without their rejects, and how many there are.

    Raises:
      ValueError: As for `finish`.
    """
    slim, reasons, details = [], collections.Counter(), {}
    with storage.writing(folder / records.REJECTED_FILE) as aside:
        with aside.open("w") as file:

            def leave_out(rows: Iterable[dict]) -> None:
                for row in rows:
                    reasons[row["reason"]] += 1
                    details.setdefault(row["reason"], row["detail"])
                    file.write(json.dumps(row) + "\n")

            leave_out(map(vars, sorted(rejects, key=lambda r: (r.reason, r.clip_id))))  # millions for Ego4D
            for report in reports:
                leave_out(sorted(report["rejects"], key=lambda r: (r["reason"], r["clip_id"])))
                slim.append({key: value for key, value in report.items() if key != "rejects"})
        info.files[records.REJECTED_FILE] = sha256(aside)
        written, left_out = sum(report["num_clips"] for report in slim), reasons.total()
        if written + left_out != num_in:
            raise ValueError(
                f"{num_in} annotations gave {written} clips and {left_out} rejects, which do not add up"
            )
    if not written:
        told = ", ".join(
            f"{n} {reason}" + (f": {details[reason]}" if details[reason] else "") for reason, n in reasons.most_common(3)
        )
        raise ValueError(f"none of {num_in} annotations became a clip ({told}); see {folder / records.REJECTED_FILE}")
    return slim, left_out


def _write_index(folder: storage.Path, info: records.ClipsInfo) -> None:
    """Writes TFDS's metadata and finally `clips.json`, which holds the digests of these files."""
    with storage.scratch_folder() as local:
        for split in info.splits.values():
            for shard in split.shards:
                (local / shard.file).touch()  # TFDS looks for files with these names
        template = tfds.core.ShardedFileTemplate(str(local), dataset_name=info.name, filetype_suffix="array_record")
        splits = [
            tfds.core.SplitInfo(
                name=name, shard_lengths=[s.num_clips for s in split.shards],
                num_bytes=sum(s.bytes for s in split.shards), filename_template=template.replace(split=name),
            )
            for name, split in info.splits.items() if split.shards
        ]  # fmt: skip
        tfds.folder_dataset.write_metadata(
            data_dir=str(local), features=feature_spec(info), split_infos=splits, version="1.0.0", check_data=False,
            description="Clips of narrated egocentric video: frames, audio and narration around a moment.",
        )  # fmt: skip
        for path in sorted(local.glob("*.json")):
            info.files[path.name] = sha256(path)
            storage.write(folder / path.name, path.read_bytes())
        info.dump(local)
        storage.write(folder / records.CLIPS_FILE, (local / records.CLIPS_FILE).read_bytes())


def _remove_leftovers(folder: storage.Path, name: str, files: set[str]) -> None:
    """Removes files of this data set that a finished one doesn't need.

    These are shards that aren't among `files` and their reports, plans, pieces, and temporary files of killed writers.
    """
    for part in (folder, folder / REPORTS, folder / PLANS, folder / pieces.FOLDER):
        for file in storage.files(part):
            if "/" in file:  # the listing of a bucket includes the files in its folders
                continue
            aside = re.fullmatch(storage.TEMPORARY, file)
            plain = aside["file"] if aside else file
            shard = re.fullmatch(rf"({_SHARD_FILE})(\.json)?", plain)
            if shard and shard["name"] == name:
                ours = bool(aside) or part == folder / PLANS or shard[1] not in files
            elif part == folder / pieces.FOLDER:
                ours = re.fullmatch(r"[0-9a-f]{32}(-\d+-\d+)?\.piece", plain) is not None
            else:
                ours = aside is not None and part == folder and plain in _METADATA
            if ours:
                storage.remove(part / file)
    for part in (PLANS, pieces.FOLDER):
        with contextlib.suppress(OSError):  # the folder doesn't exist, or holds files of the user's own
            if not storage.is_remote(folder):
                os.rmdir(folder / part)
