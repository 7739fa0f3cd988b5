"""The controls against librosa and values computed by hand, clip by clip."""

import librosa
import numpy as np
import pytest

from mc3_jax.evals import controls


def test_onset_strength_is_librosas_of_each_clip_alone():
    rng = np.random.default_rng(0)
    loud = rng.normal(0, 9000, 24_000)
    clicks = np.where(np.arange(24_000) % 6000 < 40, loud, 0.0)
    audio = np.stack([loud, clicks, 0.001 * clicks, np.zeros(24_000)]).round().astype(np.int16)
    alone = [librosa.onset.onset_strength(y=clip / np.float32(32768), sr=16_000).max() for clip in audio]
    np.testing.assert_allclose(controls.onset_strength(audio, 16_000), alone, rtol=1e-5)
    assert alone[1] > 2 * alone[0]


def test_onset_strength_does_not_depend_on_the_other_clips_of_a_batch():
    audio = np.random.default_rng(0).normal(0, 3000, (32, 24_000)).round().astype(np.int16)
    together = controls.onset_strength(audio, 16_000).astype(np.float32)
    halves = [controls.onset_strength(half, 16_000).astype(np.float32) for half in np.split(audio, 2)]
    np.testing.assert_array_equal(together, np.concatenate(halves))


def test_loudness_is_the_rms_in_db_of_full_scale():
    audio = np.stack([np.full(100, 16384), np.full(100, -3277), np.zeros(100)]).astype(np.int16)
    np.testing.assert_allclose(controls.loudness(audio), [-6.02, -20.0, -100.0], atol=0.01)


@pytest.mark.parametrize(("num_clips", "num_verbs"), [(12, 3), (100, 5), (1000, 20), (300, 300)])
def test_verbs_without_information_come_out_at_chance(num_clips, num_verbs):
    areas = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(num_clips) < 0.55 * num_clips).astype(np.int64)
        areas.append(controls.verb_prior_roc_auc(rng.integers(0, num_verbs, num_clips), labels, 1000 + seed))
    assert abs(np.mean(areas) - 0.5) < 3 * np.std(areas) / np.sqrt(len(areas)) + 1e-9
    assert abs(np.mean(areas) - 0.5) < 0.1


def test_a_single_verb_has_no_information():
    assert controls.verb_prior_roc_auc(np.zeros(50, np.int64), np.arange(50) % 2) == 0.5


@pytest.mark.parametrize("num_clips", [60, 1000])
def test_verbs_that_sound_more_or_less_often_come_out_above_chance(num_clips):
    rng = np.random.default_rng(0)
    verbs = rng.integers(0, 4, num_clips)
    labels = (rng.uniform(size=num_clips) < np.array([0.1, 0.3, 0.7, 0.9])[verbs]).astype(np.int64)
    assert controls.verb_prior_roc_auc(verbs, labels) > 0.75


def test_an_unknown_verb_counts_as_the_overall_rate():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    half = np.where(rng.uniform(size=200) < 0.5, labels, -1)  # where the verb is known, it is the label
    assert 0.65 < controls.verb_prior_roc_auc(half, labels) < 0.85
    assert controls.verb_prior_roc_auc(np.full(200, -1), labels) is None


@pytest.mark.parametrize("num_positive", [0, 1, 20])
def test_a_label_of_fewer_than_two_clips_leaves_nothing_to_learn_from(num_positive):
    labels = (np.arange(20) < num_positive).astype(np.int64)
    assert controls.verb_prior_roc_auc(np.arange(20) % 3, labels) is None
