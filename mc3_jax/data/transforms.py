"""Turns a record into the arrays of a sample: chooses and decodes frames, crops audio, tokenizes text. Without jax."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Bool, Int, Int16, UInt8

from mc3_jax.data import damage, records

_CROP_STEPS = 100  # candidate starts per window length, for crops that avoid silence
# text -> (ids, mask), both int32 [num_tokens]
Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]


class Sample(NamedTuple):
    """Arrays of a clip, and the JPEG files of its chosen frames, which are decoded later, straight into the batch's array."""

    clip_id: str
    arrays: dict[str, np.ndarray]
    jpegs: list[bytes]
    place: damage.Place = damage.NOWHERE


def choose_frames(num_intervals: int, num_candidates: int, rng: np.random.Generator | None) -> Int[np.ndarray, " t"]:
    """Returns the index of one candidate frame per interval: a random one, or the middle one if `rng` is None."""
    if rng is None:
        candidate = np.full(num_intervals, num_candidates // 2)
    else:
        candidate = rng.integers(num_candidates, size=num_intervals)
    return np.arange(num_intervals) * num_candidates + candidate


def decode_frames(
    jpegs: list[bytes], canvas: UInt8[np.ndarray, "t h w 3"], clip_id: str
) -> Int[np.ndarray, "2"]:
    """Decodes frames to the top left of a canvas, zeros around them, and returns their true (height, width), int32 [2].

    Args:
      jpegs: Frames of one clip, all of one size.
      canvas: Array to decode into, large enough for every frame of the data set. All of it is overwritten.
      clip_id: Id of the clip, for error messages.

    Raises:
      ValueError: A frame is no JPEG, or larger than the canvas.
    """
    size = (0, 0)
    for i, jpeg in enumerate(jpegs):
        try:
            size = _decode_onto(canvas[i], jpeg)
        except ValueError as error:
            raise ValueError(f"clip {clip_id}: frame {i} can't be decoded: {error}") from error
    return np.array(size, np.int32)


def _decode_onto(canvas: UInt8[np.ndarray, "h w 3"], jpeg: bytes) -> tuple[int, int]:
    """Decodes a frame to the top left of a canvas, zeros around it, and returns its (height, width).

    Nearly all frames fill their canvas. So the frame is decoded straight into it, without reading its header first. After
    an error the content of the canvas is undefined.

    Raises:
      ValueError: The frame is no JPEG, or larger than the canvas.
    """

    def refuse_larger(size: tuple[int, int]) -> None:
        if size[0] > canvas.shape[0] or size[1] > canvas.shape[1]:
            raise ValueError(f"it has {size} px, more than the canvas {canvas.shape[:2]}")

    try:
        frame = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=canvas)
    except ValueError:
        refuse_larger(simplejpeg.decode_jpeg_header(jpeg)[:2])  # simplejpeg's own message gives bytes, not pixels
        raise
    size = frame.shape[:2]
    refuse_larger(size)
    if size != canvas.shape[:2]:
        frame = frame.copy()  # it lies in the first bytes of the canvas, which is cleared next
        canvas[:] = 0
        canvas[: size[0], : size[1]] = frame
    return size


def crop_start(length: int, num_samples: int, rng: np.random.Generator | None) -> int:
    """Returns the first sample of a crop of a sound: a random one at which the crop fits, or that of the middle crop.

    Args:
      length: Number of samples of the sound.
      num_samples: Number of samples of the crop; a shorter sound is taken from its start.
      rng: Random generator that chooses; None takes the middle.
    """
    spare = max(length - num_samples, 0)
    return spare // 2 if rng is None else int(rng.integers(spare + 1))


def num_windows(lengths: Int[np.ndarray, " n"], num_samples: int, hop_samples: int) -> Int[np.ndarray, " n"]:
    """Returns the number of windows of `audio_windows` for each length, all in samples."""
    return 1 + -(-np.maximum(np.asarray(lengths) - num_samples, 0) // hop_samples)


def audio_windows(length: int, num_samples: int, hop_samples: int) -> Int[np.ndarray, " w"]:
    """Returns the first sample of each window over a sound: one every hop, and the last moved back to end with the sound.

    So no window needs padding unless the sound is shorter than a window. The windows cover the whole sound if a hop is not
    larger than a window.

    Args:
      length: Number of samples of the sound, at least 1.
      num_samples: Number of samples of a window.
      hop_samples: Samples from the start of one window to the next, at least 1.
    """
    count = int(num_windows(np.array([length]), num_samples, hop_samples)[0])
    return np.minimum(np.arange(count) * hop_samples, max(length - num_samples, 0))


def crop_audio(audio: Int16[np.ndarray, " n"], start: int, num_samples: int) -> tuple[Int16[np.ndarray, " s"], int]:
    """Returns (`num_samples` of a sound from `start` on, zeros past its end; how many of them are sound).

    If none is past the end, they are a view of `audio`.
    """
    part = audio[start : start + num_samples]
    if len(part) == num_samples:
        return part, num_samples
    out = np.zeros(num_samples, np.int16)
    out[: len(part)] = part
    return out, len(part)


def loud_windows(
    audio: Int16[np.ndarray, " n"], num_samples: int, starts: Int[np.ndarray, " w"], silence_db: float
) -> Bool[np.ndarray, " w"]:
    """Returns which windows of a sound are not silent: their level is at most `silence_db` below that of the loudest.

    The level of a window is its energy after the mean of the whole sound is subtracted. As in Piczak (MLSP 2015), silent
    windows are excluded from training and from the vote over a clip's windows.

    Args:
      audio: Mono sound, [n].
      num_samples: Number of samples of a window; a shorter sound has one window.
      starts: First sample of each window, [w].
      silence_db: Threshold in dB, positive.
    """
    deviation = audio - audio.mean()
    sums = np.concatenate([[0.0], np.cumsum(deviation * deviation)])
    energy = sums[np.minimum(starts + num_samples, len(audio))] - sums[starts]
    return energy >= energy.max() * 10 ** (-silence_db / 10)


def make_sample(
    clip: records.Clip, info: records.ClipsInfo, tokenize: Tokenize, rng: np.random.Generator | None, *,
    pictures: bool, num_samples: int | None = None, audio_start: int | None = None, silence_db: float = 0.0,
    place: damage.Place = damage.NOWHERE,
) -> Sample:  # fmt: skip
    """Returns the sample that represents a clip in a batch.

    Its arrays are `audio` int16 [num_samples], `audio_start` int32 [], the position of its first sample in the clip,
    `audio_length` int32 [], how many samples are sound before zeros pad the rest, and `text_ids`, `text_mask` int32 [l].

    Args:
      clip: Clip that `records.check` has accepted.
      info: Description of its data set.
      tokenize: Function text → (ids, mask).
      rng: Random generator that chooses frames and crop; None takes the middle frame of every interval and the middle of
        the sound.
      pictures: Whether the sample has one frame of every interval, or no frames.
      num_samples: Number of samples of the audio; None takes the data set's `num_samples`.
      audio_start: First sample of the audio in the clip; None crops by `rng`.
      silence_db: If above 0, a random crop is never one that `loud_windows` finds silent.
      place: Where the clip lies, for errors on decoding its frames later.
    """
    chosen = choose_frames(info.num_intervals, info.num_candidates, rng) if pictures else ()
    num = info.num_samples if num_samples is None else num_samples
    start = audio_start
    if start is None and rng is not None and silence_db > 0:
        starts = audio_windows(len(clip.audio), num, -(-num // _CROP_STEPS))
        start = int(rng.choice(starts[loud_windows(clip.audio, num, starts, silence_db)]))
    elif start is None:
        start = crop_start(len(clip.audio), num, rng)
    audio, length = crop_audio(clip.audio, start, num)
    ids, mask = tokenize(clip.narration)
    arrays = {"audio": audio, "audio_start": np.int32(start), "audio_length": np.int32(length)}
    return Sample(clip.clip_id, arrays | {"text_ids": ids, "text_mask": mask}, [clip.frames[i] for i in chosen], place)
