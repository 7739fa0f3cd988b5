"""What the rows of Table 2 share in a suite: data, encoders, initialisation, number of steps and learning rates."""

import dataclasses

from configs import demo, mc3_ego4d
from mc3_jax.config import Config, PhaseConfig


def suite(name: str) -> tuple[Config, PhaseConfig, PhaseConfig, PhaseConfig]:
    """Returns (run without phases, align, refine, whole): three phases, all of which contrast every pair and nothing else.

    `whole` is align and refine in one phase: it has the steps of both and, at every step, their learning rate, so that no row
    learns more or longer than another.

    Args:
      name: "soundworld", small enough for two CPU cores, or "ego4d", with the paper's data and sizes.

    Raises:
      ValueError: There is no such suite.
    """
    if name == "soundworld":
        config = demo.get_config()
        # For the 320 videos that benchmarks/tables.py makes, and at most three minutes on two cores. One block per tower and
        # small batches learn most in that time; they were chosen by row CMC on validation (benchmarks/RESULTS.md).
        config.data.batch_size, config.data.clips_per_video = 32, 3
        config.phases[0].epochs, config.phases[1].epochs = 6, 3
        config.model.audio.depth = config.model.video.depth = config.model.text.depth = 1
        config.model.video.patch_px = 16
    elif name == "ego4d":
        config = mc3_ego4d.get_config()
    else:
        raise ValueError(f"suite {name!r} is neither soundworld nor ego4d: --config=configs/tables/mc3.py:ego4d")
    align, refine = (dataclasses.replace(phase, consensus_weight=0.0) for phase in config.phases)
    epochs = align.epochs + refine.epochs
    falls = refine.optimizer.schedule == "cosine"
    optimizer = dataclasses.replace(
        refine.optimizer, warmup_steps=align.optimizer.warmup_steps, hold_share=align.epochs / epochs if falls else 0.0
    )
    whole = dataclasses.replace(refine, name="whole", epochs=epochs, optimizer=optimizer)
    return dataclasses.replace(config, phases=[]), align, refine, whole


def run(config: Config, row: str, *phases: PhaseConfig) -> Config:
    """Returns the run of a table row: `config` with the row's name and phases."""
    return dataclasses.replace(config, name=row, phases=list(phases))
