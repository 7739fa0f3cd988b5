"""Ego4DSounds' lists (`test_clips_11k.csv` and the like): narrations whose action sounds, tab-separated.

Columns: video_uid video_dur narration_source narration_ind narration_time clip_start clip_end clip_text tag_verb tag_noun
positive clip_file speech background_music traffic_noise wind_noise (https://ego4dsounds.github.io).
"""


from data_prep import storage
from data_prep.narrations import Narration, Taxonomy
from data_prep.sources import egoclip, files


def read(path: storage.Path, verbs: Taxonomy, nouns: Taxonomy) -> list[Narration]:
    """Returns every row, with the label that `positive` says, -1 where it is empty. The list is taken whole.

    Args:
      path: Of the file.
      verbs, nouns: Taxonomies that the tags number; where tags are empty the text tells.

    Raises:
      ValueError: As `egoclip.read`; also rows that are not one value a column, and a `positive` that is none of 1, 0, empty.
    """
    labelled = []
    for number, row in files.read_csv(path, egoclip.COLUMNS | {"positive"}, delimiter="\t"):
        where = f"{path}, row {number}"
        label = files.label(row["positive"], f"{where}: positive")
        labelled.append(egoclip.narration_of(row, where, verbs, nouns, label))
    return labelled
