"""MC3 whose K is inverted by each modality's own exponent: ours, no row of the paper's.

python -m mc3_jax.train --config=configs/tables/mc3_own_exponents.py --workdir=runs/tables/mc3_own_exponents
"""

import dataclasses

from configs.tables import mc3, shared
from mc3_jax.config import Config


def get_config(suite: str = "soundworld") -> Config:
    """Returns the row's run; `:ego4d` behind the file's name takes the paper's data and sizes."""
    config = mc3.get_config(suite)
    align, refine = config.phases
    consensus = dataclasses.replace(refine.consensus, inverse="per_modality")
    return shared.run(config, "mc3_own_exponents", align, dataclasses.replace(refine, consensus=consensus))
