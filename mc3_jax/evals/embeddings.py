"""The embeddings of a split on disk: what curves, comparisons, clusters and maps are made of without a model.

One `.npz` of plain arrays, read without pickle: `audio`, `video`, `text` float32 [n, d], L2-normalised, and of each clip its
`clip_id` and `video_uid` (unicode), its `index` in the split, `label`, `verb_id`, `noun_id` (-1 where nobody knows),
`loudness` and `onset_strength`. `docs/evaluation.md` has the units. Files of earlier versions lack one or both of the names.
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
    """Writes a file in one step: a reader sees the old one or the new.

    Args:
      path: Of the file.
      embeddings: {"audio", "video", "text"}: [n, d].
      known: `NUMBERS` and the strings `NAMES`: [n].
    """
    with whole_file.writing(path) as aside, aside.open("wb") as f:
        arrays = {name: embeddings[name] for name in TOWERS} | {name: known[name] for name in NUMBERS}
        np.savez(f, **arrays, **{name: np.asarray(known[name], str) for name in NAMES})


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns (embeddings, known) as `save` took them; of a file of an earlier version without some of `NAMES`.

    Raises:
      ValueError: No such file, or not one that `save` wrote.
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
        raise ValueError(f"{path} holds arrays of other shapes than one another, {sizes}: evaluate the run again")
    return {name: values[name] for name in TOWERS}, {name: values[name] for name in columns}
