"""Readers of shards that die, for tests of `data_prep.verify`; a module of its own, since the reading processes import it."""

import json
import os
import pathlib
import signal

from data_prep import verify
from mc3_jax.data import records

FILE = "dying.json"  # in the data set's folder: shard file → name of the signal, "MemoryError", or "once" for SIGKILL once


def verify_shard(folder: pathlib.Path, shard: records.Shard, info: records.ClipsInfo) -> verify.ShardReport:
    """Verifies a shard like `verify.verify_shard`, but dies first if the file `FILE` says so."""
    how = json.loads((folder / FILE).read_text()).get(shard.file)
    if how == "MemoryError":
        raise MemoryError
    if how == "once":
        how = None if (folder / "died").exists() else "SIGKILL"
        (folder / "died").touch()
    if how:
        os.kill(os.getpid(), signal.Signals[how])
    return verify.verify_shard(folder, shard, info)
