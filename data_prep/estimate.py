"""Estimates the work of a conversion before anything is decoded."""

import collections
import dataclasses

from data_prep import shards, video_files
from mc3_jax import terminal
from mc3_jax.data import records

# CPU seconds per clip of 540p H.264 with a keyframe every 250 frames and a narration every 16 s, as in Ego4D; on one core of
# 2026.
_CLIP_CPU_S = 0.22
_BYTES_PER_PX = 0.2  # for real footage as JPEG at quality 90
_START_S = 4.0  # for starting the command and its workers
# Sounds: CPU seconds of `shards.write_shard` and its decoder on one core of 2026, per clip and per second of sound. The two
# are a line through measurements of whole segments (60 s at most) and of their first 0.25 s.
_WHOLE_FILE_S, _WHOLE_FILE_CPU_S = 5.0, 0.035  # ESC-10: 0.028 per file as Vorbis, 0.043 as wav at 44.1 kHz
# Measured on 1,995 segments of 24 videos at EPIC-Sounds' public positions, filled with noise as float32 at 24 kHz.
_HDF5_CLIP_CPU_S, _HDF5_CPU_PER_S = 0.0005, 0.00045
# The same segments as FLAC or wav at 24 kHz took 0.0018 and 0.0008, 170 segments of mp4 with AAC at 48 kHz 0.0035 and 0.0020.
_SEGMENT_CPU_S, _SEGMENT_CPU_PER_S = 0.003, 0.0013
# 4 x 4 pictures over each of these 170 segments took 0.10 at 540p; EPIC-Kitchens' videos have four times as many pixels.
_SEGMENT_PICTURES_CPU_S = 0.4
_SOUND_BYTES_PER_S = 25_600  # ESC-10 in shards, which compress; noise takes 28,400
_HDF5_BYTES_PER_S = 24_000 * 4


@dataclasses.dataclass(frozen=True)
class Work:
    """Estimated work of a conversion.

    Attributes:
      sources: Kind and number of the sources to read, as text.
      read_bytes, written_bytes: Bytes of media to read, and bytes of clips to write.
      cpu_s: CPU seconds of all cores together.
    """

    sources: str
    read_bytes: float
    written_bytes: float
    cpu_s: float


def tell(tasks: list[shards.ShardTask], info: records.ClipsInfo, rejects: list[shards.Reject], num_workers: int) -> str:
    """Returns lines of text about a conversion: clips, sources, missing files, expected bytes and time, rejects by reason.

    Bytes written and time are right within a factor of about two. The time is CPU time: a slow disk or bucket takes longer.

    Args:
      tasks: Shards to write.
      info: Description of the data set; its splits are not needed.
      rejects: Annotations rejected so far.
      num_workers: Number of local processes.
    """
    clips, labelled = collections.Counter(), collections.Counter()
    for task in tasks:
        clips[task.split] += task.num_annotations
        lines = (line for item in task.items for line in item.get("narrations", ()))
        labelled[task.split] += sum(line["label"] != records.UNKNOWN for line in lines)
    items = [item for task in tasks for item in task.items]
    missing = {str(item.get("file", item.get("video_uid"))) for item in items if item.get("video_bytes", 0) is None}
    missing = sorted(missing | {r.detail or r.video_uid for r in rejects if r.reason == video_files.MISSING})
    first = ", ".join(map(terminal.printable, missing[:3]))
    reasons = collections.Counter(reject.reason for reject in rejects)
    labelled_line = f"\nlabelled: {labelled.total():,} ({_by_split(labelled)})" if labelled.total() else ""
    work = _of_sounds(items, info) if info.max_samples else _of_videos(items, info, clips.total())
    lines = [
        f"clips: {clips.total():,} ({_by_split(clips)})" + labelled_line,
        f"{work.sources}, {_size(work.read_bytes)} to read, in {len(tasks):,} shards",
        f"missing files: {len(missing):,}" + (f", e.g. {first}" if missing else ""),
        f"rejected so far: {reasons.total():,}"
        + "".join(f"\n  {count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1])),
        f"data set: about {_size(work.written_bytes)}",
        f"time: about {_span(work.cpu_s / num_workers + _START_S)} on {num_workers} core{'s' * (num_workers != 1)}",
    ]
    return "\n".join(lines)


def _by_split(counts: collections.Counter) -> str:
    return ", ".join(f"{counts[split]:,} {split}" for split in records.SPLITS)


def _of_videos(items: list[dict], info: records.ClipsInfo, num_clips: int) -> Work:
    """Returns the work of cutting narrated clips, with the time that 540p video takes."""
    written = num_clips * (_picture_bytes(info) + 2 * info.num_samples)
    return Work(f"videos: {len(items):,}", _file_bytes(items), written, num_clips * _CLIP_CPU_S)


def _of_sounds(items: list[dict], info: records.ClipsInfo) -> Work:
    """Returns the work of cutting sounds with classes."""
    most_s = info.max_samples / records.SAMPLE_RATE_HZ
    lengths_s = [_length_s(sound, most_s) for item in items for sound in item["sounds"]]
    num_clips, total_s = len(lengths_s), sum(lengths_s)
    recordings = {sound["recording"] for item in items for sound in item["sounds"]}
    files = sorted({item["file"] for item in items})
    written = total_s * _SOUND_BYTES_PER_S + num_clips * _picture_bytes(info)
    if items[0]["hdf5_name"]:
        # Only the file itself tells which recordings it lacks, and only the decoder may open it.
        sources = f"recordings: {len(recordings):,} of {files[0]} (whether it holds them is not checked)"
        read, cpu_s = total_s * _HDF5_BYTES_PER_S, num_clips * _HDF5_CLIP_CPU_S + total_s * _HDF5_CPU_PER_S
    else:
        sources = f"recordings: {len(recordings):,} in {len(files):,} file(s)"
        read = _file_bytes(items)
        if items[0]["sounds"][0]["stop_s"] is None:
            cpu_s = num_clips * _WHOLE_FILE_CPU_S
        else:
            cpu_s = num_clips * _SEGMENT_CPU_S + total_s * _SEGMENT_CPU_PER_S
    if info.num_intervals:
        cpu_s += num_clips * _SEGMENT_PICTURES_CPU_S
    return Work(sources, read, written, cpu_s)


def _length_s(sound: dict, most_s: float) -> float:
    stop_s = sound["start_s"] + _WHOLE_FILE_S if sound["stop_s"] is None else sound["stop_s"]
    return min(stop_s - sound["start_s"], most_s)


def _file_bytes(items: list[dict]) -> int:
    return sum(item.get("video_bytes") or 0 for item in items)


def _picture_bytes(info: records.ClipsInfo) -> float:
    """Returns the bytes of a clip's pictures, for 16:9 and the detail of real footage."""
    return info.num_intervals * info.num_candidates * info.short_side_px**2 * 16 / 9 * _BYTES_PER_PX


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def _span(time_s: float) -> str:
    if time_s >= 360:
        return f"{time_s / 3600:,.1f} h"
    return f"{time_s / 60:,.1f} min" if time_s >= 60 else f"{time_s:.0f} s"
