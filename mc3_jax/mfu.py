"""Model FLOPs of a clip in a training step, and the share of the devices' peak that one clip per second takes."""

import dataclasses

import jax
import jax.numpy as jnp

from mc3_jax import config as config_lib, hlo, model as model_lib, phases as phases_lib, topology as topology_lib


def model_flops(config: config_lib.Config, phase: config_lib.PhaseConfig) -> float:
    """Returns the FLOPs that a clip takes in a training step, by the model's definition.

    Counts the matrix products of the forward pass of all towers that the phase's loss uses: three times for towers that are
    trained, which stands for forward and backward pass, and once for others. Recomputation to save memory (rematerialisation)
    and the front end are not counted.
    """
    plain = dataclasses.replace(config.model, scan_layers=True, remat="none", attention="einsum")
    model, total = model_lib.make_model(plain), 0.0
    params = jax.eval_shape(lambda: model_lib.init_params(model, plain, 0))
    audio, video, text = plain.audio, plain.video, plain.text
    size = video.image_size_px
    ids = jax.ShapeDtypeStruct((1, text.num_tokens), jnp.int32)
    inputs = {
        "audio": {"audio": jax.ShapeDtypeStruct((1, audio.num_time_frames, audio.num_mel), jnp.float32)},
        "video": {"video": jax.ShapeDtypeStruct((1, video.num_frames, size, size, 3), jnp.float32)},
        "text": {"text_ids": ids, "text_mask": ids},
    }
    for tower in phases_lib.modalities(phase):
        lowered = jax.jit(lambda p, x: model.apply({"params": p}, **x)).lower(params, inputs[tower])
        text_of_it = lowered.compiler_ir("hlo").as_hlo_text()
        total += hlo.count(text_of_it).flops * (3 if tower in phase.trainable else 1)
    return total


def share_of_peak(config: config_lib.Config, phase: config_lib.PhaseConfig, mesh: jax.sharding.Mesh) -> float | None:
    """Returns the factor that turns clips per second of the whole mesh into MFU; None if the devices' peak is unknown.

    The peak is that of the data sheet for bfloat16 matrix products, whatever the model's dtype.
    """
    chip = topology_lib.chip_of(mesh.devices.flat[0].device_kind)
    return model_flops(config, phase) / (mesh.size * chip.flops_per_s) if chip else None
