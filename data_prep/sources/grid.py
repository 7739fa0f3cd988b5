"""Moments at regular intervals in videos that nobody has narrated, for as long as a video has both sound and pictures."""

import math
import os
import pathlib

from data_prep import guard, shards, video_files
from data_prep.narrations import Narration

# Usual suffixes of video files that FFmpeg reads; other files in the folder are ignored.
SUFFIXES = frozenset(
    (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
)
_MAX_LENGTH_S = 100 * 3600.0  # a greater length is a sign of damage
_EPSILON_S = 1e-6


def video_names(folder: pathlib.Path) -> list[str]:
    """Returns the sorted paths, relative to `folder`, of all video files in it and its subfolders, except hidden ones."""
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
    """Returns a narration without text for every whole window of a video, and a reject for every video that has none.

    Windows begin at 0, `every_s`, 2 `every_s`, ... of the video. A video with several names in the folder is used once.

    Args:
      folder: Folder of the videos, on this machine.
      every_s: Time from the start of one window to the next, seconds.
      window_s: Extent of a window (before, after) its moment, seconds.
      limits: Limits on the child process that opens a video.
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
            found = f"video is {'shorter than a window' if short else 'implausibly long'}: {found:.3f} s"
        if isinstance(found, str):
            reason, _, detail = found.partition(": ")
            rejects.append(shards.Reject(uid, uid, reason, detail))
            continue
        count = 1 + math.floor((found - length_s + _EPSILON_S) / every_s)
        moments += [Narration(uid, "", "grid", round(before_s + k * every_s, 6), "") for k in range(count)]
    return moments, rejects
