"""Sound without video is cut at its time from files of any kind; it may end early, but a hole is refused."""

import json
import pathlib

import numpy as np
import pytest
import soundfile

from data_prep import audio, decoder_answers, media
from data_prep.windows import Window
from tests.data_prep import test_media

SECONDS = 9.003


def write_sound(path: pathlib.Path, rate: int, seconds: float = SECONDS) -> pathlib.Path:
    wave = test_media.sound_at(np.arange(round(seconds * rate)) / rate)
    kind = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
    with soundfile.SoundFile(path, "w", rate, 1, **kind) as file:
        for part in np.split(wave, range(10_000, len(wave), 10_000)):
            file.write(part)
    return path


def cut(path: pathlib.Path, *windows: Window) -> list[media.Cut | str]:
    found = dict(media.cut_windows(path, list(windows), short_side_px=0))
    return [found[i] for i in range(len(windows))]


@pytest.mark.parametrize(
    ("suffix", "rate"),
    [(".wav", 44100), (".flac", 48000), (".ogg", 44100), (".mp3", 44100), (".opus", 48000), (".aiff", 22050)],
)
def test_sound_files_are_cut_at_their_time_and_whole_to_their_last_sample(tmp_path, suffix, rate):
    path = write_sound(tmp_path / f"a{suffix}", rate)
    windows = [
        Window(0.0, 100.0, (), open_end=True), Window(8.5, 9.5, (), open_end=True),
        Window(0.0, 1.0, ()), Window(7.0, 8.0, ()),
    ]  # fmt: skip
    together = cut(path, *windows)
    for part, window, seconds in zip(together, windows, (SECONDS, SECONDS - 8.5, 1.0, 1.0), strict=True):
        assert isinstance(part, media.Cut), part
        assert abs(len(part.audio) - seconds * 16_000) <= 1
        late, correlation = test_media.lag_of(part.audio[:32_000], window.start_s)
        assert abs(late) < 0.1
        assert correlation > 0.97
        assert (part.frames, part.frame_times_us.tolist(), part.height, part.width) == ([], [], 0, 0)
    [alone] = cut(path, windows[3])  # after a seek
    if suffix in (".wav", ".flac", ".aiff"):
        np.testing.assert_array_equal(alone.audio, together[3].audio)
    assert abs(test_media.lag_of(alone.audio, 7.0)[0]) < 0.1


def test_only_an_open_window_may_be_longer_than_the_sound_and_none_may_begin_behind_it(tmp_path):
    path = write_sound(tmp_path / "a.wav", 16_000, 3.0)
    parts = cut(
        path, Window(2.0, 4.0, ()), Window(2.0, 4.0, (), open_end=True),
        Window(3.0, 4.0, (), open_end=True), Window(1.0, 3.0, ()), Window(2.5, 3.0005, ()),
    )  # fmt: skip
    assert [len(part.audio) if isinstance(part, media.Cut) else part for part in parts] == [
        "audio does not cover the clip", 16_000, "audio does not cover the clip", 32_000, 8008,
    ]  # fmt: skip


def test_a_hole_is_no_end(tmp_path):
    test_media.write(tmp_path / "a.mkv", video=None, audio="aac", hole=(1.5, 1.9))
    parts = cut(
        tmp_path / "a.mkv", Window(0.0, 4.0, (), open_end=True), Window(0.0, 1.4, (), open_end=True),
        Window(2.1, 9.0, (), open_end=True),
    )  # fmt: skip
    assert parts[0] == "audio does not cover the clip"
    assert len(parts[1].audio) == 22_400
    assert abs(len(parts[2].audio) - 1.9 * 16_000) < 0.03 * 16_000  # within a packet
    assert abs(test_media.lag_of(parts[2].audio, 2.1)[0]) < 9  # Matroska rounds to 1 ms


def test_a_file_without_pictures_gives_no_frames_and_a_video_gives_sound_with_and_without(tmp_path):
    write_sound(tmp_path / "a.wav", 16_000, 3.0)
    [part] = cut(tmp_path / "a.wav", Window(0.0, 1.0, (0.5,)))
    assert part == "no video stream"
    test_media.write(tmp_path / "a.mp4", audio_span=(0.25, None))
    found = media.cut_windows(
        tmp_path / "a.mp4", [Window(1.0, 2.0, ()), Window(1.0, 2.0, (1.5,)), Window(0.0, 1.0, ())],
        short_side_px=96,
    )  # fmt: skip
    bare, shown, early = (part for _, part in sorted(found))
    np.testing.assert_array_equal(bare.audio, shown.audio)
    assert abs(test_media.lag_of(bare.audio, 1.0)[0]) < 0.6  # by the file's clock, not from the sound's start
    assert (bare.frames, [test_media.number_in(jpeg) for jpeg in shown.frames]) == ([], [45])
    assert early == "audio does not cover the clip"


def test_one_stamp_that_is_off_is_mended_and_lost_sound_is_not():
    part = np.zeros(100, np.float32)
    late = [(0.0, part), (100.0, part), (648.0, part), (300.0, part), (400.0, part)]
    assert [stamp for stamp, _ in audio._mend_stamps(late, 10.0)] == [0.0, 100.0, 200.0, 300.0, 400.0]
    for stamps in ([0.0, 100.0, 648.0, 748.0, 848.0], [0.0, 100.0, 400.0], [0.0, 104.0, 200.0], [5.0], []):
        pieces = [(stamp, part) for stamp in stamps]
        assert [stamp for stamp, _ in audio._mend_stamps(pieces, 10.0)] == stamps


@pytest.mark.parametrize(
    ("window", "size", "good"),
    [
        (Window(0.0, 1.0, ()), 32_000, True), (Window(0.0, 1.0, ()), 31_998, False),
        (Window(0.0, 1.0, (), open_end=True), 2, True), (Window(0.0, 1.0, (), open_end=True), 32_000, True),
        (Window(0.0, 1.0, (), open_end=True), 0, False), (Window(0.0, 1.0, (), open_end=True), 3, False),
        (Window(0.0, 1.0, (), open_end=True), 32_002, False),
    ],
)  # fmt: skip
def test_an_answer_about_sound_is_bounded_by_its_window(window, size, good):
    answer = {"index": 0, "jpegs": [], "times_us": [], "height": 0, "width": 0, "audio": size}
    if good:
        assert decoder_answers.check_answer(json.dumps(answer).encode(), [window]) == answer
        with pytest.raises(ValueError, match="height is '2', not a whole number from 0 to 0"):
            decoder_answers.check_answer(json.dumps({**answer, "height": 2}).encode(), [window])
    else:
        with pytest.raises(ValueError, match="^audio "):
            decoder_answers.check_answer(json.dumps(answer).encode(), [window])
