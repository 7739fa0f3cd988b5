"""One moment of a video as a model takes it: `frames, waveform, rate = moment.read("kitchen.mp4", 12.0)`."""

import math
import os
import pathlib
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Int16, UInt8

from data_prep import guard, windows
from mc3_jax.data import records


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
    if not (0 <= start_s < math.inf and 0 < duration_s < math.inf):
        raise ValueError(f"start_s must be at least 0 and duration_s above 0, got {start_s:g} and {duration_s:g}")
    if num_frames < 1 or short_side_px < 16 or short_side_px % 2:
        raise ValueError(
            f"num_frames must be at least 1 and short_side_px even and at least 16, got {num_frames} and {short_side_px}"
        )
    stop_s = start_s + duration_s
    window = windows.Window(start_s, stop_s, windows.frame_times(start_s, stop_s, num_frames, 1))
    [(_, cut)] = guard.cut_windows(path, [window], short_side_px=short_side_px, limits=guard.Limits())
    if isinstance(cut, str):
        raise ValueError(f"{path}: the moment from {start_s:g} to {stop_s:g} s can't be cut: {cut}")
    frames = np.stack([simplejpeg.decode_jpeg(frame) for frame in cut.frames])
    return Moment(frames, cut.audio, records.SAMPLE_RATE_HZ)
