"""Reads Ego4DSounds' lists (`test_clips_11k.csv` and the like): narrations whose action sounds, tab-separated.

Columns: video_uid video_dur narration_source narration_ind narration_time clip_start clip_end clip_text tag_verb tag_noun
positive clip_file speech background_music traffic_noise wind_noise (https://ego4dsounds.github.io).
"""


from data_prep import storage
from data_prep.narrations import Narration, Taxonomy
from data_prep.sources import egoclip, files


def read(path: storage.Path, verbs: Taxonomy, nouns: Taxonomy) -> list[Narration]:
    """Returns a narration for every row of the list, labelled by `positive`; the label is -1 where that is empty.

    Args:
      path: File to read.
      verbs, nouns: Taxonomies that the tags' ids refer to. Where a row has no tags, the text will be searched for them later.

    Raises:
      ValueError: As `egoclip.read`; also for a row without one value per column, or a `positive` other than 1, 0 or empty.
    """
    labelled = []
    for number, row in files.read_csv(path, egoclip.COLUMNS | {"positive"}, delimiter="\t"):
        where = f"{path}, row {number}"
        label = files.label(row["positive"], f"{where}: positive")
        labelled.append(egoclip.narration_of(row, where, verbs, nouns, label))
    return labelled
