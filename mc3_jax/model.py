"""The model in the sizes of a config: its modules, fresh parameters, its inputs from a batch, and embeddings."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mc3_jax import config as config_lib, mesh as mesh_lib
from mc3_jax.models import attention, frontend
from mc3_jax.models.audio import AudioSpectrogramTransformer
from mc3_jax.models.mc3 import MC3
from mc3_jax.models.text import DistilBert
from mc3_jax.models.video import SpaceTimeTransformer

Batch = Mapping[str, Array]


def check_attention(config: config_lib.ModelConfig, device: jax.Device | None = None) -> None:
    """Checks that `model.attention` is available on a device; None is JAX's default device.

    Raises:
      ValueError: It is "cudnn" and cuDNN can't be used there.
    """
    for tower in (config.audio, config.video):
        attention.check_form(config.attention, config.dtype, tower.width // tower.num_heads, device)


def heard_s(config: config_lib.ModelConfig) -> float:
    """Returns the longest sound, in s, that the audio tower hears whole: 1.5 for 149 frames, of which the last is padded."""
    return (config.audio.num_time_frames + 1) / 100


def most_samples(config: config_lib.ModelConfig) -> int:
    """Returns the number of samples at 16 kHz above which the audio tower refuses a sound: frames of 25 ms, 10 ms apart."""
    return 400 + 160 * config.audio.num_time_frames - 1


def make_model(config: config_lib.ModelConfig, device: jax.Device | None = None) -> MC3:
    """Returns the three towers with their projections, in the config's sizes.

    Args:
      config: Config of the model.
      device: Device that the form of attention is chosen for; None is JAX's default device.
    """
    audio, video, text = config.audio, config.video, config.text
    dtype = jnp.dtype(config.dtype)
    blocks = {"scan_layers": config.scan_layers, "remat": config.remat}
    form = functools.partial(attention.choose_form, config.attention, config.dtype, device=device)
    return MC3(
        audio_tower=AudioSpectrogramTransformer(
            num_mel=audio.num_mel,
            num_time_frames=audio.num_time_frames,
            patch_px=audio.patch_px,
            stride_px=audio.stride_px,
            width=audio.width,
            depth=audio.depth,
            num_heads=audio.num_heads,
            dtype=dtype,
            form=form(audio.width // audio.num_heads),
            **blocks,
        ),
        video_tower=SpaceTimeTransformer(
            image_size_px=video.image_size_px,
            patch_px=video.patch_px,
            num_positions=video.num_positions,
            width=video.width,
            depth=video.depth,
            num_heads=video.num_heads,
            time_init=video.time_init,
            dtype=dtype,
            form=form(video.width // video.num_heads),
            **blocks,
        ),
        text_tower=DistilBert(
            vocab_size=text.vocab_size,
            num_positions=text.num_positions,
            width=text.width,
            depth=text.depth,
            num_heads=text.num_heads,
            mlp_width=text.mlp_width,
            dropout=text.dropout,
            dtype=dtype,
            **blocks,
        ),
        embed_dim=config.embed_dim,
        dtype=dtype,
        num_classes=config.num_classes,
    )


def init_params(model: MC3, config: config_lib.ModelConfig, seed: int):
    """Returns freshly initialised float32 parameters, which depend only on the model and the seed."""
    audio, video, text = config.audio, config.video, config.text
    log_mel = jnp.zeros((1, audio.num_time_frames, audio.num_mel))
    frames = jnp.zeros((1, video.num_frames, video.image_size_px, video.image_size_px, 3))
    ids = jnp.zeros((1, text.num_tokens), jnp.int32)
    key = jax.random.key(seed)
    inputs = {"audio": log_mel, "video": frames, "text_ids": ids, "text_mask": jnp.ones_like(ids)}
    with fast_draws():  # also where only shapes are wanted, so that JAX traces the model once for these and for the draw
        return _draw(model, key, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _draw(model: MC3, key: PRNGKeyArray, inputs: dict[str, Array]):
    """Returns new parameters. Compiled, XLA drops the forward pass; otherwise it would run operation by operation."""
    return model.init(key, **inputs, train=False)["params"]


@contextlib.contextmanager
def fast_draws():
    """Makes what is compiled in this context draw random numbers on a GPU by JAX's own kernel, bit for bit the same.

    Fused into other kernels, the draws keep XLA compiling for a minute. The call of the outermost jitted function has to be
    in the context: inside that function, where JAX only traces, the context would have no effect on what is compiled.
    """
    before = jax.config.jax_threefry_gpu_kernel_lowering
    jax.config.update("jax_threefry_gpu_kernel_lowering", True)
    try:
        yield
    finally:
        jax.config.update("jax_threefry_gpu_kernel_lowering", before)


def prepare(batch: Batch, config: config_lib.ModelConfig, key: PRNGKeyArray | None) -> dict[str, Array]:
    """Returns the model's inputs from a decoded batch: log-mel of the audio, crops of the video, token ids.

    Args:
      batch: `audio` int16 or float [b, samples], `text_ids` and `text_mask` int32 [b, l] and `row` int32 [b]; with video also
        `video` uint8 [b, t, h, w, 3], on the canvas, and `video_size` int32 [b, 2]. See `mc3_jax.data.loader`.
      config: Sizes and augmentation.
      key: Random key of the step, for masks, crops and flips; None augments nothing and takes the centre crop.
    """
    audio, video = config.audio, config.video
    log_mel = frontend.log_mel(batch["audio"], num_mel=audio.num_mel, num_time_frames=audio.num_time_frames)
    audio_key, video_key = (None, None) if key is None else jax.random.split(key)
    if key is not None and (audio.max_time_mask or audio.max_mel_mask):
        keys = frontend.row_keys(audio_key, batch["row"])
        masks = {"max_time_mask": audio.max_time_mask, "max_mel_mask": audio.max_mel_mask}
        log_mel = frontend.mask_spectrogram(log_mel, keys, **masks)
    inputs = {"audio": log_mel, "text_ids": batch["text_ids"], "text_mask": batch["text_mask"]}
    # HIGH is TensorFloat-32 on a GPU: three roundings of 2⁻¹¹, an error of 0.4 grey levels at most. The patches are rounded
    # to bfloat16 next, which costs as much.
    precision = jax.lax.Precision.HIGH if config.dtype == "bfloat16" else jax.lax.Precision.HIGHEST
    if "video" in batch and key is None:
        inputs["video"] = frontend.center_video(
            batch["video"], batch["video_size"], video.image_size_px, video.resize_px, precision=precision
        )
    elif "video" in batch:
        inputs["video"] = frontend.augment_video(
            batch["video"],
            batch["video_size"],
            frontend.row_keys(video_key, batch["row"]),
            video.image_size_px,
            scale=video.crop_scale,
            flip_probability=video.flip_probability,
            precision=precision,
        )
    return inputs


def make_embed_fn(model: MC3, config: config_lib.ModelConfig) -> Callable[[Any, Batch], dict[str, Array]]:
    """Returns `embed(params, batch) -> {"audio", "video", "text"}`, each L2-normalised [b, d], without randomness.

    On a mesh the parameters may be sharded; to be called under `jax.jit`.
    For a batch without video frames "video" is missing; if the model has classes, the result holds "logits" [b, c] as well.
    """

    def embed(params, batch: Batch):
        return model.apply({"params": mesh_lib.gather(params)}, **prepare(batch, config, None), train=False)

    return embed
