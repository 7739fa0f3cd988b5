"""Cuts sound out of an HDF5 file, as `data_prep.media` does out of a media file. Used only in a child process of `guard`.

EPIC-Sounds' `EPIC_audio.hdf5` holds one HDF5 data set per video, with float samples at 24 kHz
(ekazakos/auditory-slow-fast, `audio_extraction/wav_to_hdf5.py`). An HDF5 file can name other files and plugins that its
reader then opens. Data sets that do so are rejected.
"""

import contextlib
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterator

import numpy as np

os.environ["HDF5_PLUGIN_PRELOAD"] = "::"  # tells HDF5 to load no filter plugins
import h5py  # reads the variable when it is imported

from data_prep import audio, media, streams
from data_prep.windows import Window

_MARGIN_S = 0.2  # read around a window; more than the resampler needs
_MAX_FLOAT = 2.0  # filtering may raise samples in [-1, 1] up to this; larger ones are in another scale
_DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError)


class Parts(io.RawIOBase):
    """A read-only file whose parts are fetched when they are needed.

    Args:
      num_bytes: Size of the file.
      read: Function (start, stop) → these bytes of the file, or only the first of them.
    """

    def __init__(self, num_bytes: int, read: Callable[[int, int], bytes]):
        self._num_bytes, self._read, self._at = num_bytes, read, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Fills the whole buffer and returns its size, since HDF5 does not ask again for the rest.

        Raises:
          OSError: The file ends before the buffer is full.
        """
        size = len(buffer)
        if not 0 <= self._at <= self._num_bytes - size:
            raise OSError(f"{size} bytes requested at byte {self._at} of a file of {self._num_bytes} bytes")
        stop = self._at + size
        while self._at < stop:
            part = self._read(self._at, stop)
            buffer[size - stop + self._at :][: len(part)] = part
            self._at += len(part)
        return size


def cut_windows(
    source: pathlib.Path | Parts, windows: list[Window], name: str, rate_hz: int
) -> Iterator[tuple[int, media.Cut | str]]:
    """Yields (index of the window, its cut or the reason why there is none), every window once.

    A reason is text of the form `reason` or `reason: detail`.

    Args:
      source: HDF5 file.
      windows: Windows without frames.
      name: Name of the data set, which must be at the top level of the file.
      rate_hz: Sample rate of the data set, Hz.
    """
    with contextlib.ExitStack() as stack:
        data = None
        try:
            if isinstance(source, pathlib.Path) and not source.is_file():
                raise FileNotFoundError
            file = stack.enter_context(h5py.File(source, "r"))
            problem = _problem(file, name)
            data = file[name] if problem is None else None
        except FileNotFoundError:
            problem = "audio file is missing"
        except _DAMAGE as error:
            problem = _why("audio file can't be opened", error)
        for i, window in enumerate(windows):
            yield i, problem or _cut(data, window, rate_hz)


def _problem(file: h5py.File, name: str) -> str | None:
    """Returns the reason why the file has no usable sound of this name, or None if it has."""
    if "/" in name or name not in file:
        return "no audio of this video in the HDF5 file"
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return "audio in the HDF5 file is a link"
    data = file[name]
    if not isinstance(data, h5py.Dataset):
        return "audio in the HDF5 file is not a data set"
    if data.is_virtual or data.external:
        return "audio of the HDF5 file is stored in other files"
    if data.ndim != 1 or data.dtype.kind not in "fi":
        return f"audio in the HDF5 file is not mono samples: {data.dtype} of shape {data.shape}"
    return None


def _why(reason: str, error: Exception) -> str:
    """Returns `reason: detail`. An error of the kernel, which HDF5 quotes, is no damage and gets a reason of its own."""
    words = " ".join(str(error).split())
    refused = re.search(r"errno = \d+, error message = '([^']*)'", words)
    if refused or isinstance(error, PermissionError):
        return f"{streams.UNREADABLE}: {refused[1] if refused else error.strerror}"
    return f"{reason}: {words[:160]}"


def _cut(data: h5py.Dataset, window: Window, rate: int) -> media.Cut | str:
    begin = int(np.floor((window.start_s - _MARGIN_S) * rate))
    end = int(np.ceil((window.stop_s + _MARGIN_S) * rate))
    covered = np.zeros(end - begin, bool)
    wave = np.zeros(end - begin, np.float32)
    first, last = max(begin, 0), min(end, len(data))
    try:
        if last > first:
            samples = data[first:last]
            scale = 1.0 if data.dtype.kind == "f" else 2.0 ** (1 - 8 * data.dtype.itemsize)
            wave[first - begin : last - begin] = samples * np.float32(scale)
            covered[first - begin : last - begin] = True
    except _DAMAGE as error:
        return _why("decoding failed", error)
    if not np.isfinite(wave).all():
        return "decoding failed: audio is not finite"
    if np.abs(wave).max(initial=0) > _MAX_FLOAT:
        return f"decoding failed: float samples up to {np.abs(wave).max():g}, not in [-1, 1]"
    sound = audio.resample_window(wave, covered, begin, rate, window)
    if sound is None:
        return "audio does not cover the clip"
    return media.Cut([], np.zeros(0, np.int64), 0, 0, sound)
