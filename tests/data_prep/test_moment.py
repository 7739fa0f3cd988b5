"""A moment of a video is read as conversion cuts it, or refused with the reason."""

import math

import numpy as np
import pytest
import simplejpeg

from data_prep import moment
from tests.data_prep import test_media


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("moment") / "a.mp4"
    test_media.write(path)
    return path


def test_the_frames_and_the_sound_are_those_of_the_moment(video):
    frames, waveform, rate = moment.read(video, 1.2)
    middles = [math.floor((1.2 + (i + 0.5) * 1.5 / 4) * 30) for i in range(4)]
    shown = [simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=95) for frame in frames]
    assert [test_media.number_in(jpeg) for jpeg in shown] == middles
    assert (frames.dtype, waveform.dtype, waveform.shape, rate) == (np.uint8, np.int16, (24_000,), 16_000)
    lag, correlation = test_media.lag_of(waveform, 1.2)
    assert abs(lag) < 20
    assert correlation > 0.7


def test_length_number_and_size_are_as_asked_for(video):
    frames, waveform, _ = moment.read(str(video), 0, duration_s=0.5, num_frames=2, short_side_px=32)
    assert frames.shape == (2, 32, 32 * test_media.WIDTH // test_media.HEIGHT, 3)
    assert waveform.shape == (8_000,)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ({"start_s": 3.0}, r"a.mp4: the moment from 3 to 4.5 s can't be cut: .*"),
        ({"start_s": -1.0}, "start_s must be from 0 to 1000000 and duration_s from 0.01 to 60, got -1 and 1.5"),
        ({"start_s": math.nan}, "got nan and 1.5"),
        ({"start_s": 1e300}, "got 1e.300 and 1.5"),
        ({"start_s": 1.0, "duration_s": 1e-9}, "got 1 and 1e-09"),
        ({"start_s": 1.0, "duration_s": 61}, "got 1 and 61"),
        ({"start_s": 1.0, "num_frames": 0}, "num_frames must be from 1 to 1000 and short_side_px even and from 16 to 4096"),
        ({"start_s": 1.0, "num_frames": 1001}, "got 1001 and 256"),
        ({"start_s": 1.0, "short_side_px": 31}, "got 4 and 31"),
    ],
)
def test_what_can_not_be_read_is_told(video, of, message):
    with pytest.raises(ValueError, match=message):
        moment.read(video, **of)


def test_files_that_are_no_videos_with_sound_are_told(tmp_path):
    test_media.write(tmp_path / "mute.mp4", audio=None)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for name, reason in (("mute", "no audio stream"), ("broken", "video file can't be opened"), ("absent", "no video file")):
        with pytest.raises(ValueError, match=reason):
            moment.read(tmp_path / f"{name}.mp4", 0.0)
