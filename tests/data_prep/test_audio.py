"""The sound of a clip is what is heard at its time, whichever other clips are cut with it."""

import collections

import numpy as np
import pytest

from data_prep import audio, media
from data_prep.windows import Window
from tests.data_prep import test_media
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


@pytest.mark.parametrize("rate", [22_255, 44_101])
def test_sound_at_a_rate_that_has_no_common_grid_with_16_khz_is_in_time(tmp_path, rate):
    write(tmp_path / "a.wav", video=None, audio="pcm_s16le", rate=rate, seconds=6.0)
    spans_s = [(1.3, 2.8), (2.5, 4.0), (2.95, 2.97), (3.05, 3.35), (4.5, 6.0)]
    windows = [Window(start, stop, ()) for start, stop in spans_s]
    for i, part in media.cut_windows(tmp_path / "a.wav", windows, short_side_px=0):
        assert isinstance(part, media.Cut), (spans_s[i], part)
        late, correlation = lag_of(part.audio, spans_s[i][0])
        assert abs(late) < 0.6
        assert correlation > 0.97


def test_channels_are_averaged_and_full_scale_is_kept(tmp_path):
    write(tmp_path / "a.mov", audio="pcm_s16le", rate=16_000, layout="stereo", right=0.0, seconds=2.0)
    (part,) = cut(tmp_path / "a.mov", (0.6,))
    np.testing.assert_allclose(part.audio, sound_at(0.1 + np.arange(24_000) / 16_000) * 16_384, atol=1.0)


@pytest.mark.parametrize(("rate", "audio"), [(44_100, "aac"), (44_100, "flac"), (48_000, "libopus")])
def test_matroskas_rounded_time_stamps_leave_no_holes(tmp_path, rate, audio):
    # 1,024 samples at 44.1 kHz last 23.2 ms; Matroska's time stamps round that to 23 or 24.
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


def test_the_last_clip_of_a_wmv_whose_decoder_gives_its_last_sound_without_a_time_stamp_is_whole(tmp_path):
    write(tmp_path / "a.wmv", seconds=4.0, video=None, audio="wmav2", rate=44_100)
    windows = [Window(0.5, 2.0, ()), Window(2.48, 3.98, ())]
    for window, (_, part) in zip(windows, media.cut_windows(tmp_path / "a.wmv", windows, short_side_px=96), strict=True):
        assert isinstance(part, media.Cut), part
        for seconds in (1.5, 0.1):  # all of it, and its end
            begin_s = window.stop_s - seconds - 2048 / 44_100  # the muxer counts from the encoder's priming
            late, correlation = lag_of(part.audio[-round(16_000 * seconds) :], begin_s)
            assert abs(late) < 16  # stamps are rounded to 1 ms
            assert correlation > 0.97


def test_after_a_hole_the_sound_is_still_in_time(tmp_path):
    write(tmp_path / "a.mp4", hole=(1.5, 1.6), rate=44_100)
    before, after = cut(tmp_path / "a.mp4", (0.5, 2.2))
    assert_in_time(before, 0.5, np.arange(120) / 30)
    assert_in_time(after, 2.2, np.arange(120) / 30)


CODECS = [("aac", "mp4"), ("aac", "mkv"), ("aac", "ts"), ("ac3", "mkv"), ("eac3", "mkv"), ("libopus", "mkv"), ("flac", "mkv"),
          ("pcm_s16le", "mov"), ("mp2", "ts")]  # fmt: skip


@pytest.mark.parametrize(("codec", "ending"), CODECS)
def test_a_clips_sound_is_the_same_alone_and_among_others(tmp_path, codec, ending, monkeypatch):
    # AAC and AC-3 do not store noise: their decoders generate it, and its values depend on what they decoded before.
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000 * 16)
    monkeypatch.setattr(test_media, "sound_at", lambda time_s: noise[: len(time_s)])
    write(tmp_path / f"a.{ending}", seconds=16.0, fps=2, audio=codec, layout="stereo", bit_rate=96_000, coder="twoloop")
    times = (0.5, 1.2, 1.25, 3.0, 3.1, 14.2)
    together = cut(tmp_path / f"a.{ending}", times)
    for time_s, part in zip(times, together, strict=True):
        (alone,) = cut(tmp_path / f"a.{ending}", [time_s])
        assert isinstance(part, media.Cut), part
        np.testing.assert_array_equal(part.audio, alone.audio)


@pytest.fixture
def read(monkeypatch) -> collections.Counter:
    """Counts how often each audio packet is read: time of the packet, s → number of reads."""
    counts, read_one = collections.Counter(), audio._Packets._read

    def counting(self):
        read_one(self)
        counts.update([] if self._ended else [self._read_s])

    monkeypatch.setattr(audio._Packets, "_read", counting)
    return counts


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_packets_are_read_once_and_not_at_all_in_long_gaps(tmp_path, read, ending):
    write(tmp_path / f"a.{ending}", seconds=24.0, fps=2, video_options={"preset": "ultrafast", "g": "4"})
    cut(tmp_path / f"a.{ending}", [0.5, 0.6, 1.0, 3.0, 2.9, 21.0, 21.1])
    assert max(read.values()) == 1
    assert not [time_s for time_s in read if 6.0 < time_s < 17.0]


def test_a_window_within_another_has_its_sound_too(tmp_path):
    write(tmp_path / "a.mp4", seconds=20.0)
    wanted = [Window(0.0, 19.0, ()), Window(2.0, 3.5, ()), Window(17.0, 18.5, (17.5,))]
    whole, early, late = (part for _, part in sorted(media.cut_windows(tmp_path / "a.mp4", wanted, short_side_px=96)))
    assert len(whole.audio) == 19 * 16_000
    for part, start_s in ((early, 2.0), (late, 17.0)):
        np.testing.assert_allclose(part.audio, whole.audio[round(16_000 * start_s) :][:24_000], atol=8)
    assert [len(part.frames) for part in (whole, early, late)] == [0, 0, 1]


def test_windows_of_sound_alone_need_no_video(tmp_path):
    write(tmp_path / "a.mp4", video=None, seconds=3.0)
    windows = [Window(0.5, 2.0, ()), Window(1.0, 9.0, (), open_end=True), Window(1.0, 9.0, ())]
    first, rest, beyond = (part for _, part in sorted(media.cut_windows(tmp_path / "a.mp4", windows, short_side_px=96)))
    assert abs(lag_of(first.audio, 0.5)[0]) < 0.6
    assert (first.frames, first.height, first.width) == ([], 0, 0)
    assert 2 * 16_000 <= len(rest.audio) < 2.1 * 16_000
    assert beyond == "audio does not cover the clip"
