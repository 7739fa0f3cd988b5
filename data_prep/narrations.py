"""Ego4D's annotation files: narrations, taxonomies, sounding-action labels, splits; text and numbers only, no media."""

import ast
import csv
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re

from mc3_jax.data.records import SPLITS, UNKNOWN

_PASSES = ("narration_pass_1", "narration_pass_2")
# "#C C", and what slips of the pen make of it: "#c C", "# C C", "#C  C", "#C c", "#CC", "C C", "3C C", "@C C".
_WEARER = re.compile(r"^\s*(#\s*cc?\b|[3@]?c\s+c\b)", re.IGNORECASE)
_OTHER = re.compile(r"^\s*#\s*oo?\b", re.IGNORECASE)
_UNSURE = re.compile(r"#\s*uns?u?re\b", re.IGNORECASE)
_TAG = re.compile(r"^\s*#\s*\w+\s+(\w\b)?|^\s*[3@]?c\s+c\b|#\s*uns?u?re\b", re.IGNORECASE)
# Endings of inflected forms and what they stand for: chops, washes, carries, slicing, diced, leaves, knives.
_ENDINGS = (
    ("es", ""), ("s", ""), ("ies", "y"), ("ing", ""), ("ing", "e"), ("ed", ""), ("ed", "e"), ("ied", "y"), ("ves", "f"),
    ("ves", "fe"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Narration:
    """A line somebody wrote about a moment of a video.

    Attributes:
      video_uid, annotation_uid: Ego4D's ids.
      source: "narration_pass_1" or "narration_pass_2", or the label file's word for it.
      time_s: Moment in the video; NaN where the file names none.
      text: As written.
      label: 1, 0 or -1 for no label.
    """

    video_uid: str
    annotation_uid: str
    source: str
    time_s: float
    text: str
    label: int = UNKNOWN

    @property
    def clip_id(self) -> str:
        """Unique: one annotation uid may cover a whole pass, so the moment is part of it."""
        moment = f"{round(self.time_s * 1e6):011d}" if math.isfinite(self.time_s) else "no_time"
        return f"{self.video_uid}_{self.annotation_uid}_{moment}"


def who(text: str) -> str:
    """Returns whose action a narration tells: "wearer", "other", "unsure" or "unknown"; slips in the tags are forgiven."""
    if _UNSURE.search(text):
        return "unsure"
    if _WEARER.search(text):
        return "wearer"
    return "other" if _OTHER.search(text) else "unknown"


def _read_json(path: pathlib.Path):
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _expect(value, kinds: type | tuple[type, ...], what: str):
    """Returns the value if it is of these kinds, or None; `what` says where it stands and what it should be."""
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{what}, got {value!r:.60}")


def _seconds(value, where: str) -> float:
    """Returns a time as a number of seconds, NaN for none at all: null, NaN or infinity."""
    try:
        time_s = float("nan" if value is None else _expect(value, (int, float, str), f"{where} must be seconds"))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where} must be seconds, got {value!r:.60}") from error
    return time_s if math.isfinite(time_s) else float("nan")


def read_narrations(path: pathlib.Path) -> list[Narration]:
    """Returns every narration of `narration.json`, both passes, in order of video and time.

    Entries without a text or time are kept, with an empty text or NaN, so that the caller can count them.

    Raises:
      ValueError: No such file, no JSON or another layout; what is wrong is named with its video, pass and row.
    """
    content = _read_json(path)
    videos = content.get("videos", content) if isinstance(content, dict) else content
    if not isinstance(videos, dict):
        raise ValueError(f"{path} must hold an object of videos, got {videos!r:.60}")
    found = []
    for uid, video in videos.items():
        for name in _PASSES:
            where = f"{path}, video {uid}"
            part = (_expect(video, dict, f"{where} must be an object") or {}).get(name)
            where = f"{where}, {name}"
            lines = (_expect(part, dict, f"{where} must be an object") or {}).get("narrations")
            for i, line in enumerate(_expect(lines, list, f"{where}: narrations must be a list") or ()):
                row = f"{where}, row {i + 1}"
                if not isinstance(line, dict):
                    raise ValueError(f"{row} must be an object, got {line!r:.60}")
                annotation = _expect(line.get("annotation_uid"), (str, int), f"{row}: annotation_uid must be text")
                text = _expect(line.get("narration_text"), str, f"{row}: narration_text must be text")
                time_s = _seconds(line.get("timestamp_sec"), f"{row}: timestamp_sec")
                annotation = "" if annotation is None else str(annotation)
                found.append(Narration(str(uid), annotation, name, time_s, text or ""))
    return sorted(found, key=lambda n: (n.video_uid, *_order(n.time_s), n.source, n.annotation_uid))


def _order(time_s: float) -> tuple[bool, float]:
    """Sorts times, those that are NaN last: by itself it would put the others out of order."""
    return (True, 0.0) if math.isnan(time_s) else (False, time_s)


def read_metadata(path: pathlib.Path) -> dict[str, dict]:
    """Returns `ego4d.json`'s entry of each video uid.

    Raises:
      ValueError: No such file, no JSON or another layout.
    """
    content = _read_json(path)
    try:
        return {video["video_uid"]: video for video in content["videos"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold a list `videos` of objects with `video_uid`") from error


def _read_csv(path: pathlib.Path, columns: set[str], delimiter: str = ",") -> list[tuple[str, dict[str, str]]]:
    """Returns ("FILE, row N", values by column) of every row; rows are counted as lines of the file."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as f:  # spreadsheets put a mark before the first column's name
        reader = csv.DictReader(f, delimiter=delimiter)
        try:
            missing = columns - set(reader.fieldnames or ())
            if missing:
                has = ", ".join(map(repr, reader.fieldnames or ())) or "none"
                raise ValueError(f"{path} lacks the column(s) {', '.join(sorted(missing))}; it has {has:.200}")
            for row in reader:
                where = f"{path}, row {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: its values are not one a column: {list(row.values())!r:.100}")
                rows.append((where, row))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}, row {reader.line_num + 1} can't be read: {error}") from error
    return rows


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """Labels and the surface forms that mean them.

    Attributes:
      labels: In order of the file; the index is the id.
      forms: Words of a surface form → id.
    """

    labels: list[str]
    forms: dict[tuple[str, ...], int]

    @functools.cached_property
    def _vocabulary(self) -> frozenset[str]:
        return frozenset(word for form in self.forms for word in form)

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.forms), default=0)

    def find(self, words: list[str]) -> tuple[int, int]:
        """Returns (id, place after it) of the first surface form in the words, the longest where several begin there.

        Inflected words that the taxonomy lacks are tried without their ending: "chops" is "chop". Without any form the
        id is -1 and the place 0.
        """
        plain = [_stem(word, self._vocabulary) for word in words]
        for start in range(len(plain)):
            for stop in range(min(start + self._longest, len(plain)), start, -1):
                found = self.forms.get(tuple(plain[start:stop]))
                if found is not None:
                    return found, stop
        return UNKNOWN, 0


def _stem(word: str, vocabulary: frozenset[str]) -> str:
    """Returns the word of the vocabulary that a word is a form of, or the word itself."""
    if word in vocabulary:
        return word
    for ending, instead in _ENDINGS:
        if word.endswith(ending):
            base = word.removesuffix(ending)
            for candidate in (base + instead, base[:-1] if base[-1:] == base[-2:-1] else base):  # chopping
                if candidate in vocabulary:
                    return candidate
    return word


def read_taxonomy(path: pathlib.Path) -> Taxonomy:
    """Returns the taxonomy of a CSV with columns `label` and `group` (a Python list of surface forms).

    Raises:
      ValueError: No such file, column or list.
    """
    labels: list[str] = []
    forms: dict[tuple[str, ...], int] = {}
    for where, row in _read_csv(path, {"label", "group"}):
        try:
            group = ast.literal_eval(row["group"])  # literals only: nothing of the file is run
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            group = None
        if not isinstance(group, list) or not all(isinstance(form, str) for form in group):
            raise ValueError(f"{where}: group {row['group'][:60]!r} is no list of forms")
        for form in group:
            words = tuple(form.replace("_", " ").lower().split())
            if words:
                forms.setdefault(words, len(labels))
        labels.append(row["label"])
    return Taxonomy(labels, forms)


def words_of(text: str) -> list[str]:
    """Returns a narration's words, tags left out, in lower case."""
    return re.findall(r"[a-z0-9'-]+", _TAG.sub(" ", text).lower())


def find_verb_and_noun(text: str, verbs: Taxonomy, nouns: Taxonomy) -> tuple[int, int]:
    """Returns the taxonomy ids of a narration's verb and noun: the first verb, and the first noun after it."""
    words = words_of(text)
    verb, after = verbs.find(words)
    return verb, nouns.find(words[after:])[0]


def read_labels(path: pathlib.Path) -> list[Narration]:
    """Returns labelled narrations: the majority of `vote_1`, `vote_2`, ... in each row. The list is taken whole.

    Raises:
      ValueError: No such file or columns, a time that is none, an even split or a vote that is neither 0 nor 1.
    """
    columns = {"video_uid", "annotation_uid", "narration_pass", "timestamp_sec", "narration_text", "vote_1"}
    labelled = []
    for where, row in _read_csv(path, columns):
        votes = [row[name] for name in row if name.startswith("vote_")]
        if set(votes) - {"0", "1"} or 2 * votes.count("1") == len(votes):
            raise ValueError(f"{where}: votes {votes} have no majority of 0 or 1")
        time_s = _seconds(row["timestamp_sec"], f"{where}: timestamp_sec")
        if math.isnan(time_s):
            raise ValueError(f"{where}: timestamp_sec must be seconds, got {row['timestamp_sec']!r:.60}")
        label = int(2 * votes.count("1") > len(votes))
        ids = (row["video_uid"], row["annotation_uid"], row["narration_pass"])
        labelled.append(Narration(*ids, time_s, row["narration_text"], label))
    return labelled


def read_splits(path: pathlib.Path) -> dict[str, str]:
    """Returns video uid → split of a CSV with columns `video_uid` and `split`.

    Raises:
      ValueError: No such file or columns, a split that is not one of `records.SPLITS`, or one video in two splits.
    """
    splits: dict[str, str] = {}
    for where, row in _read_csv(path, {"video_uid", "split"}):
        uid, split = row["video_uid"], row["split"]
        if split not in SPLITS:
            raise ValueError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}")
        if splits.setdefault(uid, split) != split:
            raise ValueError(f"{where}: video {uid} is in {split!r}, but was in {splits[uid]!r} before")
    return splits


def split_by_hash(video_uid: str, shares: tuple[float, float, float] = (0.9, 0.02, 0.08)) -> str:
    """Returns a video's split as a function of its uid alone.

    Args:
      video_uid: Of the video.
      shares: Of train, validation and test; they add up to 1.
    """
    position = int.from_bytes(hashlib.sha256(video_uid.encode()).digest()[:8], "big") / 2**64
    if position < shares[0]:
        return "train"
    return "validation" if position < shares[0] + shares[1] else "test"
