"""Reads JSON and CSV files for all layouts: a file is read whole or refused in one line that names file, row and value."""

import csv
import io
import json
import re
from collections.abc import Iterator

from data_prep import storage
from mc3_jax.data.records import UNKNOWN

_CENTURY_S = 3.2e9  # times must be below a century: records count µs in 64 bits


def read_json(path: storage.Path):
    """Returns a JSON file's content.

    Raises:
      ValueError: There is no such file, it is not JSON, or an object in it has a name twice (readers would lose the first
        value).
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise _DoubleError(f"{path} names {double!r:.60} twice in one object: merge or remove one")
        return found

    if not storage.is_file(path):
        raise ValueError(f"no file {path}")
    try:
        return json.loads(storage.read(path).decode("utf-8"), object_pairs_hook=unique)
    except _DoubleError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


class _DoubleError(ValueError):
    """An object in a JSON file has a name twice."""


def read_csv(
    path: storage.Path, columns: set[str], *, delimiter: str = ",", skip_ragged: bool = False
) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yields (line number in the file, value of each column) of every row.

    Args:
      path: File to read: UTF-8, with the names of the columns in its first line.
      columns: Columns that must be there.
      delimiter: Character between values.
      skip_ragged: Whether to yield None for a row without one value per column, instead of refusing it.

    Raises:
      ValueError: There is no such file or column, a column is there twice, bytes are not UTF-8, rows can't be told apart, or
        a row that is not to be skipped has not one value per column.
    """
    if not storage.is_file(path):
        raise ValueError(f"no file {path}")
    # "-sig", since spreadsheets put a byte order mark before the first column's name.
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as f:
        # Strict finds a quotation mark that is not closed. In other people's tab-separated files single ones mean nothing.
        reader = csv.DictReader(f, delimiter=delimiter, strict=delimiter == ",")
        try:
            names = list(reader.fieldnames or ())
            if columns - set(names):
                missing = ", ".join(sorted(columns - set(names)))
                told = f"{path} lacks the column(s) {missing}; it has {', '.join(map(repr, names)) or 'none':.200}"
                other = next((mark for mark in ";\t," if mark != delimiter and mark in "".join(names)), "")
                hint = f": separate the values by {delimiter!r} instead of {other!r}" if other and len(names) == 1 else ""
                raise ValueError(told + hint)
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
                    raise ValueError(f"{where}: it does not have one value per column: {list(row.values())!r:.100}")
                yield reader.line_num, None if ragged else row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, {_undecodable(path)}") from error
        except csv.Error as error:
            raise ValueError(f"{path}, row {reader.line_num + 1} can't be read: {error}") from error


def _undecodable(path: storage.Path) -> str:
    """Returns which row holds bytes that are not UTF-8. The decoder can't say it, since it reads ahead of the rows."""
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="") as f:
        for number, line in enumerate(f, start=1):
            found = re.search("[\udc80-\udcff]", line)
            if found:
                return f"row {number} can't be read: byte {ord(found[0]) - 0xDC00:#x} is not UTF-8"
    return "some row can't be read: the file changed while it was read"


def is_tab_separated(path: storage.Path) -> bool:
    """Returns whether a file's first line holds a tab; False if the file can't be read."""
    try:
        with path.open("rb") as f:
            return b"\t" in f.read(65536).partition(b"\n")[0]
    except OSError:
        return False


def expect(value, kinds: type | tuple[type, ...], what: str):
    """Returns `value` if it is None or of one of these types; a bool is of none.

    Args:
      value: Value from a JSON file.
      kinds: Type or types that it may have.
      what: Where the value is and what it should be, for the error.

    Raises:
      ValueError: `value` is of another type.
    """
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{what}, got {value!r:.60}")


def seconds(value, where: str) -> float:
    """Returns a time in seconds. None, NaN, infinity and more than a century give NaN, which means that there is no time.

    Raises:
      ValueError: `value` is not a number.
    """
    try:
        value = "nan" if value is None else expect(value, (int, float, str), f"{where} must be seconds")
        time_s = _number(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where} must be seconds, got {value!r:.60}") from error
    return time_s if abs(time_s) < _CENTURY_S else float("nan")


def _number(text: str) -> float:
    """Returns the number in a text. Unlike `float`, it does not accept "1_000" or the digits of other scripts.

    Raises:
      ValueError: `text` is not a number.
    """
    if not text.isascii() or "_" in text:
        raise ValueError(f"no number: {text!r:.60}")
    return float(text)


def whole_number(value: str, where: str, *, least: int = 0, most: int) -> int:
    """Returns the whole number in a text of decimal digits.

    Raises:
      ValueError: `value` is not a whole number, or not from `least` to `most`.
    """
    digits = value.strip()
    if digits.isascii() and digits.isdigit() and len(digits) < 16 and least <= int(digits) <= most:
        return int(digits)
    raise ValueError(f"{where} must be a whole number from {least} to {most}, got {value!r:.60}")


def label(value: str, where: str) -> int:
    """Returns the label in a text: 1 or 0, with or without decimals ("1.0"), or -1 where it is empty.

    Raises:
      ValueError: `value` is anything else.
    """
    if not value.strip():
        return UNKNOWN
    try:
        return {0.0: 0, 1.0: 1}[_number(value)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where} must be 1, 0 or empty, got {value!r:.60}") from error
