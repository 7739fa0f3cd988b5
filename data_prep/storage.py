"""Files that may lie in a bucket. Local ones are written aside, synced and renamed; those at `gs://` or `s3://` go up whole.

Either way a reader sees the old file, the new one or none. Local paths are `pathlib`'s, remote ones `etils.epath`'s, behind
which fsspec finds gcsfs or s3fs.
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
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # which fsspec knows them by
_WAITS_S = (1.0, 5.0, 20.0)  # before another try; the packages have tried a few times by then
_NUM_REQUESTS = 16  # at once, of small files
_CHUNK_BYTES = 1 << 23
_BLOCK_BYTES, _NUM_BLOCKS = 1 << 20, 32  # of a file read in parts, and how many stay in memory
_SCRATCH, _OURS = "mc3_jax-scratch-", ".mc3_jax-scratch"  # such folders, and the file in them that says they may be removed
TEMPORARY = r"\.(?P<file>.+)\.\w+\.tmp"  # what a killed writer leaves beside the file
FULL = (errno.ENOSPC, errno.EDQUOT)
_ORPHAN_S = 60.0  # a younger folder's owner may not have locked it yet
# A listing kept in memory knows nothing of what other workers wrote since.
for _protocol in ("gs", "gcs", "s3"):
    conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def parse(text: str) -> Path:
    """Returns the path that an option names; for argparse.

    Raises:
      argparse.ArgumentTypeError: Nothing, another kind of address, or its package lacks.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path: is a variable of the shell's not set?")
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
    """Returns the local or remote path."""
    return epath.Path(text) if is_remote(text) else pathlib.Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; a bucket has none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def _try(call: Callable, path: Path):
    """Returns what a call gives, after a few tries where a bucket's network is in the way.

    Raises:
      FileNotFoundError, PermissionError: At once: another try tells the same.
      OSError: Whatever else the bucket's package raised, in the end.
    """
    for wait_s in (*_WAITS_S, None) if is_remote(path) else (None,):
        try:
            return call()
        except Exception as error:
            if not is_remote(path) or _is_full(error):
                raise
            for kind in (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
                if isinstance(error, kind):  # s3fs does not say of what
                    raise kind(str(error) if str(path) in str(error) else f"{path}: {error}") from error
            if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs's words for status 403
                raise PermissionError(f"{path}: {error}") from error
            if wait_s is None:
                raise OSError(f"{path}: {type(error).__name__}: {error}") from error
            time.sleep(wait_s)


def _is_full(error: Exception) -> bool:
    """Returns whether a disk is full; a bucket never is."""
    return isinstance(error, OSError) and error.errno in FULL


@contextlib.contextmanager
def filling(folder: str | os.PathLike) -> Iterator[None]:
    """Gives an error about a full disk the name of the folder, for the kernel says none."""
    try:
        yield
    except OSError as error:
        if _is_full(error) and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(folder)) from error
        raise


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder; in a bucket, whether anything lies under it.

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
      OSError: It can't be read; FileNotFoundError where it isn't there.
    """
    return _try(path.read_bytes, path)


def head(path: Path, num_bytes: int) -> bytes:
    """Returns how a file begins.

    Raises:
      OSError: It can't be read; FileNotFoundError where it isn't there.
    """
    if is_remote(path):
        files, name = fsspec.url_to_fs(os.fspath(path))
        # Of an empty file every part is an error.
        return _try(lambda: files.cat_file(name, start=0, end=num_bytes), path) if size(path) != 0 else b""
    with path.open("rb") as file:
        return file.read(num_bytes)


def reader(path: Path, num_bytes: int) -> Callable[[int, int], bytes]:
    """Returns the function (start, stop) → those bytes of a bucket's file, which asks for blocks and keeps the last few.

    It raises OSError where the bucket does not answer, or the file is shorter by now.

    Args:
      path: Of the file.
      num_bytes: Its size.
    """
    files, name = fsspec.url_to_fs(os.fspath(path))

    @functools.lru_cache(maxsize=_NUM_BLOCKS)
    def block(number: int) -> bytes:
        start = number * _BLOCK_BYTES
        stop = min(start + _BLOCK_BYTES, num_bytes)
        found = _try(lambda: files.cat_file(name, start=start, end=stop), path)
        if len(found) != stop - start:
            raise OSError(f"{path}: {len(found)} bytes of {stop - start} arrived")
        return found

    def read(start: int, stop: int) -> bytes:
        first = start // _BLOCK_BYTES
        parts = [block(number) for number in range(first, -(-stop // _BLOCK_BYTES))]
        return b"".join(parts)[start - first * _BLOCK_BYTES : stop - first * _BLOCK_BYTES]

    return read


@dataclasses.dataclass(frozen=True)
class File:
    """A file's bytes, and a word that changes with its content: when it was written, or what a bucket counts or hashes."""

    bytes: int
    version: str


def _file(info: dict) -> File:
    """Returns the file of what fsspec tells of an object, each bucket in its own words."""
    words = (info[key] for key in ("generation", "etag", "ETag", "LastModified", "mtime") if info.get(key))
    return File(info["size"], str(next(words, "")))


def stat(path: Path) -> File | None:
    """Returns what a file is, or None where there is none; of a bucket's folder None, too."""
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
    """Returns a file's bytes, or None where there is none."""
    found = stat(path)
    return None if found is None else found.bytes


def files(folder: Path) -> dict[str, File]:
    """Returns each file by its path inside the folder; {} of a folder that isn't there.

    Of a local folder only the files directly inside, of a bucket's all.
    """
    if not is_remote(folder):
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another worker removed it since it was listed
                    if entry.is_file():
                        found[entry.name] = File(entry.stat().st_size, str(entry.stat().st_mtime_ns))
        return found
    system, root = fsspec.url_to_fs(os.fspath(folder))
    found = _try(lambda: system.find(root, detail=True), folder)
    return {name[len(root) :].lstrip("/"): _file(info) for name, info in found.items()}


def remove(path: Path) -> None:
    """Removes a file if it is there."""
    _try(lambda: path.unlink(missing_ok=True), path)


def write(path: Path, content: bytes) -> None:
    """Writes a file in one step."""
    with writing(path) as aside:
        aside.write_bytes(content)


@contextlib.contextmanager
def writing(path: Path, scratch: str | os.PathLike = "") -> Iterator[pathlib.Path]:
    """Yields a local path to write to. When the block ends well, the file gets its name, on the disk or in the bucket.

    Args:
      path: Of the file.
      scratch: Local folder for what goes into a bucket; "" is the system's.
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
    """Returns a local name to write under before the file gets its own; see `TEMPORARY`."""
    # Never the same: on shared disks two attempts may run at once, on machines with equal process ids.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def publish(local: pathlib.Path, path: Path) -> None:
    """Gives a written file its name: renames it, synced, in the same folder, or copies it into a bucket.

    Raises:
      OSError: It did not arrive whole.
    """
    if is_remote(path):
        _try(lambda: _copy(local, path), path)
        expected, found = local.stat().st_size, size(path)
        if found != expected:
            raise OSError(f"{path}: {found} bytes of {expected} arrived")
        return
    with local.open("rb") as f:
        os.fsync(f.fileno())
    os.replace(local, path)
    _sync_folder(path.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    """Syncs the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read_from, target.open("wb") as write_to:
        shutil.copyfileobj(read_from, write_to, _CHUNK_BYTES)


def copy(path: Path, local: pathlib.Path) -> pathlib.Path:
    """Copies a bucket's file to this machine and returns the copy.

    Raises:
      OSError: It can't be copied.
    """
    with filling(local.parent):
        _try(lambda: _copy(path, local), path)
    return local


@contextlib.contextmanager
def scratch_folder(parent: str | os.PathLike = "") -> Iterator[pathlib.Path]:
    """Yields a new local folder that goes when the block ends, with those that killed processes left.

    Raises:
      OSError: `parent` is no folder that can be written.
    """
    parent = pathlib.Path(parent or tempfile.gettempdir())
    for orphan in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), _locked(orphan):  # the kernel drops a killed process's lock
            if (orphan / _OURS).is_file() and time.time() - orphan.stat().st_mtime > _ORPHAN_S:
                shutil.rmtree(orphan, ignore_errors=True)
    # Another process may look just now whether the new folder is an orphan, and lets go of it.
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=parent) as name, _locked(pathlib.Path(name), wait=True):
        (pathlib.Path(name) / _OURS).touch()
        yield pathlib.Path(name)


@contextlib.contextmanager
def temporary_files(parent: str | os.PathLike = "") -> Iterator[pathlib.Path]:
    """Yields a new scratch folder, in which libraries of this process make their temporary files while the block runs.

    Raises:
      OSError: `parent` is no folder that can be written.
    """
    with scratch_folder(parent) as folder:
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def _locked(folder: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Waits where another process holds the lock, or raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def each(call: Callable, items: Iterable, folder: Path) -> Iterator:
    """Yields call(item) in order; a bucket is asked for several at once."""
    if not is_remote(folder):
        yield from map(call, items)
        return
    with concurrent.futures.ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        yield from pool.map(call, items)
