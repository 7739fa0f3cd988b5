"""What is known of the training of weights from what lies beside them: a run's config, or a folder's `config.json`.

Of other people's files nothing is known, and of the folders of earlier versions only the sizes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from mc3_jax import (
    config as config_lib,
    model as model_lib,
    phases as phases_lib,
    validation,
    weights,
    workdir as workdir_lib,
)
from mc3_jax.models import checkpoint_files

UNTRAINED = "untrained"  # in a folder's `config.json`
NUM_SAMPLES = "num_samples"  # in a run's `data.json` and a folder's `config.json`
# Fields of the model that are chosen anew for each use: how it is computed, and whether it has a classifier.
_FREE = ("model.scan_layers", "model.remat", "model.attention", "model.num_classes")


def as_trained(config: config_lib.Config, given: Iterable[str]) -> tuple[config_lib.Config, list[str]]:
    """Returns the config to evaluate `config.checkpoint` with, and options of the command line that lead from `config` to it.

    The sizes of a run or a folder of `mc3_jax.convert` are those that it records, also those which shapes don't show (number
    of tokens, crop). `data.num_samples` is that of the run, or the length of sounds that the folder records. Fields that are
    overridden on the command line stay as they are. With other people's files `config` is returned unchanged.

    Args:
      config: Config of the command line: file and overrides.
      given: Names of the fields that were overridden.

    Raises:
      ValueError: What is recorded is damaged or of another version, or an override doesn't fit it.
    """
    path = config.checkpoint
    if weights.is_run(path):
        num_samples = weights.read_run_config(path).data.num_samples
    elif weights.is_own_folder(path):
        num_samples = read_num_samples(path) or config.data.num_samples
    else:
        return config, []
    data = dataclasses.replace(config.data, num_samples=num_samples)
    recorded = dataclasses.replace(config, model=weights.read_model_config(path), data=data)
    made, options = workdir_lib.keep_fields(recorded, config, (*_FREE, *given))
    validation.validate_model(made.model)
    return made, options


def untrained(config: config_lib.Config) -> list[str]:
    """Returns the towers of a run that no phase uses and no file initialises: similarities with them mean nothing."""
    looked_at = phases_lib.all_modalities(config.phases)
    return [name for name in config_lib.MODALITIES if name not in looked_at and not getattr(config.init, name)]


def read_untrained(path: str) -> list[str]:
    """Returns the towers of a run or folder that were never trained, see `untrained`; [] where that is not recorded.

    Args:
      path: As for `weights.read_checkpoint`.

    Raises:
      ValueError: The file that records it is damaged.
    """
    if weights.is_run(path):
        return untrained(weights.read_run_config(path))
    known = checkpoint_files.read_config(path).get(UNTRAINED, []) if weights.is_own_folder(path) else []
    if not isinstance(known, list) or not all(name in config_lib.MODALITIES for name in known):
        among = ", ".join(config_lib.MODALITIES)
        raise ValueError(f"{path}/{weights.CONFIG_FILE}: {UNTRAINED} must be a list of towers ({among}), got {known!r:.80}")
    return [name for name in config_lib.MODALITIES if name in known]


def describe_untrained(towers: Sequence[str]) -> str:
    """Returns a clause that says which towers were never trained, why, and what that means; `towers` is not empty."""
    tower, it, its = ("tower was", "it", "its") if len(towers) == 1 else ("towers were", "them", "their")
    return (
        f"the {' and '.join(towers)} {tower} never trained, since no phase used {it} and no file initialised {it}: "
        f"{its} embeddings mean nothing"
    )


def read_num_samples(path: str) -> int:
    """Returns the number of samples at 16 kHz that every sound had in training; 0 where that is not recorded.

    The loader cropped longer sounds to it and padded shorter ones with silence. If the spectrogram of so many samples is
    shorter than the model's `num_time_frames`, `frontend.log_mel` padded it with AudioSet's mean.

    Args:
      path: As for `weights.read_checkpoint`.

    Raises:
      ValueError: The file that records it is damaged.
    """
    if weights.is_run(path):
        config = weights.read_run_config(path)
        if "audio" not in phases_lib.all_modalities(config.phases):
            return 0  # whatever the length, the audio tower has never heard it
        name, num = workdir_lib.DATA_FILE, config.data.num_samples or workdir_lib.trained_on(path).get(NUM_SAMPLES, 0)
    elif weights.is_own_folder(path):
        name, num = weights.CONFIG_FILE, checkpoint_files.read_config(path).get(NUM_SAMPLES, 0)
    else:
        return 0
    most = model_lib.most_samples(weights.read_model_config(path))
    if type(num) is not int or not 0 <= num <= most:
        raise ValueError(f"{path}/{name}: {NUM_SAMPLES} must be a whole number from 0 to {most}, got {num!r:.80}")
    return num
