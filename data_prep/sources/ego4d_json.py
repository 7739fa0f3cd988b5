"""Reads `ego4d.json`, Ego4D's metadata of all its videos.

`{videos: [{video_uid, video_metadata: {audio_duration_sec}}]}`; its other fields are not read.
"""

from data_prep import storage
from data_prep.sources import files

_AUDIO = "audio_duration_sec"


def read_silent(path: storage.Path) -> set[str]:
    """Returns the uids of the videos without audio: those whose `audio_duration_sec` is present and null.

    Raises:
      ValueError: There is no such file, it is not JSON, or it has another layout.
    """
    content = files.read_json(path)
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, list):
        raise ValueError(f"{path} must hold a list `videos`")
    silent = set()
    for i, video in enumerate(videos):
        where = f"{path}, video {i + 1}"
        video = files.expect(video, dict, f"{where} must be an object") or {}
        metadata = files.expect(video.get("video_metadata"), dict, f"{where}: video_metadata must be an object") or {}
        if _AUDIO in metadata and metadata[_AUDIO] is None:
            silent.add(str(video.get("video_uid")))
    return silent
