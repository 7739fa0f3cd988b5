"""A local worker of Beam, which `data_prep.local_runner` starts: `python -m data_prep.worker FOLDER`.

It ends as soon as the process that started it, the launcher, has ended. Beam's own workers outlive a launcher that is killed,
wait for it forever, and may still write. The launcher holds the lock of FOLDER (`data_prep.storage.scratch_folder`). When a
worker gets this lock, the launcher has ended. Log messages go to stderr, like the launcher's.
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
    """Works until the launcher has no more work or has ended."""
    threading.Thread(target=_end_with, args=(folder,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # terminals send it to all processes; the launcher's end is enough
    # Beam would send the log to the launcher, which would print each entry as a message of Beam, in protobuf's format.
    del os.environ["LOGGING_API_SERVICE_DESCRIPTOR"]
    to_stderr = logging.StreamHandler()
    to_stderr.setLevel(logging.WARNING)  # Beam lowers the root logger's level for what it sends to a launcher
    to_stderr.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logging.getLogger().addHandler(to_stderr)
    sys.stderr = quiet.Stream(sys.stderr)
    with quiet.beam():
        from apache_beam.runners.worker import sdk_worker_main

        sdk_worker_main.main([])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
