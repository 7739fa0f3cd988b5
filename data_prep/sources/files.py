"""What the layouts share: JSON and CSV files read whole or refused in one line that names file, row and value."""

import csv
import io
import json
import re
from collections.abc import Iterator

from data_prep import storage
from mc3_jax.data.records import UNKNOWN

_CENTURY_S = 3.2e9  # records count µs in 64 bits


def read_json(path: storage.Path):
    """Returns a JSON file's content.

    Raises:
      ValueError: No such file, no JSON, or an object with two values of one name, of which JSON readers lose the first.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise _DoubleError(f"{path} names {double!r:.60} twice in one object: join or remove one")
        return found

    if not storage.is_file(path):
        raise ValueError(f"no file {path}")
    try:
        return json.loads(storage.read(path).decode("utf-8"), object_pairs_hook=unique)
    except _DoubleError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


class _DoubleError(ValueError):
    """An object of a JSON file names something twice."""


def read_csv(
    path: storage.Path, columns: set[str], *, delimiter: str = ",", skip_ragged: bool = False
) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yields (number, values by column) of every row; rows are counted as lines of the file.

    Args:
      path: Of the file; UTF-8, the first line names the columns.
      columns: Those that must be there.
      delimiter: Between values.
      skip_ragged: Whether a row that hasn't one value a column is yielded as None instead of refused.

    Raises:
      ValueError: No such file or column, a column twice, bytes that are no UTF-8, or rows that can't be told apart.
    """
    if not storage.is_file(path):
        raise ValueError(f"no file {path}")
    # Spreadsheets put a mark before the first column's name.
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as f:
        # Strict finds a quotation mark that nobody closes. Tab-separated files of others hold loose ones that mean nothing.
        reader = csv.DictReader(f, delimiter=delimiter, strict=delimiter == ",")
        try:
            names = list(reader.fieldnames or ())
            if columns - set(names):
                missing = ", ".join(sorted(columns - set(names)))
                raise ValueError(f"{path} lacks the column(s) {missing}; it has {', '.join(map(repr, names)) or 'none':.200}")
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{path} has the column {twice[0]!r} more than once: rename or remove one")
            for row in reader:
                where = f"{path}, row {reader.line_num}"
                values = [value for value in row.values() if isinstance(value, str)]
                if delimiter == "\t" and any("\n" in value and "\t" in value for value in values):
                    raise ValueError(f"{where}: a value runs over several rows: a quotation mark before it is not closed")
                ragged = len(values) < len(row)
                if ragged and not skip_ragged:
                    raise ValueError(f"{where}: its values are not one a column: {list(row.values())!r:.100}")
                yield reader.line_num, None if ragged else row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, {_undecodable(path)}") from error
        except csv.Error as error:
            raise ValueError(f"{path}, row {reader.line_num + 1} can't be read: {error}") from error


def _undecodable(path: storage.Path) -> str:
    """Returns which row of a file holds bytes that are no UTF-8: the decoder reads ahead of the rows and can't say."""
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="") as f:
        for number, line in enumerate(f, start=1):
            found = re.search("[\udc80-\udcff]", line)
            if found:
                return f"row {number} can't be read: byte {ord(found[0]) - 0xDC00:#x} is no UTF-8"
    return "some row can't be read: the file changes while it is read"


def is_tab_separated(path: storage.Path) -> bool:
    """Returns whether the first line holds a tab; a file that isn't there or is no text has none."""
    try:
        with path.open("rb") as f:
            return b"\t" in f.read(65536).partition(b"\n")[0]
    except OSError:
        return False


def expect(value, kinds: type | tuple[type, ...], what: str):
    """Returns the value if it is of these kinds, or None; `what` says where it stands and what it should be.

    Raises:
      ValueError: It is neither.
    """
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{what}, got {value!r:.60}")


def seconds(value, where: str) -> float:
    """Returns a time as a number of seconds, NaN for none at all: null, NaN, infinity or more than a century.

    Raises:
      ValueError: It is no number.
    """
    try:
        value = "nan" if value is None else expect(value, (int, float, str), f"{where} must be seconds")
        time_s = _number(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where} must be seconds, got {value!r:.60}") from error
    return time_s if abs(time_s) < _CENTURY_S else float("nan")


def _number(text: str) -> float:
    """Returns the number that a text writes as other programs do: `float` also takes "1_000" and other scripts' digits.

    Raises:
      ValueError: It is none.
    """
    if not text.isascii() or "_" in text:
        raise ValueError(f"no number: {text!r:.60}")
    return float(text)


def whole_number(value: str, where: str, *, least: int = 0, most: int) -> int:
    """Returns a whole number of decimal digits.

    Raises:
      ValueError: It is none, or not from `least` to `most`.
    """
    digits = value.strip()
    if digits.isascii() and digits.isdigit() and len(digits) < 16 and least <= int(digits) <= most:
        return int(digits)
    raise ValueError(f"{where} must be a whole number from {least} to {most}, got {value!r:.60}")


def label(value: str, where: str) -> int:
    """Returns 1 or 0, however many decimals they have, or -1 where there is no value.

    Raises:
      ValueError: It is another one.
    """
    if not value.strip():
        return UNKNOWN
    try:
        return {0.0: 0, 1.0: 1}[_number(value)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where} must be 1, 0 or empty, got {value!r:.60}") from error
