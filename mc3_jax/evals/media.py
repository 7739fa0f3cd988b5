"""Frames and sounds of the clips that a page shows, compressed so that hundreds of clips fit into one file."""

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

MIN_FRAME_PX = 120  # the short side is halved as long as it stays at or above this
MAX_AUDIO_S = 10


@dataclasses.dataclass(frozen=True)
class Shown:
    """A clip as a page shows it. Its texts are untrusted.

    Attributes:
      index: Index of the clip in its split, by which the page refers to it.
      clip_id, narration: Id and narration of the clip.
      frames: JPEG files in the order of time: one from each interval, or only the middle one; [] for clips without video.
      middle: Which of the frames represents the clip.
      size_px: (width, height) of the first frame; (0, 0) without frames.
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
        """Returns {"frames", "audio"} in base64, from which the page's script makes images and sounds."""
        frames = [base64.b64encode(frame).decode() for frame in self.frames]
        return {"frames": frames, "audio": base64.b64encode(self.audio).decode()}


def shrink(jpeg: bytes) -> tuple[bytes, tuple[int, int]]:
    """Returns a JPEG file, scaled down to a short side of less than twice `MIN_FRAME_PX`, and its (width, height).

    A file that is small enough already is returned unchanged, byte for byte.
    """
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    if min(height, width) < 2 * MIN_FRAME_PX:
        return jpeg, (width, height)
    picture = simplejpeg.decode_jpeg(jpeg, min_height=MIN_FRAME_PX, min_width=MIN_FRAME_PX)
    return simplejpeg.encode_jpeg(picture, quality=80), (picture.shape[1], picture.shape[0])


def mp3(audio: Int16[np.ndarray, " samples"], sample_rate_hz: int) -> bytes:
    """Returns the first `MAX_AUDIO_S` seconds as an MP3 file, which every browser plays; b"" if there are no samples.

    A clip of 1.5 s takes about 6 KB; as WAV it would take 48 KB.
    """
    if not len(audio):
        return b""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio[: MAX_AUDIO_S * sample_rate_hz], sample_rate_hz, format="MP3")
    return buffer.getvalue()


def gather(source, indices: Iterable[int], whole: Iterable[int] = ()) -> dict[int, Shown]:
    """Returns index → clip, each clip once, in the order of the indices.

    Args:
      source: `loader.ClipSource` with the clips.
      indices: Clips that are shown with one frame.
      whole: Clips that are shown with one frame from each interval; they may be in `indices` as well.
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
    # Threads help: encoding a second of sound takes some milliseconds and releases Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(show, wanted), strict=True))
