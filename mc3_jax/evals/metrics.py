"""Ranking metrics with ties, weights and bootstrap intervals. Pure numpy."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

MIN_VIDEOS = 10  # that intervals are made of


def _grouped(labels, scores, weights):
    """Returns weights of positives and negatives summed over equal scores, highest score first: two [r, g]."""
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError(f"labels must hold both 0 and 1, got {sorted(set(labels.tolist()))}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite")
    weights = np.ones((1, len(labels))) if weights is None else np.atleast_2d(weights)
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    positive = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (1 - labels[order]), starts, axis=1)
    return positive, negative


def _ratio(above, below):
    """Returns above / below, NaN where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _unwrap(values, weights):
    return float(values[0]) if weights is None else values


def roc_auc(labels: Int[np.ndarray, " n"], scores: Num[np.ndarray, " n"], weights=None):
    """Returns the area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
      labels: 0 or 1; both occur.
      scores: Higher means more likely 1.
      weights: Of the samples [n] or [r, n]; with it an array [r] is returned instead of a float, NaN where the weights
        leave one class only.

    Raises:
      ValueError: One class only, or scores that are not finite.
    """
    positive, negative = _grouped(labels, scores, weights)
    below = negative.sum(1, keepdims=True) - np.cumsum(negative, 1)
    pairs = positive.sum(1) * negative.sum(1)
    area = _ratio((positive * (below + 0.5 * negative)).sum(1), pairs)
    return _unwrap(area, weights)


def average_precision(labels: Int[np.ndarray, " n"], scores: Num[np.ndarray, " n"], weights=None):
    """Returns the average precision Σ (R_k - R_{k-1}) P_k; arguments and errors as `roc_auc`, NaN without a positive."""
    positive, negative = _grouped(labels, scores, weights)
    hits, seen = np.cumsum(positive, 1), np.cumsum(positive + negative, 1)
    area = _ratio((positive * hits / np.maximum(seen, 1e-12)).sum(1), positive.sum(1))
    return _unwrap(area, weights)


def roc_curve(labels, scores) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
    """Returns (false positive rate, true positive rate), from (0, 0) to (1, 1)."""
    positive, negative = (np.r_[0.0, np.cumsum(x[0])] for x in _grouped(labels, scores, None))
    return negative / negative[-1], positive / positive[-1]


def pr_curve(labels, scores) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
    """Returns (recall, precision), recall rising from 0, where precision is that of the first threshold."""
    positive, negative = (np.cumsum(x[0]) for x in _grouped(labels, scores, None))
    precision = positive / (positive + negative)
    return np.r_[0.0, positive / positive[-1]], np.r_[precision[0], precision]


def pr_auc_trapezoid(labels, scores) -> float:
    """Returns the area under straight lines between PR points: what public code calls PR-AUC; too high by a little."""
    recall, precision = pr_curve(labels, scores)
    return float(np.trapezoid(precision, recall))


def within_group_roc_auc(labels, scores, groups, weights=None):
    """Returns the mean over groups of the ROC-AUC within each, weighted by its samples, and the number of samples used.

    A score that knows nothing but the group gets 0.5. Groups of one class only are left out; without others the mean is NaN.

    Args:
      labels, scores: As for `roc_auc`.
      groups: Of the samples, [n].
      weights: Of the samples [n] or [r, n]; with it arrays [r] are returned instead of numbers, and a group counts with the
        weight of its samples.
    """
    rows = np.ones((1, len(labels))) if weights is None else np.atleast_2d(weights)
    total, used = np.zeros(len(rows)), np.zeros(len(rows))
    for group in np.unique(groups):
        inside = groups == group
        if not 0 < labels[inside].sum() < inside.sum():
            continue
        here = rows[:, inside]
        both = np.minimum(here @ labels[inside], here @ (1 - labels[inside])) > 0
        size = np.where(both, here.sum(1), 0.0)
        total += np.where(both, size * roc_auc(labels[inside], scores[inside], here), 0.0)
        used += size
    mean = _ratio(total, used)
    return (float(mean[0]), int(used[0])) if weights is None else (mean, used)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], videos: Shaped[np.ndarray, " n"], num_bootstrap: int, seed: int
) -> tuple[float, float]:
    """Returns the 95 % percentile interval of a statistic of clips; a resampling where it is NaN does not count.

    Whole videos are drawn with replacement, each with all its clips. Clips of one video are alike, and drawn one by one they
    would give intervals as narrow as if each were of another video (a cluster bootstrap; Cameron, Gelbach and Miller, 2008).
    Of fewer than `MIN_VIDEOS` that says nothing: then clips are drawn one by one.

    Args:
      statistic: Takes how often each clip occurs in some resamplings, [r, n], and returns [r]. A difference of two metrics
        under the same weights is a paired bootstrap.
      videos: Which video each clip is of, by number or name.
      num_bootstrap: Resamplings.
      seed: Of the draw.
    """
    names, video = np.unique(videos, return_inverse=True)
    if len(names) < MIN_VIDEOS:
        video = np.arange(len(videos))
    num = int(video.max()) + 1
    counts = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_bootstrap)
    chunks = np.array_split(counts, max(num_bootstrap * len(videos) // 10_000_000, 1))
    values = np.concatenate([statistic(chunk[:, video].astype(np.float64)) for chunk in chunks])
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
