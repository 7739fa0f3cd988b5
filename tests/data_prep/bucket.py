"""Buckets on the local disk, for tests: an fsspec file system that an entry point registers as `gs://` and `s3://`.

Like real buckets it has no folders and no rename, and an object appears only when its file is closed. A file `faults/NAME`
under its folder makes opening the object NAME fail. It holds "forbidden", or how many times to fail as a network does.
"""

import errno
import os
import pathlib
import shutil

import fsspec
from fsspec.spec import AbstractBufferedFile

FOLDER = "MC3_TEST_BUCKETS"  # environment variable
_ENTRY_POINTS = "[fsspec.specs]\n" + "".join(f"{name}={__name__}:Buckets\n" for name in ("gs", "gcs", "s3"))


def install(site: pathlib.Path) -> None:
    """Makes a folder `site` that registers the file system in every Python process that has it in its PYTHONPATH."""
    info = site / "buckets-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: buckets\nVersion: 1.0\n")


class Upload:
    """A file to write, which becomes an object when it is closed, unless an error ended the writing."""

    def __init__(self, path: pathlib.Path):
        self._path, self._aside = path, path.with_name(f"{path.name}.{os.getpid()}.upload")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._aside.open("wb")
        self.write = self._file.write

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        self._file.close()
        if kind is None:
            self._aside.replace(self._path)
        else:
            self._aside.unlink()


class Download(AbstractBufferedFile):
    """A file that is read in ranges, as gcsfs and s3fs read theirs."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        with self.fs._at(self.path).open("rb") as file:
            file.seek(start)
            return file.read(end - start)


class Buckets(fsspec.AbstractFileSystem):
    protocol = ("gs", "gcs", "s3")

    def _at(self, path: str) -> pathlib.Path:
        return pathlib.Path(os.environ[FOLDER]) / self._strip_protocol(path)

    def _fail(self, path: str) -> None:
        fault = pathlib.Path(os.environ[FOLDER]) / "faults" / pathlib.PurePosixPath(path).name
        if not fault.exists():
            return
        if fault.read_text() == "forbidden":
            raise OSError(f"Forbidden: {path}")  # gcsfs's wording
        left = int(fault.read_text())
        if left:
            fault.write_text(str(left - 1))
            raise RuntimeError("503 Service Unavailable")  # not an OSError, as in gcsfs and aiohttp

    def info(self, path, **kwargs):
        at = self._at(path)
        if at.is_file():
            of = at.stat()
            return {"name": self._strip_protocol(path), "size": of.st_size, "type": "file", "etag": str(of.st_mtime_ns)}
        if at.is_dir() and any(p.is_file() for p in at.rglob("*")):
            return {"name": self._strip_protocol(path), "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **kwargs):
        if self.info(path)["type"] == "file":
            found = [self.info(path)]
        else:
            found = []
            for entry in sorted(self._at(path).iterdir()):
                try:
                    found.append(self.info(f"{self._strip_protocol(path)}/{entry.name}"))
                except FileNotFoundError:
                    continue
        return found if detail else [entry["name"] for entry in found]

    def open(self, path, mode="rb", **kwargs):
        self._fail(path)
        if mode == "wb":
            return Upload(self._at(path))
        assert mode == "rb"
        with (pathlib.Path(os.environ[FOLDER]) / "opened").open("a") as log:
            log.write(f"{pathlib.PurePosixPath(path).name}\n")
        return Download(self, path, "rb", cache_type="none")  # so that parts of a file are requested one by one

    def cat_file(self, path, start=None, end=None, **kwargs):
        if start is not None and start >= self.info(path)["size"]:
            raise OSError(errno.EINVAL, "The requested range is not satisfiable")  # s3fs's wording
        return super().cat_file(path, start=start, end=end, **kwargs)

    def rm_file(self, path):
        self._at(path).unlink()

    def cp_file(self, path1, path2, **kwargs):
        shutil.copyfile(self._at(path1), self._at(path2))

    def mv(self, *args, **kwargs):
        raise OSError(errno.ENOTSUP, "a bucket renames nothing")

    def mkdir(self, *args, **kwargs):
        raise OSError(errno.ENOTSUP, "a bucket has no folders")
