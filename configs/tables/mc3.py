"""MC3: first align, with the contrastive term alone, then refine, with both terms.

python -m mc3_jax.train --config=configs/tables/mc3.py --workdir=runs/tables/mc3
"""

import dataclasses

from configs.tables import shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, align, refine, _ = shared.suite(suite)
    return shared.run(config, "mc3", align, dataclasses.replace(refine, consensus_weight=1.0))
