"""CMC: contrast of all pairs, in one phase.

python -m mc3_jax.train --config=configs/tables/cmc.py --workdir=runs/tables/cmc
"""

from configs.tables import shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, _, _, whole = shared.suite(suite)
    return shared.run(config, "cmc", whole)
