"""Windows to cut out of a video, the times of their frames, and their numbers of audio samples."""

import dataclasses

from mc3_jax.data.records import SAMPLE_RATE_HZ


@dataclasses.dataclass(frozen=True)
class Window:
    """An interval of a video to cut.

    Attributes:
      start_s, stop_s: Start and end of the interval, seconds.
      frame_times_s: Times of the frames to cut, seconds; empty to cut sound only.
      open_end: Whether the sound may end before `stop_s`. Then the part that exists is cut.
    """

    start_s: float
    stop_s: float
    frame_times_s: tuple[float, ...]
    open_end: bool = False


def frame_times(start_s: float, stop_s: float, num_intervals: int, num_candidates: int) -> tuple[float, ...]:
    """Returns the times of T x C frames, interval-major: candidate C // 2 is the middle of its interval."""
    width = (stop_s - start_s) / num_intervals
    offsets = [0.5 + (c - num_candidates // 2) / num_candidates for c in range(num_candidates)]
    return tuple(start_s + (t + offset) * width for t in range(num_intervals) for offset in offsets)


def num_samples(duration_s: float) -> int:
    """Returns the number of audio samples of a window; durations that are equal to the µs give the same number."""
    return round(round(duration_s, 6) * SAMPLE_RATE_HZ)


def order(windows: list[Window]) -> list[int]:
    """Returns the windows' indices in the order in which they are cut: by end, then by start."""
    return sorted(range(len(windows)), key=lambda i: (windows[i].stop_s, windows[i].start_s))
