"""Reads `ego4d.json`, Ego4D's metadata of all its videos.

`{videos: [{video_uid, is_stereo, video_metadata: {audio_duration_sec}, redacted_intervals: [{start_sec, end_sec}],
video_components: [{redacted, canonical_video_start_sec, canonical_video_end_sec}]}],
concurrent_video_sets: [{valid, videos: [{video_uid}]}]}`; its other fields are not read.
"""

import collections
import dataclasses

from data_prep import storage
from data_prep.sources import files

_AUDIO = "audio_duration_sec"
_INTERVAL = ("start_sec", "end_sec")
_COMPONENT = ("canonical_video_start_sec", "canonical_video_end_sec")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `ego4d.json` says about videos, by their uids.

    Attributes:
      silent: Videos without audio: those whose `audio_duration_sec` is present and null.
      stereo: Videos whose pictures hold two views side by side.
      redacted_s: Video → its redacted intervals (start, end), seconds. Pictures there are blank.
      groups: Video → the smallest uid among the videos that were recorded at the same time as it. Only for videos with such
        others.
    """

    silent: frozenset[str] = frozenset()
    stereo: frozenset[str] = frozenset()
    redacted_s: dict[str, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    groups: dict[str, str] = dataclasses.field(default_factory=dict)

    def is_redacted(self, uid: str, start_s: float, stop_s: float) -> bool:
        """Returns whether any part of an interval of a video is redacted."""
        return any(start < stop_s and start_s < end for start, end in self.redacted_s.get(uid, ()))


def read(path: storage.Path) -> Metadata:
    """Returns what the file says about all videos. Fields that an entry lacks say nothing about its video.

    Raises:
      ValueError: There is no such file, it is not JSON, or it has another layout; the error names the entry and field.
    """
    content = files.read_json(path)
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, list):
        raise ValueError(f"{path} must hold a list `videos`")
    silent, stereo, redacted_s = set(), set(), collections.defaultdict(list)
    for i, video in enumerate(videos):
        where = f"{path}, video {i + 1}"
        uid = _uid(video, where)
        metadata = files.expect(video.get("video_metadata"), dict, f"{where}: video_metadata must be an object") or {}
        if _AUDIO in metadata and metadata[_AUDIO] is None:
            silent.add(uid)
        if _flag(video, "is_stereo", where):
            stereo.add(uid)
        for inside, interval in _entries(video, "redacted_intervals", where):
            redacted_s[uid].append(_seconds(interval, _INTERVAL, inside))
        for inside, component in _entries(video, "video_components", where):
            # One without times is not a part of the video.
            if _flag(component, "redacted", inside) and any(component.get(name) is not None for name in _COMPONENT):
                redacted_s[uid].append(_seconds(component, _COMPONENT, inside))
    sets = [
        {_uid(video, place) for place, video in _entries(found, "videos", inside)}
        for inside, found in _entries(content, "concurrent_video_sets", str(path))
        if _flag(found, "valid", inside)
    ]
    return Metadata(frozenset(silent), frozenset(stereo), dict(redacted_s), _groups(sets))


def _groups(sets: list[set[str]]) -> dict[str, str]:
    """Returns member → smallest member of its group. Sets that share a member are one group."""
    group_of: dict[str, set[str]] = {}
    for members in sets:
        group = members.union(*(group_of[uid] for uid in members if uid in group_of))
        group_of |= dict.fromkeys(group, group)
    return {uid: min(group) for uid, group in group_of.items() if len(group) > 1}


def _entries(parent: dict, name: str, where: str) -> list[tuple[str, dict]]:
    """Returns (where it is, entry) of each object in a list; [] if the list is null or missing.

    Raises:
      ValueError: The field is no list of objects.
    """
    found = []
    for i, entry in enumerate(files.expect(parent.get(name), list, f"{where}: {name} must be a list") or ()):
        inside = f"{where}, {name} {i + 1}"
        found.append((inside, _object(entry, inside)))
    return found


def _object(entry, where: str) -> dict:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {entry!r:.60}")
    return entry


def _uid(entry, where: str) -> str:
    uid = _object(entry, where).get("video_uid")
    if not isinstance(uid, str):
        raise ValueError(f"{where}: video_uid must be text, got {uid!r:.60}")
    return uid


def _flag(entry: dict, name: str, where: str) -> bool:
    value = entry.get(name)
    if not (value is None or isinstance(value, bool)):
        raise ValueError(f"{where}: {name} must be true or false, got {value!r:.60}")
    return bool(value)


def _seconds(entry: dict, names: tuple[str, str], where: str) -> tuple[float, float]:
    """Returns the start and end of an interval in seconds, given by these two fields.

    Raises:
      ValueError: One of them is missing or not a time, or the end lies before the start.
    """
    start_s, end_s = (files.seconds(entry.get(name), f"{where}: {name}") for name in names)
    if not start_s <= end_s:  # NaN too
        told = " and ".join(f"{entry.get(name)!r:.60}" for name in names)
        raise ValueError(f"{where}: {names[0]} and {names[1]} must be two times in this order, got {told}")
    return start_s, end_s
