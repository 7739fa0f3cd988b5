"""The consensus loss against float64 numpy, finite differences, and properties that follow from Eq. 2 and 3."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc3_jax.losses.consensus import INVERSES, consensus_loss

ALPHAS = {"video": 0.5, "text": 1.0}


def embeddings(num=16, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    draws = {name: rng.normal(size=(num, dim)) for name in ("audio", "video", "text")}
    return {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in draws.items()}


def with_scores(**scores):
    """Returns two-dimensional embeddings whose cosines with audio are the given scores."""
    angles = {name: np.arccos(np.asarray(s, np.float64)) for name, s in scores.items()}
    num = len(next(iter(angles.values())))
    x = {name: jnp.asarray(np.stack([np.cos(a), np.sin(a)], axis=1), jnp.float32) for name, a in angles.items()}
    return {"audio": jnp.asarray([[1.0, 0.0]] * num)} | x


def to_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def reference(x, anchor, alphas, inverse):
    """Returns (loss, mean consensus) by Eq. 2 and 3, sample by sample, in float64."""
    losses, consensuses = [], []
    for t in range(len(x[anchor])):
        scores = {name: float(x[name][t] @ x[anchor][t]) for name in alphas}
        scaled = {name: ((scores[name] + 1) / 2) ** alphas[name] for name in alphas}
        least = min(scaled, key=scaled.get)
        same = {"argmin": alphas[least], "linear": 1}
        exponents = alphas if inverse == "per_modality" else dict.fromkeys(alphas, same[inverse])
        c = {name: 2 * scaled[least] ** (1 / exponent) - 1 for name, exponent in exponents.items()}
        losses.append(sum(abs(s - c[name]) for name, s in scores.items()))
        consensuses.append(np.mean(list(c.values())))
    return np.mean(losses), np.mean(consensuses)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize(
    ("anchor", "alphas"), [("audio", ALPHAS), ("video", {"audio": 0.3, "text": 2.0}), ("text", {"video": 1.0})]
)
def test_consensus_loss_is_eq_2_and_3(anchor, alphas, inverse):
    x = embeddings()
    loss, aux = consensus_loss(to_jax(x), anchor=anchor, alphas=alphas, inverse=inverse)
    expected_loss, expected_consensus = reference(x, anchor, alphas, inverse)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(aux["consensus_score"], expected_consensus, rtol=1e-5)


def consensus_of(x, inverse):
    """Returns the consensus c of every modality and sample, [2, b], in float64; the anchor is audio."""
    scores = np.stack([np.sum(x[name] * x["audio"], axis=-1) for name in ALPHAS])
    scaled = np.stack([((score + 1) / 2) ** alpha for score, alpha in zip(scores, ALPHAS.values(), strict=True)])
    if inverse == "linear":
        return np.stack([2 * scaled.min(axis=0) - 1] * 2)
    if inverse == "per_modality":
        c = np.stack([2 * scaled.min(axis=0) ** (1 / alpha) - 1 for alpha in ALPHAS.values()])
        return np.where(scaled == scaled.min(axis=0), scores, c)
    return np.stack([scores[scaled.argmin(axis=0), np.arange(len(scores[0]))]] * 2)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("inverse", INVERSES)
def test_gradient_of_the_consensus_loss_is_its_finite_difference(inverse, stop_gradient):
    x = embeddings(num=4)
    target = consensus_of(x, inverse)

    def loss(e):
        """Returns the mean of Σ |s - c|; c is that of the undisturbed embeddings with `stop_gradient`, else that of `e`."""
        c = target if stop_gradient else consensus_of(e, inverse)
        return np.mean(sum(np.abs(np.sum(e[name] * e["audio"], axis=-1) - of) for name, of in zip(ALPHAS, c, strict=True)))

    with jax.enable_x64(True):
        detail = {"anchor": "audio", "alphas": ALPHAS, "inverse": inverse, "stop_gradient": stop_gradient}
        grads = jax.grad(lambda e: consensus_loss(e, **detail)[0])(to_jax(x, jnp.float64))
    for name in x:
        # At c itself |s - c| has a kink, and central differences give the mean of both slopes: 0, as they should.
        direction, step = np.random.default_rng(1).normal(size=x[name].shape), 1e-6
        up, down = (loss(x | {name: x[name] + sign * step * direction}) for sign in (1, -1))
        slope = np.sum(np.asarray(grads[name]) * direction)
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_bottleneck_has_no_loss_and_no_gradient():
    x = with_scores(video=[0.8, 0.2], text=[0.1, 0.9])
    loss, aux = consensus_loss(x, anchor="audio", alphas={"video": 1.0, "text": 1.0})
    np.testing.assert_allclose(loss, np.mean([0.7, 0.7]), atol=1e-6)
    np.testing.assert_allclose(aux["consensus_score"], 0.15, atol=1e-6)
    assert aux["bottleneck_video"] == 0.5
    assert aux["bottleneck_text"] == 0.5
    grads = jax.grad(lambda e: consensus_loss(e, anchor="audio", alphas={"video": 1.0, "text": 1.0})[0])(x)
    assert not np.any(grads["video"][1])
    assert not np.any(grads["text"][0])
    assert np.any(grads["video"][0])
    assert np.any(grads["text"][1])


def test_alphas_decide_which_modality_is_the_bottleneck():
    # The exponent 0.5 raises video's (s + 1) / 2 from 0.4 to 0.63, above text's 0.5.
    x = with_scores(video=[-0.2], text=[0.0])
    _, aux = consensus_loss(x, anchor="audio", alphas={"video": 1.0, "text": 1.0})
    assert aux["bottleneck_video"] == 1
    _, aux = consensus_loss(x, anchor="audio", alphas=ALPHAS)
    assert aux["bottleneck_text"] == 1
    np.testing.assert_allclose(aux["consensus_score"], 0.0, atol=1e-6)


def test_the_argmin_inverse_is_one_of_the_scores_and_the_linear_one_is_not():
    x = with_scores(video=[-0.2], text=[0.9])
    _, aux = consensus_loss(x, anchor="audio", alphas=ALPHAS)
    np.testing.assert_allclose(aux["consensus_score"], -0.2, atol=1e-6)
    _, aux = consensus_loss(x, anchor="audio", alphas=ALPHAS, inverse="linear")
    np.testing.assert_allclose(aux["consensus_score"], 2 * 0.4**0.5 - 1, atol=1e-6)


def test_with_the_target_fixed_scores_only_fall_and_otherwise_the_bottleneck_rises():
    x = with_scores(video=[0.8], text=[0.1])

    def gradient_along_audio(stop_gradient):
        detail = {"anchor": "audio", "alphas": ALPHAS, "stop_gradient": stop_gradient}
        grads = jax.grad(lambda e: consensus_loss(e, **detail)[0])(x)
        return {name: float(grads[name][0, 0]) for name in ALPHAS}

    np.testing.assert_allclose(list(gradient_along_audio(True).values()), [1, 0])
    np.testing.assert_allclose(list(gradient_along_audio(False).values()), [1, -1])


@pytest.mark.parametrize("alphas", [ALPHAS, {"video": 2.0, "text": 0.3}])
def test_inverted_by_each_modalitys_own_exponent_no_score_is_raised(alphas):
    rng = np.random.default_rng(0)
    x = with_scores(video=rng.uniform(-1, 1, 500), text=rng.uniform(-1, 1, 500))

    def raised(inverse):
        detail = {"anchor": "audio", "alphas": alphas, "inverse": inverse}
        grads = jax.grad(lambda e: consensus_loss(e, **detail)[0])(x)
        return {name: np.any(np.asarray(grads[name][:, 0]) < 0) for name in alphas}

    assert raised("per_modality") == {"video": False, "text": False}
    assert any(raised("argmin").values())  # a score below the consensus, which its exponent hides
    assert any(raised("linear").values())


def test_a_video_that_agrees_less_than_the_bottleneck_is_pulled_closer_unless_inverted_by_its_own_exponent():
    """The scores are those of the first row of the table in docs/method.md."""
    x = with_scores(video=[0.1], text=[0.45])
    for inverse, score, slope in (("argmin", 0.45, -1), ("linear", 0.45, -1), ("per_modality", (0.05125 + 0.45) / 2, 1)):
        loss = functools.partial(consensus_loss, anchor="audio", alphas=ALPHAS, inverse=inverse)
        grads, aux = jax.grad(loss, has_aux=True)(x)
        np.testing.assert_allclose(aux["consensus_score"], score, atol=1e-6)
        assert np.sign(grads["video"][0, 0]) == slope
        assert not np.any(grads["text"])


def test_equal_scores_have_no_loss_and_inverted_by_each_modalitys_own_exponent_only_at_the_ends():
    equal = np.array([-1, -0.5, 0, 0.5, 1])
    for inverse, all_fine in (("argmin", True), ("per_modality", False)):
        losses = [
            float(consensus_loss(with_scores(video=[s], text=[s]), anchor="audio", alphas=ALPHAS, inverse=inverse)[0])
            for s in equal
        ]
        np.testing.assert_array_equal(np.abs(losses) < 1e-5, all_fine | (np.abs(equal) == 1))


def test_with_exponents_of_1_all_inverses_are_the_same():
    x = to_jax(embeddings())
    found = [
        jax.value_and_grad(lambda e: consensus_loss(e, anchor="audio", alphas={"video": 1.0, "text": 1.0}, inverse=i)[0])(x)  # noqa: B023
        for i in INVERSES
    ]
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("inverse", INVERSES)
def test_loss_and_gradient_are_finite_where_a_modality_opposes_the_anchor(inverse, stop_gradient):
    x = with_scores(video=[-1.0, 1.0], text=[0.3, -1.0])
    value, grads = jax.value_and_grad(
        lambda e: consensus_loss(e, anchor="audio", alphas=ALPHAS, inverse=inverse, stop_gradient=stop_gradient)[0]
    )(x)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in grads.values())


def test_bfloat16_embeddings_agree_in_float32():
    x = to_jax(embeddings(), jnp.bfloat16)
    wide = jax.tree.map(lambda value: value.astype(jnp.float32), x)
    (found, described), (expected, wanted) = (consensus_loss(e, anchor="audio", alphas=ALPHAS) for e in (x, wide))
    assert found.dtype == described["consensus_score"].dtype == jnp.float32
    assert (float(found), described["consensus_score"]) == (float(expected), wanted["consensus_score"])


def test_the_loss_of_a_sample_does_not_depend_on_the_others():
    x = to_jax(embeddings(num=4))
    whole, _ = consensus_loss(x, anchor="audio", alphas=ALPHAS)
    rows = [{name: e[i : i + 1] for name, e in x.items()} for i in range(4)]
    parts = [consensus_loss(row, anchor="audio", alphas=ALPHAS)[0] for row in rows]
    np.testing.assert_allclose(whole, np.mean(parts), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inverse": "square"}, "square"),
        ({"alphas": {}}, "must name modalities"),
        ({"alphas": {"audio": 1.0}}, "must name modalities"),
        ({"alphas": {"smell": 1.0}}, "smell"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        consensus_loss(to_jax(embeddings()), **({"anchor": "audio", "alphas": ALPHAS} | change))
