"""Writes clips into ArrayRecord shards by Beam, and makes of the folder a TFDS data set, without TensorFlow.

A shard is a fixed set of videos. Beam maps over shards and moves no payload: a task cuts its videos' clips into a spool
file, then writes its shard, video by video in the order of clip ids, syncs and renames it, and leaves a report beside it.
A rerun takes finished shards as they are: those whose videos, settings and bytes are what their report says. What was
read, written and left out must add up, and nothing of an earlier conversion stays.
"""

import builtins
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mc3_jax.data import records

_REPORTS = "reports"  # folder inside the data set: one JSON file a shard
_SHARD_FILE = rf"(?P<name>\w+)-({'|'.join(records.SPLITS)})\.array_record-\d+-of-\d+"
# Files that make a folder a data set; there only while all shards they name are.
_INDEX_FILES = (records.CLIPS_FILE, "dataset_info.json")


@dataclasses.dataclass(frozen=True)
class Reject:
    """An annotation that gave no clip, and why: `reason` is what equal cases share and are counted by, `detail` the rest."""

    clip_id: str
    video_uid: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
      split, index, num_shards: Which.
      items: What `make_clips` gets, one after the other; plain JSON values.
    """

    split: str
    index: int
    num_shards: int
    items: tuple

    def file(self, name: str) -> str:
        """Returns the shard's file name, as TFDS names it."""
        return f"{name}-{self.split}.array_record-{self.index:05d}-of-{self.num_shards:05d}"


# (item, settings) → clips and rejects of the item.
MakeClips = Callable[[object, dict], Iterator[records.Clip | Reject]]


def assign_shards(uids: list[str], num_shards: int) -> list[list[str]]:
    """Returns the uids of each shard: dealt out in the order of their hashes, so no shard is empty."""
    order = sorted(uids, key=lambda uid: hashlib.sha256(uid.encode()).digest())
    return [sorted(order[i::num_shards]) for i in range(min(num_shards, len(order)))]


def _fingerprint(task: ShardTask, settings: dict) -> str:
    content = json.dumps([records.SCHEMA_VERSION, dataclasses.asdict(task), settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _report_path(task: ShardTask, folder: str, name: str) -> pathlib.Path:
    return pathlib.Path(folder) / _REPORTS / f"{task.file(name)}.json"


def _read_report(task: ShardTask, folder: str, name: str, settings: dict) -> dict | None:
    """Returns the report of a shard that is there and of this task, or None. Its bytes are counted, not read."""
    path, report_path = pathlib.Path(folder) / task.file(name), _report_path(task, folder, name)
    try:
        report = json.loads(report_path.read_text())
        fits = report["fingerprint"] == _fingerprint(task, settings) and report["bytes"] == path.stat().st_size
    except (OSError, ValueError, TypeError, KeyError):  # none, or of a writer that was cut off
        return None
    return report if fits else None


def write_shard(task: ShardTask, folder: str, name: str, make_clips: MakeClips, settings: dict) -> dict:
    """Writes one shard unless it is there already, and returns its report.

    Args:
      task: What to write.
      folder: Of the data set, on a file system that all workers share.
      name: Of the data set.
      make_clips: Cuts the clips of an item.
      settings: Passed to it; plain JSON values.

    Raises:
      ValueError: Two clips have one id, or the shard read back holds another number of records than were written.
    """
    path = pathlib.Path(folder) / task.file(name)
    report = _read_report(task, folder, name, settings)
    # Read whole: a flipped byte would otherwise be found when training meets it. That costs a disk's speed, not a decoder's.
    if report is not None and report["sha256"] == _sha256(path):
        return report
    # A name of its own: on shared disks two attempts at one shard may run at once, on machines with equal process ids.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    counts = collections.Counter()
    rejects = []
    with tempfile.TemporaryFile(dir=folder) as spool:
        places: dict[str, tuple[str, int, int]] = {}
        samples: dict[str, int] = {}
        for item in task.items:
            for made in make_clips(item, settings):
                if isinstance(made, Reject):
                    rejects.append(dataclasses.asdict(made))
                    continue
                if made.clip_id in places:
                    raise ValueError(f"two clips have the id {made.clip_id}: ids must differ")
                record = records.encode(made)
                places[made.clip_id] = (made.video_uid, spool.tell(), len(record))
                samples[made.clip_id] = len(made.audio)
                spool.write(record)
                counts["labelled"] += made.label != records.UNKNOWN
                counts["positive"] += made.label == 1
                counts["long_side"] = max(counts["long_side"], made.frame_height, made.frame_width)
        writer = ArrayRecordWriter(str(aside), "group_size:1")
        order = sorted(places, key=lambda clip_id: (places[clip_id][0], clip_id))
        for clip_id in order:
            _, start, length = places[clip_id]
            spool.seek(start)
            writer.write(spool.read(length))
        writer.close()
    _check_and_publish(aside, path, len(places))
    report = {
        "fingerprint": _fingerprint(task, settings), "split": task.split, "index": task.index, "file": path.name,
        "num_clips": len(places), "num_labelled": counts["labelled"], "num_positive": counts["positive"],
        "long_side_px": counts["long_side"], "bytes": path.stat().st_size, "sha256": _sha256(path),
        "video_clips": list(collections.Counter(places[clip_id][0] for clip_id in order).values()),
        "clip_samples": [samples[clip_id] for clip_id in order],
        "rejects": sorted(rejects, key=lambda r: r["clip_id"]),
    }  # fmt: skip
    report_path = _report_path(task, folder, name)
    report_path.parent.mkdir(parents=True, exist_ok=True)
    aside = report_path.with_name(f".{report_path.name}.{uuid.uuid4().hex}.tmp")
    aside.write_text(json.dumps(report))
    os.replace(aside, report_path)
    return report


def _check_and_publish(aside: pathlib.Path, path: pathlib.Path, expected: int) -> None:
    """Reads the shard back, syncs it and gives it its name."""
    reader = ArrayRecordReader(str(aside))
    found = reader.num_records()
    reader.close()
    if found != expected:
        raise ValueError(f"{path.name}: wrote {expected} records but {found} can be read: is the disk full?")
    with aside.open("rb") as f:
        os.fsync(f.fileno())
    os.replace(aside, path)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def run(
    tasks: list[ShardTask], folder: str, name: str, make_clips: MakeClips, settings: dict, num_workers: int,
    beam_args: list[str],
) -> list[dict]:  # fmt: skip
    """Writes all shards by Beam and returns their reports.

    Args:
      tasks: Shards to write.
      folder, name, make_clips, settings: As for `write_shard`.
      num_workers: Local processes.
      beam_args: Beam's own options, e.g. `--runner=DataflowRunner`; empty is the local runner on all cores.

    Raises:
      ValueError: A shard can't be written or is not there in the end, or the folder holds another data set.
    """
    others = {m["name"] for path in pathlib.Path(folder).glob("*") if (m := re.fullmatch(_SHARD_FILE, path.name))} - {
        name
    }
    if others:
        raise ValueError(f"{folder} holds the data set {min(others)!r}: choose another folder or name than {name!r}")
    if any(_read_report(task, folder, name, settings) is None for task in tasks):
        # While shards change, whoever opens the folder must not take it for the finished data set that it was.
        for file in _INDEX_FILES:
            (pathlib.Path(folder) / file).unlink(missing_ok=True)
    if not beam_args:
        # Named, because the default runner of recent Beams fetches a binary when it starts.
        mode = "multi_processing" if num_workers > 1 else "in_memory"
        beam_args = ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
                     f"--direct_running_mode={mode}", f"--direct_num_workers={num_workers}"]  # fmt: skip
    try:
        with _quiet_local_workers(), beam.Pipeline(options=PipelineOptions(beam_args)) as pipeline:
            # Without the reshuffle, one worker would get all shards fused behind Create.
            _ = (
                pipeline
                | "Shards" >> beam.Create(tasks)
                | "Spread" >> beam.Reshuffle()
                | "Write" >> beam.Map(_write, folder, name, make_clips, settings)
            )
    except RuntimeError as error:
        raise _unwrap(error) from error
    reports = [_read_report(task, folder, name, settings) for task in tasks]
    for task, report in zip(tasks, reports, strict=True):
        if report is None:
            raise ValueError(f"shard {task.file(name)} was not written though the pipeline says it is done")
    return reports


@contextlib.contextmanager
def _quiet_local_workers() -> Iterator[None]:
    """Keeps local workers from reporting how they start and stop.

    The local runner passes them no options; they read their log level from the file that this variable names.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"options": {"default_sdk_harness_log_level": "ERROR"}}, file)
        file.flush()
        before = os.environ.get("PIPELINE_OPTIONS_FILE")
        os.environ["PIPELINE_OPTIONS_FILE"] = file.name
        try:
            yield
        finally:
            del os.environ["PIPELINE_OPTIONS_FILE"]
            if before is not None:
                os.environ["PIPELINE_OPTIONS_FILE"] = before


def _unwrap(error: RuntimeError) -> Exception:
    """Returns a worker's ValueError or OSError as one line; of anything else, Beam's error with the worker's traceback."""
    last = str(error).strip().splitlines()[-1]
    found = re.fullmatch(r"(?:RuntimeError: )?(\w+): (.*?)(?: \[while running '.*'\])?", last)
    kind = getattr(builtins, found[1], None) if found else None
    if isinstance(kind, type) and issubclass(kind, ValueError | OSError):
        return ValueError(f"a worker failed: {found[2]}")
    return error


def _write(task: ShardTask, folder: str, name: str, make_clips: MakeClips, settings: dict) -> None:
    write_shard(task, folder, name, make_clips, settings)


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
    reports: list[dict], folder: pathlib.Path, info: records.ClipsInfo, rejects: list[Reject], num_in: int
) -> records.ClipsInfo:
    """Checks the sums, writes `clips.json`, `rejected.jsonl` and the TFDS metadata; returns the completed info.

    Shards and reports that an earlier conversion left in the folder are removed.

    Args:
      reports: Of all shards.
      folder: Of the data set.
      info: Without splits and canvas.
      rejects: Annotations left out before any shard was written.
      num_in: Annotations read.

    Raises:
      ValueError: Records in are not records out and left out, or there is no clip at all.
    """
    left_out = [dataclasses.asdict(r) for r in rejects] + [r for report in reports for r in report["rejects"]]
    written = sum(report["num_clips"] for report in reports)
    if written + len(left_out) != num_in:
        raise ValueError(
            f"{num_in} annotations came in, {written} clips and {len(left_out)} rejects came out: some are lost"
        )
    lines = sorted(left_out, key=lambda r: (r["reason"], r["clip_id"]))
    (folder / records.REJECTED_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not written:
        reasons = collections.Counter(r["reason"] for r in left_out)
        told = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common(3))
        raise ValueError(f"none of {num_in} annotations became a clip ({told}); see {folder / records.REJECTED_FILE}")
    for split in records.SPLITS:
        mine = sorted((r for r in reports if r["split"] == split), key=lambda r: r["index"])
        shards = [records.Shard(**{f.name: r[f.name] for f in dataclasses.fields(records.Shard)}) for r in mine]
        if not info.max_samples:  # all have `info.num_samples`
            shards = [dataclasses.replace(shard, clip_samples=[]) for shard in shards]
        sums = [sum(r[key] for r in mine) for key in ("num_clips", "num_labelled", "num_positive")]
        info.splits[split] = records.SplitInfo(*sums, shards)
    info.canvas_px = (info.short_side_px, max([r["long_side_px"] for r in reports] + [info.short_side_px]))
    _remove_leftovers(folder, info.name, {report["file"] for report in reports})
    template = tfds.core.ShardedFileTemplate(folder, dataset_name=info.name, filetype_suffix="array_record")
    splits = [
        tfds.core.SplitInfo(
            name=name, shard_lengths=[s.num_clips for s in split.shards], num_bytes=sum(s.bytes for s in split.shards),
            filename_template=template.replace(split=name),
        )
        for name, split in info.splits.items() if split.shards
    ]  # fmt: skip
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=feature_spec(info), split_infos=splits, version="1.0.0", check_data=False,
        description="Clips of narrated egocentric video: frames, audio and narration around a moment.",
    )  # fmt: skip
    info.dump(folder)
    return info


def _remove_leftovers(folder: pathlib.Path, name: str, files: set[str]) -> None:
    """Removes shards of the data set that aren't among `files`, their reports, and what killed writers left."""
    for path in [*folder.glob("*"), *(folder / _REPORTS).glob("*")]:
        found = re.fullmatch(rf"\.?({_SHARD_FILE})(\.json)?((\.\w+)?\.tmp)?", path.name)
        if found and found["name"] == name and (path.name.endswith(".tmp") or found[1] not in files):
            path.unlink(missing_ok=True)
