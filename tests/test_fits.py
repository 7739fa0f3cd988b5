"""What makes a run fit into memory: scanned layers, rematerialisation, gradient caching, sharded state; also bfloat16.

All but bfloat16 leave gradients as they are, up to rounding.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import demo
from mc3_jax import (
    checkpoint,
    config as config_lib,
    hlo,
    mesh as mesh_lib,
    model as model_lib,
    phases as phases_lib,
    train_step as step_lib,
    validation,
)
from mc3_jax.models import layers

CANVAS_PX = (24, 32)


def small_config(**model) -> config_lib.Config:
    """Returns the demo's config at tiny sizes: three layers, dropout, masks, crops, both losses; `model` replaces fields."""
    config = demo.get_config()
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.width, tower.depth, tower.num_heads = 8, 3, 2
    config.model.audio.num_mel = config.model.audio.num_time_frames = 32
    config.model.audio.max_time_mask = config.model.audio.max_mel_mask = 8
    config.model.video.image_size_px = config.model.video.resize_px = 24
    config.model.text.mlp_width, config.model.text.vocab_size, config.model.text.num_tokens = 16, 50, 6
    config.model.text.dropout, config.model.embed_dim, config.data.batch_size = 0.5, 8, 16
    for name, value in model.items():
        setattr(config.model, name, value)
    validation.validate(config)
    return config


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Returns a batch of 16 random clips; their heights, widths and text lengths vary."""
    rng, rows = np.random.default_rng(0), 16
    return {
        "audio": rng.integers(-9000, 9000, (rows, 3000)).astype(np.int16),
        "video": rng.integers(0, 255, (rows, 4, *CANVAS_PX, 3)).astype(np.uint8),
        "video_size": np.stack([rng.integers(16, 25, rows), rng.integers(16, 33, rows)], axis=1).astype(np.int32),
        "text_ids": rng.integers(1, 50, (rows, 6)).astype(np.int32),
        "text_mask": (np.arange(6) < rng.integers(1, 7, (rows, 1))).astype(np.int32),
        "row": np.arange(rows, dtype=np.int32),
    }


def gradients(config: config_lib.Config, shape: tuple[int, int] = (1, 1), *, mesh=None, rows=None):
    """Returns (gradients, loss) of the refine phase at step 3 with the parameters of seed 0, on the host.

    Args:
      config: Config of the run.
      shape: Shape (data, fsdp) of a mesh of this process's devices.
      mesh: Mesh to use instead of one of that shape, for instance one over all processes.
      rows: Rows of the batch that this process holds; None for all of `batch()`.
    """
    if mesh is None:
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    params = jax.device_get(initial())
    abstract = mesh_lib.abstract_state(mesh, jax.eval_shape(lambda: params))
    placed = mesh_lib.replace_leaves(abstract, params)
    grad_fn = step_lib.make_grad_fn(model_lib.make_model(config.model), config, config.phases[1])
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        grads, (terms, _) = jax.jit(grad_fn)(placed, np.int32(3), mesh_lib.put_batch(mesh, batch() if rows is None else rows))
        grads = jax.jit(lambda tree: tree, out_shardings=whole)(grads)
    return jax.device_get(grads), float(terms["loss"])


@functools.cache
def initial():
    config = small_config()
    return model_lib.init_params(model_lib.make_model(config.model), config.model, 0)


def weighted_sum(**model):
    """Returns a function from parameters to a weighted sum of the embeddings of four clips, with dropout."""
    config = small_config(**model).model
    rng, module = np.random.default_rng(1), model_lib.make_model(config)
    inputs = {
        "audio": rng.normal(size=(4, 32, 32)).astype(np.float32),
        "video": rng.normal(size=(4, 4, 24, 24, 3)).astype(np.float32),
        "text_ids": rng.integers(1, 50, (4, 6)).astype(np.int32),
        "text_mask": np.ones((4, 6), np.int32),
    }
    inputs = jax.tree.map(jnp.asarray, inputs)
    weights = {name: rng.normal(size=(4, 8)).astype(np.float32) for name in config_lib.MODALITIES}

    def loss(params):
        embeddings = module.apply({"params": params}, **inputs, train=True, rngs={"dropout": jax.random.key(5)})
        return sum(jnp.sum(weights[name] * x) for name, x in embeddings.items())

    return loss


@functools.cache
def model_gradients(**model):
    """Returns (gradients, value) of `weighted_sum` at the initial parameters."""
    value, grads = jax.jit(jax.value_and_grad(weighted_sum(**model)))(initial())
    return jax.device_get(grads), float(value)


def assert_equal(left, right):
    """Asserts that two (gradients, loss) agree: within 1e-6 of the loss, and 1e-5 of each leaf's largest gradient."""
    assert abs(left[1] - right[1]) <= 1e-6 * abs(right[1])
    ours, theirs = checkpoint.flatten(left[0]), checkpoint.flatten(right[0])
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.max(np.abs(ours[name] - gradient)) <= 1e-5 * max(np.max(np.abs(gradient)), 1e-12), name


@pytest.mark.large
@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "full"), (True, "dots"), (False, "full")])
def test_layers_as_a_loop_and_rematerialisation_change_no_gradient(scan_layers, remat):
    assert_equal(model_gradients(scan_layers=scan_layers, remat=remat), model_gradients())


@pytest.mark.large
@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_dots_recomputes_all_but_dense_layers_and_full_recomputes_these_too(scan_layers):
    def flops(remat):
        step = jax.jit(jax.grad(weighted_sum(scan_layers=scan_layers, remat=remat))).lower(initial())
        counts = hlo.count(step.compiler_ir("hlo").as_hlo_text())
        assert counts.unknown_loops == []
        return counts.flops

    none, dots, full = map(flops, ("none", "dots", "full"))
    assert none < dots < full
    assert dots - none < 0.3 * (full - none)


@pytest.mark.slow  # initialises all towers twice
def test_parameters_have_the_same_names_shapes_and_values_scanned_or_not():
    loop, lines = (small_config(scan_layers=scanned).model for scanned in (True, False))
    one, other = (checkpoint.flatten(model_lib.init_params(model_lib.make_model(c), c, 0)) for c in (loop, lines))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_every_row_step_and_seed_has_masks_crops_and_dropout_of_its_own():
    config = small_config()
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.depth = 1
    alike = jax.tree.map(lambda x: np.repeat(x[:1], 4, axis=0), batch()) | {"row": np.arange(4, dtype=np.int32)}

    embed = jax.jit(step_lib.make_train_embed_fn(model_lib.make_model(config.model), config, config.phases[1]))
    first, again, second = (embed(initial(), step, alike) for step in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, again, first)
    for name in config_lib.MODALITIES:
        rows = np.concatenate([first[name], second[name]])
        apart = np.abs(rows[:, None] - rows).max(axis=2)
        assert apart[~np.eye(len(rows), dtype=bool)].min() > 1e-4, name
    keys = [jax.random.key_data(step_lib._step_key(dataclasses.replace(config, seed=seed), 3)) for seed in (0, 1)]
    assert (keys[0] != keys[1]).any()


@pytest.mark.slow
def test_gradient_caching_gives_the_gradient_of_the_whole_batch_also_with_a_frozen_tower():
    whole, loss = gradients(small_config())
    config = small_config(scan_layers=True)
    config.data.chunk_size, config.phases[1].trainable = 8, ("audio", "text")
    assert_equal(gradients(config, (2, 4)), (whole | {"video": jax.tree.map(np.zeros_like, whole["video"])}, loss))


@pytest.mark.large
def test_equal_narrations_are_masked_the_same_way_in_chunks_in_blocks_and_sharded():
    twice = batch() | {name: np.concatenate([batch()[name][:8]] * 2) for name in ("text_ids", "text_mask")}
    config = small_config(scan_layers=True)
    plain = gradients(config, rows=twice)
    config.phases[1].mask_same_text = True
    whole = gradients(config, rows=twice)
    assert whole[1] < plain[1] - 0.1
    config.data.chunk_size, config.loss_block_rows = 8, 5
    assert_equal(gradients(config, (2, 4), rows=twice), whole)


def test_dropout_of_a_row_does_not_depend_on_its_neighbours():
    rng, x = np.random.default_rng(0), jnp.ones((6, 50))
    dropout = functools.partial(layers.Dropout(0.5).apply, {}, train=True, rngs={"dropout": jax.random.key(2)})
    whole, rows = dropout(x), rng.permutation(6)[:4]
    np.testing.assert_array_equal(dropout(x[rows], jnp.asarray(rows)), whole[rows])
    assert set(np.unique(whole)) == {0, 2}
    assert not np.array_equal(whole[0], whole[1])
    assert 0.3 < np.mean(whole == 0) < 0.7
    np.testing.assert_array_equal(layers.Dropout(0.5).apply({}, x, train=False), x)


@pytest.mark.slow
def test_bfloat16_computes_with_float32_parameters_gradients_and_moments():
    grads, value = model_gradients(dtype="bfloat16", scan_layers=True)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {np.dtype("float32")}
    assert 0 < abs(value - model_gradients()[1]) < 0.5
    config = small_config(dtype="bfloat16")
    phase = phases_lib.plan_phases(config.phases, 1000, 16)[1]
    state = jax.eval_shape(lambda: step_lib.init_state(model_lib.make_model(config.model), config, phase))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.opt_state))} <= {"float32", "int32"}
    # A kernel's gradient keeps the digits that bfloat16, with a significand of 8 bits, would cut off.
    for name, gradient in checkpoint.flatten(grads).items():
        if name.endswith("kernel"):
            cut = np.asarray(jnp.asarray(gradient, jnp.bfloat16), np.float32)
            assert np.mean(cut[gradient != 0] != gradient[gradient != 0]) > 0.8, name


def test_parameters_and_both_moments_are_sharded_over_fsdp():
    config = small_config()
    mesh = jax.make_mesh((2, 4), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 2)
    model = model_lib.make_model(config.model)
    phase = phases_lib.plan_phases(config.phases, 1000, 16)[1]
    shapes = jax.eval_shape(functools.partial(step_lib.init_state, model, config, phase))
    state = mesh_lib.abstract_state(mesh, shapes)

    def size(tree, where) -> int:
        return sum(leaf.dtype.itemsize * int(np.prod(where(leaf))) for leaf in jax.tree.leaves(tree))

    for part in ("params", "opt_state"):
        whole = size(getattr(state, part), lambda leaf: leaf.shape)
        mine = size(getattr(state, part), lambda leaf: leaf.sharding.shard_shape(leaf.shape))
        assert whole / 4 <= mine <= 1.02 * whole / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.data, "accumulate_steps", 4), "accumulate_steps = 4: must be 1: .* change the contrastive loss"),
        (lambda c: setattr(c.data, "chunk_size", 5), "chunk_size = 5: must be 0 or a divisor of data.batch_size = 16"),
        (lambda c: setattr(c.data, "chunk_size", -4), "chunk_size = -4: must be 0 or a divisor"),
        (lambda c: setattr(c.model, "remat", "some"), "model.remat = 'some': must be none, dots or full"),
    ],
)
def test_bad_values_are_refused_with_the_reason(change, message):
    config = copy.deepcopy(small_config())
    change(config)
    with pytest.raises(ValueError, match=message):
        validation.validate(config)
