"""Model FLOPs: what a clip takes in a step, and the share of the devices' peak that a clip a second is."""

import dataclasses

import jax
import jax.numpy as jnp

from mc3_jax import config as config_lib, hlo, model as model_lib, phases as phases_lib, topology as topology_lib


def model_flops(config: config_lib.Config, phase: config_lib.PhaseConfig) -> float:
    """Returns the FLOPs a clip takes in a training step, by the model's definition.

    Matrix products of the forward pass of the towers that the phase's loss looks at, three times of those that learn and once
    of others; neither what is computed again to save memory nor the front end is in it.
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
    """Returns what clips per second are to be multiplied by for the MFU, None where the devices' peak is not known.

    The peak is that of the data sheet, of bfloat16 matrix products, whatever the model's dtype.
    """
    chip = topology_lib.chip_of(mesh.devices.flat[0].device_kind)
    return model_flops(config, phase) / (mesh.size * chip.flops_per_s) if chip else None
