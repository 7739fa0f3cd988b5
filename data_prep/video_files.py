"""Which file a video's name means. Names come from files that others wrote, so none of them leads out of the folder."""

import os
import pathlib
import re

from data_prep import media

# FFmpeg follows what these name, anywhere on the machine.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat")


def problem_of(name: str) -> str | None:
    """Returns why a name, put behind a folder's, could mean something outside it or nothing at all; None if it is fine."""
    if re.search("[\0\ud800-\udfff]", name):
        return "video name is none that a file can have"
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "video name leads out of the folder"
    return None if path.parts else "narration names no video"


def find(folder: pathlib.Path, name: str) -> tuple[str, str]:
    """Returns (uid, ""): the path inside the folder of the file that a name means; or (name, why there is none).

    A file has one uid however it is named, with or without suffix or through links inside the folder, so that no video
    comes to stand in two splits.

    Args:
      folder: Of the videos.
      name: Path relative to it. Where there is no such file, the suffix may lack: whatever FFmpeg knows will do. Of several
        files that differ in their suffix, the one with video and audio is meant.
    """
    problem = problem_of(name)
    if problem:
        return name, problem
    path = folder / name
    try:
        matches = [path]
        if not path.is_file():
            with os.scandir(path.parent) as entries:
                # The whole name before the suffix, so that "a" is not "a.b.mp4".
                names = sorted(e.name for e in entries if e.name.rpartition(".")[0] == path.name and e.is_file())
            matches = [path.parent / found for found in names]
    except OSError:  # no such folder, a name that is too long
        return name, "video file is missing"
    root = os.path.realpath(folder)
    real = sorted({os.path.realpath(match) for match in matches})
    if not real:
        return name, "video file is missing"
    inside = [match for match in real if os.path.commonpath([root, match]) == root]
    if not inside:
        return name, "video file is a link that leads out of the folder"
    videos = [match for match in inside if not _is_playlist(match)]
    if not videos:
        return name, "video file is a playlist"
    if len(videos) > 1:
        videos = [match for match in videos if media.probe_streams(pathlib.Path(match)) is None]
        if len(videos) != 1:
            return name, "several files have this video name: write its suffix"
    uid = pathlib.Path(videos[0]).relative_to(root).as_posix()
    problem = problem_of(uid)
    return (name, problem) if problem else (uid, "")


def _is_playlist(path: str) -> bool:
    try:
        with open(path, "rb") as f:
            return f.read(16).lstrip(b"\xef\xbb\xbf").startswith(_PLAYLISTS)
    except OSError:  # told when it is opened as a video
        return False
