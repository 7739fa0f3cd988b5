"""Reads sounding-action labels (Sec. 4 of the paper): a CSV of narrations with three annotators' votes or their result.

Columns: video_uid, annotation_uid, narration_pass, timestamp_sec, narration_text, and vote_1, vote_2, ... or positive.
"""

import math

from data_prep import storage
from data_prep.narrations import Narration
from data_prep.sources import files

_COLUMNS = {"video_uid", "annotation_uid", "narration_pass", "timestamp_sec", "narration_text"}


def read(path: storage.Path) -> list[Narration]:
    """Returns a narration for every row of the list, labelled by `positive` or by the majority of the row's votes.

    Raises:
      ValueError: As `files.read_csv`; also for a time that is not a number, both `positive` and votes or neither, votes
        without a majority, a vote other than 1 or 0, or a `positive` other than 1, 0 or empty.
    """
    labelled = []
    for number, row in files.read_csv(path, _COLUMNS):
        where = f"{path}, row {number}"
        time_s = files.seconds(row["timestamp_sec"], f"{where}: timestamp_sec")
        if math.isnan(time_s):
            raise ValueError(f"{where}: timestamp_sec must be seconds, got {row['timestamp_sec']!r:.60}")
        ids = (row["video_uid"], row["annotation_uid"], row["narration_pass"])
        labelled.append(Narration(*ids, time_s, row["narration_text"], _label(row, where)))
    return labelled


def _label(row: dict[str, str], where: str) -> int:
    votes = [row[name] for name in row if name.startswith("vote_")]
    if ("positive" in row) == bool(votes):
        raise ValueError(f"{where}: there must be either votes (vote_1, ...) or a column positive, not both or neither")
    if not votes:
        return files.label(row["positive"], f"{where}: positive")
    if set(votes) - {"0", "1"} or 2 * votes.count("1") == len(votes):
        raise ValueError(f"{where}: votes {votes} have no majority of 0 or 1")
    return int(2 * votes.count("1") > len(votes))
