"""CM-ACC's negatives: momentum, gradient embeddings, k-means++ and ring buffers against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc3_jax.losses import active, contrastive


def normal(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def logsumexp(x):
    top = x.max(1)
    return top + np.log(np.exp(x - top[:, None]).sum(1))


def test_momentum_makes_an_exponential_moving_average():
    average, new = {"a": normal(0, 3, 2), "b": {"c": normal(1, 5)}}, {"a": normal(2, 3, 2), "b": {"c": normal(3, 5)}}
    found = average
    for _ in range(4):
        found = active.momentum_update(found, new, 0.9)
    expected = jax.tree.map(lambda a, x: 0.9**4 * a + (1 - 0.9**4) * x, average, new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_gradient_embeddings_are_the_gradient_of_info_nce_with_respect_to_the_candidates():
    queries, candidates, valid = normal(0, 6, 8), normal(1, 20, 8), np.arange(20) < 15
    found = active.gradient_embeddings(jnp.float32(queries), jnp.float32(candidates), jnp.asarray(valid), 0.2)

    def loss(candidates):
        logits = np.where(valid, queries @ candidates.T / 0.2, -np.inf)
        return np.mean(logsumexp(logits) - np.diagonal(logits))

    for j, k in ((0, 0), (5, 3), (9, 7), (14, 2)):
        step = np.zeros_like(candidates)
        step[j, k] = 1e-6
        slope = (loss(candidates + step) - loss(candidates - step)) / 2e-6
        np.testing.assert_allclose(found[j, k], slope, atol=1e-6)
    np.testing.assert_array_equal(found[15:], 0)


def numpy_kmeans_plus_plus(points, valid, uniforms):
    chosen, nearest = [], np.ones(len(points))
    for uniform in uniforms:
        weight = np.where(valid, nearest, 0)
        place = int(np.searchsorted(np.cumsum(weight), uniform * weight.sum(), side="right"))
        distance = ((points - points[place]) ** 2).sum(1)
        nearest = np.minimum(nearest, distance) if chosen else distance
        chosen.append(place)
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_k_means_plus_plus_chooses_what_float64_numpy_chooses(seed):
    rng = np.random.default_rng(seed)
    points, valid, uniforms = rng.normal(size=(60, 5)), rng.uniform(size=60) < 0.7, rng.uniform(size=12)
    found = active.kmeans_plus_plus(jnp.float32(points), jnp.asarray(valid), jnp.float32(uniforms))
    assert np.asarray(found).tolist() == numpy_kmeans_plus_plus(points, valid, uniforms)
    assert valid[np.asarray(found)].all()
    assert len(set(np.asarray(found).tolist())) == 12


def test_far_groups_are_all_found_and_equal_points_do_no_harm():
    groups = np.repeat(100 * np.eye(4), 25, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(100, 4))
    found = active.kmeans_plus_plus(jnp.float32(groups), jnp.ones(100, bool), jnp.float32([0.3, 0.6, 0.1, 0.999999]))
    assert sorted(np.asarray(found) // 25) == [0, 1, 2, 3]
    valid = np.array([False, True, True, True])
    same = active.kmeans_plus_plus(jnp.ones((4, 3)), jnp.asarray(valid), jnp.float32([0.0, 0.5, 0.9999999]))
    assert valid[np.asarray(same)].all()


def run(steps, batch_size=4, pool_size=8, dictionary_size=12, pairs=("av",)):
    """Returns (loss, loss by pair, memory after the step, queries, keys) of each step."""
    names = sorted({contrastive.MODALITY_OF_LETTER[letter] for pair in pairs for letter in pair})
    memory, seen = active.init_memory(names, pool_size, dictionary_size, 6), []
    for step in range(steps):
        x = {name: normal(10 * step + n, batch_size, 6) for n, name in enumerate(names)}
        keys = {name: normal(1000 + 10 * step + n, batch_size, 6) for n, name in enumerate(names)}
        inputs = [{name: jnp.float32(v) for name, v in part.items()} for part in (x, keys)]
        loss, per_pair, after = active.active_contrastive_loss(*inputs, memory, 0.5, pairs, jax.random.key(step))
        seen.append((float(loss), per_pair, jax.device_get(after), x, keys))
        memory = after
    return seen


def test_the_loss_is_info_nce_against_the_batch_and_the_filled_part_of_the_dictionary():
    for number, (loss, per_pair, memory, x, keys) in enumerate(run(5)):
        filled, expected = min(4 * number, 12), 0.0
        for asking, answering in (("audio", "video"), ("video", "audio")):
            answers = np.concatenate([keys[answering], memory["dictionary"][answering][:filled]])
            logits = x[asking] @ answers.T / 0.5
            expected += np.mean(logsumexp(logits) - np.diagonal(logits))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(per_pair["av"], expected, rtol=1e-5)


def test_pools_keep_the_newest_and_dictionaries_what_was_chosen_of_them():
    seen = run(6)
    for number, (_, _, memory, _, keys) in enumerate(seen):
        begin = 4 * number % 8
        for name in ("audio", "video"):
            np.testing.assert_allclose(memory["pool"][name][begin : begin + 4], keys[name], rtol=1e-6)
            if number:
                pool = np.concatenate([old[4][name] for old in seen[max(number - 2, 0) : number]])
                place = 4 * (number - 1) % 12
                chosen = memory["dictionary"][name][place : place + 4]
                distances = np.abs(pool[None] - chosen[:, None]).sum(2)
                assert distances.min(1).max() < 1e-5  # each is in the pool
                assert len(set(distances.argmin(1).tolist())) == 4
        assert memory["steps"] == number + 1


def test_three_modalities_are_contrasted_pairwise_and_a_step_has_the_same_negatives_again():
    once, again = run(3, pairs=("av", "al", "vl")), run(3, pairs=("av", "al", "vl"))
    for (loss, per_pair, memory, *_), (_, _, other, *_) in zip(once, again, strict=True):
        np.testing.assert_allclose(loss, sum(per_pair.values()), rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, memory, other)
