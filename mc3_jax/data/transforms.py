"""From a record to the arrays of a sample: frames chosen and decoded onto the canvas, audio, tokens. numpy only."""

from collections.abc import Callable

import numpy as np
import simplejpeg
from jaxtyping import Int, UInt8

from mc3_jax.data import records

# text -> (ids, mask), both int32 [num_tokens]
Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]


def choose_frames(num_intervals: int, num_candidates: int, rng: np.random.Generator | None) -> Int[np.ndarray, " t"]:
    """Returns the index of one candidate frame per interval: a random one, or without `rng` the interval's middle."""
    if rng is None:
        candidate = np.full(num_intervals, num_candidates // 2)
    else:
        candidate = rng.integers(num_candidates, size=num_intervals)
    return np.arange(num_intervals) * num_candidates + candidate


def decode_frames(
    jpegs: list[bytes], canvas_px: tuple[int, int], clip_id: str
) -> tuple[UInt8[np.ndarray, "t h w 3"], Int[np.ndarray, "2"]]:
    """Returns frames on a canvas, zeros below and to the right, and their true (height, width).

    Args:
      jpegs: Frames of one clip, all of one size.
      canvas_px: (height, width) that holds every frame of the data set.
      clip_id: For the error.

    Raises:
      ValueError: A frame is no JPEG, or larger than the canvas.
    """
    canvas = np.zeros((len(jpegs), *canvas_px, 3), np.uint8)
    size = (0, 0)
    for i, jpeg in enumerate(jpegs):
        try:
            frame = simplejpeg.decode_jpeg(jpeg, "RGB")
        except ValueError as error:
            raise ValueError(f"clip {clip_id}: frame {i} can't be decoded: {error}") from error
        size = frame.shape[:2]
        if size[0] > canvas_px[0] or size[1] > canvas_px[1]:
            raise ValueError(f"clip {clip_id}: frame {i} of {size} px is larger than the canvas {canvas_px}")
        canvas[i, : size[0], : size[1]] = frame
    return canvas, np.array(size, np.int32)


def make_sample(
    clip: records.Clip, info: records.ClipsInfo, tokenize: Tokenize, rng: np.random.Generator | None
) -> dict[str, np.ndarray]:
    """Returns a clip as arrays: `audio` [samples], `video` [t, h, w, 3], `video_size` [2], `text_ids`, `text_mask` [l].

    Args:
      clip: Decoded record.
      info: Of its data set.
      tokenize: Text to ids and mask.
      rng: Chooses frames; None takes the middle of every interval.

    Raises:
      ValueError: The clip is not what its data set promises.
    """
    records.check(clip, info)
    chosen = choose_frames(info.num_intervals, info.num_candidates, rng)
    video, size = decode_frames([clip.frames[i] for i in chosen], info.canvas_px, clip.clip_id)
    text_ids, text_mask = tokenize(clip.narration)
    return {"audio": clip.audio, "video": video, "video_size": size, "text_ids": text_ids, "text_mask": text_mask}
