"""EgoVLP's `egoclip.csv`: 3.8 million narrations of Ego4D with taxonomy tags, tab-separated.

Columns: clip_idx video_uid video_dur narration_source narration_ind narration_time clip_start clip_end clip_text tag_verb
tag_noun (https://github.com/showlab/EgoVLP). The clips' bounds are EgoVLP's own and not used: a clip is cut around
`narration_time` like any other. Ego4DSounds' lists have these columns too, and `positive`.
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
    """Returns every narration, in the file's order.

    A row without a time or text is kept so that the caller can count it. So is one whose values aren't one a column, with
    its problem: the file is known for such rows, its authors' reader leaves them out.

    Args:
      path: Of the file.
      verbs, nouns: Taxonomies that the tags number.

    Raises:
      ValueError: No such file or column, a time that is no number, or a tag that is no list of ids of the taxonomy.
    """
    found = []
    for number, row in files.read_csv(path, COLUMNS, delimiter="\t", skip_ragged=True):
        if row is None:
            found.append(Narration("", f"row_{number}", "egoclip", float("nan"), "", problem="row is not one value a column"))
        else:
            found.append(narration_of(row, f"{path}, row {number}", verbs, nouns))
    return found


def narration_of(row: dict[str, str], where: str, verbs: Taxonomy, nouns: Taxonomy, label: int = UNKNOWN) -> Narration:
    """Returns the narration of a row.

    Args:
      row: Values by column.
      where: File and row, for errors.
      verbs, nouns: Taxonomies that the tags number.
      label: 1, 0 or -1.

    Raises:
      ValueError: A time that is no number, or a tag that is no list of ids of the taxonomy.
    """
    time_s = files.seconds(row["narration_time"].strip() or None, f"{where}: narration_time")
    tags = []
    for column, taxonomy in (("tag_verb", verbs), ("tag_noun", nouns)):
        ids = _read_ids(row[column])
        if ids is None:
            raise ValueError(f"{where}: {column} must be a list of ids such as [93], got {row[column]!r:.60}")
        if max(ids, default=-1) >= len(taxonomy.labels):
            raise ValueError(
                f"{where}: {column} has the id {max(ids)}, but the taxonomy only {len(taxonomy.labels)} labels: take the "
                "taxonomy files that the tags were made with"
            )
        tags.append(ids)
    # The index counts a pass's narrations of one video, so that with the pass it names the narration in all such lists.
    annotation = f"{row['narration_source']}_{row['narration_ind']}"
    return Narration(row["video_uid"], annotation, row["narration_source"], time_s, row["clip_text"], label, *tags)


@functools.lru_cache(maxsize=65536)
def _read_ids(text: str) -> tuple[int, ...] | None:
    """Returns the numbers of a Python list as text, () for none; None if it is no such list."""
    found = _IDS.fullmatch(text.strip())
    if found is None:
        return None
    return tuple(map(int, found[1].split(","))) if found[1] else ()
