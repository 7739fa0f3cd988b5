"""Parts of the encoders against PyTorch and naive float64 numpy, and the encoders' parameter counts."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from scipy import special, stats

from mc3_jax.models import layers
from mc3_jax.models.audio import AudioSpectrogramTransformer
from mc3_jax.models.mc3 import MC3, AudioTower
from mc3_jax.models.text import DistilBert
from mc3_jax.models.video import DividedAttention, SpaceTimeBlock, SpaceTimeTransformer


def randomize(params, seed=0):
    """Returns random parameters of these shapes, also in place of those that start at 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), params)


def init(module, *args, seed=0, **kwargs):
    return randomize(jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"], seed)


def to_float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def masked_attention(params, x, allowed, num_heads):
    """Returns softmax attention over tokens [n, w], one query at a time, to the keys that `allowed[query]` permits."""
    query, key, value = (
        rearrange(part, "n (h d) -> h n d", h=num_heads) for part in np.split(dense(params["qkv"], x), 3, axis=-1)
    )
    out = np.zeros_like(query)
    for h in range(num_heads):
        for i in range(len(x)):
            keys = np.flatnonzero(allowed[i])
            logits = key[h, keys] @ query[h, i] / np.sqrt(query.shape[-1])
            weights = np.exp(logits - logits.max())
            out[h, i] = weights / weights.sum() @ value[h, keys]
    return dense(params["out"], rearrange(out, "h n d -> n (h d)"))


def layer_norm(params, x, epsilon):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * params["scale"] + params["bias"]


def mlp(params, x):
    hidden = dense(params["hidden"], x)
    erf = np.vectorize(math.erf)
    return dense(params["out"], 0.5 * hidden * (1 + erf(hidden / np.sqrt(2))))


def groups(over, num_frames, num_places):
    """Returns allowed [query, key] for divided attention: the class token comes first, then the patches, frame by frame."""
    frame, place = (x.ravel() for x in np.indices((num_frames, num_places)))
    same = frame if over == "space" else place
    allowed = np.ones((1 + len(same), 1 + len(same)), bool)
    allowed[1:, 1:] = same[:, None] == same
    return allowed


def random_tokens(num_frames=3, num_places=4, width=8, batch=2, seed=1):
    rng = np.random.default_rng(seed)
    class_token, patches = rng.normal(size=(batch, 1, width)), rng.normal(size=(batch, num_frames, num_places, width))
    return class_token, patches


def flatten(tokens):
    return np.concatenate([tokens[0], rearrange(np.asarray(tokens[1]), "b t p w -> b (t p) w")], axis=1)


def to_jax(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("over", ["space", "time"])
def test_divided_attention_is_attention_masked_to_the_group_and_the_class_token(over):
    tokens = random_tokens()
    module = DividedAttention(over, num_heads=2)
    params = init(module, to_jax(tokens))
    out = flatten(module.apply({"params": params}, to_jax(tokens)))
    for x, y in zip(flatten(tokens), out, strict=True):
        expected = masked_attention(to_float64(params), x, groups(over, 3, 4), num_heads=2)
        np.testing.assert_allclose(y, expected, atol=1e-5, rtol=0)


def test_the_space_time_block_adds_space_attention_to_its_input_not_to_times_output():
    tokens = random_tokens()
    module = SpaceTimeBlock(num_heads=2)
    params = init(module, to_jax(tokens))
    out = flatten(module.apply({"params": params}, to_jax(tokens)))
    p = to_float64(params)
    for x, result in zip(flatten(tokens), out, strict=True):
        time = masked_attention(p["time_attention"], layer_norm(p["norm_time"], x, 1e-6), groups("time", 3, 4), 2)
        normed = layer_norm(p["norm_space"], x + time, 1e-6)
        y = x + masked_attention(p["space_attention"], normed, groups("space", 3, 4), 2)
        expected = y + mlp(p["mlp"], layer_norm(p["norm_mlp"], y, 1e-6))
        np.testing.assert_allclose(result, expected, atol=1e-5, rtol=1e-5)


def test_the_class_token_alone_is_what_the_whole_block_gives():
    tokens = to_jax(random_tokens())
    module = SpaceTimeBlock(num_heads=2)
    params = init(module, tokens)
    whole, alone = (module.apply({"params": params}, tokens, class_only=c) for c in (False, True))
    assert alone[1] is None
    np.testing.assert_allclose(alone[0], whole[0], atol=1e-5, rtol=0)


def test_time_attention_starts_at_zero_or_at_random():
    tokens = to_jax(random_tokens())
    for time_init, zero in (("zeros", True), ("random", False)):
        params = SpaceTimeBlock(num_heads=2, time_init=time_init).init(jax.random.key(0), tokens)["params"]
        time = DividedAttention("time", 2).apply({"params": params["time_attention"]}, tokens)
        assert all(np.all(x == 0) for x in time) == zero
        assert np.all(params["time_attention"]["qkv"]["kernel"] == 0) == zero
        assert np.all(params["time_attention"]["out"]["kernel"] == 1) == zero


@pytest.mark.slow
def test_the_time_branch_has_a_gradient_if_it_starts_at_random_but_none_if_it_starts_at_zero():
    """Whatever the other weights are, such as those of an image model."""
    tokens = to_jax(random_tokens())

    def gradient(time_init):
        module = SpaceTimeBlock(num_heads=2, time_init=time_init)

        @jax.jit
        def grads(key):
            others = module.init(key, tokens)["params"]
            time = {"time_attention": others.pop("time_attention")}
            moved = jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape), others)
            params = moved | time
            return jax.grad(lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, tokens)[0])))(params)

        return np.max(np.abs(grads(jax.random.key(0))["time_attention"]["qkv"]["kernel"]))

    # It is zero apart from float32's rounding, a few ten-millionths of the other.
    assert gradient("zeros") < 1e-5 * gradient("random")


@pytest.mark.parametrize("num_outputs", [1, 2, None])
def test_attention_for_the_first_tokens_alone_equals_that_for_all(num_outputs):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    module = layers.SelfAttention(num_heads=2)
    params = init(module, x, mask)
    whole, part = (module.apply({"params": params}, x, mask, num_outputs=n) for n in (None, num_outputs))
    np.testing.assert_allclose(part, whole[:, :num_outputs], atol=1e-6, rtol=0)
    for row, kept, out in zip(np.asarray(x), np.asarray(mask), whole, strict=True):
        expected = masked_attention(to_float64(params), row, np.tile(kept, (5, 1)), num_heads=2)
        np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


def test_padding_tokens_do_not_reach_the_text_embedding():
    module = DistilBert(vocab_size=20, num_positions=8, width=8, depth=2, num_heads=2, mlp_width=16)
    ids = jnp.asarray([[1, 5, 6, 0, 0]])
    mask = jnp.asarray([[1, 1, 1, 0, 0]])
    params = init(module, ids, mask)
    one, other = (module.apply({"params": params}, i, m)[:, :3] for i, m in ((ids, mask), (ids.at[:, 3:].set(9), mask)))
    np.testing.assert_array_equal(one, other)
    short = module.apply({"params": params}, ids[:, :3], mask[:, :3])
    np.testing.assert_allclose(one, short, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "stride", "length", "axis"), [(16, 10, 149, 1), (16, 16, 64, 1), (4, 6, 20, 2), (5, 1, 5, 1)]
)
def test_sliding_windows_are_the_slices_of_the_axis(size, stride, length, axis):
    shape = [2, 3, 4]
    shape[axis] = length
    x = np.arange(np.prod(shape)).reshape(shape)
    windows = np.asarray(layers.sliding_windows(jnp.asarray(x), size, stride, axis))
    starts = range(0, length - size + 1, stride)
    expected = np.stack([x.take(range(s, s + size), axis) for s in starts], axis)
    np.testing.assert_array_equal(windows, expected)


def test_sliding_windows_of_too_short_an_axis_are_refused():
    with pytest.raises(ValueError, match="one window needs 16"):
        layers.sliding_windows(jnp.zeros((1, 15)), 16, 10, 1)


def test_patch_embeddings_are_convolutions():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 1, 16, 16)).astype(np.float32)
    spectrogram = rng.normal(size=(2, 39, 46)).astype(np.float32)
    conv = torch.nn.functional.conv2d(torch.tensor(spectrogram).mT[:, None], torch.tensor(kernel), stride=10)
    expected = rearrange(conv.numpy(), "b o f t -> b (f t) o")
    patches = layers.sliding_windows(jnp.asarray(spectrogram), 16, 10, axis=2)
    patches = layers.sliding_windows(patches, 16, 10, axis=1)
    ours = rearrange(patches, "b t j f i -> b (f t) (i j)") @ rearrange(kernel, "o c i j -> (i j c) o")
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_pytorchs_exact_one(dtype):
    x = np.linspace(-6, 6, 401, dtype=np.float32)
    expected = torch.nn.functional.gelu(torch.tensor(x).to(getattr(torch, dtype))).float().numpy()
    ours = np.asarray(layers.gelu(jnp.asarray(x).astype(dtype)).astype(jnp.float32))
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0 if dtype == "float32" else 2**-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_gelu_is_pytorchs(dtype):
    x, gradient = np.linspace(-6, 6, 401, dtype=np.float32), np.linspace(2, -1, 401, dtype=np.float32)
    asked = torch.tensor(x).to(getattr(torch, dtype)).requires_grad_()
    torch.nn.functional.gelu(asked).backward(torch.tensor(gradient).to(getattr(torch, dtype)))
    _, backward = jax.vjp(layers.gelu, jnp.asarray(x).astype(dtype))
    (ours,) = backward(jnp.asarray(gradient).astype(dtype))
    expected = asked.grad.float().numpy()
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=1e-6, rtol=0 if dtype == "float32" else 2**-7)


def test_a_gelu_keeps_only_its_input_for_the_backward_pass():
    def naive(x):
        return (0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))).astype(x.dtype)

    def temporaries(activation):
        def loss(kernels, x):
            for up, down in kernels:
                x = x + activation(x @ up) @ down
            return jnp.sum(x * x)

        up, down = jax.ShapeDtypeStruct((32, 128), jnp.float32), jax.ShapeDtypeStruct((128, 32), jnp.float32)
        x = jax.ShapeDtypeStruct((1024, 32), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower([(up, down)] * 3, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (1024 * 128 * 4)

    # Three layers save three arrays of the hidden layer's size.
    assert temporaries(layers.gelu) <= temporaries(naive) - 2.5


@pytest.mark.parametrize("given", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_and_its_gradients_are_flaxs(given, dtype):
    theirs = nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False)
    ours = layers.LayerNorm(epsilon=1e-6, dtype=dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    x = (5 + 3 * jax.random.normal(keys[0], (2, 7, 48))).astype(given)
    params = {"scale": 1 + jax.random.normal(keys[1], (48,)), "bias": jax.random.normal(keys[2], (48,))}
    assert jax.tree.map(jnp.shape, ours.init(keys[3], x)["params"]) == jax.tree.map(jnp.shape, params)
    weight = jax.random.normal(keys[3], x.shape)

    def loss(module, params, x):
        out = module.apply({"params": params}, x)
        assert out.dtype == dtype
        return jnp.sum(weight * out.astype(jnp.float32))

    found, wanted = (jax.tree.leaves(jax.value_and_grad(loss, (1, 2))(module, params, x)) for module in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        tolerance = (1e-5 if dtype == given == "float32" else 2**-7) * np.abs(other).max()
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0, atol=tolerance)


def test_the_normal_distribution_for_bfloat16_is_near_the_exact_one():
    x = jnp.linspace(-12, 12, 100_001)
    cdf, density = layers._normal(x, jnp.bfloat16)
    np.testing.assert_allclose(cdf, special.ndtr(np.asarray(x, np.float64)), rtol=0, atol=3e-7)
    np.testing.assert_allclose(density, stats.norm.pdf(np.asarray(x, np.float64)), rtol=1e-4, atol=1e-7)


def count(module, *args, **kwargs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    return sum(x.size for x in jax.tree.leaves(shapes))


def test_the_defaults_have_the_papers_parameter_counts():
    ids = jnp.zeros((1, 30), jnp.int32)
    log_mel = jnp.zeros((1, 149, 128))
    assert count(AudioTower(AudioSpectrogramTransformer(), embed_dim=256), log_mel) == 85_583_872
    assert count(SpaceTimeTransformer(), jnp.zeros((1, 4, 224, 224, 3))) == 114_177_792
    assert count(DistilBert(), ids, ids) == 66_362_880


def test_embeddings_are_float32_of_length_1_and_dropout_acts_in_training_only():
    small = {"width": 8, "depth": 1, "num_heads": 2}
    model = MC3(
        AudioSpectrogramTransformer(num_mel=32, num_time_frames=40, **small, dtype=jnp.bfloat16),
        SpaceTimeTransformer(image_size_px=32, num_positions=4, **small, dtype=jnp.bfloat16),
        DistilBert(vocab_size=20, num_positions=8, mlp_width=16, **small, dtype=jnp.bfloat16),
        embed_dim=4,
        dtype=jnp.bfloat16,
    )
    ids = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    rng = np.random.default_rng(0)
    log_mel, video = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 40, 32), (2, 3, 32, 32, 3)))
    inputs = {"audio": log_mel, "video": video, "text_ids": ids, "text_mask": jnp.ones_like(ids)}
    params = init(model, **inputs)
    apply = jax.jit(model.apply, static_argnames="train")
    quiet = apply({"params": params}, **inputs)
    noisy = apply({"params": params}, **inputs, train=True, rngs={"dropout": jax.random.key(0)})
    assert set(quiet) == {"audio", "video", "text"}
    for x in quiet.values():
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(quiet["audio"], noisy["audio"])
    assert np.any(quiet["text"] != noisy["text"])


def test_a_vector_of_zeros_has_a_finite_norm_and_gradient():
    x = jnp.zeros((2, 3))
    assert np.all(layers.l2_normalize(x) == 0)
    assert np.all(np.isfinite(jax.grad(lambda y: jnp.sum(layers.l2_normalize(y)))(x)))


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (SpaceTimeTransformer(image_size_px=30), [(1, 1, 30, 30, 3)], "multiple of patch_px 16"),
        (SpaceTimeTransformer(image_size_px=32), [(1, 1, 32, 48, 3)], "32x48 pixels"),
        (SpaceTimeTransformer(image_size_px=32, num_positions=2), [(1, 3, 32, 32, 3)], "num_positions is 2"),
        (AudioSpectrogramTransformer(), [(1, 148, 128)], "num_time_frames is 149"),
        (AudioSpectrogramTransformer(num_time_frames=8), [(1, 8, 128)], "smaller than a patch"),
    ],
)
def test_inputs_of_another_size_than_the_models_are_refused(module, args, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), *[jnp.zeros(shape) for shape in args]))


def test_text_longer_than_the_position_table_and_text_without_a_mask_are_refused():
    ids = jnp.zeros((1, 9), jnp.int32)
    text = DistilBert(vocab_size=20, num_positions=8, width=8, depth=1, num_heads=2, mlp_width=16)
    with pytest.raises(ValueError, match="9 tokens"):
        text.init(jax.random.key(0), ids, ids)
    model = MC3(AudioSpectrogramTransformer(), SpaceTimeTransformer(), text)
    with pytest.raises(ValueError, match="text_mask"):
        model.init(jax.random.key(0), text_ids=ids)
    with pytest.raises(ValueError, match="no modality"):
        model.init(jax.random.key(0))
