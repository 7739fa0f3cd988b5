"""Ego4D's annotation files: narrations, taxonomies, sounding-action labels, splits; text and numbers only, no media."""

import ast
import csv
import dataclasses
import hashlib
import json
import pathlib
import re

from mc3_jax.data.records import SPLITS, UNKNOWN

_PASSES = ("narration_pass_1", "narration_pass_2")
# "#C C", and what slips of the pen make of it: "#c C", "# C C", "#C  C", "#C c", "#CC".
_WEARER = re.compile(r"^\s*#\s*c\b|^\s*#\s*cc\b", re.IGNORECASE)
_OTHER = re.compile(r"^\s*#\s*o\b|^\s*#\s*oo\b", re.IGNORECASE)
_UNSURE = re.compile(r"#\s*uns?u?re\b", re.IGNORECASE)
_TAG = re.compile(r"^\s*#\s*\w+\s+(\w\b)?|#\s*uns?u?re\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Narration:
    """A line somebody wrote about a moment of a video.

    Attributes:
      video_uid, annotation_uid: Ego4D's ids.
      source: "narration_pass_1" or "narration_pass_2", or the label file's word for it.
      time_s: Moment in the video.
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
        return f"{self.video_uid}_{self.annotation_uid}_{round(self.time_s * 1e6):011d}"


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
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def read_narrations(path: pathlib.Path) -> list[Narration]:
    """Returns every narration of `narration.json`, both passes, in order of video and time.

    Entries without a text or time are kept, with an empty text or NaN, so that the caller can count them.

    Raises:
      ValueError: No such file, no JSON or another layout.
    """
    content = _read_json(path)
    videos = content.get("videos", content) if isinstance(content, dict) else None
    if not isinstance(videos, dict):
        raise ValueError(f"{path} must hold an object of videos")
    found = []
    for uid, video in videos.items():
        for name in _PASSES:
            part = video.get(name) if isinstance(video, dict) else None
            for line in (part or {}).get("narrations") or ():
                time_s = line.get("timestamp_sec")
                found.append(
                    Narration(
                        video_uid=str(uid),
                        annotation_uid=str(line.get("annotation_uid", "")),
                        source=name,
                        time_s=float("nan") if time_s is None else float(time_s),
                        text=str(line.get("narration_text") or ""),
                    )
                )
    return sorted(found, key=lambda n: (n.video_uid, n.time_s, n.source, n.annotation_uid))


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


def _read_csv(path: pathlib.Path, columns: set[str], delimiter: str = ",") -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    with path.open(newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f, delimiter=delimiter)
        missing = columns - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the column(s) {', '.join(sorted(missing))}; it has {reader.fieldnames}")
        return list(reader)


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """Labels and the surface forms that mean them.

    Attributes:
      labels: In order of the file; the index is the id.
      forms: (words of a surface form, id), longest first.
    """

    labels: list[str]
    forms: dict[tuple[str, ...], int]

    def match(self, words: list[str]) -> int:
        """Returns the id of the first surface form in the words, the longest where several begin; -1 without any."""
        longest = max((len(form) for form in self.forms), default=0)
        for start in range(len(words)):
            for length in range(min(longest, len(words) - start), 0, -1):
                found = self.forms.get(tuple(words[start : start + length]))
                if found is not None:
                    return found
        return UNKNOWN


def read_taxonomy(path: pathlib.Path) -> Taxonomy:
    """Returns the taxonomy of a CSV with columns `label` and `group` (a Python list of surface forms).

    Raises:
      ValueError: No such file, column or list.
    """
    labels, forms = [], {}
    for i, row in enumerate(_read_csv(path, {"label", "group"})):
        labels.append(row["label"])
        try:
            group = ast.literal_eval(row["group"])  # literals only: nothing of the file is run
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{path}, row {i + 2}: group {row['group'][:60]!r} is no list of forms") from error
        for form in group:
            forms.setdefault(tuple(str(form).replace("_", " ").lower().split()), i)
    return Taxonomy(labels, forms)


def words_of(text: str) -> list[str]:
    """Returns a narration's words, tags left out, in lower case."""
    return re.findall(r"[a-z0-9'-]+", _TAG.sub(" ", text).lower())


def find_verb_and_noun(text: str, verbs: Taxonomy, nouns: Taxonomy) -> tuple[int, int]:
    """Returns the taxonomy ids of a narration's verb and noun: the first verb, and the first noun after it.

    Inflected forms that the taxonomy lacks are tried without their ending: "chops" is "chop".
    """
    words = words_of(text)
    plain = [_stem(word, verbs, nouns) for word in words]
    verb_at = next((i for i in range(len(plain)) if verbs.match(plain[i : i + 1]) != UNKNOWN), None)
    verb = verbs.match(plain[verb_at:]) if verb_at is not None else UNKNOWN
    noun = nouns.match(plain[verb_at + 1 :] if verb_at is not None else plain)
    return verb, noun


def _stem(word: str, verbs: Taxonomy, nouns: Taxonomy) -> str:
    for ending in ("", "es", "s", "ing", "ed"):
        base = word.removesuffix(ending)
        if (base,) in verbs.forms or (base,) in nouns.forms:
            return base
    return word


def read_labels(path: pathlib.Path) -> list[Narration]:
    """Returns labelled narrations: the majority of `vote_1`, `vote_2`, ... in each row. The list is taken whole.

    Raises:
      ValueError: No such file or columns, an even split or a vote that is neither 0 nor 1.
    """
    rows = _read_csv(
        path, {"video_uid", "annotation_uid", "narration_pass", "timestamp_sec", "narration_text", "vote_1"}
    )
    labelled = []
    for i, row in enumerate(rows):
        votes = [row[name] for name in row if name and name.startswith("vote_")]
        if set(votes) - {"0", "1"} or 2 * votes.count("1") == len(votes):
            raise ValueError(f"{path}, row {i + 2}: votes {votes} have no majority of 0 or 1")
        label = int(2 * votes.count("1") > len(votes))
        ids = (row["video_uid"], row["annotation_uid"], row["narration_pass"])
        labelled.append(Narration(*ids, float(row["timestamp_sec"]), row["narration_text"], label))
    return labelled


def read_splits(path: pathlib.Path) -> dict[str, str]:
    """Returns video uid → split of a CSV with columns `video_uid` and `split`.

    Raises:
      ValueError: No such file or columns, or a split that is not one of `records.SPLITS`.
    """
    rows = _read_csv(path, {"video_uid", "split"})
    for i, row in enumerate(rows):
        if row["split"] not in SPLITS:
            raise ValueError(f"{path}, row {i + 2}: split {row['split']!r} is none of {', '.join(SPLITS)}")
    return {row["video_uid"]: row["split"] for row in rows}


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
