"""MC3 without the contrastive term in its second phase, which has the consensus term alone.

python -m mc3_jax.train --config=configs/tables/without_contrastive.py --workdir=runs/tables/without_contrastive
"""

import dataclasses

from configs.tables import shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, align, refine, _ = shared.suite(suite)
    refine = dataclasses.replace(refine, contrastive_weight=0.0, consensus_weight=1.0)
    return shared.run(config, "without_contrastive", align, refine)
