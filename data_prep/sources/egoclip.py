"""Reads EgoVLP's `egoclip.csv`: 3.8 million narrations of Ego4D with taxonomy tags, tab-separated.

Columns: clip_idx video_uid video_dur narration_source narration_ind narration_time clip_start clip_end clip_text tag_verb
tag_noun (https://github.com/showlab/EgoVLP). EgoVLP's own clip bounds, `clip_start` and `clip_end`, are not used: a clip is
cut around `narration_time`, as for the other sources. Ego4DSounds' lists also have the columns read here, and `positive`.
"""

import functools
import re

from data_prep import storage
from data_prep.narrations import Narration, Taxonomy
from data_prep.sources import files
from mc3_jax.data.records import UNKNOWN

COLUMNS = {"video_uid", "narration_source", "narration_ind", "narration_time", "clip_text", "tag_verb", "tag_noun"}
_IDS = re.compile(r"\[ ?(\d{1,9}(?:, ?\d{1,9})*)? ?\]|")


def read(path: storage.Path, verbs: Taxonomy, nouns: Taxonomy) -> list[Narration]:
    """Returns a narration for every row, in the file's order.

    Rows without a time or text are kept, so that the caller can count them. So are rows without one value per column, with
    that as their `problem`: the file is known to have some, and its authors' reader skips them.

    Args:
      path: File to read.
      verbs, nouns: Taxonomies that the tags' ids refer to.

    Raises:
      ValueError: As `files.read_csv`; also for a time that is not a number, or a tag that is no list of ids of the taxonomy.
    """
    found = []
    for number, row in files.read_csv(path, COLUMNS, delimiter="\t", skip_ragged=True):
        if row is None:
            problem = "row does not have one value per column"
            found.append(Narration("", f"row_{number}", "egoclip", float("nan"), "", problem=problem))
        else:
            found.append(narration_of(row, f"{path}, row {number}", verbs, nouns))
    return found


def narration_of(row: dict[str, str], where: str, verbs: Taxonomy, nouns: Taxonomy, label: int = UNKNOWN) -> Narration:
    """Returns the narration of a row.

    Args:
      row: Value of each column.
      where: File and row, to be named in errors.
      verbs, nouns: Taxonomies that the tags' ids refer to.
      label: Label of the narration: 1, 0, or -1 for none.

    Raises:
      ValueError: A time is not a number, or a tag is not a list of ids of the taxonomy.
    """
    time_s = files.seconds(row["narration_time"].strip() or None, f"{where}: narration_time")
    tags = []
    for column, taxonomy in (("tag_verb", verbs), ("tag_noun", nouns)):
        ids = _read_ids(row[column])
        if ids is None:
            raise ValueError(f"{where}: {column} must be a list of ids such as [93], got {row[column]!r:.60}")
        if max(ids, default=-1) >= len(taxonomy.labels):
            raise ValueError(
                f"{where}: {column} has the id {max(ids)}, but the taxonomy has only {len(taxonomy.labels)} labels: use the "
                "taxonomy files that the tags were made with"
            )
        tags.append(ids)
    # The index counts the narrations of one pass over a video, so that pass and index identify a narration in all such lists.
    annotation = f"{row['narration_source']}_{row['narration_ind']}"
    return Narration(row["video_uid"], annotation, row["narration_source"], time_s, row["clip_text"], label, *tags)


@functools.lru_cache(maxsize=65536)
def _read_ids(text: str) -> tuple[int, ...] | None:
    """Returns the ids in a text such as "[93, 7]", () if the text or its list is empty, or None if it is no such list."""
    found = _IDS.fullmatch(text.strip())
    if found is None:
        return None
    return tuple(map(int, found[1].split(","))) if found[1] else ()
