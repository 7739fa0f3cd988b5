"""ImageBind: video and language first, then audio is aligned with the frozen video at a scale of 20.

python -m mc3_jax.train --config=configs/tables/image_bind.py --workdir=runs/tables/image_bind
"""

import dataclasses

from configs.tables import shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, _, _, whole = shared.suite(suite)
    # Each stage trains towers that the run has not trained before, so each gets half the steps and its own warm-up.
    half = dataclasses.replace(whole, epochs=whole.epochs / 2)
    first = dataclasses.replace(half, name="video_text", pairs=("vl",), trainable=("video", "text"))
    second = dataclasses.replace(
        half, name="audio", pairs=("av",), trainable=("audio",), temperature=1 / 20, reset_optimizer=True
    )
    return shared.run(config, "image_bind", first, second)
