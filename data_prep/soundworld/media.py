"""Encodes a SoundWorld video through PyAV as H.264 and AAC in mp4; the same plan gives the same bytes."""

import os
import pathlib
from collections.abc import Iterable
from fractions import Fraction

import av
import cv2
import numpy as np

from data_prep.soundworld.plan import Video

_KEYFRAME_INTERVAL = 250  # Ego4D's 540p videos have a keyframe every 250 frames


def write_mp4(path: pathlib.Path, video: Video, frames: Iterable[np.ndarray], audio: np.ndarray | None) -> None:
    """Writes one mp4; it appears under its name only when complete.

    Args:
      path: File to write.
      video: Plan of the video, which gives its format.
      frames: Frames in order, uint8 RGB [height, width, 3].
      audio: float32 [channels, samples] at the video's sample rate, beginning at `video.audio_start_s`; None writes no
        audio stream.
    """
    aside = path.with_suffix(".part.mp4")
    with av.open(str(aside), "w", options={"movflags": "faststart"}) as container:
        # Fast encoding at a moderate quality is enough: the converter only uses clips of 1.5 s, scaled down.
        picture = container.add_stream("libx264", rate=video.fps)
        picture.options = {"preset": "ultrafast", "crf": "24", "threads": "1", "g": str(_KEYFRAME_INTERVAL)}
        picture.width, picture.height, picture.pix_fmt = video.width_px, video.height_px, "yuv420p"
        sound = None
        if audio is not None:
            layout = "mono" if video.num_channels == 1 else "stereo"
            sound = container.add_stream("aac", rate=video.sample_rate_hz, layout=layout)
            sound.bit_rate = 64000 * video.num_channels
            # The default coder takes longer than all drawing and synthesis. The tools switched off here take a third of what
            # is then left.
            sound.options = {"aac_coder": "fast", "aac_tns": "0", "aac_pns": "0", "aac_is": "0", "aac_ms": "0"}
        # Sound first, then pictures: the muxer interleaves by time, and a minute of AAC is small.
        if sound is not None:
            _encode_audio(container, sound, video, audio)
        for i, frame in enumerate(frames):
            yuv = av.VideoFrame.from_ndarray(cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420), format="yuv420p")
            yuv.pts, yuv.time_base = i, Fraction(1, video.fps)
            container.mux(picture.encode(yuv))
        container.mux(picture.encode(None))
    os.replace(aside, path)


def _encode_audio(container, sound, video: Video, audio: np.ndarray) -> None:
    """Encodes and muxes all of the audio, with timestamps that begin at `video.audio_start_s`."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio), format="fltp", layout=sound.layout.name)
    frame.sample_rate = video.sample_rate_hz
    frame.time_base = Fraction(1, video.sample_rate_hz)
    frame.pts = round(video.audio_start_s * video.sample_rate_hz)
    container.mux(sound.encode(frame))
    container.mux(sound.encode(None))
