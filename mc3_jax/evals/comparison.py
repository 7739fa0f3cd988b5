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
    """Returns "lead", a metric's mean over our seeds minus its mean over theirs, and its 95 % "interval" [low, high].

    Each resampling of the videos is applied to all seeds of both methods, so that what they have in common cancels. The
    interval covers the choice of videos only, not that of seeds.

    Args:
      ours, theirs: Scores of the clips, one row for each seed.
      labels: 0 or 1.
      videos: Video of each clip, by number or name.
      metric: Function of (labels, scores, weights [r, n]), e.g. `metrics.roc_auc`.
      num_bootstrap, seed: Number of resamplings and their seed.
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
    """Returns other method → measure → the `lead` of our method over it.

    The measures are `roc_auc`, `average_precision`, `within_verb_roc_auc` if any verb has clips of both labels, and for each
    region `roc_auc_region_NAME`, which ranks all positives against the negatives of that region alone.

    Args:
      scores: Method → scores of the clips, one row for each seed.
      ours: Name of the method that is compared with the others.
      labels: 0 or 1.
      verb_ids: Verb of each clip: the groups of the within-verb average.
      videos: Video of each clip, by number or name.
      regions: Region → whether each clip lies in it, bool [n]; regions without negatives are skipped.
      num_bootstrap, seed: Number of resamplings for each interval and their seed.
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
