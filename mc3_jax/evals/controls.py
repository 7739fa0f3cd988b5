"""Scores that know nothing of the method: what it has to beat to have learned anything."""

import librosa
import numpy as np
from jaxtyping import Float, Int

from mc3_jax.evals import metrics

NUM_FOLDS = 10


def loudness(audio: Int[np.ndarray, "b samples"]) -> Float[np.ndarray, " b"]:
    """Returns the RMS level of each clip in dB of full scale (int16)."""
    power = np.mean((audio.astype(np.float64) / 32768.0) ** 2, axis=1)
    return 10.0 * np.log10(power + 1e-10)


def onset_strength(audio: Int[np.ndarray, "b samples"], sample_rate_hz: int) -> Float[np.ndarray, " b"]:
    """Returns the strongest onset of each clip: the maximum of librosa's spectral-flux envelope.

    Args:
      audio: int16.
      sample_rate_hz: Of it.
    """
    waves = audio.astype(np.float32) / 32768.0
    # The mel filters are made once for all clips. The decibels are each clip's own: librosa cuts 80 below the loudest.
    powers = librosa.feature.melspectrogram(y=waves, sr=sample_rate_hz)
    levels = [librosa.power_to_db(power) for power in powers]
    return np.array([librosa.onset.onset_strength(S=level, sr=sample_rate_hz).max() for level in levels], np.float64)


def verb_prior_roc_auc(
    verb_ids: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], seed: int = 0
) -> float | None:
    """Returns the ROC-AUC of how often a clip's verb sounds, learned from other clips than those it is measured on.

    The clips are cut into folds, each with its share of both labels. A verb's rate is learned from the other folds and
    clips are ranked within their own: the other folds' rate is low where the fold's own is high, so that ranked across
    folds a verb that tells nothing would come out far below 0.5. The folds' areas are averaged by their clips.

    None where no verb is known, or where a label has fewer than two clips, so that there are no two folds.

    Args:
      verb_ids: Of the clips; -1 where unknown, for which the overall rate stands.
      labels: 0 or 1.
      seed: Of the folds.
    """
    num_folds = min(NUM_FOLDS, int((labels == 1).sum()), int((labels == 0).sum()))
    if num_folds < 2 or not np.any(verb_ids >= 0):
        return None
    rng = np.random.default_rng(seed)
    fold = np.empty(len(labels), np.int64)
    for label in (0, 1):
        same = np.flatnonzero(labels == label)
        fold[rng.permutation(same)] = np.arange(len(same)) % num_folds
    prior = np.empty(len(labels))
    for k in range(num_folds):
        rest, own = fold != k, fold == k
        mean = labels[rest].mean()
        prior[own] = mean
        for verb in np.unique(verb_ids[own & (verb_ids >= 0)]):
            same = rest & (verb_ids == verb)
            # Two clips' worth of the overall rate, so that a rare verb is not taken at its word.
            prior[own & (verb_ids == verb)] = (labels[same].sum() + 2 * mean) / (same.sum() + 2)
    return float(metrics.within_group_roc_auc(labels, prior, fold)[0])
