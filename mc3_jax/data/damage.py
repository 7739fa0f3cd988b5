"""What is said of clips that can't be read: where they lie, what is wrong, and what mends it."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import NamedTuple


class DataError(ValueError):
    """A shard or a record of it is not what was converted. One line names it, what is wrong and what mends it."""


class Place(NamedTuple):
    """Where a clip lies: the path of its shard, and the number of its record, -1 for none in particular."""

    shard: str
    record: int = -1


NOWHERE = Place("")


@contextlib.contextmanager
def blaming(place: Place) -> Iterator[None]:
    """Turns what is wrong with a record into an error that names it.

    ArrayRecord raises RuntimeError, for what the disk refuses too, so the shard is to be looked at before it is deleted.

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
            "it names and give the conversion's command again, which makes the same files"
        ) from error
