"""Files on a disk or in a bucket. Readers see the old file, the new one or none, but never half of one.

Local files are written under a temporary name, synced and renamed; files at `gs://` or `s3://` are uploaded in one piece.
Local paths are `pathlib`'s, remote ones `etils.epath`'s, behind which fsspec finds gcsfs or s3fs.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import functools
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

import fsspec
from etils import epath
from fsspec.config import conf

Path = pathlib.Path | epath.Path
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme → package through which fsspec reads it
_WAITS_S = (1.0, 5.0, 20.0)  # before each retry; the packages have retried a few times themselves by then
_NUM_REQUESTS = 16  # for small files, at the same time
_CHUNK_BYTES = 1 << 23
_BLOCK_BYTES, _NUM_BLOCKS = 1 << 20, 32  # block size of a file that is read in parts, and number of blocks kept in memory
_SCRATCH, _OURS = "mc3_jax-scratch-", ".mc3_jax-scratch"  # prefix of scratch folders; file in them that allows their removal
TEMPORARY = r"\.(?P<file>.+)\.\w+\.tmp"  # name of the file that a killed writer leaves behind
FULL = (errno.ENOSPC, errno.EDQUOT)
_ORPHAN_S = 60.0  # the owner of a younger folder may not have locked it yet
# A cached listing would miss what other workers have written since.
for _protocol in ("gs", "gcs", "s3"):
    conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def parse(text: str) -> Path:
    """Returns the path that an option names; a `type` for argparse.

    Raises:
      argparse.ArgumentTypeError: The text is empty or another kind of address, or the package for it is not installed.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path: is a shell variable not set?")
    scheme, is_address, _ = text.partition("://")
    if is_address and scheme not in _PACKAGES:
        raise argparse.ArgumentTypeError(f"{text!r} must be a local path, gs:// or s3://")
    if is_address:
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError:
            package = _PACKAGES[scheme]
            raise argparse.ArgumentTypeError(f"{scheme}:// needs {package}: pip install {package}") from None
    return as_path(text)


def as_path(text: str | os.PathLike) -> Path:
    """Returns a text as a local or remote path."""
    return epath.Path(text) if is_remote(text) else pathlib.Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()


def make_folder(path: Path) -> None:
    """Makes a local folder and its parents; does nothing in a bucket, which has no folders."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def _try(call: Callable, path: Path):
    """Returns the result of a call; if `path` is in a bucket, errors such as a failing network are retried a few times.

    Raises:
      FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError: At once, since a retry would not help.
      OSError: Any other error of the bucket's package, after the last retry. A full local disk is reported at once.
    """
    for wait_s in (*_WAITS_S, None) if is_remote(path) else (None,):
        try:
            return call()
        except Exception as error:
            if not is_remote(path) or _is_full(error):
                raise
            for kind in (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
                if isinstance(error, kind):  # s3fs does not name the path
                    raise kind(str(error) if str(path) in str(error) else f"{path}: {error}") from error
            if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs's message for status 403
                raise PermissionError(f"{path}: {error}") from error
            if wait_s is None:
                raise OSError(f"{path}: {type(error).__name__}: {error}") from error
            time.sleep(wait_s)


def _is_full(error: Exception) -> bool:
    """Returns whether an error means that a disk is full, which a bucket never is."""
    return isinstance(error, OSError) and error.errno in FULL


@contextlib.contextmanager
def filling(folder: str | os.PathLike) -> Iterator[None]:
    """Adds the folder's name to an error about a full disk, since the kernel gives none."""
    try:
        yield
    except OSError as error:
        if _is_full(error) and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(folder)) from error
        raise


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder; in a bucket, whether any file lies under it.

    Raises:
      OSError: The bucket does not answer.
    """
    if not is_remote(path):
        return path.is_dir()
    files, root = fsspec.url_to_fs(os.fspath(path))
    try:
        return bool(_try(lambda: files.ls(root, detail=False), path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_file(path: Path) -> bool:
    return path.is_file() if not is_remote(path) else size(path) is not None


def read(path: Path) -> bytes:
    """Returns a file's content.

    Raises:
      OSError: The file can't be read; FileNotFoundError if it doesn't exist.
    """
    return _try(path.read_bytes, path)


def head(path: Path, num_bytes: int) -> bytes:
    """Returns the first bytes of a file, at most `num_bytes`.

    Raises:
      OSError: The file can't be read; FileNotFoundError if it doesn't exist.
    """
    if is_remote(path):
        files, name = fsspec.url_to_fs(os.fspath(path))
        # Asking for any part of an empty file is an error.
        return _try(lambda: files.cat_file(name, start=0, end=num_bytes), path) if size(path) != 0 else b""
    with path.open("rb") as file:
        return file.read(num_bytes)


def reader(path: Path, num_bytes: int) -> Callable[[int, int], bytes]:
    """Returns a function (start, stop) → these bytes of a file in a bucket. It fetches whole blocks and caches the last few.

    The function raises OSError if the bucket does not answer, or if the file has become shorter.

    Args:
      path: File in the bucket.
      num_bytes: Size of the file.
    """
    files, name = fsspec.url_to_fs(os.fspath(path))

    @functools.lru_cache(maxsize=_NUM_BLOCKS)
    def block(number: int) -> bytes:
        start = number * _BLOCK_BYTES
        stop = min(start + _BLOCK_BYTES, num_bytes)
        found = _try(lambda: files.cat_file(name, start=start, end=stop), path)
        if len(found) != stop - start:
            raise OSError(f"{path}: {len(found)} of {stop - start} bytes arrived")
        return found

    def read(start: int, stop: int) -> bytes:
        first = start // _BLOCK_BYTES
        parts = [block(number) for number in range(first, -(-stop // _BLOCK_BYTES))]
        return b"".join(parts)[start - first * _BLOCK_BYTES : stop - first * _BLOCK_BYTES]

    return read


@dataclasses.dataclass(frozen=True)
class File:
    """Size of a file in bytes, and a text that changes with its content: the time of writing, a bucket's version or hash."""

    bytes: int
    version: str


def _file(info: dict) -> File:
    """Returns size and version from fsspec's description of an object, whose keys differ from bucket to bucket."""
    words = (info[key] for key in ("generation", "etag", "ETag", "LastModified", "mtime") if info.get(key))
    return File(info["size"], str(next(words, "")))


def stat(path: Path) -> File | None:
    """Returns the size and version of a file; None if it doesn't exist, or is a folder in a bucket."""
    try:
        if is_remote(path):
            system, root = fsspec.url_to_fs(os.fspath(path))
            info = _try(lambda: system.info(root), path)
            return None if info["type"] == "directory" else _file(info)
        found = path.stat()
        return File(found.st_size, str(found.st_mtime_ns))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None


def size(path: Path) -> int | None:
    """Returns the size of a file in bytes, or None if it doesn't exist."""
    found = stat(path)
    return None if found is None else found.bytes


def files(folder: Path) -> dict[str, File]:
    """Returns path inside the folder → file; {} if the folder doesn't exist.

    Of a local folder only the files directly inside are listed, in a bucket also those of all folders below.
    """
    if not is_remote(folder):
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another worker has removed it after the listing
                    if entry.is_file():
                        found[entry.name] = File(entry.stat().st_size, str(entry.stat().st_mtime_ns))
        return found
    system, root = fsspec.url_to_fs(os.fspath(folder))
    found = _try(lambda: system.find(root, detail=True), folder)
    return {name[len(root) :].lstrip("/"): _file(info) for name, info in found.items()}


def names(folder: Path) -> list[str]:
    """Returns the paths inside the folder of what `files` lists, and of folders on a disk; [] if the folder doesn't exist.

    No file is looked at. On a file system of many machines that would be a request for each.
    """
    if is_remote(folder):
        return list(files(folder))
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def remove(path: Path) -> None:
    """Removes a file if it exists."""
    _try(lambda: path.unlink(missing_ok=True), path)


def write(path: Path, content: bytes) -> None:
    """Writes a file so that readers never see half of it."""
    with writing(path) as aside:
        aside.write_bytes(content)


@contextlib.contextmanager
def writing(path: Path, scratch: str | os.PathLike = "") -> Iterator[pathlib.Path]:
    """Yields a temporary local path to write to. If the block ends without error, the file is moved or uploaded to `path`.

    Args:
      path: Final path, on a disk or in a bucket.
      scratch: Local folder for the temporary file of a bucket; "" is the system's.
    """
    if is_remote(path):
        with scratch_folder(scratch) as folder:
            with filling(folder):
                yield folder / path.name
            publish(folder / path.name, path)
        return
    aside = aside_of(path)
    try:
        with filling(path.parent):
            yield aside
            publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: pathlib.Path) -> pathlib.Path:
    """Returns a temporary name in the same folder, under which a file is written first; see `TEMPORARY`."""
    # Unique, since on shared disks two attempts may run at the same time, on machines with equal process ids.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def publish(local: pathlib.Path, path: Path) -> None:
    """Gives a written file its final name: syncs and renames it within its folder, or copies it into a bucket.

    Raises:
      OSError: The disk or bucket fails, or the copy is incomplete.
    """
    if is_remote(path):
        _try(lambda: _copy(local, path), path)
        expected, found = local.stat().st_size, size(path)
        if found != expected:
            raise OSError(f"{path}: {found} of {expected} bytes arrived")
        return
    with local.open("rb") as f:
        os.fsync(f.fileno())
    os.replace(local, path)
    _sync_folder(path.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    """Syncs the directory entries of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read_from, target.open("wb") as write_to:
        shutil.copyfileobj(read_from, write_to, _CHUNK_BYTES)


def copy(path: Path, local: pathlib.Path) -> pathlib.Path:
    """Copies a file from a bucket to this machine and returns the local path.

    Raises:
      OSError: The file can't be copied.
    """
    with filling(local.parent):
        _try(lambda: _copy(path, local), path)
    return local


@contextlib.contextmanager
def scratch_folder(parent: str | os.PathLike = "") -> Iterator[pathlib.Path]:
    """Yields a new local folder, which is removed when the block ends. Also removes those that killed processes left.

    Raises:
      OSError: `parent` is not a folder that can be written to.
    """
    parent = pathlib.Path(parent or tempfile.gettempdir())
    for orphan in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), _locked(orphan):  # the kernel releases the lock of a killed process
            if (orphan / _OURS).is_file() and time.time() - orphan.stat().st_mtime > _ORPHAN_S:
                shutil.rmtree(orphan, ignore_errors=True)
    # Wait, since another process may hold the new folder's lock for a moment, to see whether the folder is an orphan.
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=parent) as name, _locked(pathlib.Path(name), wait=True):
        (pathlib.Path(name) / _OURS).touch()
        yield pathlib.Path(name)


@contextlib.contextmanager
def temporary_files(parent: str | os.PathLike = "") -> Iterator[pathlib.Path]:
    """Yields a new scratch folder. While the block runs, libraries in this process put their temporary files into it.

    Raises:
      OSError: `parent` is not a folder that can be written to.
    """
    with scratch_folder(parent) as folder:
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def _locked(folder: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Locks a folder while the block runs. If another process holds the lock, waits, or without `wait` raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def each(call: Callable, items: Iterable, folder: Path) -> Iterator:
    """Yields call(item) in order; if the folder is in a bucket, several calls run at the same time."""
    if not is_remote(folder):
        yield from map(call, items)
        return
    with concurrent.futures.ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        yield from pool.map(call, items)
