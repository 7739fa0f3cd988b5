"""MC3 without its consensus term: the contrastive term alone in both phases.

python -m mc3_jax.train --config=configs/tables/without_consensus.py --workdir=runs/tables/without_consensus
"""

from configs.tables import shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, align, refine, _ = shared.suite(suite)
    return shared.run(config, "without_consensus", align, refine)
