"""The clips that a run was trained on: how many they are, and how many of them an evaluation measures."""

import numpy as np
from jaxtyping import Int

from mc3_jax import config as config_lib
from mc3_jax.data import loader


def count(config: config_lib.Config, facts: dict) -> int:
    """Returns how many clips a run was trained on.

    Args:
      config: Config of the run.
      facts: What `workdir.trained_on` returns for the run. Earlier versions did not record the number; then the data are
        opened.

    Raises:
      ValueError: The data can't be opened.
    """
    data = config.data
    return facts["num_clips"] if "num_clips" in facts else len(loader.open_split(data.dir, data.split, 0, data.folds))


def count_seen(
    config: config_lib.Config, source: loader.ClipSource, rows: Int[np.ndarray, " n"], trained: config_lib.DataConfig,
    facts: dict,
) -> int:  # fmt: skip
    """Returns how many of the measured clips the run was trained on; 0 if it was trained on another data set.

    Args:
      config: Config of the evaluation.
      source: The evaluated split.
      rows: Indices in `source` of the measured clips.
      trained: Data that the run was trained on; only its split and folds count.
      facts: What `workdir.trained_on` returns for the run.

    Raises:
      ValueError: The run is evaluated in its own workdir and its training clips can't be opened.
    """
    filled = {name for name, split in source.info.splits.items() if split.num_clips}
    if not filled & set(trained.split.split("+")) & set(config.eval.split.split("+")):
        return 0
    try:
        train = loader.open_split(config.data.dir, trained.split, 0, trained.folds)
    except ValueError:
        if not config.checkpoint:
            raise
        return 0  # not the run's data: these lack its splits or folds
    if facts.get("data.dir", train.digest) != train.digest:
        return 0
    return int(loader.are_shared(source, train)[rows].sum())
