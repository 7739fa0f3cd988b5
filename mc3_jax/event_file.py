"""Event files for TensorBoard with a run's metrics."""

import contextlib
import os
import pathlib
import socket
import time

from tensorboardX import record_writer, summary
from tensorboardX.proto import event_pb2


class EventFile:
    """An event file for TensorBoard, complete after every row. tensorboardX's own writer hangs for ever after a full disk."""

    def __init__(self, folder: pathlib.Path, purge_step: int):
        """Begins a file in `folder`; TensorBoard then ignores what earlier files there have from `purge_step` on."""
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._folder, self._file = folder, record_writer.RecordWriter(str(folder / name))
        self._write(step=purge_step, file_version="brain.Event:2")
        self._write(step=purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _write(self, **fields) -> None:
        self._file.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one row.

        Raises:
          OSError: The row can't be written; the file is closed then.
        """
        try:
            for name, value in scalars.items():
                self._write(step=step, summary=summary.scalar(name, value))
            self._file.flush()
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self._folder)) from error

    def close(self) -> None:
        """Closes the file. Errors are dropped, such as of a full disk, which Python would report again when it exits."""
        with contextlib.suppress(OSError):
            self._file.close()
