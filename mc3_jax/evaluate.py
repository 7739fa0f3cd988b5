"""Evaluates a run: `python -m mc3_jax.evaluate --config=configs/demo.py --workdir=DIR`.

Embeds the labelled split with the last checkpoint and with the one at the end of every earlier phase, measures
discovery and retrieval (`mc3_jax/evals`), and writes `WORKDIR/results.json` and `WORKDIR/report/index.html`.
"""

import json
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from mc3_jax import checkpoint, cli, config as config_lib, mesh as mesh_lib, phases as phases_lib
from mc3_jax import train_step as step_lib
from mc3_jax.data import loader, tokenizer as tokenizer_lib
from mc3_jax.evals import controls, discovery, report, retrieval

_CONFIG, _WORKDIR = cli.define_flags()


def embed_split(embed, params, batches, mesh) -> dict[str, np.ndarray]:
    """Returns the embeddings of every clip of a split in the split's order, on every process.

    Args:
      embed: Jitted `train_step.make_embed_fn`.
      params: Parameters on the mesh.
      batches: `loader.eval_batches`: this process's part of each batch, `valid` marks real rows.
      mesh: Of the devices.

    Returns:
      {"audio", "video", "text"}: float32 [n, d].
    """
    parts, index = [], []
    for batch in batches:
        valid = multihost_utils.process_allgather(batch.pop("valid"), tiled=True)
        rows = multihost_utils.process_allgather(batch.pop("index"), tiled=True)
        out = multihost_utils.process_allgather(embed(params, mesh_lib.put_batch(mesh, batch)), tiled=True)
        parts.append({name: np.asarray(value, np.float32)[valid] for name, value in out.items()})
        index.append(rows[valid])
    order = np.argsort(np.concatenate(index))
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
