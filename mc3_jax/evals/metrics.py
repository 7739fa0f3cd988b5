"""Ranking metrics with ties, weights and bootstrap intervals. Pure numpy."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

MIN_VIDEOS = 10  # for intervals by resampling videos


def _grouped(labels, scores, weights):
    """Returns the summed weights of positives and of negatives at each distinct score, highest first, both [r, g]."""
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
    """Returns the area under the ROC curve: the chance that a positive scores above a negative; a tie counts half.

    Args:
      labels: 0 or 1; both must occur.
      scores: Score of each sample; higher means more likely 1.
      weights: Weights of the samples, [n] or [r, n]. With them an array [r] is returned instead of a float, NaN where the
        weights leave one class only.

    Raises:
      ValueError: Labels that are not both 0 and 1, or scores that are not finite.
    """
    positive, negative = _grouped(labels, scores, weights)
    below = negative.sum(1, keepdims=True) - np.cumsum(negative, 1)
    pairs = positive.sum(1) * negative.sum(1)
    area = _ratio((positive * (below + 0.5 * negative)).sum(1), pairs)
    return _unwrap(area, weights)


def average_precision(labels: Int[np.ndarray, " n"], scores: Num[np.ndarray, " n"], weights=None):
    """Returns the average precision Σ (R_k - R_{k-1}) P_k; as for `roc_auc`, but NaN where no positive has weight."""
    positive, negative = _grouped(labels, scores, weights)
    hits, seen = np.cumsum(positive, 1), np.cumsum(positive + negative, 1)
    area = _ratio((positive * hits / np.maximum(seen, 1e-12)).sum(1), positive.sum(1))
    return _unwrap(area, weights)


def roc_curve(labels, scores) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
    """Returns (false positive rate, true positive rate), from (0, 0) to (1, 1)."""
    positive, negative = (np.r_[0.0, np.cumsum(x[0])] for x in _grouped(labels, scores, None))
    return negative / negative[-1], positive / positive[-1]


def pr_curve(labels, scores) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
    """Returns (recall, precision) by rising recall; at recall 0 the precision is that of the first threshold."""
    positive, negative = (np.cumsum(x[0]) for x in _grouped(labels, scores, None))
    precision = positive / (positive + negative)
    return np.r_[0.0, positive / positive[-1]], np.r_[precision[0], precision]


def pr_auc_trapezoid(labels, scores) -> float:
    """Returns the area under the PR curve with straight lines between points: public code's PR-AUC, slightly too high."""
    recall, precision = pr_curve(labels, scores)
    return float(np.trapezoid(precision, recall))


def within_group_roc_auc(labels, scores, groups, weights=None):
    """Returns the mean of the groups' own ROC-AUCs, weighted by their samples, and the number of samples used.

    A score that depends on the group alone gets 0.5. Groups with one class only are skipped; the mean is NaN if all are.

    Args:
      labels, scores: As for `roc_auc`.
      groups: Group of each sample, [n].
      weights: Weights of the samples, [n] or [r, n]. With them arrays [r] are returned instead of numbers, and groups are
        weighted by the weights of their samples.

    Raises:
      ValueError: Scores that are not finite, in a group with both classes.
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
    """Returns the 95 % percentile bootstrap interval of a statistic of clips; resamplings where it is NaN don't count.

    Whole videos are drawn with replacement, each with all its clips (a cluster bootstrap; Cameron, Gelbach and Miller, 2008).
    Clips of one video are alike: drawn one by one, they would give intervals as narrow as if each came from another video.
    Fewer than `MIN_VIDEOS` videos are too few to resample; then clips are drawn one by one.

    Args:
      statistic: Function of the number of times that each clip occurs in each resampling, [r, n], which returns [r]. The
        difference of two metrics under the same weights makes a paired bootstrap.
      videos: Video of each clip, by number or name.
      num_bootstrap: Number of resamplings.
      seed: Seed of the resamplings.
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
