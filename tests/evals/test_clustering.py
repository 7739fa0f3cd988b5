"""Planted clusters are found for any number of clips; examples are the nearest to the mean; maps keep neighbours."""

import numpy as np
import pytest

from mc3_jax.evals import clustering, projection

RNG = np.random.default_rng(0)
PLANTED = np.repeat(np.arange(4), (40, 30, 20, 10))
CENTRES = np.linalg.qr(RNG.normal(size=(8, 8)))[0][:4]


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


EMBEDDINGS = unit(CENTRES[PLANTED] + 0.05 * RNG.normal(size=(100, 8)))
ORDER = RNG.permutation(100)


def test_planted_clusters_are_found_and_numbered_by_size():
    found = clustering.cluster(EMBEDDINGS[ORDER], 4, 0)
    np.testing.assert_array_equal(found, PLANTED[ORDER])


def test_above_the_limit_a_sample_is_merged_and_the_rest_joins_the_nearest_mean(monkeypatch):
    monkeypatch.setattr(clustering, "MAX_MERGED", 60)
    np.testing.assert_array_equal(clustering.cluster(EMBEDDINGS[ORDER], 4, 0), PLANTED[ORDER])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_clips_than_clusters_are_a_cluster_each(n):
    assert sorted(clustering.cluster(EMBEDDINGS[[0, 50, 99]][:n], 20, 0)) == list(range(n))


@pytest.mark.parametrize(("n", "num_clusters"), [(0, 3), (5, 0)])
def test_nothing_to_cluster_is_refused(n, num_clusters):
    with pytest.raises(ValueError, match=f"{num_clusters} clusters of {n} clips"):
        clustering.cluster(EMBEDDINGS[:n], num_clusters, 0)


def test_a_cluster_is_described_by_its_clips():
    labels = (np.arange(100) % 4 == 0).astype(int)
    verbs = np.where(np.arange(100) < 25, 7, np.where(np.arange(100) < 35, 2, -1))
    first = clustering.describe(PLANTED, EMBEDDINGS, labels, verbs, num_examples=5)[0]
    assert (first.size, first.sounding) == (40, 0.25)
    assert first.verbs == [(7, 25), (2, 10)]
    mean = EMBEDDINGS[:40].sum(0)
    np.testing.assert_array_equal(first.examples, np.argsort(-(EMBEDDINGS[:40] @ mean))[:5])


def test_examples_are_no_more_than_the_cluster_holds():
    alone = clustering.describe(PLANTED, EMBEDDINGS, PLANTED * 0, PLANTED, num_examples=50)
    assert [len(c.examples) for c in alone] == [40, 30, 20, 10]


def test_a_map_keeps_clusters_together_and_is_the_same_for_a_seed():
    places = projection.project(EMBEDDINGS, 0)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(100)
    assert (PLANTED[distances.argmin(1)] == PLANTED).all()
    np.testing.assert_array_equal(projection.project(EMBEDDINGS, 0), places)


@pytest.mark.parametrize(
    "embeddings", [EMBEDDINGS[:1], EMBEDDINGS[:3], EMBEDDINGS[:5], np.ones((9, 8)), EMBEDDINGS[:9, :1]]
)
def test_few_clips_or_clips_all_alike_still_have_places(embeddings):
    places = projection.project(embeddings, 0)
    assert places.shape == (len(embeddings), 2)
    assert np.isfinite(places).all()


def test_a_sample_is_drawn_without_repeats():
    drawn = projection.sample(1000, 100, 0)
    assert len(np.unique(drawn)) == 100
    assert drawn.max() > 800
    np.testing.assert_array_equal(projection.sample(7, 100, 0), np.arange(7))
