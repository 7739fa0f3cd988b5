"""Writes clips into ArrayRecord shards by Beam, and makes of the folder a TFDS data set, without TensorFlow.

A shard is a fixed set of videos. Beam maps over shards and moves no payload: a task cuts its videos' clips into a spool
file, then writes its shard in the order of clip ids, syncs and renames it, and leaves a report beside it. A rerun takes
finished shards as they are. What was read, written and left out must add up.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mc3_jax.data import records

REJECTED_FILE = "rejected.jsonl"
_REPORTS = "reports"  # folder inside the data set: one JSON file a shard


@dataclasses.dataclass(frozen=True)
class Reject:
    """A narration that gave no clip, and why."""

    clip_id: str
    video_uid: str
    reason: str


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
    content = json.dumps([dataclasses.asdict(task), settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


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
    report_path = pathlib.Path(folder) / _REPORTS / f"{path.name}.json"
    fingerprint = _fingerprint(task, settings)
    if report_path.is_file() and path.is_file():
        report = json.loads(report_path.read_text())
        if report["fingerprint"] == fingerprint and report["bytes"] == path.stat().st_size:
            return report
    report_path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    counts = collections.Counter()
    rejects = []
    with tempfile.TemporaryFile(dir=folder) as spool:
        places: dict[str, tuple[int, int]] = {}
        for item in task.items:
            for made in make_clips(item, settings):
                if isinstance(made, Reject):
                    rejects.append(dataclasses.asdict(made))
                    continue
                if made.clip_id in places:
                    raise ValueError(f"two clips have the id {made.clip_id}: ids must differ")
                record = records.encode(made)
                places[made.clip_id] = (spool.tell(), len(record))
                spool.write(record)
                counts["labelled"] += made.label != records.UNKNOWN
                counts["positive"] += made.label == 1
                counts["long_side"] = max(counts["long_side"], made.frame_height, made.frame_width)
        writer = ArrayRecordWriter(str(aside), "group_size:1")
        for clip_id in sorted(places):
            start, length = places[clip_id]
            spool.seek(start)
            writer.write(spool.read(length))
        writer.close()
    _check_and_publish(aside, path, len(places))
    report = {
        "fingerprint": fingerprint, "split": task.split, "index": task.index, "file": path.name,
        "num_clips": len(places), "num_labelled": counts["labelled"], "num_positive": counts["positive"],
        "long_side_px": counts["long_side"], "bytes": path.stat().st_size, "sha256": _sha256(path),
        "rejects": sorted(rejects, key=lambda r: r["clip_id"]),
    }  # fmt: skip
    aside = report_path.with_suffix(".tmp")
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
    """
    if not beam_args:
        # Named, because the default runner of recent Beams fetches a binary when it starts.
        mode = "multi_processing" if num_workers > 1 else "in_memory"
        beam_args = ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
                     f"--direct_running_mode={mode}", f"--direct_num_workers={num_workers}",
                     "--default_sdk_harness_log_level=WARNING"]  # fmt: skip
    with beam.Pipeline(options=PipelineOptions(beam_args)) as pipeline:
        # Without the reshuffle, one worker would get all shards fused behind Create.
        _ = (
            pipeline
            | "Shards" >> beam.Create(tasks)
            | "Spread" >> beam.Reshuffle()
            | "Write" >> beam.Map(_write, folder, name, make_clips, settings)
        )
    reports = []
    for task in tasks:
        path = pathlib.Path(folder) / _REPORTS / f"{task.file(name)}.json"
        if not path.is_file():
            raise ValueError(f"shard {task.file(name)} was not written though the pipeline says it is done")
        reports.append(json.loads(path.read_text()))
    return reports


def _write(task: ShardTask, folder: str, name: str, make_clips: MakeClips, settings: dict) -> None:
    write_shard(task, folder, name, make_clips, settings)


def feature_spec(info: records.ClipsInfo) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a clip, as `records.encode` writes it."""
    num_frames = info.num_intervals * info.num_candidates
    text = {key: tfds.features.Text() for key in ("clip_id", "video_uid", "narration", "source")}
    number = {
        key: tfds.features.Scalar(np.int64)
        for key in ("time_us", "start_us", "stop_us", "frame_height", "frame_width", "verb_id", "noun_id", "label")
    }
    return tfds.features.FeaturesDict(
        {
            **text,
            **number,
            "frames": tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg"), length=num_frames),
            "frame_times_us": tfds.features.Sequence(np.int64, length=num_frames),
            "audio": tfds.features.Text(),  # bytes: little-endian int16
        }
    )


def finish(
    reports: list[dict], folder: pathlib.Path, info: records.ClipsInfo, rejects: list[Reject], num_in: int
) -> records.ClipsInfo:
    """Checks the sums, writes `clips.json`, `rejected.jsonl` and the TFDS metadata; returns the completed info.

    Args:
      reports: Of all shards.
      folder: Of the data set.
      info: Without splits and canvas.
      rejects: Narrations left out before any shard was written.
      num_in: Narrations read.

    Raises:
      ValueError: Records in are not records out and left out.
    """
    left_out = [dataclasses.asdict(r) for r in rejects] + [r for report in reports for r in report["rejects"]]
    written = sum(report["num_clips"] for report in reports)
    if written + len(left_out) != num_in:
        raise ValueError(
            f"{num_in} narrations came in, {written} clips and {len(left_out)} rejects came out: some are lost"
        )
    for split in records.SPLITS:
        mine = sorted((r for r in reports if r["split"] == split), key=lambda r: r["index"])
        shards = [records.Shard(r["file"], r["num_clips"], r["bytes"], r["sha256"]) for r in mine]
        sums = [sum(r[key] for r in mine) for key in ("num_clips", "num_labelled", "num_positive")]
        info.splits[split] = records.SplitInfo(*sums, shards)
    info.canvas_px = (info.short_side_px, max([r["long_side_px"] for r in reports] + [info.short_side_px]))
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
    lines = sorted(left_out, key=lambda r: (r["reason"], r["clip_id"]))
    (folder / REJECTED_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    info.dump(folder)
    return info
