"""Metrics equal scikit-learn's, ties included; intervals cover the truth; chance levels are those of a random order."""

import numpy as np
import pytest
import sklearn.metrics

from mc3_jax.evals import comparison, controls, discovery, metrics, retrieval

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 200)
SCORES = np.round(RNG.normal(size=200) + LABELS, 1)  # rounded: many ties


def test_metrics_equal_scikit_learns_with_ties():
    assert metrics.roc_auc(LABELS, SCORES) == pytest.approx(sklearn.metrics.roc_auc_score(LABELS, SCORES), abs=1e-12)
    expected = sklearn.metrics.average_precision_score(LABELS, SCORES)
    assert metrics.average_precision(LABELS, SCORES) == pytest.approx(expected, abs=1e-12)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(LABELS, SCORES)
    ours = metrics.pr_curve(LABELS, SCORES)
    np.testing.assert_allclose(ours[0][1:], recall[:-1][::-1])
    np.testing.assert_allclose(ours[1][1:], precision[:-1][::-1])
    # scikit-learn's curve always begins at a precision of 1, so that equal scores would get more than chance.
    assert (ours[0][0], ours[1][0]) == (0, precision[-2])
    area = sklearn.metrics.auc(recall[:-1], precision[:-1]) + recall[-2] * precision[-2]
    assert metrics.pr_auc_trapezoid(LABELS, SCORES) == pytest.approx(area, abs=1e-12)
    assert metrics.pr_auc_trapezoid(LABELS, np.zeros(200)) == pytest.approx(LABELS.mean(), abs=1e-12)


def test_integer_weights_are_repeated_samples():
    weights = RNG.integers(0, 4, 200)
    repeated = np.repeat(np.arange(200), weights)
    for metric in (metrics.roc_auc, metrics.average_precision):
        assert metric(LABELS, SCORES, weights)[0] == pytest.approx(
            metric(LABELS[repeated], SCORES[repeated]), abs=1e-12
        )


@pytest.mark.parametrize(
    ("labels", "scores"), [(np.ones(3, int), np.zeros(3)), (np.array([0, 1]), np.array([0, np.nan]))]
)
def test_undefined_metrics_are_refused(labels, scores):
    with pytest.raises(ValueError, match=r"both 0 and 1|not finite"):
        metrics.roc_auc(labels, scores)


def test_a_score_that_knows_only_the_group_is_worth_nothing_within_groups():
    groups = RNG.integers(0, 5, 500)
    labels = (RNG.random(500) < np.array([0.1, 0.3, 0.5, 0.7, 0.9])[groups]).astype(int)
    assert metrics.roc_auc(labels, groups.astype(float)) > 0.7
    assert metrics.within_group_roc_auc(labels, groups.astype(float), groups)[0] == 0.5


def test_groups_count_by_their_samples():
    labels = np.array([1, 0, 1, 0, 0, 1, 1, 1])
    scores = np.array([0.9, 0.1, 0.1, 0.9, 0.8, 0.7, 0.5, 0.3])  # areas 1 and 0; none with a single class
    groups = np.array([0, 0, 1, 1, 1, 1, 2, 2])
    assert metrics.within_group_roc_auc(labels, scores, groups) == (pytest.approx(2 / 6), 6)
    weights = np.array([[3.0, 3, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]])  # second: a group without negatives
    mean, used = metrics.within_group_roc_auc(labels, scores, groups, weights)
    np.testing.assert_allclose(mean, [6 / 10, 1])
    np.testing.assert_allclose(used, [10, 2])


def draw(videos, num, seed):
    """Returns how often each clip occurs in each resampling, [num, n]."""
    drawn = []
    metrics.bootstrap_interval(lambda weights: drawn.append(weights) or weights[:, 0], videos, num, seed)
    return np.concatenate(drawn)


def test_an_interval_holds_95_percent_of_what_the_resamplings_give():
    videos = np.arange(50)
    weights = draw(videos, 1000, 3)
    found = metrics.bootstrap_interval(lambda weights: weights[:, 7] + 0.001 * weights[:, 8], videos, 1000, 3)
    values = weights[:, 7] + 0.001 * weights[:, 8]
    np.testing.assert_allclose(found, np.percentile(values, [2.5, 97.5]))


@pytest.mark.parametrize("per_video", [1, 3])
def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says(per_video):
    videos = np.repeat(np.arange(120 // per_video), per_video)
    labels = videos % 2  # clips of a video have one label and nearly the same score
    covered = {"videos": 0, "clips": 0}
    for trial in range(100):
        rng = np.random.default_rng(trial)
        scores = rng.normal(size=120 // per_video)[videos] + 1e-3 * rng.normal(size=120) + labels  # AUC: Φ(1 / √2)
        for name, drawn in (("videos", videos), ("clips", np.arange(120))):
            low, high = metrics.bootstrap_interval(lambda w, y=labels, s=scores: metrics.roc_auc(y, s, w), drawn, 300, trial)
            covered[name] += low <= 0.7602 <= high
    assert 88 <= covered["videos"] <= 100
    assert covered["clips"] < 80 or per_video == 1  # why whole videos are drawn


def test_videos_are_drawn_whole_and_clips_of_a_few_by_themselves():
    names = np.array(["b", "a", "b", *"cdefghijk", "b"])
    weights = draw(names, 200, 0)
    for clip in (2, -1):
        np.testing.assert_array_equal(weights[:, 0], weights[:, clip])
    np.testing.assert_array_equal(weights[:, [0, 1, *range(3, 12)]].sum(1), 11)
    assert (weights.mean(0) > 0.7).all()
    for few in (np.zeros(12, int), np.minimum(np.arange(12), 8)):
        np.testing.assert_array_equal(draw(few, 20, 0), draw(np.arange(12), 20, 0))


def test_a_resampling_that_lost_a_class_does_not_count():
    rng = np.random.default_rng(0)
    labels = np.r_[np.zeros(3, int), np.ones(397, int)]
    scores = labels * 3 + rng.standard_normal(400)
    weights = np.ones((2, 400))
    weights[1, :3] = 0
    assert np.isnan(metrics.roc_auc(labels, scores, weights)).tolist() == [False, True]
    assert np.isnan(metrics.average_precision(1 - labels, -scores, weights)).tolist() == [False, True]
    low, high = metrics.bootstrap_interval(lambda w: metrics.roc_auc(labels, scores, w), np.arange(400), 500, 0)
    assert 0.9 < low < high <= 1


def test_verbs_that_always_or_never_sound_do_not_affect_other_metrics():
    labels, verbs = np.array([0, 0, 1, 1] * 10), np.array([0, 0, 1, 1] * 10)
    scores = np.random.default_rng(0).standard_normal(40) + labels
    videos = np.arange(40)
    found = discovery.discover(scores, labels, verbs, videos, num_bootstrap=20, seed=0)
    assert found["within_verb_roc_auc"] is None
    assert found["roc_auc"] == metrics.roc_auc(labels, scores)
    leads = comparison.leads(
        {"a": scores[None], "b": -scores[None]}, "a", labels, verbs, videos, {}, num_bootstrap=20, seed=0
    )["b"]  # fmt: skip
    assert set(leads) == {"roc_auc", "average_precision"}


def test_the_margin_over_controls_inverts_a_control_below_chance():
    scores = RNG.normal(size=200) + 2 * LABELS
    upside_down = {"bad": -(RNG.normal(size=200) + LABELS)}
    result = discovery.compare(scores, upside_down, LABELS, np.arange(200), num_bootstrap=200, seed=0)
    assert result["best_control_roc_auc"] > 0.6
    assert result["margin_interval"][0] < result["margin"] < result["margin_interval"][1]


@pytest.mark.parametrize(
    ("margin", "interval", "verdict"),
    [
        (0.1216, [0.071, 0.168], "+0.122, 95 % interval [+0.071, +0.168], which lies above 0: AV is ahead."),
        (-0.0133, [-0.18, 0.0911], "-0.013, 95 % interval [-0.180, +0.091], which contains 0: no evidence of a lead."),
        (0.02, [-0.01, 0.05], "+0.020, 95 % interval [-0.010, +0.050], which contains 0: no evidence of a lead."),
        (0.02, [0.0, 0.05], "+0.020, 95 % interval [+0.000, +0.050], which contains 0: no evidence of a lead."),
        (-0.1, [-0.2, -0.05], "-0.100, 95 % interval [-0.200, -0.050], which lies below 0: AV is behind."),
    ],
)
def test_a_margin_is_called_a_lead_only_where_its_interval_lies_above_zero(margin, interval, verdict):
    found = {"controls": ["loudness", "onset_strength"], "best_control_roc_auc": 0.55, "margin": margin}
    said = discovery.describe_margin(found | {"margin_interval": interval})
    assert said == f"ROC-AUC of AV minus that of the better of loudness and onset strength (0.550): {verdict}"


def test_the_score_of_a_pair_is_the_cosine_of_its_two_letters_modalities():
    embeddings = {
        "audio": np.array([[1.0, 0], [0.6, 0.8]]),
        "video": np.array([[0, 1.0], [0, 1]]),
        "text": np.array([[-1.0, 0], [0.8, 0.6]]),
    }
    found = {pair: scores.tolist() for pair, scores in discovery.similarities(embeddings).items()}
    assert found == {"av": [0, 0.8], "al": [-1, pytest.approx(0.96)], "vl": [0, 0.6]}


def test_the_verb_prior_of_a_clip_does_not_use_its_label():
    labels = RNG.integers(0, 2, 2000)
    assert controls.verb_prior_roc_auc(np.arange(2000), labels) == 0.5  # a verb per clip: nothing to learn from others


def test_groups_are_halved_with_the_odd_one_to_the_queries_and_pairs_left_out():
    groups = np.array([0] * 5 + [1] * 2 + [2] * 4)
    queries, pool = retrieval.split_groups(groups, 0)
    assert sorted(groups[queries]) == [0, 0, 0, 2, 2]
    assert sorted(groups[pool]) == [0, 0, 2, 2]
    assert not set(queries) & set(pool)


def test_retrieval_chance_is_that_of_a_random_order():
    groups = RNG.integers(0, 12, 150)
    queries, pool = retrieval.split_groups(groups, 0)
    same = groups[queries][:, None] == groups[pool][None]
    chance = retrieval.chance_levels(same.sum(1), len(pool))
    hits = np.stack([RNG.permuted(same, axis=1)[:, :5].sum(1) for _ in range(2000)])
    assert chance["hit@5"] == pytest.approx((hits > 0).mean(), abs=0.01)
    assert chance["mean_hits@5"] == pytest.approx(hits.mean(), abs=0.01)
    assert chance["recall@5"] == pytest.approx((hits / same.sum(1)).mean(), abs=0.01)


def test_perfect_embeddings_retrieve_everything():
    groups = np.repeat(np.arange(6), 8)
    one_hot = np.eye(6)[groups]
    result = retrieval.retrieve({"audio": one_hot, "video": one_hot, "text": one_hot}, groups, 0)
    assert result["v2a"]["hit@1"] == 1.0
    assert result["l2a"]["recall@5"] == 1.0
    assert result["a2v"]["pool_size"] == 24
