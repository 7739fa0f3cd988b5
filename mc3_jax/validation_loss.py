"""The validation loss: a phase's loss during training on clips that are not trained on, which shows overfitting."""

import contextlib
from collections.abc import Callable

import jax
import numpy as np

from mc3_jax import config as config_lib, mesh as mesh_lib, phases as phases_lib, train_step as step_lib
from mc3_jax.data import loader
from mc3_jax.models.mc3 import MC3

_SEED = 0  # chooses clips and frames: the same in all runs on a data set, whatever the seed of a run


class ValidationLoss:
    """Measures a phase's loss on a few fixed batches of a split, each as large as a training batch.

    A contrastive loss grows with the batch size, and with the number of clips of one video in a batch, so the batches are
    composed as in training. Sounds and frames are not augmented on the devices, and there is no dropout.
    """

    def __init__(
        self, config: config_lib.Config, mesh: jax.sharding.Mesh, model: MC3, tokenize: Callable, num_frames: int,
        trained_on: loader.ClipSource,
    ):  # fmt: skip
        """Opens the split.

        Args:
          config: Config of the run; `config.validation` says how often to measure, and on which clips.
          mesh: Mesh of the training.
          model: The trained model.
          tokenize: Function from text to token ids and mask.
          num_frames: Frames per clip; 0 if no phase uses video.
          trained_on: Training clips, of the same data set; none of them may be among the validation clips.

        Raises:
          ValueError: The split can't be read, has fewer clips than a batch, or contains clips that are trained on.
        """
        chosen, batch_size = config.validation, config.data.batch_size
        self._config, self._mesh, self._model, self._tokenize = config, mesh, model, tokenize
        self._source = loader.open_split(
            config.data.dir, chosen.split, num_frames, chosen.folds, option="--config.validation.split"
        )
        if len(self._source) < batch_size:
            raise ValueError(
                f"config.validation.every_steps = {chosen.every_steps}: split {chosen.split!r} of {config.data.dir} has "
                f"{len(self._source)} clips, fewer than a batch of {batch_size}: choose a larger validation.split, or "
                "set validation.every_steps to 0"
            )
        if "text" in phases_lib.all_modalities(config.phases) and not self._source.has_texts():
            raise ValueError(
                f"config.validation.every_steps = {chosen.every_steps}: the clips in split {chosen.split!r} of "
                f"{config.data.dir} have no texts, which a phase uses: choose others by validation.split, or set "
                "validation.every_steps to 0"
            )
        if shared := int(loader.are_shared(self._source, trained_on).sum()):
            raise ValueError(
                f"config.validation.every_steps = {chosen.every_steps}: {shared} of the {len(self._source)} clips of "
                f"split {chosen.split!r} and folds {tuple(chosen.folds)} are trained on: choose others by validation.split "
                "and validation.folds, or set validation.every_steps to 0"
            )
        self._num_batches = min(chosen.num_batches, len(self._source) // batch_size)
        self._compiled: tuple[str, Callable] | None = None

    def is_due(self, step: int, stop: int) -> bool:
        """Returns whether the loss is to be measured after `step` steps; at the end of a phase, `stop`, it always is."""
        return step % self._config.validation.every_steps == 0 or step == stop

    def measure(self, phase: phases_lib.Phase, params) -> dict[str, float]:
        """Returns the phase's loss and its terms as `validation_loss` and so on, means over the batches.

        Called by every process. For a phase with a memory, negatives come from the batch alone.

        Args:
          phase: Phase whose loss is measured.
          params: Parameters of the model, on the current mesh.
        """
        if self._compiled is None or self._compiled[0] != phase.config.name:
            self._compiled = phase.config.name, jax.jit(
                step_lib.make_validation_fn(self._model, self._config, phase.config)
            )
        measure, data = self._compiled[1], self._config.data
        batches = loader.train_batches(
            self._source, self._tokenize, batch_size=data.batch_size, seed=_SEED, clips_per_video=data.clips_per_video,
            num_samples=data.num_samples or None, silence_db=data.silence_db, num_steps=self._num_batches,
            process_index=jax.process_index(), process_count=jax.process_count(),
            num_threads=min(data.num_threads, self._num_batches), prefetch=1,
        )  # fmt: skip
        found = []
        with contextlib.closing(batches):
            for batch in batches:
                batch.pop("index")
                found.append(measure(params, mesh_lib.put_batch(self._mesh, batch)))
        found = jax.device_get(found)
        return {f"validation_{name}": float(np.mean([terms[name] for terms in found])) for name in found[0]}
