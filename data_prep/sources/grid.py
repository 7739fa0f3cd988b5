"""Moments of a folder of video files that nobody has narrated: one every so many seconds, as far as sound and pictures go."""

import math
import os
import pathlib

from data_prep import guard, shards, video_files
from data_prep.narrations import Narration

# What FFmpeg's users call video files; others in the folder are none of ours.
SUFFIXES = frozenset(
    (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
)
_MAX_LENGTH_S = 100 * 3600.0  # beyond it a length is damage
_EPSILON_S = 1e-6


def video_names(folder: pathlib.Path) -> list[str]:
    """Returns the names of all video files in a folder and those below it, relative to it, in order; hidden ones are left."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = pathlib.Path(place).relative_to(folder)
        shown = (name for name in files if not name.startswith("."))
        found += [(inside / name).as_posix() for name in shown if pathlib.PurePath(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def read(
    folder: pathlib.Path, every_s: float, window_s: tuple[float, float], limits: guard.Limits
) -> tuple[list[Narration], list[shards.Reject]]:
    """Returns a moment for every window that a video holds whole, without text, and a reject for each video that holds none.

    Windows begin at 0, `every_s`, 2 `every_s`, ... of the video. A video that stands there under several names counts once.

    Args:
      folder: Of the videos, on this machine.
      every_s: From one window to the next, seconds.
      window_s: (before, after) the moment.
      limits: Of the child that opens a video.
    """
    before_s, length_s = window_s[0], sum(window_s)
    moments, rejects, seen = [], [], set()
    for name in video_names(folder):
        uid, problem = video_files.find(folder, name)
        if uid in seen:
            continue
        seen.add(uid)
        found = problem or guard.length_s(folder / uid, ("video", "audio"), limits)
        if found is None:
            found = "container does not say how long the video is"
        elif not isinstance(found, str) and not length_s - _EPSILON_S <= found <= _MAX_LENGTH_S:
            short = found < length_s
            found = f"video is {'shorter than a window' if short else 'too long to be true'}: {found:.3f} s"
        if isinstance(found, str):
            reason, _, detail = found.partition(": ")
            rejects.append(shards.Reject(uid, uid, reason, detail))
            continue
        count = 1 + math.floor((found - length_s + _EPSILON_S) / every_s)
        moments += [Narration(uid, "", "grid", round(before_s + k * every_s, 6), "") for k in range(count)]
    return moments, rejects
