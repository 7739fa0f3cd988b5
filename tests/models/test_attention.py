"""The forms of attention that are chosen on a GPU compute the same as plain attention."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mc3_jax import config as config_lib, mesh as mesh_lib, validation
from mc3_jax.models import attention, video
from mc3_jax.models.audio import AudioSpectrogramTransformer
from mc3_jax.models.layers import SelfAttention

B, T, P, H, D = 2, 4, 5, 3, 8


def draw(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [3 * jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def grid_and_class(**kwargs):
    return draw(*[(B, T, P, H, D)] * 3, *[(B, H, D)] * 2, **kwargs)


def value_and_gradients(attend, inputs):
    weight = jax.random.normal(jax.random.key(1), jax.eval_shape(attend, *inputs).shape)
    scalar = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weight * attend(*x)), argnums=0))
    return jax.jit(attend)(*inputs), scalar(list(inputs))[1]


def assert_same(one, other, tolerance=1e-5):
    """Asserts that arrays agree, relative to the largest value of each: sums are taken in another order."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_attention_over_few_frames_as_sums_equals_matrix_products():
    inputs = grid_and_class()
    assert_same(value_and_gradients(attention.attend_few, inputs), value_and_gradients(video._within_places, inputs))


@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_attention_as_sums_takes_any_number_of_frames(num_frames):
    inputs = draw(*[(B, num_frames, P, H, D)] * 3, *[(B, H, D)] * 2)
    assert_same(value_and_gradients(attention.attend_few, inputs), value_and_gradients(video._within_places, inputs))


def test_attention_of_one_query_as_sums_equals_matrix_products():
    _, *rest = grid_and_class()
    inputs = [draw((B, H, D))[0], *rest]
    assert_same(value_and_gradients(attention.attend_once, inputs), value_and_gradients(video._class_to_all, inputs))


@pytest.mark.parametrize("attend", [attention.attend_few, attention.attend_once])
def test_large_logits_do_not_overflow(attend):
    inputs = [100 * x for x in grid_and_class()]
    inputs[0] = inputs[0] if attend is attention.attend_few else inputs[0][:, 0, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_gradients(attend, inputs)))


@pytest.mark.parametrize("attend", [attention.attend_few, attention.attend_once])
def test_in_bfloat16_sums_are_at_least_as_accurate_as_matrix_products(attend):
    plain = video._within_places if attend is attention.attend_few else video._class_to_all
    narrow = grid_and_class(dtype=jnp.bfloat16)
    narrow[0] = narrow[0] if attend is attention.attend_few else narrow[0][:, 0, 0]
    wanted = value_and_gradients(plain, [x.astype(jnp.float32) for x in narrow])

    def errors(form):
        found = value_and_gradients(form, narrow)
        return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(
            map(jnp.asarray, jax.tree.leaves(found)), jax.tree.leaves(wanted), strict=True)]  # fmt: skip

    for ours, theirs in zip(errors(attend), errors(plain), strict=True):
        assert ours <= 1.1 * theirs


@pytest.fixture
def flash_on_a_cpu(monkeypatch):
    """Replaces cuDNN's attention by XLA's, which refuses odd lengths as cuDNN does; the code around the call is ours.

    Returns the list of the numbers of rows in each call.
    """
    called = []

    def flash(query, key, value, *, implementation, **lengths):
        called.append(len(query))
        assert implementation == "cudnn"
        assert query.shape[1] % 2 == key.shape[1] % 2 == 0
        return plain(query, key, value, implementation="xla", **lengths)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", flash)
    return called


@pytest.mark.usefixtures("flash_on_a_cpu")
@pytest.mark.parametrize("num_patches", [6, 9])  # the class token adds a key
def test_flash_attention_within_frames_is_the_plain_one(num_patches):
    inputs = draw(*[(B, T, num_patches, H, D)] * 3, *[(B, H, D)] * 2)
    assert_same(
        value_and_gradients(video._within_frames_flash, inputs), value_and_gradients(video._within_frames, inputs)
    )


@pytest.mark.usefixtures("flash_on_a_cpu")
@pytest.mark.parametrize("num_outputs", [None, 2])
def test_self_attention_is_the_same_in_both_forms(num_outputs):
    (x,) = draw((B, 6, H * D))
    plain, flash = (SelfAttention(H, form=form) for form in attention.FORMS)
    params = plain.init(jax.random.key(0), x)
    apply = [functools.partial(module.apply, num_outputs=num_outputs) for module in (plain, flash)]
    assert_same(*(value_and_gradients(lambda p, x, a=a: a({"params": p}, x), [params["params"], x]) for a in apply))


ENCODERS = {
    "video": (
        functools.partial(
            video.SpaceTimeTransformer, image_size_px=24, patch_px=8, num_positions=12, width=48, depth=3, num_heads=4,
            time_init="random",
        ),
        (8, 4, 24, 24, 3),
    ),
    "video of many frames": (
        functools.partial(
            video.SpaceTimeTransformer, image_size_px=16, patch_px=8, num_positions=12, width=48, depth=1, num_heads=4,
            time_init="random",
        ),
        (8, attention.MOST_FRAMES + 1, 16, 16, 3),
    ),
    "audio": (
        functools.partial(AudioSpectrogramTransformer, num_mel=32, num_time_frames=40, width=48, depth=3, num_heads=4),
        (8, 40, 32),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("flash_on_a_cpu")
@pytest.mark.parametrize(
    ("name", "form", "barriers", "layouts"),
    [
        # Norms and GELU keep their input for the backward pass. Patches and class token go through each on their own.
        ("audio", "einsum", 2 + 1, 0),
        ("video", "einsum", 2 * (3 + 1), 0),
        # Forward and back: branches are kept apart from their sum, columns of queries, keys and values written once, and
        # tokens stored row by row, as are the sums over all patches: two of each class query, two for its key and value.
        ("audio", "cudnn", 2 + 1 + 2 * (2 + 1), 2),
        ("video", "cudnn", 2 * (3 + 1) + 2 * (2 * 3 + 2), 2 * 2 + 2 * 2 + 2),
    ],
)
def test_each_block_asks_xla_for_what_makes_it_fast(name, form, barriers, layouts):
    """Counts what the last block of two doesn't have, in the program of the gradient; equal blocks are one function there."""
    make, shape = ENCODERS[name]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def count(depth):
        encoder = make(depth=depth, form=form)
        params = jax.eval_shape(encoder.init, jax.random.key(0), x)
        program = jax.jit(jax.grad(lambda params, x: jnp.sum(encoder.apply(params, x)))).lower(params, x).as_text()
        return np.array([program.count(word) for word in ("optimization_barrier", "LayoutConstraint")])

    assert (count(2) - count(1)).tolist() == [barriers, layouts]


@pytest.mark.usefixtures("flash_on_a_cpu")
@pytest.mark.parametrize(
    ("name", "scan_layers", "remat", "on_a_mesh"),
    [
        ("audio", False, "none", False),
        pytest.param("video", True, "full", True, marks=pytest.mark.slow),
        ("video of many frames", False, "none", False),
        pytest.param("video", False, "dots", True, marks=pytest.mark.large),
    ],
)
def test_a_whole_encoder_is_the_same_in_both_forms(name, scan_layers, remat, on_a_mesh):
    make, shape = ENCODERS[name]
    x = jax.random.normal(jax.random.key(2), shape)
    plain, fast = make(), make(scan_layers=scan_layers, remat=remat, form="cudnn")
    params = jax.jit(plain.init)(jax.random.key(0), x)["params"]

    def value_and_gradient(module, x):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(module.apply({"params": p}, x))), (0, 1)))(params, x)

    wanted = value_and_gradient(plain, x)
    with contextlib.ExitStack() as stack:
        if on_a_mesh:
            mesh = mesh_lib.make_mesh(2, jax.devices()[:8])
            stack.enter_context(jax.set_mesh(mesh))
            x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(mesh_lib.AXES)))
        found = value_and_gradient(fast, x)
    assert_same(found, wanted, tolerance=1e-4)


def test_where_cudnn_is_not_available_einsum_takes_its_place_except_in_training():
    assert attention.choose_form("auto", "bfloat16", 64) == attention.choose_form("cudnn", "bfloat16", 64) == "einsum"
    attention.check_form("auto", "bfloat16", 64)
    with pytest.raises(ValueError, match=r"model\.attention = 'cudnn' needs .* this is bfloat16, 64 wide, on cpu: set auto"):
        attention.check_form("cudnn", "bfloat16", 64)


class FakeGpu:
    def __init__(self, capability, platform="gpu"):
        self.compute_capability, self.platform, self.device_kind = capability, platform, "fake"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "form"),
    [
        (FakeGpu("9.0"), "bfloat16", 64, "cudnn"),
        (FakeGpu("8.0"), "bfloat16", 128, "cudnn"),
        (FakeGpu("9.0"), "float32", 64, "einsum"),  # cuDNN has none in float32
        (FakeGpu("9.0"), "bfloat16", 12, "einsum"),
        (FakeGpu("9.0"), "bfloat16", 136, "einsum"),
        (FakeGpu("7.5"), "bfloat16", 64, "einsum"),
        (FakeGpu("gfx942"), "bfloat16", 64, "einsum"),  # a GPU of AMD
        (FakeGpu(None, "tpu"), "bfloat16", 64, "einsum"),
    ],
)  # fmt: skip
def test_auto_looks_at_the_device_the_dtype_and_the_heads(monkeypatch, device, dtype, head_dim, form):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert attention.choose_form("auto", dtype, head_dim) == attention.choose_form("cudnn", dtype, head_dim) == form
    assert attention.choose_form("einsum", dtype, head_dim) == "einsum"


def test_what_a_form_can_not_do_is_refused_by_the_config():
    with pytest.raises(ValueError, match=r"model\.attention = 'flash': must be auto, einsum or cudnn"):
        validation.validate_model(config_lib.ModelConfig(attention="flash"))
    with pytest.raises(ValueError, match=r"model\.attention = 'cudnn': .*bfloat16"):
        validation.validate_model(config_lib.ModelConfig(attention="cudnn", dtype="float32"))


@pytest.mark.parametrize("num_keys", [6, 7])
def test_cudnn_is_given_whole_heads_of_a_devices_rows_where_parameters_are_sharded(flash_on_a_cpu, num_keys):
    mesh = mesh_lib.make_mesh(8, jax.devices()[:8])
    heads = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))  # as XLA shards them behind a split kernel
    inputs = draw(*[(16, num_keys, 8, D)] * 3)
    wanted = value_and_gradients(attention.attend, inputs)
    with jax.set_mesh(mesh):
        spread = [jax.device_put(x, heads) for x in inputs]
        found = value_and_gradients(attention.attend_flash, spread)
        odd = jax.jit(attention.attend_flash)(*(x[:9] for x in inputs))  # can't be split over 8 devices
    assert set(flash_on_a_cpu) == {2, 9}
    assert_same(found, wanted)
    assert_same(odd, attention.attend(*(x[:9] for x in inputs)))


@pytest.mark.parametrize("attend", [attention.attend_few, attention.attend_once])
def test_on_a_mesh_every_device_keeps_its_rows(attend):
    mesh = mesh_lib.make_mesh(2, jax.devices()[:8])
    rows = NamedSharding(mesh, PartitionSpec(mesh_lib.AXES))
    inputs = draw(*[(8, T, P, H, D)] * 3, *[(8, H, D)] * 2)
    inputs[0] = inputs[0] if attend is attention.attend_few else inputs[0][:, 0, 0]
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(attend(*x)))), in_shardings=rows)
        compiled = gradient.lower(inputs).compile()
        found = compiled(jax.device_put(inputs, rows))
    assert not re.search(r"all-(gather|reduce|to-all)", compiled.as_text())
    assert_same(found, jax.grad(lambda x: jnp.sum(jnp.sin(attend(*x))))(inputs))
