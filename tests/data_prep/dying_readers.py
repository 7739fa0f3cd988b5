"""Readers of shards that die or hang, for tests of `data_prep.verify`; a module of its own, which these processes import."""

import json
import os
import pathlib
import signal
import time

from data_prep import verify
from mc3_jax.data import records

# In the data set's folder: shard file → name of the signal, "MemoryError", "hang", or "once" for SIGKILL once.
FILE = "dying.json"
HANGS = "hangs"  # file in that folder: a reader hangs


def verify_shard(folder: pathlib.Path, shard: records.Shard, info: records.ClipsInfo) -> verify.ShardReport:
    """Verifies a shard like `verify.verify_shard`, but dies or hangs first if the file `FILE` says so."""
    how = json.loads((folder / FILE).read_text()).get(shard.file)
    if how == "MemoryError":
        raise MemoryError
    if how == "hang":
        (folder / HANGS).touch()
        time.sleep(300)
    if how == "once":
        how = None if (folder / "died").exists() else "SIGKILL"
        (folder / "died").touch()
    if how:
        os.kill(os.getpid(), signal.Signals[how])
    return verify.verify_shard(folder, shard, info)
