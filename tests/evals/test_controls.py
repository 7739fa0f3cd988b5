"""The controls against librosa and by hand, clip by clip."""

import librosa
import numpy as np

from mc3_jax.evals import controls


def test_onset_strength_is_librosas_of_each_clip_alone():
    rng = np.random.default_rng(0)
    loud = rng.normal(0, 9000, 24_000)
    clicks = np.where(np.arange(24_000) % 6000 < 40, loud, 0.0)
    audio = np.stack([loud, clicks, 0.001 * clicks, np.zeros(24_000)]).round().astype(np.int16)
    alone = [librosa.onset.onset_strength(y=clip / np.float32(32768), sr=16_000).max() for clip in audio]
    np.testing.assert_allclose(controls.onset_strength(audio), alone, rtol=1e-5)
    assert alone[1] > 2 * alone[0]


def test_loudness_is_the_rms_in_db_of_full_scale():
    audio = np.stack([np.full(100, 16384), np.full(100, -3277), np.zeros(100)]).astype(np.int16)
    np.testing.assert_allclose(controls.loudness(audio), [-6.02, -20.0, -100.0], atol=0.01)
