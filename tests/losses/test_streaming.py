"""InfoNCE in blocks of any size has the value and gradients of the whole matrix, without that matrix in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import demo
from mc3_jax import mesh as mesh_lib, model as model_lib, objective, train_step as step_lib
from mc3_jax.config import PhaseConfig
from mc3_jax.losses import contrastive, streaming

TOWERS = ("audio", "video", "text")


def embeddings(num: int, dim: int = 16, seed: int = 0, dtype=jnp.float32) -> dict:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(num, dim))
    draws = {name: common + rng.normal(size=(num, dim)) for name in TOWERS}
    return {name: jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype) for name, x in draws.items()}


def loss_and_gradients(x, temperature, block_rows, weight=1.0, pairs=("av", "al", "vl"), groups=None):
    def loss(x, temperature):
        total, per_pair = contrastive.contrastive_loss(x, temperature, pairs, block_rows, groups)
        return weight * total, per_pair

    (value, per_pair), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, temperature)
    return jax.device_get((value, per_pair, grads))


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])  # at 0.01 logits span 200, more than exp spans in float32
@pytest.mark.parametrize("block_rows", [1, 7, 32, 95])
def test_blocks_have_the_value_and_gradients_of_the_whole_matrix(block_rows, temperature):
    x = embeddings(96)
    value, per_pair, grads = loss_and_gradients(x, jnp.float32(temperature), 0, weight=0.7)
    again, again_per_pair, again_grads = loss_and_gradients(x, jnp.float32(temperature), block_rows, weight=0.7)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    assert list(again_per_pair) == list(per_pair)
    np.testing.assert_allclose(list(again_per_pair.values()), list(per_pair.values()), rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(again_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("block_rows", [1, 7])
def test_blocks_leave_out_rows_of_a_group_as_the_whole_matrix_does(block_rows):
    x = embeddings(40)
    groups = jnp.asarray(np.random.default_rng(0).integers(0, 6, 40)).at[:15].set(9)  # blocks with no other group
    value, _, grads = loss_and_gradients(x, jnp.float32(0.05), 0, groups=groups)
    again, _, again_grads = loss_and_gradients(x, jnp.float32(0.05), block_rows, groups=groups)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    assert value < 0.98 * loss_and_gradients(x, jnp.float32(0.05), 0)[0]
    for ours, theirs in zip(jax.tree.leaves(again_grads), jax.tree.leaves(grads), strict=True):
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_blocks_agree_with_float64():
    with jax.enable_x64(True):
        x = embeddings(50, dtype=jnp.float64)
        _, _, grads = loss_and_gradients(x, jnp.float64(0.05), 0)
        _, _, again = loss_and_gradients(x, jnp.float64(0.05), 16)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(grads), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, atol=1e-12 * np.abs(theirs).max() + 1e-15)


def test_a_block_of_the_batch_or_more_is_the_whole_matrix():
    x = embeddings(12)
    whole = loss_and_gradients(x, jnp.float32(0.05), 0)[0]
    assert all(loss_and_gradients(x, jnp.float32(0.05), size)[0] == whole for size in (12, 13))


def test_bfloat16_is_summed_in_float32_and_gets_its_own_gradients_back():
    x = embeddings(64, dtype=jnp.bfloat16)
    value, _, (grads, _) = loss_and_gradients(x, jnp.float32(0.05), 16)
    assert value.dtype == np.float32
    assert all(g.dtype == jnp.bfloat16 for g in grads.values())
    whole = loss_and_gradients(x, jnp.float32(0.05), 0)
    np.testing.assert_allclose(value, whole[0], rtol=1e-5)


def test_the_whole_matrix_is_never_in_memory():
    num, rows = 4096, 64
    shapes = {name: jax.ShapeDtypeStruct((num, 16), jnp.float32) for name in TOWERS}

    def held(block_rows):
        def loss(x):
            return contrastive.contrastive_loss(x, 0.05, block_rows=block_rows)[0]

        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    matrix = num * num * 4
    assert held(0) > 2 * matrix
    assert held(rows) < matrix / 10


def test_a_phase_takes_the_configs_blocks_and_a_mesh_changes_nothing():
    x, phase = embeddings(64), PhaseConfig(name="refine", consensus_weight=1.0)
    mesh = mesh_lib.make_mesh()

    def grads(x, block_rows):
        return jax.grad(lambda x: objective.phase_loss(x, phase, block_rows=block_rows)[0])(x)

    whole = jax.device_get(jax.jit(grads, static_argnums=1)(x, 0))
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, rows)
        gathered = jax.jit(
            lambda x: grads(jax.lax.with_sharding_constraint(x, PartitionSpec()), 24), out_shardings=rows
        )(spread)
    for name, value in whole.items():
        np.testing.assert_allclose(gathered[name], value, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize("block_rows", [0, 5])
def test_the_train_step_has_the_blocks_of_the_config(block_rows):
    config = demo.get_config()
    config.loss_block_rows, config.data.batch_size = block_rows, 24
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.width, tower.depth, tower.num_heads = 16, 1, 2
    model = model_lib.make_model(config.model)
    shapes = jax.eval_shape(lambda: model_lib.init_params(model, config.model, 0))
    batch = step_lib.batch_shapes(config, 24_000, (72, 96))
    text = str(jax.make_jaxpr(step_lib.make_loss_fn(model, config, config.phases[0]))(shapes, jnp.int32(0), batch))
    assert ("f32[5,24]" in text) == (block_rows == 5)  # a block of similarities
    assert ("f32[24,24]" in text) == (block_rows == 0)
    assert str(streaming.LEFT_OUT) not in text


@pytest.mark.parametrize("chunk_size", [0, 8])
def test_equal_narrations_are_masked_in_training_and_validation_with_and_without_chunks(chunk_size):
    config = demo.get_config()
    config.data.batch_size, config.data.chunk_size, config.phases[0].mask_same_text = 24, chunk_size, True
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.width, tower.depth, tower.num_heads = 16, 1, 2
    model = model_lib.make_model(config.model)
    shapes = jax.eval_shape(lambda: model_lib.init_params(model, config.model, 0))
    batch = step_lib.batch_shapes(config, 24_000, (72, 96))
    grad_fn = step_lib.make_grad_fn(model, config, config.phases[0])
    assert str(streaming.LEFT_OUT) in str(jax.make_jaxpr(grad_fn)(shapes, jnp.int32(0), batch))
    validate = step_lib.make_validation_fn(model, config, config.phases[0])
    assert str(streaming.LEFT_OUT) in str(jax.make_jaxpr(validate)(shapes, batch))
