"""Hides Beam's messages about itself from the terminal, and nothing else, by logger and wording; see `_NOISE`."""

import contextlib
import io
import logging
import re
from collections.abc import Iterator

# Logger → pattern at the beginning of messages to hide. The traceback of a failed shard is in the error that the pipeline
# raises.
_NOISE = {
    "root": "apitools not found",  # when Beam is imported without Google's packages
    "apache_beam.runners.common": r".* \[while running '",
    "apache_beam.runners.portability.fn_api_runner.fn_runner": "If direct_num_workers is not equal to 1",
    "apache_beam.runners.worker.data_plane": "Failed to read inputs in the data plane",  # from a worker that has ended
    "apache_beam.runners.worker.sdk_worker": "Error processing instruction",
    "apache_beam.runners.worker.sdk_worker_main": "No semi_persistent_directory found",
}
_TRACEBACK = re.compile(
    r'Traceback \(most recent call last\):\n.*/apache_beam/runners/worker/sdk_worker\.py", line \d+, in _execute\n', re.DOTALL
)


class _Filter:
    """A log filter, one object per block: if nested blocks shared one, the end of the inner would also end the outer."""

    def filter(self, record: logging.LogRecord) -> bool:
        return re.match(_NOISE[record.name], record.getMessage(), re.DOTALL) is None


@contextlib.contextmanager
def beam() -> Iterator[None]:
    """Hides the messages of `_NOISE` while the block imports or runs Beam."""
    root = logging.getLogger()
    # When imported, Beam calls `logging.warning`, which would configure logging if nobody has done so.
    nothing, noise = logging.NullHandler(), _Filter()
    root.addHandler(nothing)
    for name in _NOISE:
        logging.getLogger(name).addFilter(noise)
    try:
        yield
    finally:
        for name in _NOISE:
            logging.getLogger(name).removeFilter(noise)
        root.removeHandler(nothing)


class Stream(io.TextIOBase):
    """Passes on what is written, except tracebacks that Beam's workers print although they also log and send them."""

    def __init__(self, stream):
        self._stream, self._ends_line = stream, False

    def write(self, text: str) -> int:
        # `print` writes its text and then the end of the line.
        is_noise = _TRACEBACK.match(text) or (self._ends_line and text == "\n")
        self._ends_line = is_noise and text != "\n"
        return len(text) if is_noise else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()
