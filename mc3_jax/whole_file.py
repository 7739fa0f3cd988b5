"""Atomic writing of files: a file gets its name once it is whole, so that even after a kill the old or the new is there."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the same folder to write to; after the block that file is synced and renamed to `path`.

    If the block raises, the temporary file is deleted and `path` stays as it was.

    Args:
      path: Path of the file; its folder exists.

    Raises:
      OSError: The file can't be written. The error names the file, which Python's own error for a full disk doesn't.
    """
    # A random name: two evaluations may write at once, on machines where their process ids are equal.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.errno is None:  # raised by a library, with its own message
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # it would hide the first error
            aside.unlink(missing_ok=True)
