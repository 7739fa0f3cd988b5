"""CM-ACC: audio and video alone, with negatives from a memory (`mc3_jax/losses/active.py`).

python -m mc3_jax.train --config=configs/tables/cm_acc.py --workdir=runs/tables/cm_acc
"""

import dataclasses

from configs.tables import shared
from mc3_jax.config import Config, MemoryConfig


def get_config(suite: str = "soundworld") -> Config:
    """Returns the run of this row; `:ego4d` after the file's name takes the paper's data and sizes."""
    config, _, _, whole = shared.suite(suite)
    size = config.data.batch_size
    # The pool holds ten batches and the dictionary three, as in the method's public code (yunyikristy/CM-ACC).
    memory = MemoryConfig(pool_size=10 * size, dictionary_size=3 * size)
    phase = dataclasses.replace(whole, pairs=("av",), trainable=("audio", "video"), memory=memory)
    return shared.run(config, "cm_acc", phase)
