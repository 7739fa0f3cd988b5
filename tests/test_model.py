"""A model is initialised once and fast; a batch is masked, flipped and cropped for it as its config says."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc3_jax import checkpoint, config as config_lib, hlo, mesh as mesh_lib, model as model_lib, weights
from mc3_jax.models import frontend
from mc3_jax.models.mc3 import MC3

SIZE_PX = 24


def small_config() -> config_lib.ModelConfig:
    config = config_lib.ModelConfig()
    config.video.image_size_px = config.video.resize_px = SIZE_PX
    config.video.crop_scale = (1.0, 1.0)  # the whole of a square frame
    return config


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    arrays = {
        "audio": rng.integers(-3000, 3000, (2, 24_000), dtype=np.int16),
        "video": rng.integers(0, 256, (2, 1, SIZE_PX, SIZE_PX, 3), dtype=np.uint8),
        "video_size": np.full((2, 2), SIZE_PX, np.int32),
        "text_ids": np.ones((2, 4), np.int32), "text_mask": np.ones((2, 4), np.int32), "row": np.arange(2, dtype=np.int32),
    }  # fmt: skip
    return jax.tree.map(jnp.asarray, arrays)


@pytest.mark.parametrize(("masked", "across"), [("max_time_mask", 2), ("max_mel_mask", 1)])
def test_a_mask_covers_the_axis_it_is_named_after(batch, masked, across):
    config = small_config()
    setattr(config.audio, masked, 60)
    plain = model_lib.prepare(batch, config, None)["audio"][:, :148]  # without the last frame: padding
    changed = np.asarray(plain != model_lib.prepare(batch, config, jax.random.key(0))["audio"][:, :148])
    assert changed.any()
    np.testing.assert_array_equal(changed.any(across), changed.all(across))
    assert not changed.all()


def test_frames_are_flipped_as_often_and_cropped_as_much_as_the_config_says(batch):
    config = small_config()
    plain = np.asarray(model_lib.prepare(batch, config, None)["video"])
    for probability in (0.0, 1.0):
        config.video.flip_probability = probability
        found = model_lib.prepare(batch, config, jax.random.key(0))["video"]
        np.testing.assert_allclose(found, plain[..., ::-1, :] if probability else plain, atol=1e-5)
    cut = copy.deepcopy(config)
    cut.video.resize_px = 32
    wanted = frontend.center_video(batch["video"], batch["video_size"], SIZE_PX, 32)
    found = model_lib.prepare(batch, cut, None)["video"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(found - plain).max() > 0.1


def tiny_config() -> config_lib.ModelConfig:
    """Returns sizes that compile fast, and that no other test has."""
    config = config_lib.ModelConfig(embed_dim=5)
    for tower in (config.audio, config.video, config.text):
        tower.width, tower.depth, tower.num_heads = 4, 1, 1
    config.audio.num_mel = config.audio.num_time_frames = config.video.image_size_px = config.video.patch_px = 16
    config.text.mlp_width = config.text.vocab_size = 8
    return config


def test_a_models_shapes_and_parameters_of_any_seed_take_one_trace_and_another_model_has_its_own(monkeypatch):
    traced, init = [], MC3.init
    monkeypatch.setattr(MC3, "init", lambda *args, **kwargs: traced.append(args[0]) or init(*args, **kwargs))
    config = tiny_config()
    shapes = weights.param_shapes(config)
    one, other = (checkpoint.flatten(model_lib.init_params(model_lib.make_model(config), config, seed)) for seed in (0, 1))
    with model_lib.fast_draws():  # as where a state is drawn
        jax.eval_shape(lambda: model_lib.init_params(model_lib.make_model(config), config, 0))
    assert len(traced) == 1
    assert jax.tree.map(jnp.shape, one) == {name: leaf.shape for name, leaf in shapes.items()}
    assert (one["text/projection/kernel"] != other["text/projection/kernel"]).any()
    config.num_classes = 3
    assert {*weights.param_shapes(config)} - {*shapes} == {
        f"classifier/{name}" for name in ("norm/scale", "norm/bias", "head/kernel", "head/bias")
    }
    assert len(traced) == 2


def test_parameters_that_files_lack_are_those_of_the_seed_and_compile_as_fast_on_a_gpu():
    config = tiny_config()
    drawn = checkpoint.flatten(model_lib.init_params(model_lib.make_model(config), config, 0))
    read = {name: np.zeros(leaf.shape) for name, leaf in drawn.items() if name != "text/projection/kernel"}
    lowered = {}

    def listen(event, duration_s, fun_name="", **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            lowered[fun_name] = jax.config.jax_threefry_gpu_kernel_lowering

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        full = weights.complete(read, config, 0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert full.keys() == drawn.keys()
    assert all((full[name] == 0).all() for name in read)
    np.testing.assert_array_equal(full["text/projection/kernel"], drawn["text/projection/kernel"])
    assert lowered["jit(draw)"]
    assert not jax.config.jax_threefry_gpu_kernel_lowering


def test_where_parameters_are_sharded_they_are_gathered_once_and_no_activation_moves(batch):
    config = tiny_config()
    model, mesh = model_lib.make_model(config), mesh_lib.make_mesh(fsdp=4)
    params = mesh_lib.abstract_state(mesh, jax.eval_shape(lambda: model_lib.init_params(model, config, 0)))
    rows = {name: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    rows["audio"] = jax.ShapeDtypeStruct((8, model_lib.most_samples(config)), jnp.int16)
    with jax.set_mesh(mesh):
        embed = jax.jit(model_lib.make_embed_fn(model, config))
        exchanges = hlo.count(embed.lower(params, mesh_lib.abstract_batch(mesh, rows)).compile().as_text()).exchanges
    spread = [leaf for leaf in jax.tree.leaves(params) if "fsdp" in leaf.sharding.spec]
    assert {exchange.kind for exchange in exchanges} == {"all-gather"}
    assert sum(exchange.num_bytes for exchange in exchanges) == 4 * sum(leaf.size for leaf in spread)


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["centre", "random"])
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "HIGH"), ("float32", "HIGHEST")])
def test_frames_are_resampled_in_products_of_the_precision_that_the_towers_need(batch, monkeypatch, key, dtype, precision):
    monkeypatch.setattr(frontend, "log_mel", lambda audio, **_: jnp.zeros((2, 10, 10)))
    config = dataclasses.replace(small_config(), dtype=dtype)
    text = jax.jit(lambda batch: model_lib.prepare(batch, config, key)["video"]).lower(batch).as_text()
    assert set(re.findall(r"dot_general.* precision = \[(\w+), (\w+)\]", text)) == {(precision, precision)}
