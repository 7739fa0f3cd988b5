"""Classification metrics equal those that EPIC-Sounds' own code has written to a file."""

import numpy as np
import pytest

from mc3_jax.evals import classification
from tests import golden_models


def test_metrics_are_epic_sounds():
    golden = np.load(golden_models.GOLDEN / "epic_sounds_metrics.npz")
    found = classification.classify(golden["probabilities"], golden["labels"])
    # The original counts top-k in float32.
    assert found["top1"] == pytest.approx(float(golden["top1"]), abs=1e-6 * 100)
    assert found["top5"] == pytest.approx(float(golden["top5"]), abs=1e-6 * 100)
    for ours, theirs in (("mean_class_accuracy", "mCA"), ("mAP", "mAP"), ("mAUC", "mAUC")):
        assert found[ours] == pytest.approx(float(golden[theirs]), abs=1e-9), ours


def test_classes_that_do_not_occur_count_nowhere():
    scores = np.eye(6)[[0, 0, 1, 5]] + 0.01 * np.random.default_rng(0).random((4, 6))
    assert set(classification.classify(scores, np.array([0, 0, 1, 5])).values()) == {100.0, 1.0}


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), "labels from 0 to 3: the scores' classes are 0 to 2"),
        (np.zeros((2, 3)), np.array([1, 1]), "all 2 labels are class 1"),
        (np.zeros((0, 3)), np.zeros(0, int), "0 rows of scores for 0 labels"),
        (np.full((2, 3), np.nan), np.array([0, 1]), "not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        classification.classify(scores, labels)
