"""Files that get their name when they are whole: whoever reads, or comes after a kill, finds the old one or the new."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path in the same folder to write to. When the block ends well, that file is on the disk and gets its name.

    Args:
      path: Of the file; its folder is there.

    Raises:
      OSError: The file can't be written. It names the file, which Python leaves out where a disk is full.
    """
    # Never the same: two evaluations may write at once, on machines with equal process ids.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.errno is None:  # a library's own words
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # it would hide why
            aside.unlink(missing_ok=True)
