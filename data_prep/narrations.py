"""Narrations: whose action they describe, which verb and noun of a taxonomy they name, and the split of their video.

Handles text and numbers only, no media. `data_prep.sources` reads narrations from files, with one module per layout.
"""

import ast
import dataclasses
import functools
import hashlib
import heapq
import math
import re

from data_prep import storage
from data_prep.sources import files
from mc3_jax.data.records import SPLITS, UNKNOWN

# "#C C" and its misspellings: "#c C", "# C C", "#C  C", "#C c", "#CC", "C C", "3C C", "@C C".
_WEARER = re.compile(r"^\s*(#\s*cc?\b|[3@]?c\s+c\b)", re.IGNORECASE)
_OTHER = re.compile(r"^\s*#\s*oo?\b", re.IGNORECASE)
_UNSURE = re.compile(r"#\s*uns?u?re\b", re.IGNORECASE)
# A single letter after a tag is part of it only in the camera wearer's "C C": in "#O a man" it is an article.
_TAG = re.compile(
    r"^\s*#\s*(?:(?:cc?|uns?u?re)\s+c\b|\w+\s)|^\s*[3@]?c\s+c\b|#\s*uns?u?re\b", re.IGNORECASE
)
# Endings of inflected forms and what replaces them: chops, washes, carries, slicing, diced, leaves, knives. If stems differ
# by an "e", the longer one is tried first: "tubes" and "taped" come from tube and tape, "tubs" and "tapped" from tub and tap.
_ENDINGS = {
    "s": ("",), "es": ("",), "ies": ("y",), "ves": ("f", "fe"), "ing": ("e", ""), "ed": ("e", ""), "ied": ("y",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Narration:
    """A line of text that somebody wrote about a moment of a video.

    Attributes:
      video_uid: Uid of the video, which is also the name of its file.
      annotation_uid: Id in the annotation file, maybe shared by all narrations of a pass; "" if there is none.
      source: "narration_pass_1" or "narration_pass_2", or the annotation file's own word for its source.
      time_s: Moment in the video, seconds; NaN if the file gives none.
      text: Text as written.
      label: Label 1 or 0, or -1 for no label.
      verb_tags, noun_tags: Taxonomy ids that the file gives, in arbitrary order; () if it gives none.
      problem: Reason why the narration can't become a clip, if that is known when it is read; "" if not.
    """

    video_uid: str
    annotation_uid: str
    source: str
    time_s: float
    text: str
    label: int = UNKNOWN
    verb_tags: tuple[int, ...] = ()
    noun_tags: tuple[int, ...] = ()
    problem: str = ""

    @property
    def words(self) -> str:
        """The text with single spaces; narrations of the same moment are duplicates if it is equal."""
        return " ".join(self.text.split())

    @property
    def clip_id(self) -> str:
        """An id made of video, annotation, moment in µs and a hash of the words.

        All are needed, since a whole pass may share an annotation uid, and a moment may have several narrations. Nothing else
        is part of it, so that it is the same in every list and does not depend on other rows.
        """
        moment = f"{round(self.time_s * 1e6):011d}" if math.isfinite(self.time_s) else "no_time"
        text = hashlib.sha256(self.words.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return "_".join(filter(None, (self.video_uid, self.annotation_uid, moment, text)))


def who(text: str) -> str:
    """Returns whose action a narration describes: "wearer", "other", "unsure" or "unknown"; accepts misspelt tags."""
    if _UNSURE.search(text):
        return "unsure"
    if _WEARER.search(text):
        return "wearer"
    return "other" if _OTHER.search(text) else "unknown"


def clean(text: str) -> str:
    """Returns a narration without its tags ("#C C", "#O", "#unsure") and with single spaces; "" if nothing else is left."""
    return " ".join(_TAG.sub(" ", text).split())


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """Labels and the surface forms that stand for them.

    Attributes:
      labels: Labels in the order of the file; the index of a label is its id.
      forms: Words of a surface form → id of its label.
    """

    labels: list[str]
    forms: dict[tuple[str, ...], int]

    @functools.cached_property
    def _vocabulary(self) -> frozenset[str]:
        return frozenset(word for form in self.forms for word in form)

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.forms), default=0)

    def find(self, words: list[str], among: tuple[int, ...] = ()) -> tuple[int, int]:
        """Returns (id, index of the word after it) of the first surface form in the words, or (-1, 0) if there is none.

        If several forms begin at the same word, the longest is found. Inflected words that the taxonomy lacks are tried
        without their ending: "chops" is "chop".

        Args:
          words: Words of a text in lower case.
          among: Ids to look for; () means all.
        """
        plain = [_stem(word, self._vocabulary) for word in words]
        for start in range(len(plain)):
            for stop in range(min(start + self._longest, len(plain)), start, -1):
                found = self.forms.get(tuple(plain[start:stop]))
                if found is not None and (not among or found in among):
                    return found, stop
        return UNKNOWN, 0


def _stem(word: str, vocabulary: frozenset[str]) -> str:
    """Returns the word of the vocabulary of which a word is an inflected form, or else the word itself."""
    if word in vocabulary:
        return word
    for ending, instead in _ENDINGS.items():
        if word.endswith(ending):
            base = word.removesuffix(ending)
            doubled = [base[:-1]] if base[-1:] == base[-2:-1] else []  # chopping
            for candidate in [base + letters for letters in instead] + doubled:
                if candidate in vocabulary:
                    return candidate
    return word


def read_taxonomy(path: storage.Path) -> Taxonomy:
    """Returns the taxonomy in a CSV file with columns `label` and `group` (a Python list of surface forms).

    Raises:
      ValueError: The file or a column is missing, or a group is not a list of texts.
    """
    labels: list[str] = []
    forms: dict[tuple[str, ...], int] = {}
    for number, row in files.read_csv(path, {"label", "group"}):
        try:
            group = ast.literal_eval(row["group"])  # literals only: no code from the file is run
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            group = None
        if not isinstance(group, list) or not all(isinstance(form, str) for form in group):
            raise ValueError(f"{path}, row {number}: group {row['group'][:60]!r} is not a list of forms")
        for form in group:
            words = tuple(form.replace("_", " ").lower().split())
            if words:
                forms.setdefault(words, len(labels))
        labels.append(row["label"])
    return Taxonomy(labels, forms)


def words_of(text: str) -> list[str]:
    """Returns a narration's words in lower case, without tags."""
    return re.findall(r"[a-z0-9'-]+", _TAG.sub(" ", text).lower())


def find_verb_and_noun(
    text: str, verbs: Taxonomy, nouns: Taxonomy, verb_tags: tuple[int, ...] = (), noun_tags: tuple[int, ...] = ()
) -> tuple[int, int]:
    """Returns the taxonomy ids of a narration's verb and noun: the first verb, and the first noun after it; -1 if not found.

    Args:
      text: Text of the narration.
      verbs, nouns: Taxonomies.
      verb_tags, noun_tags: Ids that annotators gave the narration. If there are any, the result is one of them: the one that
        the text names first (a noun after the verb if possible), or the first tag if the text names none.
    """
    words = words_of(text)
    verb, after = verbs.find(words, verb_tags)
    noun = nouns.find(words[after:], noun_tags)[0]
    if verb == UNKNOWN and verb_tags:
        verb = verb_tags[0]
    if noun == UNKNOWN and noun_tags:
        noun = nouns.find(words, noun_tags)[0]
        noun = noun_tags[0] if noun == UNKNOWN else noun
    return verb, noun


def read_splits(path: storage.Path) -> dict[str, str]:
    """Returns video uid → split from a CSV file with columns `video_uid` and `split`.

    Raises:
      ValueError: The file or a column is missing, a split is not one of `records.SPLITS`, or a video is in two splits.
    """
    splits: dict[str, str] = {}
    for number, row in files.read_csv(path, {"video_uid", "split"}):
        where = f"{path}, row {number}"
        uid, split = row["video_uid"], row["split"]
        if split not in SPLITS:
            raise ValueError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}")
        if splits.setdefault(uid, split) != split:
            raise ValueError(f"{where}: video {uid} is in {split!r}, but was in {splits[uid]!r} before")
    return splits


def split_by_hash(video_uid: str, shares: tuple[float, float, float] = (0.9, 0.02, 0.08)) -> str:
    """Returns a video's split, which depends only on its uid.

    Args:
      video_uid: Uid of the video.
      shares: Shares of train, validation and test; they add up to 1.
    """
    position = int.from_bytes(hashlib.sha256(video_uid.encode()).digest()[:8], "big") / 2**64
    if position < shares[0]:
        return "train"
    return "validation" if position < shares[0] + shares[1] else "test"


def held_out_by_hash(video_uid: str) -> str:
    """Returns "validation" or "test" for a video with labels, which depends only on its uid.

    One in eleven goes to validation, like 3,000 of the paper's 33,000 labelled clips (Sec. 5).
    """
    return split_by_hash(video_uid, (0.0, 1 / 11, 10 / 11))


def sample(found: list[Narration], num: int, seed: int) -> tuple[list[Narration], list[Narration]]:
    """Returns a random sample of `num` narrations, and the other narrations, both in the given order.

    The sample consists of those with the lowest hash of (seed, clip id). So it does not depend on their order, and a larger
    sample contains the smaller ones.

    Args:
      found: Narrations with different clip ids.
      num: Size of the sample; 0, or more than there are, takes all.
      seed: Seed of the sample.
    """
    if not 0 < num < len(found):
        return found, []

    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{seed} {found[i].clip_id}".encode()).digest()

    taken = set(heapq.nsmallest(num, range(len(found)), key=rank))
    return [n for i, n in enumerate(found) if i in taken], [n for i, n in enumerate(found) if i not in taken]
