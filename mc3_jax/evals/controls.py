"""Control scores made without any model: a method that doesn't beat them has learned nothing useful."""

import librosa
import numpy as np
from jaxtyping import Float, Int

from mc3_jax.evals import metrics

NUM_FOLDS = 10
_FFT_SAMPLES = 2048  # librosa's default


def loudness(audio: Int[np.ndarray, "b samples"]) -> Float[np.ndarray, " b"]:
    """Returns the RMS level of each clip in dB relative to full scale (int16), at least -100."""
    power = np.mean((audio.astype(np.float64) / 32768.0) ** 2, axis=1)
    return 10.0 * np.log10(power + 1e-10)


def onset_strength(audio: Int[np.ndarray, "b samples"], sample_rate_hz: int) -> Float[np.ndarray, " b"]:
    """Returns the strongest onset of each clip: the maximum of librosa's spectral-flux envelope.

    Args:
      audio: int16 samples.
      sample_rate_hz: Sample rate of `audio`.
    """
    # What librosa.feature.melspectrogram computes, but clip by clip and with products in float64: its own product in float32
    # for many clips at once gives a clip other last bits when evaluation runs in more processes.
    filters = librosa.filters.mel(sr=sample_rate_hz, n_fft=_FFT_SAMPLES).astype(np.float64)
    strongest = []
    for wave in audio.astype(np.float32) / 32768.0:
        power = np.abs(librosa.stft(wave, n_fft=_FFT_SAMPLES)) ** 2
        level = librosa.power_to_db(filters @ power)
        strongest.append(librosa.onset.onset_strength(S=level, sr=sample_rate_hz).max())
    return np.array(strongest, np.float64)


def verb_prior_roc_auc(
    verb_ids: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], seed: int = 0
) -> float | None:
    """Returns the cross-validated ROC-AUC of a score that knows only how often each verb sounds.

    The clips are split into folds, stratified by label. A verb's rate is estimated on the other folds, and clips are ranked
    only within their own fold. Ranking across folds would be biased: where a fold's own rate is high, that of the other folds
    is low, and a verb that tells nothing would come out far below 0.5. The areas are averaged over folds, weighted by clips.

    None if no verb is known, or if a label has fewer than two clips, which is too few for two folds.

    Args:
      verb_ids: Verb of each clip; -1 where unknown, which is scored with the overall rate.
      labels: 0 or 1.
      seed: Seed of the split into folds.
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
            # Two pseudo-clips at the overall rate: the few clips of a rare verb are poor evidence.
            prior[own & (verb_ids == verb)] = (labels[same].sum() + 2 * mean) / (same.sum() + 2)
    return float(metrics.within_group_roc_auc(labels, prior, fold)[0])
