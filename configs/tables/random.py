"""The untrained towers, as every row starts from them; evaluated without a training run.

python -m mc3_jax.evaluate --config=configs/tables/random.py
"""

from configs.tables import shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, *_ = shared.suite(suite)
    return shared.run(config, "random")
