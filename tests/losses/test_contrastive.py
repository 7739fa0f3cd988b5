"""InfoNCE against float64 numpy, golden values made by PyTorch, and finite differences."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from mc3_jax.losses.contrastive import contrastive_loss, same_rows

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def embeddings(num=6, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    draws = {name: rng.normal(size=(num, dim)) for name in ("audio", "video", "text")}
    return {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in draws.items()}


def reference(x, y, temperature):
    """Returns InfoNCE from rows of `x` to rows of `y`, computed row by row in float64."""
    total = 0.0
    for t in range(len(x)):
        logits = np.array([x[t] @ other for other in y]) / temperature
        total -= logits[t] - np.log(np.sum(np.exp(logits)))
    return total / len(x)


def to_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def info_nce(x, y, temperature):
    """Returns Eq. (1) for one ordered pair, literally as in the paper."""
    logits = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST) / temperature
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)))


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_infonce_is_the_mean_negative_log_probability_of_the_own_row(temperature):
    x = embeddings()
    value = info_nce(to_jax(x["audio"]), to_jax(x["video"]), temperature)
    np.testing.assert_allclose(value, reference(x["audio"], x["video"], temperature), rtol=1e-6)


def test_infonce_has_one_direction_only():
    x = to_jax(embeddings())
    assert abs(float(info_nce(x["audio"], x["text"], 0.05) - info_nce(x["text"], x["audio"], 0.05))) > 1e-3


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_a_pairs_loss_and_gradient_are_those_of_infonce_in_both_directions(temperature):
    x = to_jax(embeddings(9))

    def both(e):
        return info_nce(e["audio"], e["video"], temperature) + info_nce(e["video"], e["audio"], temperature)

    loss, gradient = jax.value_and_grad(lambda e: contrastive_loss(e, temperature, ["av"])[0])(x)
    expected, wanted = jax.value_and_grad(both)(x)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda found, want: np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6), gradient, wanted)


def test_each_pair_is_the_sum_of_its_two_directions():
    x = embeddings()
    total, per_pair = contrastive_loss(to_jax(x), 0.05)
    assert list(per_pair) == ["av", "al", "vl"]
    names = {"av": ("audio", "video"), "al": ("audio", "text"), "vl": ("video", "text")}
    expected = {p: reference(x[i], x[j], 0.05) + reference(x[j], x[i], 0.05) for p, (i, j) in names.items()}
    for pair, value in expected.items():
        np.testing.assert_allclose(per_pair[pair], value, rtol=1e-6)
    np.testing.assert_allclose(total, sum(expected.values()), rtol=1e-6)


def test_contrastive_loss_is_symmetric_in_a_pairs_modalities():
    x = to_jax(embeddings())
    swapped = {"audio": x["video"], "video": x["audio"]}
    one, other = (contrastive_loss(e, 0.05, ["av"])[0] for e in (x, swapped))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_rows_of_a_group_are_no_negatives_of_each_other():
    x, groups = embeddings(), np.array([0, 1, 0, 2, 1, 0])
    _, per_pair = contrastive_loss(to_jax(x), 0.05, groups=jnp.asarray(groups))

    def masked(one, other):
        """Returns what `reference` does, but with candidates of other groups and the row's own only."""
        total = 0.0
        for t in range(len(one)):
            counts = (groups != groups[t]) | (np.arange(len(one)) == t)
            total -= one[t] @ other[t] / 0.05 - np.log(np.sum(np.exp(other[counts] @ one[t] / 0.05)))
        return total / len(one)

    for pair, (i, j) in {"av": ("audio", "video"), "al": ("audio", "text"), "vl": ("video", "text")}.items():
        np.testing.assert_allclose(per_pair[pair], masked(x[i], x[j]) + masked(x[j], x[i]), rtol=1e-5)
    plain = contrastive_loss(to_jax(x), 0.05)[0]
    assert contrastive_loss(to_jax(x), 0.05, groups=jnp.arange(6))[0] == plain  # a group for each row
    assert abs(contrastive_loss(to_jax(x), 0.05, groups=jnp.zeros(6, int))[0]) < 1e-5  # no negative is left


def test_rows_of_tokens_have_the_same_group_if_and_only_if_they_are_equal():
    ids = jnp.asarray([[5, 2, 0], [5, 1, 0], [5, 2, 0], [1, 1, 1], [5, 2, 1], [5, 1, 0]])
    groups = np.asarray(jax.jit(same_rows)(ids))
    same = (ids[:, None] == ids).all(axis=2)
    np.testing.assert_array_equal(groups[:, None] == groups, same)


def test_contrastive_loss_is_pytorchs():
    golden = np.load(GOLDEN / "pairwise_nce.npz")
    x = {"audio": golden["A"], "video": golden["V"], "text": golden["L"]}
    _, per_pair = contrastive_loss(to_jax(x), float(golden["temperature"]))
    for pair in ("AV", "AL", "VL"):
        np.testing.assert_allclose(per_pair[pair.lower()], golden[pair], rtol=1e-6)


def test_gradient_of_the_contrastive_loss_is_its_finite_difference():
    with jax.enable_x64(True):
        x = to_jax(embeddings(), jnp.float64)
        test_util.check_grads(jax.jit(lambda e: contrastive_loss(e, 0.05)[0]), (x,), order=1, modes=["rev"], rtol=1e-6)


def test_bfloat16_embeddings_are_contrasted_in_float32():
    x = to_jax(embeddings(), jnp.bfloat16)
    value, _ = contrastive_loss(x, 0.05)
    assert value.dtype == jnp.float32
    exact = {name: np.asarray(v.astype(jnp.float32)) for name, v in x.items()}
    np.testing.assert_allclose(value, contrastive_loss(to_jax(exact), 0.05)[0], rtol=1e-6)


def test_a_temperature_may_be_learned():
    x = to_jax(embeddings())
    grad = jax.grad(lambda t: contrastive_loss(x, t)[0])(jnp.float32(0.07))
    assert np.isfinite(grad)
    assert grad != 0


@pytest.mark.parametrize("pairs", [[], ["aa"], ["ax"], ["a"], ["vl"]])
def test_a_pair_that_is_not_two_known_modalities_is_refused(pairs):
    x = to_jax(embeddings())
    del x["text"]
    with pytest.raises(ValueError, match="pair"):
        contrastive_loss(x, 0.05, pairs)
