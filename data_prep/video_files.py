"""Which file a video's name means. Names come from files that others wrote, so none of them leads out of the folder.

The folder may be a bucket's; then a video is copied to this machine for as long as it is decoded.
"""

import collections
import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator

from data_prep import guard, storage, streams

# FFmpeg follows what these name, anywhere on the machine.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat")
_PLAYLIST = "video file is a playlist"
MISSING = "video file is missing"
SEVERAL = "several files have this video name"


def problem_of(name: str) -> str | None:
    """Returns why a name, put behind a folder's, could mean something outside it or nothing at all; None if it is fine."""
    if re.search("[\0\ud800-\udfff]", name):
        return "video name is none that a file can have"
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "video name leads out of the folder"
    return None if path.parts else "narration names no video"


@functools.lru_cache(maxsize=4)
def _listing(folder: str) -> tuple[dict[str, storage.File], dict[str, list[str]]]:
    """Returns each file in a bucket's folder, and the files of each name without suffix."""
    found = storage.files(storage.as_path(folder))
    named = collections.defaultdict(list)
    for file in sorted(found):
        stem, dot, suffix = file.rpartition(".")
        if dot and "/" not in suffix:
            named[stem].append(file)
    return found, named


def facts(folder: storage.Path) -> Callable[[str], dict]:
    """Returns the function video uid → what `shards.ShardTask.items` hold of its file. A bucket is listed, once."""
    listing = _listing(str(folder))[0] if storage.is_remote(folder) else None

    def of(uid: str) -> dict:
        if listing is not None:
            return facts_of(listing.get(uid, listing.get(f"{uid}.mp4")))
        try:
            return facts_of(storage.stat(_local(folder, uid)))
        except OSError:  # a folder on the way that nobody may open, links in a circle
            return facts_of(None)

    return of


def facts_of(file: storage.File | None) -> dict:
    """Returns what `shards.ShardTask.items` hold of a file: a rerun after it was replaced redoes the shard."""
    return {"video_bytes": file and file.bytes, "video_version": file and file.version}


def reason_of(told: str, item: dict) -> tuple[str, str]:
    """Returns (reason, detail) of what cutting a file told.

    A file that was there when the work was planned is not missing: a worker does not see it, or it went.

    Args:
      told: `reason` or `reason: detail`.
      item: Of `shards.ShardTask.items`.
    """
    reason, _, detail = told.partition(": ")
    if reason.endswith("file is missing") and item.get("video_bytes") is not None:
        return streams.UNREADABLE, "it was there when the conversion began"
    return reason, detail


def _local(folder: pathlib.Path, uid: str) -> pathlib.Path:
    """Returns the video's file: own videos' uids are file names, Ego4D's lack the suffix."""
    path = folder / uid
    return path if os.path.isfile(path) else path.with_name(f"{path.name}.mp4")


@contextlib.contextmanager
def fetched(folder: str, uid: str, scratch: str) -> Iterator[pathlib.Path | str]:
    """Yields the local file of a video, a bucket's copied for as long as the block lasts; or why there is none to open.

    Args:
      folder: Of the videos.
      uid: Of the video.
      scratch: Local folder for the copy; "" is the system's.

    Raises:
      OSError: The bucket does not answer, or nothing in it may be read. That is no fault of the video's.
    """
    if not storage.is_remote(folder):
        path = _local(pathlib.Path(folder), uid)
        yield _PLAYLIST if _is_playlist(str(path)) else path
        return
    with storage.scratch_folder(scratch) as local:
        found = _download(storage.as_path(folder), uid, local)
        yield _PLAYLIST if isinstance(found, pathlib.Path) and _is_playlist(str(found)) else found


def _download(folder: storage.Path, uid: str, local: pathlib.Path) -> pathlib.Path | str:
    for path in (folder / uid, folder / f"{uid}.mp4"):
        try:
            return storage.copy(path, local / path.name)
        except FileNotFoundError:
            continue
        except PermissionError:
            # Fails as well where nobody may read anything any more, e.g. with a token that expired.
            storage.files(folder)
            return f"{streams.UNREADABLE}: Permission denied"
    return MISSING


def find(folder: storage.Path, name: str, kinds: tuple[str, ...] = ("video", "audio")) -> tuple[str, str]:
    """Returns (uid, ""): the path inside the folder of the file that a name means; or (name, why there is none).

    A file has one uid however it is named, with or without suffix or through links inside the folder, so that no video
    comes to stand in two splits.

    Args:
      folder: Of the videos.
      name: Path relative to it. Where there is no such file, the suffix may lack: whatever FFmpeg knows will do. Of several
        files that differ in their suffix, the one with streams of these kinds is meant.
      kinds: Of streams.
    """
    return finder(folder, kinds)(name)


def finder(
    folder: storage.Path, kinds: tuple[str, ...] = ("video", "audio")
) -> Callable[[str], tuple[str, str]]:
    """Returns the function name → what `find` returns, which lists each folder once: for many names."""
    stems = functools.cache(_names_by_stem)
    return lambda name: _find(folder, name, kinds, stems)


def _names_by_stem(folder: pathlib.Path) -> dict[str, list[str]]:
    """Returns the names in a folder by what stands before their suffix: all of it, so that "a" is not "a.b.mp4"."""
    found = collections.defaultdict(list)
    for name in sorted(os.listdir(folder)):
        found[name.rpartition(".")[0]].append(name)
    return found


def _find(
    folder: storage.Path, name: str, kinds: tuple[str, ...], stems: Callable[[pathlib.Path], dict[str, list[str]]]
) -> tuple[str, str]:
    problem = problem_of(name)
    if problem:
        return name, problem
    if storage.is_remote(folder):
        return _find_remote(folder, name)
    path = folder / name
    try:
        matches = [path]
        if not path.is_file():
            others = (path.parent / found for found in stems(path.parent).get(path.name, ()))
            matches = [match for match in others if match.is_file()]
    except PermissionError:
        return name, streams.UNREADABLE
    except OSError:  # no such folder, a name that is too long
        return name, MISSING
    root = os.path.realpath(folder)
    real = sorted({os.path.realpath(match) for match in matches})
    if not real:
        return name, MISSING
    inside = [match for match in real if os.path.commonpath([root, match]) == root]
    if not inside:
        return name, "video file is a link that leads out of the folder"
    videos = [match for match in inside if not _is_playlist(match)]
    if not videos:
        return name, _PLAYLIST
    if len(videos) > 1:
        videos = [match for match in videos if guard.probe(match, kinds) is None]
        if len(videos) != 1:
            return name, f"{SEVERAL}: write its suffix"
    uid = pathlib.Path(videos[0]).relative_to(root).as_posix()
    problem = problem_of(uid)
    return (name, problem) if problem else (uid, "")


def _find_remote(folder: storage.Path, name: str) -> tuple[str, str]:
    """Returns what `find` does; of several files that differ in their suffix none is opened here to see which is meant."""
    uid = pathlib.PurePosixPath(name).as_posix()
    listing, named = _listing(str(folder))
    if uid in listing:
        return uid, ""
    found = named.get(uid, ())
    if not found:
        return name, MISSING
    return (found[0], "") if len(found) == 1 else (name, f"{SEVERAL}: write its suffix")


def _is_playlist(path: str) -> bool:
    try:
        with open(path, "rb") as f:
            return f.read(16).lstrip(b"\xef\xbb\xbf").startswith(_PLAYLISTS)
    except OSError:  # told when it is opened as a video
        return False
