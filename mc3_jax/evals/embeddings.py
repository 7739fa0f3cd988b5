"""The embeddings of a split on disk, from which curves, comparisons, clusters and maps can be made without a model.

One `.npz` of plain arrays, read without pickle: `audio`, `video`, `text` float32 [n, d], L2-normalised, and for each clip its
`clip_id` and `video_uid` (unicode), its `index` in the split, `label`, `verb_id`, `noun_id` (-1 where unknown), `loudness`
and `onset_strength`. `docs/evaluation.md` has the units. Files of earlier versions lack `clip_id`, `video_uid` or both.
"""

import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from mc3_jax import whole_file

FILE = "embeddings.npz"
TOWERS = ("audio", "video", "text")
NUMBERS = ("index", "label", "verb_id", "noun_id", "loudness", "onset_strength")
NAMES = ("clip_id", "video_uid")


def save(path: pathlib.Path, embeddings: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray]) -> None:
    """Writes the file atomically: a reader sees the old file or the new one.

    Args:
      path: Path of the file.
      embeddings: {"audio", "video", "text"}: [n, d].
      known: The numbers `NUMBERS` and the strings `NAMES` of each clip, [n].
    """
    with whole_file.writing(path) as aside, aside.open("wb") as f:
        arrays = {name: embeddings[name] for name in TOWERS} | {name: known[name] for name in NUMBERS}
        np.savez(f, **arrays, **{name: np.asarray(known[name], str) for name in NAMES})


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns (embeddings, known) as `save` took them; files of earlier versions lack some of `NAMES`.

    Raises:
      ValueError: The file doesn't exist, or `save` didn't write it.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = (*NUMBERS, *(name for name in NAMES if name in arrays.files))
            values = {name: arrays[name] for name in (*TOWERS, *columns)}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} can't be read: {type(error).__name__}: {error}: evaluate the run again") from error
    sizes = {name: value.shape for name, value in values.items()}
    n, width = len(values["index"]), values["audio"].shape[-1:]
    wanted = {name: (n, *width) for name in TOWERS} | {name: (n,) for name in columns}
    if sizes != wanted:
        raise ValueError(f"{path} holds arrays whose shapes don't match, {sizes}: evaluate the run again")
    return {name: values[name] for name in TOWERS}, {name: values[name] for name in columns}
