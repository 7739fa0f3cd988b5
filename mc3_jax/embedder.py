"""A trained model ready for use: takes sounds, frames and sentences and returns L2-normalised numpy embeddings.

    model = mc3_jax.load("runs/demo/train")
    model.embed_audio(waveform, 44_100) @ model.embed_text(["#C C cuts the onion"]).T
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import librosa
import numpy as np
from jaxtyping import Float, Num

from mc3_jax import (
    checkpoint,
    config as config_lib,
    model as model_lib,
    terminal,
    tower_tokenizer,
    training_facts,
    weights,
)
from mc3_jax.data import tokenizer as tokenizer_lib
from mc3_jax.data.records import SAMPLE_RATE_HZ
from mc3_jax.models import frontend

_MAX_CHANNELS = 64  # of a recording; shorter rows are channels, no sounds


class Embedder:
    """Embeds any number of inputs, in batches whose sizes are few, so that each input shape is compiled only a few times.

    Attributes:
      config: Sizes of the model.
      batch_size: Maximum number of rows in a batch.
      params: All parameters, nested as in the model's modules, on the default device.
      untrained: Towers that were never trained, whose embeddings mean nothing.
    """

    def __init__(
        self, params: weights.Flat, config: config_lib.ModelConfig, tokenizer: str = "", batch_size: int = 32,
        why_no_tokenizer: str = "", untrained: Sequence[str] = (), num_samples: int = 0,
    ):  # fmt: skip
        """Puts the parameters on the default device.

        Args:
          params: All parameters of the model, flat.
          config: Sizes of the model.
          tokenizer: Folder of the tokenizer; "" makes `embed_text` raise an error.
          batch_size: Maximum number of rows in a batch.
          why_no_tokenizer: Reason given in that error.
          untrained: Towers that were never trained.
          num_samples: Samples at 16 kHz that every sound had in training; 0 if that is not known.

        Raises:
          ValueError: The parameters don't fit the sizes, or the tokenizer's folder holds none or one with more tokens than
            the model.
        """
        self.config, self.batch_size, self.untrained = config, batch_size, tuple(untrained)
        self._num_samples = num_samples
        model = model_lib.make_model(config)
        checkpoint.check_shapes(params, weights.param_shapes(config), "params")
        self.params = jax.device_put(checkpoint.unflatten(params))
        text, self._why_no_tokenizer = config.text, why_no_tokenizer or "the model came without a tokenizer"
        self._tokenize = (
            tokenizer_lib.load_tokenizer(tokenizer, text.num_tokens, text.vocab_size) if tokenizer else None
        )

        def audio(params, waveform):
            spectrogram = frontend.log_mel(
                waveform, num_mel=config.audio.num_mel, num_time_frames=config.audio.num_time_frames
            )
            return model.apply({"params": params}, audio=spectrogram)["audio"]

        def video(params, frames):
            size = jnp.broadcast_to(jnp.array(frames.shape[2:4], jnp.int32), (len(frames), 2))
            frames = frontend.center_video(frames, size, config.video.image_size_px, config.video.resize_px)
            return model.apply({"params": params}, video=frames)["video"]

        def text_tower(params, ids, mask):
            return model.apply({"params": params}, text_ids=ids, text_mask=mask)["text"]

        self._audio, self._video, self._text = jax.jit(audio), jax.jit(video), jax.jit(text_tower)

    def _in_batches(self, embed: Callable, *inputs: np.ndarray) -> Float[np.ndarray, "b d"]:
        """Returns `embed` of all rows; the last batch is padded to a power of two with copies of its last row."""
        num, out = len(inputs[0]), []
        for start in range(0, num, self.batch_size):
            size = min(1 << (num - start - 1).bit_length(), self.batch_size)
            rows = np.minimum(np.arange(start, start + size), num - 1)
            out.append(np.asarray(embed(self.params, *(x[rows] for x in inputs))))
        return np.concatenate(out)[:num] if out else np.zeros((0, self.config.embed_dim), np.float32)

    @property
    def window_samples(self) -> int:
        """Number of samples at 16 kHz to which shorter sounds are padded with silence: that of every sound in training.

        The loader pads clips in the same way. What then is still missing from `config.audio.num_time_frames` is padded with
        AudioSet's mean in the spectrogram, as in training. If the number is not recorded, it is that of the longest sound
        that the tower hears whole: for 149 frames 24,000.
        """
        return self._num_samples or round(model_lib.heard_s(self.config) * SAMPLE_RATE_HZ)

    def embed_audio(self, waveform: Num[np.ndarray, "*batch n"], sample_rate: float) -> Float[np.ndarray, "*batch d"]:
        """Returns L2-normalised embeddings of mono sounds.

        Two dimensions always mean a batch of mono sounds, never the channels of one sound: a stereo sound from librosa,
        [2, n], counts as two sounds and gets two embeddings. Mix channels down first: `waveform.mean(0)` of librosa's
        [2, n], `waveform.mean(1)` of soundfile's [n, 2].

        Args:
          waveform: One sound [n] or several of the same length [b, n]; floats in [-1, 1] or int16. Sounds shorter than
            `window_samples` are padded with silence, as in training.
          sample_rate: Sample rate in Hz; other rates than 16 kHz are resampled.

        Raises:
          ValueError: A sound is longer than the model's window, shorter than one spectrogram frame, not finite, beyond
            [-2, 2] (int16 values as floats), or has another dtype; or the rate is not a positive number; or the waveform is
            a path, or sounds of different lengths.
        """
        if isinstance(waveform, str | os.PathLike):
            raise ValueError(f"waveform is the path {waveform}: read it first: waveform, rate = librosa.load(path, sr=None)")
        try:
            waveform = np.asarray(waveform)
        except ValueError as error:
            fix = "cut them to one length, or embed each alone"
            raise ValueError(f"waveform holds sounds of different lengths: {fix}") from error
        if waveform.ndim not in (1, 2):
            raise ValueError(f"waveform must be [n] or [b, n], got {waveform.shape}: mix the channels to mono first")
        if waveform.dtype == np.int16:
            waveform = waveform / np.float32(32768)
        if not np.issubdtype(waveform.dtype, np.floating):
            raise ValueError(f"waveform must be int16 or floats in [-1, 1], got {waveform.dtype}")
        if bad := int(np.sum(~np.isfinite(waveform))):
            raise ValueError(f"waveform must be finite, {bad} of its values are NaN or infinite: repair or skip the sound")
        if np.ndim(sample_rate) or np.asarray(sample_rate).dtype.kind not in "iuf" or not 0 < sample_rate < float("inf"):
            raise ValueError(f"sample_rate must be a positive number of Hz, got {sample_rate!r}")
        rows = np.atleast_2d(waveform).astype(np.float32)
        if rows.size and np.abs(rows).max() > 2:
            raise ValueError(f"waveform reaches {np.abs(rows).max():g}: floats must be in [-1, 1]; or pass int16")
        self._check_length(rows.shape, float(sample_rate), waveform.ndim)
        if sample_rate != SAMPLE_RATE_HZ:
            rows = librosa.resample(rows, orig_sr=sample_rate, target_sr=SAMPLE_RATE_HZ, res_type="soxr_hq", axis=-1)
        rows = np.pad(rows, ((0, 0), (0, max(self.window_samples - rows.shape[1], 0))))
        out = self._in_batches(self._audio, rows)
        return out[0] if waveform.ndim == 1 else out

    def _check_length(self, shape: tuple[int, int], sample_rate: float, ndim: int) -> None:
        """Raises a ValueError if the sounds are too short or too long, before they are resampled."""
        num_samples = float(np.ceil(shape[1] * (SAMPLE_RATE_HZ / sample_rate)))  # the length that librosa resamples to
        # Spectrogram frames are 25 ms long, one every 10 ms. Up to hop - 1 samples beyond the last frame change nothing.
        frame, hop = SAMPLE_RATE_HZ * 25 // 1000, SAMPLE_RATE_HZ * 10 // 1000
        most = (self.config.audio.num_time_frames - 1) * hop + frame + hop - 1
        if num_samples < frame:
            is_turned = ndim == 2 and shape[1] <= _MAX_CHANNELS and shape[0] > shape[1]
            hint = f"; {shape} looks like channels last: pass waveform.mean(1)" if is_turned else ""
            raise ValueError(f"{num_samples:.0f} samples at 16 kHz are shorter than a spectrogram frame of {frame}{hint}")
        if num_samples > most:
            raise ValueError(
                f"sounds of {num_samples / SAMPLE_RATE_HZ:.2f} s are longer than the model's window of "
                f"{most / SAMPLE_RATE_HZ:.2f} s: cut them into windows"
            )

    def embed_video(self, frames: np.ndarray) -> Float[np.ndarray, "*batch d"]:
        """Returns L2-normalised embeddings of clips; frames are resized, centre-cropped and normalised as in evaluation.

        Args:
          frames: uint8 RGB frames of one clip [t, h, w, 3] or several [b, t, h, w, 3]; t is at most the model's number of
            temporal positions. The model was trained on `config.video.num_frames` frames, the middle ones of as many equal
            intervals.

        Raises:
          ValueError: Another shape or dtype, frames of different sizes, no frames or too many.
        """
        try:
            frames = np.asarray(frames)
        except ValueError as error:
            raise ValueError("frames have different sizes: resize them to one size, or embed each clip alone") from error
        if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [t, h, w, 3] or [b, t, h, w, 3], got {frames.dtype} {frames.shape}")
        if 0 in frames.shape[-4:]:
            raise ValueError(f"frames are empty: {frames.shape}")
        if frames.shape[-4] > self.config.video.num_positions:
            raise ValueError(f"{frames.shape[-4]} frames, but the model takes at most {self.config.video.num_positions}")
        out = self._in_batches(self._video, frames if frames.ndim == 5 else frames[None])
        return out[0] if frames.ndim == 4 else out

    def embed_text(self, texts: Iterable[str]) -> Float[np.ndarray, "b d"]:
        """Returns L2-normalised embeddings of sentences, each cut at the model's number of tokens.

        A warning says how many are cut or have no word that the tokenizer knows.

        Raises:
          ValueError: The model has no tokenizer, or `texts` is a single string or holds anything but strings.
        """
        if self._tokenize is None:
            raise ValueError(f"{self._why_no_tokenizer}: name it by mc3_jax.load(path, tokenizer=FOLDER)")
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of strings, got the string {texts[:40]!r}: put it in a list")
        texts = list(texts)
        if other := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"texts must be a list of strings, got {other[0]!r:.40} among them")
        lost = [(text, what) for text in texts if (what := self._tokenize.find_loss(text))]
        if lost:
            text, what = lost[0]
            told = f"{len(lost)} of {len(texts)} texts are not seen whole: {terminal.printable(text[:40])!r} {what}"
            print(f"warning: {told}", file=sys.stderr)
        tokens = [self._tokenize(text) for text in texts]
        shape = (len(tokens), self.config.text.num_tokens)
        ids, mask = (np.array([t[i] for t in tokens], np.int32).reshape(shape) for i in (0, 1))
        return self._in_batches(self._text, ids, mask)


def load(
    path: str, *, tokenizer: str = "", model: config_lib.ModelConfig | None = None, batch_size: int = 32
) -> Embedder:
    """Returns a model ready to embed, with weights from a folder, a run or a checkpoint; nothing is downloaded or unpickled.

    A warning names the towers that were never trained, if a folder or a run records that.

    Args:
      path: A folder made by `python -m mc3_jax.convert`, the workdir of a run, or somebody else's checkpoint that holds all
        three towers with their projections (see `weights.read_checkpoint`).
      tokenizer: Folder of the tokenizer; "" takes the one in the folder, or the one the run was trained with. If that can't
        be found, sounds and frames can still be embedded, but `embed_text` raises an error.
      model: Sizes of the model in somebody else's checkpoint; None takes the paper's. Folders and runs record theirs.
      batch_size: Maximum number of rows in a batch.

    Raises:
      ValueError: Nothing readable is at `path`, weights are missing or don't fit, `model` is given for a folder or a run, or
        the tokenizer is not the one that the text tower was trained with.
    """
    known = weights.is_own_folder(path) or weights.is_run(path)
    if known and model is not None:
        raise ValueError(f"{path} records the sizes of its model: don't pass `model`")
    config = weights.read_model_config(path) if known else model or config_lib.ModelConfig()
    config = dataclasses.replace(config, num_classes=0)  # embedding needs no classifier
    tokenizer = tower_tokenizer.find(path, tokenizer)
    untrained, num_samples = training_facts.read_untrained(path), training_facts.read_num_samples(path)
    params, _ = weights.read_checkpoint(path, config)
    if untrained:
        print(f"warning: {path}: {training_facts.describe_untrained(untrained)}", file=sys.stderr)
    return Embedder(params, config, tokenizer, batch_size, tower_tokenizer.why_none(path), untrained, num_samples)
