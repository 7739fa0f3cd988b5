"""From a record to the arrays of a sample: frames chosen and decoded onto the canvas, audio cut out, tokens. numpy only."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Bool, Int, Int16, UInt8

from mc3_jax.data import damage, records

_CROP_STEPS = 100  # a window: where crops may begin whose level is looked at
# text -> (ids, mask), both int32 [num_tokens]
Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]


class Sample(NamedTuple):
    """What comes of a clip: its arrays, and the JPEG files of its pictures, which are decoded to where a batch stays."""

    clip_id: str
    arrays: dict[str, np.ndarray]
    jpegs: list[bytes]
    place: damage.Place = damage.NOWHERE


def choose_frames(num_intervals: int, num_candidates: int, rng: np.random.Generator | None) -> Int[np.ndarray, " t"]:
    """Returns the index of one candidate frame per interval: a random one, or without `rng` the interval's middle."""
    if rng is None:
        candidate = np.full(num_intervals, num_candidates // 2)
    else:
        candidate = rng.integers(num_candidates, size=num_intervals)
    return np.arange(num_intervals) * num_candidates + candidate


def decode_frames(
    jpegs: list[bytes], canvas: UInt8[np.ndarray, "t h w 3"], clip_id: str
) -> Int[np.ndarray, "2"]:
    """Decodes frames onto a canvas, zeros below and to the right of them; returns their true (height, width).

    Args:
      jpegs: Frames of one clip, all of one size.
      canvas: (height, width) of it hold every frame of the data set. Written in full.
      clip_id: For the error.

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
    """Decodes a frame to the top left of a canvas, zeros around it; returns its (height, width).

    Nearly all frames fill their canvas, and are decoded to where they stay without a look at their header before. What the
    canvas holds after an error is undefined.

    Raises:
      ValueError: It is no JPEG, or larger than the canvas.
    """

    def refuse_larger(size: tuple[int, int]) -> None:
        if size[0] > canvas.shape[0] or size[1] > canvas.shape[1]:
            raise ValueError(f"it has {size} px, more than the canvas {canvas.shape[:2]}")

    try:
        frame = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=canvas)
    except ValueError:
        refuse_larger(simplejpeg.decode_jpeg_header(jpeg)[:2])  # simplejpeg's message tells bytes
        raise
    size = frame.shape[:2]
    refuse_larger(size)
    if size != canvas.shape[:2]:
        frame = frame.copy()  # it lies in the first bytes of the canvas
        canvas[:] = 0
        canvas[: size[0], : size[1]] = frame
    return size


def crop_start(length: int, num_samples: int, rng: np.random.Generator | None) -> int:
    """Returns where a crop of a sound begins: anywhere that it fits, or without `rng` in the middle.

    Args:
      length: Samples of the sound.
      num_samples: Samples of the crop; a sound that is shorter is taken from its start.
      rng: Chooses.
    """
    spare = max(length - num_samples, 0)
    return spare // 2 if rng is None else int(rng.integers(spare + 1))


def num_windows(lengths: Int[np.ndarray, " n"], num_samples: int, hop_samples: int) -> Int[np.ndarray, " n"]:
    """Returns how many windows `audio_windows` lays over sounds of such lengths."""
    return 1 + -(-np.maximum(np.asarray(lengths) - num_samples, 0) // hop_samples)


def audio_windows(length: int, num_samples: int, hop_samples: int) -> Int[np.ndarray, " w"]:
    """Returns where windows over a sound begin: every hop from its start on, the last one where it ends with the sound.

    Without padding, then, unless the sound is shorter than a window; and all of it is covered where a hop is at most a
    window.

    Args:
      length: Samples of the sound, at least 1.
      num_samples: Samples of a window.
      hop_samples: From one window to the next, at least 1.
    """
    count = int(num_windows(np.array([length]), num_samples, hop_samples)[0])
    return np.minimum(np.arange(count) * hop_samples, max(length - num_samples, 0))


def crop_audio(audio: Int16[np.ndarray, " n"], start: int, num_samples: int) -> tuple[Int16[np.ndarray, " s"], int]:
    """Returns `num_samples` of a sound from `start` on, zeros behind its end, and how many of them are the sound's.

    Where the sound holds them all, they are a view of it.
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

    Silent stretches are left out of training and of the vote as in Piczak (MLSP 2015). A level is the energy without the
    mean of the whole sound.

    Args:
      audio: Mono.
      num_samples: Of a window; a shorter sound has one.
      starts: Where the windows begin.
      silence_db: Positive.
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
    """Returns what a batch holds of a clip.

    Arrays are `audio` int16 [num_samples], `audio_start` and `audio_length` int32 []: the first of them in the clip's sound,
    and how many are the sound's, the others are zeros; `text_ids`, `text_mask` [l].

    Args:
      clip: Decoded record, checked.
      info: Of its data set.
      tokenize: Text to ids and mask.
      rng: Chooses frames and crop; None takes the middle of every interval, and of the sound.
      pictures: Whether they are wanted, a frame of every interval.
      num_samples: Of the audio; None is the data set's `num_samples`.
      audio_start: Where the audio begins; None crops.
      silence_db: Where above 0, a random crop is none that `loud_windows` calls silent.
      place: Of the clip, for who finds that a picture can't be decoded.
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
