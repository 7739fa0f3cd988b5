"""What a conversion would do, told before anything is decoded."""

import collections

from data_prep import shards, terminal
from mc3_jax.data import records

# CPU seconds of a clip of 540p H.264 with a keyframe every 250 frames, narrated every 16 s, as Ego4D's: one core of 2026.
_CLIP_CPU_S = 0.22
_BYTES_PER_PX = 0.2  # of real footage as JPEG at quality 90


def tell(
    tasks: list[shards.ShardTask], info: records.ClipsInfo, rejects: dict[str, int], num_workers: int
) -> str:
    """Returns what is to be done: clips and videos, missing files, bytes and time to expect, rejects by reason so far.

    Bytes written are those of 16:9 pictures as busy as footage is; time is that of 540p video. Both are right within a
    factor of two or so.

    Args:
      tasks: Shards.
      info: Of the data set, without splits.
      rejects: Reasons and counts of what was left out.
      num_workers: Local processes.
    """
    clips = collections.Counter()
    for task in tasks:
        clips[task.split] += task.num_annotations
    items = [item for task in tasks for item in task.items]
    missing = sorted(str(item.get("video_uid")) for item in items if item.get("video_bytes", 0) is None)
    first = ", ".join(map(terminal.printable, missing[:3]))
    num_bytes = sum(item.get("video_bytes") or 0 for item in items)
    frames_px = info.num_intervals * info.num_candidates * info.short_side_px**2 * 16 / 9
    clip_bytes = frames_px * _BYTES_PER_PX + 2 * info.num_samples
    hours = clips.total() * _CLIP_CPU_S / num_workers / 3600
    lines = [
        f"clips: {clips.total():,} (" + ", ".join(f"{clips[split]:,} {split}" for split in records.SPLITS) + ")",
        f"videos: {len(items):,}, {num_bytes / 1e9:,.1f} GB to read, in {len(tasks):,} shards",
        f"missing files: {len(missing):,}" + (f", first {first}" if missing else ""),
        f"left out so far: {sum(rejects.values()):,}"
        + "".join(f"\n  {count:,} {reason}" for reason, count in sorted(rejects.items(), key=lambda r: -r[1])),
        f"data set: about {clips.total() * clip_bytes / 1e9:,.1f} GB",
        f"time: about {hours:,.1f} h on {num_workers} cores",
    ]
    return "\n".join(lines)
