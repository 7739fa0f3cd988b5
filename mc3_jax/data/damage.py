"""The error for clips that can't be read: where the clip lies, what is wrong with it, and how to fix it."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import NamedTuple


class DataError(ValueError):
    """A shard or one of its records is not as the conversion wrote it. One line names it, the fault and the fix."""


class Place(NamedTuple):
    """Where a clip lies: the path of its shard and the index of its record there, -1 for the shard as a whole."""

    shard: str
    record: int = -1


NOWHERE = Place("")


@contextlib.contextmanager
def blaming(place: Place) -> Iterator[None]:
    """Turns an error in the `with` block, which reads a clip, into a DataError that names the shard and the record.

    ArrayRecord raises RuntimeError for disk errors too, so the message asks for the shard to be verified before deletion.

    Raises:
      DataError: The block raised RuntimeError or ValueError.
    """
    try:
        yield
    except DataError:
        raise
    except (RuntimeError, ValueError) as error:
        path = pathlib.Path(place.shard)
        record = f", record {place.record}" if place.record >= 0 else ""
        raise DataError(
            f"{path}{record} can't be read: {error}: run `python -m data_prep.verify {path.parent}`, delete the shards that "
            "it names and run the conversion again, which makes the same files"
        ) from error
