"""The loss of a phase on clips that nobody trains on, while training goes on: whether it still learns or only remembers."""

import contextlib
from collections.abc import Callable

import jax
import numpy as np

from mc3_jax import config as config_lib, mesh as mesh_lib, phases as phases_lib, train_step as step_lib
from mc3_jax.data import loader
from mc3_jax.models.mc3 import MC3

_SEED = 0  # of which clips and frames: the same in all runs on a data set, whatever their own seed


class ValidationLoss:
    """Measures losses on a fixed few batches of a split, each of the training batch's size.

    A contrastive loss grows with the batch, and with clips of one video in it, so the batches are composed as in training;
    sounds and pictures are not augmented on the devices, and there is no dropout.
    """

    def __init__(
        self, config: config_lib.Config, mesh: jax.sharding.Mesh, model: MC3, tokenize: Callable, num_frames: int,
        trained_on: loader.ClipSource,
    ):  # fmt: skip
        """Opens the split.

        Args:
          config: Of the run; `config.validation` says how often, and on what.
          mesh: That is trained on.
          model: That is trained.
          tokenize: Text to ids and mask.
          num_frames: Of a clip, 0 where no phase looks at pictures.
          trained_on: Clips of the same data set, none of which may be among these.

        Raises:
          ValueError: The split can't be read, has fewer clips than a batch, or clips that are trained on.
        """
        chosen, batch_size = config.validation, config.data.batch_size
        self._config, self._mesh, self._model, self._tokenize = config, mesh, model, tokenize
        self._source = loader.open_split(
            config.data.dir, chosen.split, num_frames, chosen.folds, option="--config.validation.split"
        )
        if len(self._source) < batch_size:
            raise ValueError(
                f"config.validation.every_steps = {chosen.every_steps}: split {chosen.split!r} of {config.data.dir} has "
                f"{len(self._source)} clips, fewer than a batch of {batch_size}: choose a larger validation.split, or 0 steps"
            )
        if shared := int(loader.are_shared(self._source, trained_on).sum()):
            raise ValueError(
                f"config.validation.every_steps = {chosen.every_steps}: of the {len(self._source)} clips of split "
                f"{chosen.split!r} and folds {tuple(chosen.folds)} {shared} are trained on: choose others by "
                "validation.split and validation.folds, or 0 steps"
            )
        self._num_batches = min(chosen.num_batches, len(self._source) // batch_size)
        self._compiled: tuple[str, Callable] | None = None

    def is_due(self, step: int, stop: int) -> bool:
        """Returns whether it is measured after a step; after the last of a phase, `stop`, it always is."""
        return step % self._config.validation.every_steps == 0 or step == stop

    def measure(self, phase: phases_lib.Phase, params) -> dict[str, float]:
        """Returns the means of the phase's loss and its terms over the batches, as `validation_loss` and so on.

        Called by every process. Negatives of a phase with a memory are those of the batch.

        Args:
          phase: Whose loss.
          params: Of the model, on the mesh that is set.
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
