"""Frames and sounds of the clips a page shows, small enough that hundreds of them fit into one file."""

import base64
import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Iterable

import numpy as np
import simplejpeg
import soundfile
from jaxtyping import Int16

MIN_FRAME_PX = 120  # the short side is halved while it stays as long
MAX_AUDIO_S = 10


@dataclasses.dataclass(frozen=True)
class Shown:
    """A clip as a page shows it. Texts are untrusted.

    Attributes:
      index: In the split; names the clip within the page.
      clip_id, narration: Of the clip.
      frames: JPEG files, in the order of time: one of each interval, or the middle one alone; none of a sound.
      middle: Which of the frames stands for the clip.
      size_px: (width, height) of the frames; (0, 0) without.
      audio: MP3 file of at most the first `MAX_AUDIO_S` seconds; b"" where there is no sound.
    """

    index: int
    clip_id: str
    narration: str
    frames: list[bytes]
    middle: int
    size_px: tuple[int, int]
    audio: bytes

    def encoded(self) -> dict:
        """Returns what the page's script makes pictures and sounds of."""
        frames = [base64.b64encode(frame).decode() for frame in self.frames]
        return {"frames": frames, "audio": base64.b64encode(self.audio).decode()}


def shrink(jpeg: bytes) -> tuple[bytes, tuple[int, int]]:
    """Returns a JPEG file whose short side is under twice `MIN_FRAME_PX`, and its (width, height).

    A small one is handed on as it is, byte for byte.
    """
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    if min(height, width) < 2 * MIN_FRAME_PX:
        return jpeg, (width, height)
    picture = simplejpeg.decode_jpeg(jpeg, min_height=MIN_FRAME_PX, min_width=MIN_FRAME_PX)
    return simplejpeg.encode_jpeg(picture, quality=80), (picture.shape[1], picture.shape[0])


def mp3(audio: Int16[np.ndarray, " samples"], sample_rate_hz: int) -> bytes:
    """Returns the first `MAX_AUDIO_S` seconds as an MP3 file, which every browser plays; b"" of nothing.

    A clip of 1.5 s takes about 6 KB; as WAV it would take 48.
    """
    if not len(audio):
        return b""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio[: MAX_AUDIO_S * sample_rate_hz], sample_rate_hz, format="MP3")
    return buffer.getvalue()


def gather(source, indices: Iterable[int], whole: Iterable[int] = ()) -> dict[int, Shown]:
    """Returns every clip once, by its index.

    Args:
      source: `loader.ClipSource`.
      indices: Clips of which one frame is shown.
      whole: Clips of which one frame of each interval is.
    """
    whole = {int(i) for i in whole}
    candidates = source.info.num_candidates

    def show(index: int) -> Shown:
        clip = source[index]
        frames = clip.frames[candidates // 2 :: candidates] if source.pictures else []
        middle = len(frames) // 2
        if frames and index not in whole:
            frames, middle = [frames[middle]], 0
        shrunk = [shrink(frame) for frame in frames]
        return Shown(
            index, clip.clip_id, clip.narration, [frame for frame, _ in shrunk], middle,
            shrunk[0][1] if shrunk else (0, 0), mp3(clip.audio, source.info.sample_rate_hz),
        )  # fmt: skip

    wanted = sorted({int(i) for i in indices} | whole)
    # Encoding a second of sound takes some milliseconds, without Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(show, wanted), strict=True))
