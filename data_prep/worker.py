"""Imported by a local Beam worker when it starts: keeps it quiet, and ends it when the process that started it is no more.

Beam's workers outlive a launcher that is killed, wait for it for ever, and may still write. The launcher holds the lock of
the folder its options lie in (`data_prep.storage.scratch_folder`); who gets that lock has lost the launcher.
"""

import fcntl
import os
import pathlib
import sys
import threading


def _end_with(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os._exit(1)


threading.Thread(
    target=_end_with, args=(pathlib.Path(os.environ["PIPELINE_OPTIONS_FILE"]).parent,), daemon=True
).start()
sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (tracebacks, which the error that the launcher raises holds as well)
