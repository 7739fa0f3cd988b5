"""A local worker of Beam, which `data_prep.local_runner` starts: `python -m data_prep.worker FOLDER`.

It ends when the process that started it is no more. Beam's workers outlive a launcher that is killed, wait for it for ever,
and may still write. The launcher holds the lock of FOLDER (`data_prep.storage.scratch_folder`); who gets that lock has lost
the launcher. What is logged goes to stderr, as the launcher's own.
"""

import fcntl
import logging
import os
import pathlib
import signal
import sys
import threading

from data_prep import quiet


def _end_with(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os._exit(1)


def main(folder: pathlib.Path) -> None:
    """Works until the launcher has no more work, or is no more."""
    threading.Thread(target=_end_with, args=(folder,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the launcher's end is enough
    # Beam would send the log to the launcher, which tells it as Beam's, entry by entry in protobuf's words.
    del os.environ["LOGGING_API_SERVICE_DESCRIPTOR"]
    to_stderr = logging.StreamHandler()
    to_stderr.setLevel(logging.WARNING)  # Beam opens the root logger for what it tells a launcher
    to_stderr.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logging.getLogger().addHandler(to_stderr)
    sys.stderr = quiet.Stream(sys.stderr)
    with quiet.beam():
        from apache_beam.runners.worker import sdk_worker_main

        sdk_worker_main.main([])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
