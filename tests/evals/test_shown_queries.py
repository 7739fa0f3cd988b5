"""The queries that are shown are those that are measured; verbs' scores are ranked against how often they sound."""

import numpy as np
import pytest

from mc3_jax.evals import discovery, retrieval

RNG = np.random.default_rng(0)
GROUPS = RNG.integers(0, 12, 90)
EMBEDDINGS = {tower: RNG.normal(size=(90, 6)) + np.eye(12, 6)[GROUPS] for tower in ("audio", "video", "text")}


@pytest.mark.parametrize("direction", retrieval.DIRECTION_MODALITIES)
def test_all_queries_together_are_what_is_measured(direction):
    shown = retrieval.draw_queries(EMBEDDINGS, GROUPS, direction, 3, num_queries=1000, num_retrieved=10)
    measured = retrieval.retrieve(EMBEDDINGS, GROUPS, 3)[direction]
    assert len(shown) == measured["num_queries"]
    assert {query.pool_size for query in shown} == {measured["pool_size"]}
    for k in (1, 5, 10):
        assert np.mean([query.first_match <= k for query in shown]) == pytest.approx(measured[f"hit@{k}"])
        assert np.mean([sum(query.matches[:k]) for query in shown]) == pytest.approx(measured[f"mean_hits@{k}"])


def test_matches_are_those_of_verb_and_noun_and_no_query_retrieves_itself():
    for query in retrieval.draw_queries(EMBEDDINGS, GROUPS, "v2a", 0, num_queries=20):
        assert query.matches == [GROUPS[i] == GROUPS[query.query] for i in query.retrieved]
        assert query.query not in query.retrieved
        assert len(query.retrieved) == 5


def test_queries_are_drawn_by_the_seed_and_not_by_how_well_they_do():
    perfect = {tower: np.eye(12)[GROUPS] for tower in EMBEDDINGS}
    drawn = [
        [query.query for query in retrieval.draw_queries(e, GROUPS, "a2l", seed, num_queries=4)]
        for e, seed in ((EMBEDDINGS, 0), (perfect, 0), (EMBEDDINGS, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_where_no_group_has_three_clips_there_are_no_queries():
    alone = {tower: value[:5] for tower, value in EMBEDDINGS.items()}
    assert retrieval.draw_queries(alone, np.arange(5), "v2a", 0, num_queries=4) == []


def test_groups_are_of_sounding_clips_with_verb_and_noun():
    labels, verbs, nouns = np.array([1, 1, 0, 1, 1, 1]), np.array([3, 3, 3, -1, 3, 2]), np.array([5, 5, 5, 5, -1, 5])
    rows, groups = retrieval.named_groups(labels, verbs, nouns)
    assert rows.tolist() == [0, 1, 5]
    assert groups[0] == groups[1] != groups[2]


def test_verbs_are_ranked_by_score_as_by_rate():
    verbs = np.repeat([4, 1, 9, 2, -1], (10, 10, 10, 4, 10))
    labels = np.concatenate([[1] * 2 + [0] * 8, [1] * 5 + [0] * 5, [1] * 9 + [0], [1] * 4, [1] * 10])
    scores = np.repeat([0.1, 0.2, 0.3, 0.9, -5.0], (10, 10, 10, 4, 10))
    found = discovery.by_verb(scores, labels, verbs)
    assert found.verb_ids.tolist() == [1, 4, 9]  # verb 2 has only four clips
    np.testing.assert_allclose(found.rates, [0.5, 0.2, 0.9])
    np.testing.assert_allclose(found.scores, [0.2, 0.1, 0.3])
    assert found.counts.tolist() == [10, 10, 10]
    assert found.spearman == pytest.approx(1.0)
    assert discovery.by_verb(-scores, labels, verbs).spearman == pytest.approx(-1.0)


def test_too_few_verbs_have_no_correlation():
    found = discovery.by_verb(np.arange(12.0), np.arange(12) % 2, np.repeat([0, 1], 6))
    assert len(found.verb_ids) == 2
    assert np.isnan(found.spearman)
    assert discovery.by_verb(np.arange(5.0), np.arange(5) % 2, np.zeros(5, int)).counts.tolist() == [5]
    assert len(discovery.by_verb(np.arange(3.0), np.array([0, 1, 0]), np.full(3, -1)).verb_ids) == 0
