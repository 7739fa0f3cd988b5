"""Reads Ego4D's own JSON: `narration.json` and `all_narrations_redacted.json` of version 2.

`narration.json` has two passes per video, `{uid: {narration_pass_1: {narrations: [{timestamp_sec, narration_text,
annotation_uid}]}}}`. The redacted file has one list per video, `{uid: {narrations: [{time, text}]}}`. In both, this object is
either the whole file or under `videos`. A video that was withdrawn has only a `status`.
"""

import math
import re

from data_prep import storage
from data_prep.narrations import Narration
from data_prep.sources import files

_PASS = re.compile(r"narration_pass_\d+", re.ASCII)


def read(path: storage.Path) -> list[Narration]:
    """Returns every narration of the file, of all passes, in order of video and time.

    Entries without a text or time are kept, with an empty text or NaN, so that the caller can count them.

    Raises:
      ValueError: There is no such file, it is not JSON, or it has another layout; the error names the video, pass and row.
    """
    content = files.read_json(path)
    videos = content.get("videos", content) if isinstance(content, dict) else content
    if not isinstance(videos, dict):
        raise ValueError(f"{path} must hold an object of videos, got {videos!r:.60}")
    found = []
    for uid, video in videos.items():
        where = f"{path}, video {uid}"
        video = files.expect(video, dict, f"{where} must be an object") or {}
        for name in sorted(filter(_PASS.fullmatch, video)):
            inside = f"{where}, {name}"
            lines = (files.expect(video.get(name), dict, f"{inside} must be an object") or {}).get("narrations")
            found += _read_lines(lines, str(uid), name, inside, "timestamp_sec", "narration_text")
        found += _read_lines(video.get("narrations"), str(uid), "narrations", where, "time", "text")
    return sorted(found, key=lambda n: (n.video_uid, *_order(n.time_s), n.source, n.annotation_uid))


def _read_lines(lines, uid: str, source: str, where: str, time_name: str, text_name: str) -> list[Narration]:
    """Returns the narrations of a list whose entries have their time and text in these two fields; None is an empty list."""
    found = []
    for i, line in enumerate(files.expect(lines, list, f"{where}: narrations must be a list") or ()):
        row = f"{where}, row {i + 1}"
        if not isinstance(line, dict):
            raise ValueError(f"{row} must be an object, got {line!r:.60}")
        annotation = files.expect(line.get("annotation_uid"), (str, int), f"{row}: annotation_uid must be text")
        text = files.expect(line.get(text_name), str, f"{row}: {text_name} must be text") or ""
        time_s = files.seconds(line.get(time_name), f"{row}: {time_name}")
        found.append(Narration(uid, "" if annotation is None else str(annotation), source, time_s, text))
    return found


def _order(time_s: float) -> tuple[bool, float]:
    """Returns a key that sorts NaN after all times; NaN as its own key would disturb the order of the others."""
    return (True, 0.0) if math.isnan(time_s) else (False, time_s)
