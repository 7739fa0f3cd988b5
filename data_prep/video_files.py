"""Finds the file that a video's name means. Names come from files of others, so a name must not lead out of the folder.

The folder may be in a bucket. Then a video is copied to this machine while it is decoded.
"""

import collections
import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator

from data_prep import guard, media, storage, streams
from data_prep.windows import Window

# First bytes of playlists. FFmpeg would open the files that a playlist names, anywhere on the machine.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat")
_PLAYLIST = "video file is a playlist"
MISSING = "video file is missing"
SEVERAL = "several files have this video name"


def problem_of(name: str) -> str | None:
    """Returns why a name can't be the path of a file inside a folder, or None if it can."""
    if re.search("[\0\ud800-\udfff]", name):
        return "video name can't be a file name"
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "video name points outside the folder"
    return None if path.parts else "narration names no video"


@functools.lru_cache(maxsize=4)
def _listing(folder: str) -> tuple[dict[str, storage.File], dict[str, list[str]]]:
    """Returns the files in a bucket's folder, as path → file and as path without suffix → paths."""
    found = storage.files(storage.as_path(folder))
    named = collections.defaultdict(list)
    for file in sorted(found):
        stem, dot, suffix = file.rpartition(".")
        if dot and "/" not in suffix:
            named[stem].append(file)
    return found, named


def facts(folder: storage.Path) -> Callable[[str], dict]:
    """Returns a function video uid → what `shards.ShardTask.items` hold about its file. A bucket is listed only once."""
    listing = _listing(str(folder))[0] if storage.is_remote(folder) else None

    def of(uid: str) -> dict:
        if listing is not None:
            return facts_of(listing.get(uid, listing.get(f"{uid}.mp4")))
        try:
            return facts_of(storage.stat(_local(folder, uid)))
        except OSError:  # a folder on the way that we may not open, or a loop of links
            return facts_of(None)

    return of


def facts_of(file: storage.File | None) -> dict:
    """Returns what `shards.ShardTask.items` hold about a file, so that a rerun redoes the shard if the file was replaced."""
    return {"video_bytes": file and file.bytes, "video_version": file and file.version}


def reason_of(told: str, item: dict) -> tuple[str, str]:
    """Returns (reason, detail) for a clip that could not be cut.

    A file that existed when the work was planned is reported as unreadable, not as missing: either this worker does not see
    it, or it has gone since.

    Args:
      told: Reason from cutting, `reason` or `reason: detail`.
      item: The file's item of `shards.ShardTask.items`.
    """
    reason, _, detail = told.partition(": ")
    if reason.endswith("file is missing") and item.get("video_bytes") is not None:
        return streams.UNREADABLE, "it was there when the conversion began"
    return reason, detail


def _local(folder: pathlib.Path, uid: str) -> pathlib.Path:
    """Returns the path of a video's file. The uids of own videos are file names, those of Ego4D lack the suffix."""
    path = folder / uid
    return path if os.path.isfile(path) else path.with_name(f"{path.name}.mp4")


@contextlib.contextmanager
def fetched(folder: str, uid: str, scratch: str) -> Iterator[pathlib.Path | str]:
    """Yields the local path of a video, or the reason why there is no file to open. From a bucket the file is copied.

    The copy is removed when the block ends.

    Args:
      folder: Folder of the videos.
      uid: Uid of the video.
      scratch: Local folder for the copy; "" is the system's.

    Raises:
      OSError: The bucket does not answer, or nothing in it may be read, so that the video itself is not to blame.
    """
    if not storage.is_remote(folder):
        path = _local(pathlib.Path(folder), uid)
        yield _PLAYLIST if _is_playlist(str(path)) else path
        return
    with storage.scratch_folder(scratch) as local:
        found = _download(storage.as_path(folder), uid, local)
        yield _PLAYLIST if isinstance(found, pathlib.Path) and _is_playlist(str(found)) else found


def cut_windows(
    folder: str, uid: str, windows: list[Window], settings: dict, *, stereo: bool = False
) -> Iterator[tuple[int, media.Cut | str]]:
    """Yields what `guard.cut_windows` yields of a video, which is copied for as long as it is decoded if it is in a bucket.

    Args:
      folder: Of the videos.
      uid: Of the video.
      windows: What to cut.
      settings: See `shards.write_shard`; how large and good pictures are, the decoder's limits and "scratch".
      stereo: See `media.cut_windows`.
    """
    with fetched(folder, uid, settings.get("scratch", "")) as found:
        if isinstance(found, str):
            yield from ((i, found) for i in range(len(windows)))
            return
        yield from guard.cut_windows(
            found, windows, short_side_px=settings["short_side_px"], quality=settings["jpeg_quality"],
            limits=limits_of(settings), stereo=stereo,
        )  # fmt: skip


def limits_of(settings: dict) -> guard.Limits:
    """Returns the decoder's limits that `--cpu_limit` and `--memory_limit` have set."""
    return guard.Limits(*settings["cpu_limit_s"], settings["memory_limit_mb"])


def _download(folder: storage.Path, uid: str, local: pathlib.Path) -> pathlib.Path | str:
    for path in (folder / uid, folder / f"{uid}.mp4"):
        try:
            return storage.copy(path, local / path.name)
        except FileNotFoundError:
            continue
        except PermissionError:
            # This fails too if nothing in the bucket may be read any more, e.g. with an expired token.
            storage.files(folder)
            return f"{streams.UNREADABLE}: Permission denied"
    return MISSING


def find(folder: storage.Path, name: str, kinds: tuple[str, ...] = ("video", "audio")) -> tuple[str, str]:
    """Returns (uid, ""), where uid is the path inside the folder of the file that a name means; or (name, reason) if none.

    A file has the same uid however it is named, with or without suffix or through links inside the folder, so that no video
    ends up in two splits.

    Args:
      folder: Folder of the videos.
      name: Path relative to the folder. It may lack the suffix, which can be any that FFmpeg knows. Of several files that
        differ only in their suffix, the one with streams of these kinds is meant.
      kinds: Kinds of streams, "video" and "audio".
    """
    return finder(folder, kinds)(name)


def finder(
    folder: storage.Path, kinds: tuple[str, ...] = ("video", "audio")
) -> Callable[[str], tuple[str, str]]:
    """Returns a function name → what `find` returns. It lists each folder only once, for many names."""
    stems = functools.cache(_names_by_stem)
    return lambda name: _find(folder, name, kinds, stems)


def _names_by_stem(folder: pathlib.Path) -> dict[str, list[str]]:
    """Returns stem → file names of a folder. The stem is all before the last dot, so "a" does not mean "a.b.mp4"."""
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
    except OSError:  # no such folder, or too long a name
        return name, MISSING
    root = os.path.realpath(folder)
    real = sorted({os.path.realpath(match) for match in matches})
    if not real:
        return name, MISSING
    inside = [match for match in real if os.path.commonpath([root, match]) == root]
    if not inside:
        return name, "video file is a link that points outside the folder"
    videos = [match for match in inside if not _is_playlist(match)]
    if not videos:
        return name, _PLAYLIST
    if len(videos) > 1:
        videos = [match for match in videos if guard.probe(match, kinds) is None]
        if len(videos) != 1:
            return name, f"{SEVERAL}: give the name with its suffix"
    uid = pathlib.Path(videos[0]).relative_to(root).as_posix()
    problem = problem_of(uid)
    return (name, problem) if problem else (uid, "")


def _find_remote(folder: storage.Path, name: str) -> tuple[str, str]:
    """Returns what `find` returns, for a bucket. Of several files that differ only in suffix, it opens none to choose one."""
    uid = pathlib.PurePosixPath(name).as_posix()
    listing, named = _listing(str(folder))
    if uid in listing:
        return uid, ""
    found = named.get(uid, ())
    if not found:
        return name, MISSING
    return (found[0], "") if len(found) == 1 else (name, f"{SEVERAL}: give the name with its suffix")


def _is_playlist(path: str) -> bool:
    try:
        with open(path, "rb") as f:
            return f.read(16).lstrip(b"\xef\xbb\xbf").startswith(_PLAYLISTS)
    except OSError:  # reported when it is opened as a video
        return False
