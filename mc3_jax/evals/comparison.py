"""Is one method better than another on the same clips? Paired bootstrap over videos, averaged over seeds."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped

from mc3_jax.evals import metrics

Metric = Callable[..., np.ndarray]  # (labels, scores, weights [r, n]) -> [r]


def lead(
    ours: Float[np.ndarray, "s n"],
    theirs: Float[np.ndarray, "t n"],
    labels: Int[np.ndarray, " n"],
    videos: Shaped[np.ndarray, " n"],
    metric: Metric,
    *,
    num_bootstrap: int,
    seed: int,
) -> dict[str, object]:
    """Returns by how much the mean of a metric over our seeds is above that over theirs, and its 95 % interval.

    Every resampling of the videos meets all seeds of both, so what is common to them cancels. The interval is that of the
    videos: how much other seeds would differ is not in it.

    Args:
      ours, theirs: Scores of the clips, one row for each seed.
      labels: 0 or 1.
      videos: Which video each clip is of.
      metric: Takes weights [r, n], e.g. `metrics.roc_auc`.
      num_bootstrap, seed: Of the interval.
    """

    def difference(weights):
        mine, other = (np.mean([metric(labels, row, weights) for row in rows], axis=0) for rows in (ours, theirs))
        return mine - other

    low, high = metrics.bootstrap_interval(difference, videos, num_bootstrap, seed)
    return {"lead": float(difference(np.ones((1, len(labels))))[0]), "interval": [low, high]}


def leads(
    scores: Mapping[str, Float[np.ndarray, "s n"]],
    ours: str,
    labels: Int[np.ndarray, " n"],
    verb_ids: Int[np.ndarray, " n"],
    videos: Shaped[np.ndarray, " n"],
    regions: Mapping[str, np.ndarray],
    *,
    num_bootstrap: int,
    seed: int,
) -> dict[str, dict[str, dict]]:
    """Returns method → measure → `lead` of ours over it.

    Measures are `roc_auc`, `average_precision`, `within_verb_roc_auc` where a verb has both labels and, for each region,
    `roc_auc_region_NAME`: positives against the negatives of that region alone.

    Args:
      scores: Of every method, one row for each seed.
      ours: Method compared with the others.
      labels: 0 or 1.
      verb_ids: Groups of the within-verb average.
      videos: Which video each clip is of.
      regions: Name → whether a clip lies there, bool [n]; a region without negatives is left out.
      num_bootstrap, seed: Of the intervals.
    """
    everyone = np.ones(len(labels), bool)
    measures: dict[str, tuple[Metric, np.ndarray]] = {
        "roc_auc": (metrics.roc_auc, everyone),
        "average_precision": (metrics.average_precision, everyone),
    }

    def within(labels, scores, weights):
        return metrics.within_group_roc_auc(labels, scores, verb_ids, weights)[0]

    if metrics.within_group_roc_auc(labels, labels, verb_ids)[1]:
        measures["within_verb_roc_auc"] = (within, everyone)
    for name, inside in regions.items():
        chosen = (labels == 1) | inside
        if (labels[chosen] == 0).any():
            measures[f"roc_auc_region_{name}"] = (metrics.roc_auc, chosen)
    return {
        method: {
            name: lead(scores[ours][:, chosen], rows[:, chosen], labels[chosen], videos[chosen], metric,
                       num_bootstrap=num_bootstrap, seed=seed)
            for name, (metric, chosen) in measures.items()
        }
        for method, rows in scores.items() if method != ours
    }  # fmt: skip
