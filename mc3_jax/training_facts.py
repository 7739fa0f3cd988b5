"""What is known of the training of weights from what lies beside them: a run's config, or a folder's `config.json`.

Of other people's files nothing is known.
"""

import dataclasses
from collections.abc import Iterable

from mc3_jax import config as config_lib, validation, weights, workdir as workdir_lib

# Fields of the model that are chosen anew for each use: how it is computed, and whether it has a classifier.
_FREE = ("model.scan_layers", "model.remat", "model.attention", "model.num_classes")


def as_trained(config: config_lib.Config, given: Iterable[str]) -> tuple[config_lib.Config, list[str]]:
    """Returns the config to evaluate `config.checkpoint` with, and options of the command line that lead from `config` to it.

    The sizes of a run or a folder of `mc3_jax.convert` are those that it records, also those which shapes don't show (number
    of tokens, crop), and so is a run's `data.num_samples`. Fields that are overridden on the command line stay as they are.
    With other people's files `config` is returned unchanged.

    Args:
      config: Config of the command line: file and overrides.
      given: Names of the fields that were overridden.

    Raises:
      ValueError: What is recorded is damaged or of another version, or an override doesn't fit it.
    """
    path, data = config.checkpoint, config.data
    if weights.is_run(path):
        data = dataclasses.replace(data, num_samples=weights.read_run_config(path).data.num_samples)
    elif not weights.is_own_folder(path):
        return config, []
    recorded = dataclasses.replace(config, model=weights.read_model_config(path), data=data)
    made, options = workdir_lib.keep_fields(recorded, config, (*_FREE, *given))
    validation.validate_model(made.model)
    return made, options
