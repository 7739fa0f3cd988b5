"""Turns decoded clips into the encoders' inputs, by pure functions that run inside jit.

Audio: the log-mel spectrogram of AST (YuanGongND/ast, `src/dataloader.py`), which is Kaldi's fbank with a Hann window
and no dither. Video: the transforms of EgoVLP (showlab/EgoVLP, `data_loader/transforms.py`), which are torchvision's:
random resized crop and horizontal flip in training, resize and centre crop otherwise, ImageNet mean and deviation.

Differs in that pixels are never rounded between crop, resize and normalisation, and that all of a clip's frames share
one crop and flip. Each clip has its own true size within the canvas that all clips of a batch share.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int16, Int32, Key, UInt8

from mc3_jax.models.layers import sliding_windows

# Statistics of AudioSet's spectrograms, from AST, which divides by twice the deviation.
LOG_MEL_MEAN, LOG_MEL_STD = -4.2677393, 4.5689974
# Kaldi's floor for energies, the epsilon of float32.
LOG_FLOOR = 1.1920929e-7
PRE_EMPHASIS = 0.97
LOW_FREQUENCY_HZ = 20.0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# torchvision draws again if a crop does not fit into the frame, this many times at most.
NUM_CROP_TRIES = 10

HIGHEST = jax.lax.Precision.HIGHEST


@functools.lru_cache
def _spectrum_matrix(size: int, num_fft: int) -> np.ndarray:
    """Returns the matrix [size, 2 * num_fft / 2] that applies DC removal, pre-emphasis, window and DFT to a frame.

    All four are linear. Its columns are the real parts of the bins, then the imaginary parts. The Nyquist bin is omitted,
    since no mel band gives it a weight.
    """
    remove_dc = np.eye(size) - 1 / size
    # Kaldi repeats the first sample before the frame; the Hann window gives the result a weight of 0 anyway.
    emphasize = np.eye(size) - PRE_EMPHASIS * np.eye(size, k=1)
    emphasize[0, 0] -= PRE_EMPHASIS
    angles = 2 * np.pi / num_fft * np.outer(np.arange(size), np.arange(num_fft // 2))
    dft = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return (remove_dc @ emphasize @ (np.hanning(size)[:, None] * dft)).astype(np.float32)


@functools.lru_cache
def _mel_matrix(num_mel: int, num_fft: int, sample_rate_hz: int) -> np.ndarray:
    """Returns the mel filterbank [num_fft / 2, num_mel]: triangles that are linear in Kaldi's mel, not in Hz, of height 1."""

    def mel(frequency_hz):
        return 1127 * np.log(1 + frequency_hz / 700)

    edges = np.linspace(mel(LOW_FREQUENCY_HZ), mel(sample_rate_hz / 2), num_mel + 2)
    bins = mel(np.arange(num_fft // 2) * sample_rate_hz / num_fft)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


def kaldi_fbank(
    waveform: Float[Array, "b n"], *, num_mel: int, sample_rate_hz: int = 16_000
) -> Float[Array, "b frames mel"]:
    """Returns Kaldi's log-mel filterbank energies of frames of 25 ms every 10 ms; frames that reach past the end are dropped.

    Symmetric Hann window, FFT of the next power of two, power, pre-emphasis 0.97, DC removed per frame, bands from
    20 Hz to Nyquist, natural log with a floor, no dither.

    Args:
      waveform: Mono sound in [-1, 1].
      num_mel: Number of mel bands.
      sample_rate_hz: Sample rate of the waveform.

    Raises:
      ValueError: If the waveform is shorter than a frame.
    """
    size, hop = sample_rate_hz * 25 // 1000, sample_rate_hz * 10 // 1000
    num_fft = 1 << (size - 1).bit_length()
    frames = sliding_windows(waveform, size, hop, axis=1)
    # One matmul, which is faster than an FFT on a CPU.
    spectrum = jnp.matmul(frames, _spectrum_matrix(size, num_fft), precision=HIGHEST)
    real, imaginary = jnp.split(spectrum, 2, axis=-1)
    mel_matrix = _mel_matrix(num_mel, num_fft, sample_rate_hz)
    energies = jnp.matmul(real * real + imaginary * imaginary, mel_matrix, precision=HIGHEST)
    return jnp.log(jnp.maximum(energies, LOG_FLOOR))


def log_mel(
    audio: Int16[Array, "b n"] | Float[Array, "b n"],
    *,
    num_mel: int,
    num_time_frames: int,
    sample_rate_hz: int = 16_000,
) -> Float[Array, "b time mel"]:
    """Returns the normalised log-mel spectrogram that AST takes, padded with zeros at its end.

    Args:
      audio: Mono PCM: int16, or float in [-1, 1].
      num_mel: Number of mel bands.
      num_time_frames: Number of time frames of the result.
      sample_rate_hz: Sample rate of the audio.

    Raises:
      ValueError: If the audio is longer than `num_time_frames`, or shorter than one frame.
    """
    fbank = kaldi_fbank(_without_mean(audio), num_mel=num_mel, sample_rate_hz=sample_rate_hz)
    missing = num_time_frames - fbank.shape[1]
    if missing < 0:
        raise ValueError(
            f"{audio.shape[1]} samples make {fbank.shape[1]} spectrogram frames but num_time_frames is "
            f"{num_time_frames}: raise it or cut the audio"
        )
    # Padded after normalisation, as in action2sound's audio tower, so that the padding is the mean of the data, not silence.
    # AST itself pads before normalisation with a log energy of 0, which becomes 0.47.
    return jnp.pad((fbank - LOG_MEL_MEAN) / (2 * LOG_MEL_STD), ((0, 0), (0, missing), (0, 0)))


def _without_mean(audio: Int16[Array, "b n"] | Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Returns sounds as float32, int16 scaled to [-1, 1], each without its mean."""
    waveform = audio.astype(jnp.float32)
    if jnp.issubdtype(audio.dtype, jnp.integer):
        waveform /= 32768
    return waveform - jnp.mean(waveform, axis=1, keepdims=True)


def mix(
    audio: Int16[Array, "b n"] | Float[Array, "b n"], targets: Float[Array, "b c"], keys: Key[Array, " b"], beta: float
) -> tuple[Float[Array, "b n"], Float[Array, "b c"]]:
    """Returns waveforms mixed with those of the batch in reverse order, and targets mixed in the same proportion.

    Mixup (Zhang et al., ICLR 2018) of waveforms after their means are subtracted, as in AST's training. The share of a
    row's own sound is drawn from Beta(beta, beta) by its key.

    Args:
      audio: Mono PCM: int16, or float in [-1, 1].
      targets: Share of each class in each row.
      keys: One random key per clip; see `row_keys`.
      beta: Parameter of the Beta distribution.
    """
    waveform = _without_mean(audio)
    share = jax.vmap(lambda key: jax.random.beta(key, beta, beta))(keys)[:, None]
    return share * waveform + (1 - share) * waveform[::-1], share * targets + (1 - share) * targets[::-1]


def mask_spectrogram(
    log_mel: Float[Array, "b time mel"], keys: Key[Array, " b"], *, max_time_mask: int, max_mel_mask: int
) -> Float[Array, "b time mel"]:
    """Returns spectrograms with one random stretch of time and one of mel bands set to 0, which is AudioSet's mean.

    SpecAugment (Park et al., Interspeech 2019) with one mask of each kind, as in AST's training, which however sets them to
    0 before normalisation. A clip's masks depend only on its key.

    Args:
      log_mel: Normalised spectrograms.
      keys: One random key per clip; see `row_keys`.
      max_time_mask, max_mel_mask: Longest mask in frames and in bands; the length of a mask is uniform from 0 up to this.
    """

    def outside(key, size: int, longest: int) -> Bool[Array, " n"]:
        length_key, start_key = jax.random.split(key)
        length = jax.random.randint(length_key, (), 0, longest + 1)
        start = jax.random.randint(start_key, (), 0, size - length + 1)
        i = jnp.arange(size)
        return (i < start) | (i >= start + length)

    def mask(spectrogram, key):
        time_key, mel_key = jax.random.split(key)
        frames, bands = spectrogram.shape
        kept = outside(time_key, frames, max_time_mask)[:, None] & outside(mel_key, bands, max_mel_mask)
        return jnp.where(kept, spectrogram, 0)

    return jax.vmap(mask)(log_mel, keys)


def row_keys(key: Key[Array, ""], row: Int[Array, " b"]) -> Key[Array, " b"]:
    """Returns one random key per row, which depends only on `key` and the row's index in the global batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(row)


def _interpolation(
    num_source: int,
    num_target: int,
    *,
    start: Float[Array, " b"],
    scale: Float[Array, " b"],
    low: Int[Array, " b"],
    high: Int[Array, " b"],
) -> Float[Array, "b target source"]:
    """Returns matrices of antialiased bilinear resampling along one axis, as in PIL and torchvision.

    Target pixel i weighs source pixels by a triangle centred at start + (i + 1/2) scale, in source pixels. It reaches
    max(scale, 1) to either side. Source pixels outside of [low, high) get no weight.
    """
    centers = start[:, None] + (jnp.arange(num_target) + 0.5) * scale[:, None]
    pixels = jnp.arange(num_source)
    reach = jnp.maximum(scale, 1.0)[:, None, None]
    weights = jnp.maximum(1 - jnp.abs(pixels + 0.5 - centers[..., None]) / reach, 0)
    inside = (pixels >= low[:, None]) & (pixels < high[:, None])
    weights = jnp.where(inside[:, None], weights, 0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _resample(
    video: UInt8[Array, "b t h w 3"],
    vertical: Float[Array, "b y h"],
    horizontal: Float[Array, "b x w"],
    precision: jax.lax.Precision,
) -> Float[Array, "b t y x 3"]:
    """Returns frames resampled by one matrix per clip and axis, then normalised by ImageNet's mean and deviation."""
    frames = jnp.einsum("byh,bthwc->btywc", vertical, video.astype(jnp.float32), precision=precision)
    frames = jnp.einsum("bxw,btywc->btyxc", horizontal, frames, precision=precision)
    return (frames / 255 - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)


def center_video(
    video: UInt8[Array, "b t h w 3"],
    video_size: Int32[Array, "b 2"],
    image_size_px: int,
    resize_px: int,
    *,
    precision: jax.lax.Precision = HIGHEST,
) -> Float[Array, "b t y x 3"]:
    """Returns normalised frames: the short side is resized to `resize_px`, then the central square is cropped.

    Both are one interpolation. EgoVLP resizes the short side to 256, crops the central 256 x 256 and resizes that to 224.
    This is the same view as with `resize_px` equal to `image_size_px` here; a larger `resize_px` cuts off a border.

    Args:
      video: Frames on a canvas, each clip in its top left corner.
      video_size: True height and width of each clip on the canvas.
      image_size_px: Height and width of the result.
      resize_px: Short side before the crop, at least `image_size_px`.
      precision: Precision of the matmuls that resample.

    Raises:
      ValueError: If `resize_px` is below `image_size_px`.
    """
    if resize_px < image_size_px:
        raise ValueError(f"resize_px {resize_px} is below image_size_px {image_size_px}: raise it to at least that")
    # Rounded as in torchvision: the long side down, the crop's corner to the nearest pixel.
    resized = resize_px * video_size // jnp.min(video_size, axis=1, keepdims=True)
    corner = jnp.round((resized - image_size_px) / 2)
    scale = video_size / resized
    matrices = [
        _interpolation(
            video.shape[2 + axis],
            image_size_px,
            start=corner[:, axis] * scale[:, axis],
            scale=scale[:, axis],
            low=jnp.zeros_like(video_size[:, axis]),
            high=video_size[:, axis],
        )
        for axis in (0, 1)
    ]
    return _resample(video, *matrices, precision)


def _random_crop(
    key: Key[Array, ""], size: Int[Array, "2"], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Int[Array, "2"], Int[Array, "2"]]:
    """Returns the corner and the size, each (vertical, horizontal), of a random crop by torchvision's rule.

    The crop's share of the area is uniform in `scale`, and the log of its aspect ratio uniform. Ten crops are drawn at once
    and the first that fits is taken. If none fits, it is the largest central crop whose aspect ratio is within `ratio`.
    """
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    height, width = size[0], size[1]
    tries = (NUM_CROP_TRIES,)
    area = height * width * jax.random.uniform(area_key, tries, minval=scale[0], maxval=scale[1])
    low, high = np.log(ratio)
    aspect = jnp.exp(jax.random.uniform(ratio_key, tries, minval=low, maxval=high))
    crops = jnp.round(jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=1))).astype(jnp.int32)
    fits = jnp.all((crops > 0) & (crops <= size), axis=1)

    # The whole frame, with its height cut if the frame is too tall for the ratios, or its width if it is too wide.
    fallback = jnp.minimum(size, jnp.round(jnp.stack([width / ratio[0], height * ratio[1]])).astype(jnp.int32))
    some = jnp.any(fits)
    crop = jnp.where(some, crops[jnp.argmax(fits)], fallback)
    corner = jax.random.randint(corner_key, (2,), 0, size - crop + 1)
    return jnp.where(some, corner, (size - crop) // 2), crop


def augment_video(
    video: UInt8[Array, "b t h w 3"],
    video_size: Int32[Array, "b 2"],
    keys: Key[Array, " b"],
    image_size_px: int,
    *,
    scale: tuple[float, float],
    flip_probability: float,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    precision: jax.lax.Precision = HIGHEST,
) -> Float[Array, "b t y x 3"]:
    """Returns normalised frames, augmented with one random crop and one random horizontal flip per clip.

    A clip's augmentation depends only on its key and its size.

    Args:
      video: Frames on a canvas, each clip in its top left corner.
      video_size: True height and width of each clip on the canvas.
      keys: One random key per clip; see `row_keys`.
      image_size_px: Height and width of the result.
      scale: Range (low, high) of the crop's share of the frame's area.
      flip_probability: Probability of a horizontal flip.
      ratio: Range (low, high) of the crop's width divided by its height.
      precision: Precision of the matmuls that resample.
    """

    def draw(key, size) -> tuple[Array, Array, Bool[Array, ""]]:
        crop_key, flip_key = jax.random.split(key)
        return *_random_crop(crop_key, size, scale, ratio), jax.random.bernoulli(flip_key, flip_probability)

    corner, crop, flip = jax.vmap(draw)(keys, video_size)
    vertical, horizontal = (
        _interpolation(
            video.shape[2 + axis],
            image_size_px,
            start=corner[:, axis].astype(jnp.float32),
            scale=crop[:, axis] / image_size_px,
            low=corner[:, axis],
            high=corner[:, axis] + crop[:, axis],
        )
        for axis in (0, 1)
    )
    # The matrix is flipped, which costs nothing; to flip the frames would copy them.
    horizontal = jnp.where(flip[:, None, None], horizontal[:, ::-1], horizontal)
    return _resample(video, vertical, horizontal, precision)
