"""Classification of sounds: the metrics of EPIC-Sounds (Huh et al., ICASSP 2023), as its evaluation code computes them.

Follows `utils/metrics.py` of epic-kitchens/epic-sounds-annotations: top-k in percent; mean class accuracy, mean average
precision and mean area under the ROC curve over the classes that occur. Pure numpy.
"""

import numpy as np
from jaxtyping import Float, Int

from mc3_jax.evals import metrics


def top_k_accuracy(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], k: int) -> float:
    """Returns the share of samples, in percent, whose label is among the `k` highest scores.

    Args:
      scores: Score of each sample for each class. Ties go to the lower class.
      labels: Class of each sample.
      k: From 1 to the number of classes.

    Raises:
      ValueError: `k` is not from 1 to the number of classes.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k = {k}: must be from 1 to {scores.shape[1]}, the number of classes")
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return 100.0 * float(np.mean(np.any(highest == labels[:, None], axis=1)))


def classify(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Returns top-1 and top-5 accuracy in percent, and mean class accuracy, mAP and mAUC from 0 to 1.

    The means are over the classes that occur. With fewer than five classes, top-5 counts all of them.

    Args:
      scores: Score of each sample for each class, e.g. probabilities.
      labels: Class of each sample, 0 to c - 1.

    Raises:
      ValueError: No samples, another number of labels than of scores, a label that is no class, scores that are not finite,
        or a single class throughout.
    """
    num_classes = scores.shape[1]
    if len(labels) == 0 or len(labels) != len(scores):
        raise ValueError(f"{len(scores)} rows of scores for {len(labels)} labels: the numbers must be equal and not 0")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: the scores' classes are 0 to {num_classes - 1}")
    occurring = np.unique(labels)
    if len(occurring) < 2:
        raise ValueError(f"all {len(labels)} labels are class {occurring[0]}: at least two classes are needed")
    hit = np.argmax(scores, axis=1) == labels
    of_class = [((labels == c).astype(np.int64), scores[:, c]) for c in occurring]
    return {
        "top1": top_k_accuracy(scores, labels, 1),
        "top5": top_k_accuracy(scores, labels, min(5, num_classes)),
        "mean_class_accuracy": float(np.mean([hit[labels == c].mean() for c in occurring])),
        "mAP": float(np.mean([metrics.average_precision(*pair) for pair in of_class])),
        "mAUC": float(np.mean([metrics.roc_auc(*pair) for pair in of_class])),
    }
