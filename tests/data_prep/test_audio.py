"""The sound of a clip is what is heard at its time, whatever is cut with it."""

import numpy as np
import pytest

from tests.data_prep.test_media import assert_in_time, cut, lag_of, sound_at, write


@pytest.mark.parametrize("rate", [44_100, 48_000])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("start_s", [0.0, 1.3])
def test_audio_is_placed_by_its_time_stamps_at_any_rate_and_start(tmp_path, rate, layout, start_s):
    options = {"movie_timescale": str(rate)}
    write(tmp_path / "a.mp4", rate=rate, layout=layout, audio_span=(start_s, None), options=options)
    early, *late = cut(tmp_path / "a.mp4", (1.0, 1.9, 2.3456))
    for time_s, part in zip((1.9, 2.3456), late, strict=True):
        assert_in_time(part, time_s, np.arange(120) / 30)
    if start_s:
        assert early == "audio does not cover the clip"
    else:
        assert_in_time(early, 1.0, np.arange(120) / 30)


def test_channels_are_averaged_and_full_scale_is_kept(tmp_path):
    write(tmp_path / "a.mov", audio="pcm_s16le", rate=16_000, layout="stereo", right=0.0, seconds=2.0)
    (part,) = cut(tmp_path / "a.mov", (0.6,))
    np.testing.assert_allclose(part.audio, sound_at(0.1 + np.arange(24_000) / 16_000) * 16_384, atol=1.0)


@pytest.mark.parametrize(("rate", "audio"), [(44_100, "aac"), (44_100, "flac"), (48_000, "libopus")])
def test_matroskas_rounded_time_stamps_leave_no_holes(tmp_path, rate, audio):
    # 1,024 samples of 44.1 kHz are 23.2 ms; Matroska says 23 or 24.
    write(tmp_path / "a.mkv", rate=rate, audio=audio, seconds=10.0)
    times = (0.5, 1.2, 9.0)
    for time_s, part in zip(times, cut(tmp_path / "a.mkv", times), strict=True):
        assert_in_time(part, time_s, np.arange(300) / 30, lag=8.6, tick_s=0.001)  # half a millisecond is eight samples


def test_the_first_clip_and_the_last_are_whole(tmp_path):
    write(tmp_path / "a.mp4", seconds=4.0)
    first, last = cut(tmp_path / "a.mp4", (0.5, 3.0))
    assert_in_time(first, 0.5, np.arange(120) / 30)
    assert_in_time(last, 3.0, np.arange(120) / 30)
    # The codec's first packet primes the decoder: without it, what follows is wrong for 20 ms.
    assert lag_of(first.audio[:320], 0.0)[1] > 0.97
    assert lag_of(last.audio[-320:], 3.98)[1] > 0.97


def test_after_a_hole_the_sound_is_still_in_time(tmp_path):
    write(tmp_path / "a.mp4", hole=(1.5, 1.6), rate=44_100)
    before, after = cut(tmp_path / "a.mp4", (0.5, 2.2))
    assert_in_time(before, 0.5, np.arange(120) / 30)
    assert_in_time(after, 2.2, np.arange(120) / 30)
