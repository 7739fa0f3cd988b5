"""Sounding-action discovery: does the similarity of two modalities predict whether the narrated action sounds? (Sec. 5.1)"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import scipy.stats
from jaxtyping import Float, Int, Shaped

from mc3_jax.evals import metrics

PAIR_MODALITIES = {"av": ("audio", "video"), "al": ("audio", "text"), "vl": ("video", "text")}


def similarities(embeddings: Mapping[str, Float[np.ndarray, "n d"]]) -> dict[str, Float[np.ndarray, " n"]]:
    """Returns pair of `PAIR_MODALITIES` → cosine of the two modalities of each clip.

    Args:
      embeddings: {"audio", "video", "text"}, L2-normalised.
    """
    return {pair: np.sum(embeddings[a] * embeddings[b], axis=1) for pair, (a, b) in PAIR_MODALITIES.items()}


def discover(
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    verb_ids: Int[np.ndarray, " n"],
    videos: Shaped[np.ndarray, " n"],
    *,
    num_bootstrap: int,
    seed: int,
) -> dict[str, object]:
    """Returns the metrics of one score on all labelled clips, with chance levels and counts.

    `within_verb_roc_auc` is None if no verb has clips of both labels.

    Args:
      scores: Score of each clip, higher where it is more likely to sound.
      labels: 0 or 1.
      verb_ids: Verb of each clip: the groups of the within-verb average.
      videos: Video of each clip, by number or name.
      num_bootstrap, seed: Number of resamplings for the 95 % intervals and their seed.
    """
    within, num_within = metrics.within_group_roc_auc(labels, scores, verb_ids)
    interval = {
        name: metrics.bootstrap_interval(lambda w, f=function: f(labels, scores, w), videos, num_bootstrap, seed)
        for name, function in (("roc_auc", metrics.roc_auc), ("average_precision", metrics.average_precision))
    }
    return {
        "roc_auc": metrics.roc_auc(labels, scores),
        "roc_auc_interval": list(interval["roc_auc"]),
        "average_precision": metrics.average_precision(labels, scores),
        "average_precision_interval": list(interval["average_precision"]),
        "pr_auc_trapezoid": metrics.pr_auc_trapezoid(labels, scores),
        "within_verb_roc_auc": within if num_within else None,
        "within_verb_num_clips": num_within,
        "chance": {"roc_auc": 0.5, "average_precision": float(labels.mean())},
        "num_clips": len(labels),
        "num_positive": int(labels.sum()),
    }


def compare(
    scores: Float[np.ndarray, " n"],
    controls: Mapping[str, Float[np.ndarray, " n"]],
    labels: Int[np.ndarray, " n"],
    videos: Shaped[np.ndarray, " n"],
    *,
    num_bootstrap: int,
    seed: int,
) -> dict[str, object]:
    """Returns the margin, a score's ROC-AUC minus the best control's, with its paired bootstrap interval.

    A control that is lower where clips sound has its sign reversed, in favour of the controls. Each resampling compares the
    score with the control that is best in that resampling.

    Args:
      scores: Score of each clip.
      controls: Name → score of each clip.
      labels: 0 or 1.
      videos: Video of each clip, by number or name.
      num_bootstrap, seed: Number of resamplings for the 95 % interval and their seed.
    """

    def best(weights=None):
        areas = [metrics.roc_auc(labels, control, weights) for control in controls.values()]
        return np.max([np.maximum(area, 1 - np.asarray(area)) for area in areas], axis=0)

    def margin(weights):
        return metrics.roc_auc(labels, scores, weights) - best(weights)

    low, high = metrics.bootstrap_interval(margin, videos, num_bootstrap, seed)
    return {
        "controls": sorted(controls),
        "best_control_roc_auc": float(best()),
        "margin": float(metrics.roc_auc(labels, scores) - best()),
        "margin_interval": [low, high],
    }


def describe_margin(found: Mapping) -> str:
    """Returns a sentence with the margin of the AV score over the controls and what its interval means.

    Args:
      found: Result of `compare`.
    """
    low, high = found["margin_interval"]
    if low > 0:
        verdict = "which lies above 0: AV is ahead"
    elif high < 0:
        verdict = "which lies below 0: AV is behind"
    else:
        verdict = "which contains 0: no evidence of a lead"
    names = " and ".join(name.replace("_", " ") for name in found["controls"])
    return (
        f"ROC-AUC of AV minus that of the better of {names} ({found['best_control_roc_auc']:.3f}): {found['margin']:+.3f}, "
        f"95 % interval [{low:+.3f}, {high:+.3f}], {verdict}."
    )


@dataclasses.dataclass(frozen=True)
class Verbs:
    """Mean score of each verb beside the share of its clips that sound.

    Attributes:
      verb_ids: Ids of the verbs with enough clips.
      counts: Number of labelled clips of each verb.
      rates: Share of these clips that sound.
      scores: Mean score of these clips.
      spearman: Rank correlation of rates and scores; NaN with fewer than three verbs or if either is constant.
    """

    verb_ids: Int[np.ndarray, " v"]
    counts: Int[np.ndarray, " v"]
    rates: Float[np.ndarray, " v"]
    scores: Float[np.ndarray, " v"]
    spearman: float


def by_verb(
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    verb_ids: Int[np.ndarray, " n"],
    min_clips: int = 5,
) -> Verbs:
    """Returns the mean score and the true sounding rate of each verb.

    Args:
      scores: Score of each clip.
      labels: 0 or 1.
      verb_ids: Verb of each clip; clips with a negative one, unknown, are skipped.
      min_clips: Verbs with fewer clips are skipped.
    """
    known = verb_ids >= 0
    verbs, place, counts = np.unique(verb_ids[known], return_inverse=True, return_counts=True)
    rates, means = (np.bincount(place, values[known], len(verbs)) / counts for values in (labels, scores))
    enough = counts >= min_clips
    verbs, counts, rates, means = verbs[enough], counts[enough], rates[enough], means[enough]
    ranked = len(verbs) > 2 and len(np.unique(rates)) > 1 and len(np.unique(means)) > 1
    spearman = float(scipy.stats.spearmanr(rates, means).statistic) if ranked else float("nan")
    return Verbs(verbs, counts, rates, means, spearman)
