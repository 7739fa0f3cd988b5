"""One moment of a video as a model takes it: `frames, waveform, rate = moment.read("kitchen.mp4", 12.0)`."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Int16, UInt8

from data_prep import guard, windows
from mc3_jax.data import records

_MOST_START_S, _LEAST_S, _MOST_S, _MOST_FRAMES = 1_000_000, 0.01, 60, 1_000


class Moment(NamedTuple):
    """A moment of a video.

    Attributes:
      frames: RGB frames, the middles of equal intervals of the moment, uint8 [t, h, w, 3]: for `Embedder.embed_video`.
      waveform: Mono sound, int16 [samples]: for `Embedder.embed_audio`.
      rate_hz: Its sample rate.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    waveform: Int16[np.ndarray, " samples"]
    rate_hz: int


def read(
    video: str | os.PathLike, start_s: float, *, duration_s: float = 1.5, num_frames: int = 4, short_side_px: int = 256
) -> Moment:
    """Returns the frames and the sound of a moment, cut as conversion cuts clips; the video is decoded in a child process.

    Args:
      video: Video file.
      start_s: Start of the moment, seconds from that of the video.
      duration_s: Its length; for a model, that of its training clips.
      num_frames: Number of frames; for a model, `config.video.num_frames`.
      short_side_px: Length to which the short side of the frames is scaled down, px.

    Raises:
      ValueError: There is no such file, a number is not allowed, or the moment can't be cut; the message says why.
      ChildProcessError: The child can't be started, or something other than the video killed it.
    """
    path = pathlib.Path(video)
    if not path.is_file():
        raise ValueError(f"no video file {path}")
    if not (0 <= start_s <= _MOST_START_S and _LEAST_S <= duration_s <= _MOST_S):
        raise ValueError(
            f"start_s must be from 0 to {_MOST_START_S} and duration_s from {_LEAST_S} to {_MOST_S}, got {start_s:g} and "
            f"{duration_s:g}"
        )
    if num_frames not in range(1, _MOST_FRAMES + 1) or short_side_px not in range(16, 4097, 2):
        raise ValueError(
            f"num_frames must be from 1 to {_MOST_FRAMES} and short_side_px even and from 16 to 4096, got {num_frames} and "
            f"{short_side_px}"
        )
    stop_s = start_s + duration_s
    window = windows.Window(start_s, stop_s, windows.frame_times(start_s, stop_s, int(num_frames), 1))
    [(_, cut)] = guard.cut_windows(path, [window], short_side_px=int(short_side_px), limits=guard.Limits())
    if isinstance(cut, str):
        raise ValueError(f"{path}: the moment from {start_s:g} to {stop_s:g} s can't be cut: {cut}")
    frames = np.stack([simplejpeg.decode_jpeg(frame) for frame in cut.frames])
    return Moment(frames, cut.audio, records.SAMPLE_RATE_HZ)
