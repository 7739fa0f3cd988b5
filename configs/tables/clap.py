"""CLAP: audio and language alone, symmetric cross entropy with a learned scale.

python -m mc3_jax.train --config=configs/tables/clap.py --workdir=runs/tables/clap
"""

import dataclasses

from configs.tables import shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, _, _, whole = shared.suite(suite)
    # The scale starts at 1 / 0.07 and is limited to 100.
    phase = dataclasses.replace(whole, pairs=("al",), trainable=("audio", "text"), temperature=0.07, learn_scale=True)
    return shared.run(config, "clap", phase)
