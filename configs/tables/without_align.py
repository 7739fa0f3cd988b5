"""MC3 without its first phase: one phase with both terms from the beginning.

python -m mc3_jax.train --config=configs/tables/without_align.py --workdir=runs/tables/without_align
"""

import dataclasses

from configs.tables import shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, _, _, whole = shared.suite(suite)
    return shared.run(config, "without_align", dataclasses.replace(whole, consensus_weight=1.0))
