"""Clips hold what is seen and heard at their time, or a reason why not. The content of the test files tells the time."""

import pathlib
from fractions import Fraction

import av
import numpy as np
import pytest
import simplejpeg

from data_prep import media
from data_prep.windows import Window, frame_times, num_samples

REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "media"
WIDTH, HEIGHT, NUM_BARS = 192, 96, 12
TONES = np.random.default_rng(0)
TONES_HZ, PHASES = TONES.uniform(100, 6000, 24), TONES.uniform(0, 2 * np.pi, 24)


def sound_at(time_s: np.ndarray) -> np.ndarray:
    """Returns the sound of every test file at these times, about 0.18 RMS; its autocorrelation has one sharp peak."""
    return 0.05 * np.sin(2 * np.pi * TONES_HZ[:, None] * time_s[None] + PHASES[:, None]).sum(0)


def picture_of(number: int, width: int, height: int) -> np.ndarray:
    """Returns an image whose bars are the binary digits of the frame number, the lowest at the left."""
    picture = np.full((height, width, 3), 20, np.uint8)
    for k in range(NUM_BARS):
        if number >> k & 1:
            picture[:, k * width // NUM_BARS : (k + 1) * width // NUM_BARS] = 235
    return picture


def two_views(number: int, width: int, height: int, one_view=picture_of) -> np.ndarray:
    """Returns a stereoscopic image: `picture_of` as its left view, and a red right view."""
    picture = np.full((height, width, 3), (255, 0, 0), np.uint8)
    picture[:, : width // 2] = one_view(number, width // 2, height)
    return picture


def number_in(jpeg: bytes) -> int:
    grey = simplejpeg.decode_jpeg(jpeg, colorspace="GRAY")[..., 0]
    bar = grey.shape[1] / NUM_BARS
    return sum(1 << k for k in range(NUM_BARS) if grey[:, int((k + 0.3) * bar) : int((k + 0.7) * bar)].mean() > 128)


def write(path, *, seconds=4.0, fps=30, frame_starts_s=None, video="libx264", video_options=None, pixels="yuv420p",
          size=(WIDTH, HEIGHT), matrix=None, aspect=None, audio="aac", rate=48000, layout="mono", audio_span=(0.0, None),
          hole=(0.0, 0.0), right=1.0, bit_rate=192_000, coder="fast", clock_hz=90_000, options=None):  # fmt: skip
    """Writes a media file whose frames and sound tell the time.

    Args:
      path: Path of the file; its ending decides the container.
      seconds: Duration of the video, and of the sound unless `audio_span` gives its end.
      fps, frame_starts_s: Frame rate, or instead the time at which each frame begins.
      video, audio: Encoders, or None for no such stream.
      matrix: (a, b, c, d) of the display matrix: x is mapped to (a x, b x) and y to (c y, d y).
      aspect: Width of a pixel divided by its height.
      audio_span: (start, stop) of the sound, seconds; None as stop is the end of the video.
      hole: (start, stop) of the sound's packets that are left out, seconds.
      right: Gain of the right channel.
      bit_rate, coder: Bit rate of the sound, bit/s; coder of AAC, where "twoloop" stores noise as noise.
      clock_hz: Clock of the frames' time stamps.
      options: Options of the muxer.
    """
    # Without this option the mp4 muxer rounds the start of late audio to 1 ms.
    options = {"movie_timescale": "48000"} if options is None and path.suffix in (".mp4", ".mov") else options
    with av.open(str(path), "w", options=options or {}) as container:
        picture = sound = None
        if video:
            picture = container.add_stream(video, rate=fps, time_base=Fraction(1, clock_hz))
            picture.width, picture.height, picture.pix_fmt = *size, pixels
            picture.codec_context.time_base = Fraction(1, clock_hz)
            picture.options = video_options or {"preset": "ultrafast", "g": "60", "threads": "1"}
            if aspect is not None:
                picture.codec_context.sample_aspect_ratio = aspect
            if matrix is not None:
                a, b, c, d = (round(65536 * value) for value in matrix)
                picture.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        if audio:
            sound = container.add_stream(audio, rate=rate, layout=layout)
            sound.bit_rate, sound.options = bit_rate, {"aac_coder": coder} if audio == "aac" else {}
            packets = _encode_sound(sound, audio_span[0], audio_span[1] or seconds, rate, layout, right)
            container.mux([p for p in packets if not hole[0] <= p.pts * p.time_base < hole[1]])
        if video:
            starts = np.arange(round(seconds * fps)) / fps if frame_starts_s is None else frame_starts_s
            for number, start in enumerate(starts):
                frame = av.VideoFrame.from_ndarray(picture_of(number, *size), format="rgb24").reformat(format=pixels)
                frame.pts, frame.time_base = round(start * clock_hz), Fraction(1, clock_hz)
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))


def _encode_sound(sound, start_s, stop_s, rate, layout, right):
    wave = sound_at(start_s + np.arange(round((stop_s - start_s) * rate)) / rate)
    channels = np.stack([wave] if layout == "mono" else [wave, right * wave]).astype(np.float32)
    name = sound.format.name
    if name == "s16":
        channels = np.round(channels.T.reshape(1, -1) * 32768).astype(np.int16)
    elif name == "flt":
        channels = channels.T.reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels), format=name, layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start_s * rate)
    return sound.encode(frame) + sound.encode(None)


def window(time_s: float, num_intervals: int = 4, num_candidates: int = 4) -> Window:
    """Returns the window that the converter cuts for a narration at `time_s`."""
    start, stop = time_s - 0.5, time_s + 1.0
    return Window(start, stop, frame_times(start, stop, num_intervals, num_candidates))


def cut(path, times_s, **kwargs) -> list[media.Cut | str]:
    """Returns the result for the window at each time; asserts that each comes once."""
    windows = [window(float(t)) for t in times_s]
    found = list(media.cut_windows(path, windows, **{"short_side_px": HEIGHT, **kwargs}))
    assert sorted(i for i, _ in found) == list(range(len(windows)))
    return [part for _, part in sorted(found, key=lambda pair: pair[0])]


def lag_of(audio: np.ndarray, start_s: float) -> tuple[float, float]:
    """Returns (lateness in samples, correlation) of audio, compared with what should sound from `start_s` on."""
    wave, reach = audio / 32768.0, 400
    expected = sound_at(start_s + np.arange(-reach, len(wave) + reach) / 16000)
    # By the Fourier transform, as BLAS threads would spin on a busy machine.
    size = 1 << 16
    spectrum = np.fft.rfft(expected, size) * np.fft.rfft(wave, size).conj()
    scores = np.fft.irfft(spectrum)[: 2 * reach + 1]
    at = int(scores.argmax())
    before, here, after = scores[max(at - 1, 0)], scores[at], scores[min(at + 1, len(scores) - 1)]
    fraction = 0.5 * (before - after) / min(before - 2 * here + after, -1e-9)
    late = reach - at - fraction
    part = sound_at(start_s + (np.arange(len(wave)) - late) / 16000)
    return late, float((wave * part).mean() / np.sqrt((wave**2).mean() * (part**2).mean() + 1e-12))


def assert_in_time(part: media.Cut | str, time_s: float, starts_s: np.ndarray, lag: float = 0.6, tick_s: float = 0.0):
    """Asserts that frames, their times and the sound are those of the window at `time_s`."""
    assert isinstance(part, media.Cut), part
    wanted = np.array(window(time_s).frame_times_s)
    expected = np.searchsorted(np.asarray(starts_s), wanted + 1e-6, side="right") - 1
    if tick_s == 0.0:
        assert [number_in(jpeg) for jpeg in part.frames] == expected.tolist()
    else:  # the container rounds: a frame may begin up to `tick_s` earlier or later
        early, late = (np.searchsorted(starts_s, wanted + d, side="right") - 1 for d in (-tick_s, tick_s))
        assert all(a <= number_in(jpeg) <= b for a, jpeg, b in zip(early, part.frames, late, strict=True))
    numbers = [number_in(jpeg) for jpeg in part.frames]
    np.testing.assert_allclose(part.frame_times_us, np.asarray(starts_s)[numbers] * 1e6, atol=20 + tick_s * 1e6)
    assert part.audio.dtype == np.int16
    assert part.audio.shape == (24_000,)
    late, correlation = lag_of(part.audio, time_s - 0.5)
    assert abs(late) <= lag
    assert correlation > 0.97


@pytest.mark.parametrize("num_intervals", [1, 4, 7])
@pytest.mark.parametrize("num_candidates", [1, 2, 3, 4, 5])
def test_frame_times_are_interval_major_and_candidate_half_c_is_the_middle(num_intervals, num_candidates):
    times = np.array(frame_times(2.0, 3.5, num_intervals, num_candidates)).reshape(num_intervals, num_candidates)
    edges = np.linspace(2.0, 3.5, num_intervals + 1)
    assert (times >= edges[:-1, None] - 1e-9).all()
    assert (times < edges[1:, None]).all()
    np.testing.assert_allclose(times[:, num_candidates // 2], (edges[:-1] + edges[1:]) / 2)
    if num_candidates > 1:
        np.testing.assert_allclose(np.diff(times, axis=1), 1.5 / num_intervals / num_candidates)


@pytest.mark.parametrize("fps", [25, 30])
def test_the_frame_is_the_one_shown_at_its_time_and_the_sound_the_one_heard(tmp_path, fps):
    write(tmp_path / "a.mp4", fps=fps)
    times = (0.5, 0.517, 1.0, 1.2345678, 2.0, 2.97)
    for time_s, part in zip(times, cut(tmp_path / "a.mp4", times), strict=True):
        assert_in_time(part, time_s, np.arange(4 * fps) / fps)


def test_with_a_variable_frame_rate_time_stamps_decide(tmp_path):
    # From 10 to 100 frames per second, and one frame that lasts three quarters of a second.
    rng = np.random.default_rng(1)
    steps = rng.choice([0.01, 0.025, 0.04, 0.1], 100)
    steps[20] = 0.75
    starts = np.cumsum(np.r_[0.0, np.round(steps, 3)])
    write(tmp_path / "a.mp4", frame_starts_s=starts, seconds=6.0)
    times = (0.5, 1.1, 1.7, 2.3, starts[-1] - 1.0)
    assert starts[-1] < 6.0
    for time_s, part in zip(times, cut(tmp_path / "a.mp4", times), strict=True):
        assert_in_time(part, time_s, starts)


def test_a_picture_is_shown_as_long_as_mp4_says(tmp_path):
    starts = np.r_[np.arange(30) / 30, 4.0 + np.arange(60) / 30]
    b_frames = {"preset": "veryfast", "bf": "2", "g": "300", "threads": "1"}
    write(tmp_path / "a.mp4", frame_starts_s=starts, seconds=6.0, video_options=b_frames)
    for time_s, part in zip((0.7, 2.0, 3.5, 4.6), cut(tmp_path / "a.mp4", (0.7, 2.0, 3.5, 4.6)), strict=True):
        assert_in_time(part, time_s, starts)


def test_a_window_where_a_stream_is_not_has_a_reason_never_silence_or_black(tmp_path):
    write(tmp_path / "late.mp4", audio_span=(1.3, None))
    write(tmp_path / "hole.mp4", hole=(1.5, 1.6))
    write(tmp_path / "short_sound.mp4", audio_span=(0.0, 2.0))
    write(tmp_path / "short_picture.mp4", audio_span=(0.0, 8.0))
    write(tmp_path / "late_picture.mp4", frame_starts_s=1.0 + np.arange(90) / 30)
    no_audio, no_video = "audio does not cover the clip", "video does not cover the clip"
    expected = {
        # The encoder's lead-in of 1,024 samples counts as sound.
        "late.mp4": {0.4: no_audio, 1.0: no_audio, 1.77: no_audio, 1.79: None},
        "hole.mp4": {0.5: None, 0.53: no_audio, 1.0: no_audio, 2.0: no_audio, 2.13: None},
        "short_sound.mp4": {0.9: None, 1.1: no_audio, 3.0: no_audio, 100.0: no_audio},
        "short_picture.mp4": {3.0: None, 3.2: no_video, 6.0: no_video},
        "late_picture.mp4": {0.5: no_video, 1.4: no_video, 1.5: None},
    }
    for name, reasons in expected.items():
        together = cut(tmp_path / name, reasons)
        alone = [cut(tmp_path / name, [time_s])[0] for time_s in reasons]
        for found in (together, alone):
            told = {t: part if isinstance(part, str) else None for t, part in zip(reasons, found, strict=True)}
            assert told == reasons, name


def _unknown_codec(path, *codes: bytes):
    """Overwrites each code in the sample table, which comes first in the file apart from the brands."""
    content = path.read_bytes()
    for code in codes:
        at = content.index(code, content.index(b"stsd") if code == b"avc1" else 0)
        content = content[:at] + b"z" * len(code) + content[at + len(code) :]
    path.write_bytes(content)


def test_a_file_that_cannot_give_clips_says_why(tmp_path):
    write(tmp_path / "mute.mp4", audio=None)
    write(tmp_path / "blind.mp4", video=None)
    write(tmp_path / "whole.mp4")
    for name in ("odd_picture.mp4", "odd_sound.mp4"):
        write(tmp_path / name, options={"movflags": "faststart", "brand": "mp42"})
    _unknown_codec(tmp_path / "odd_picture.mp4", b"avc1")
    _unknown_codec(tmp_path / "odd_sound.mp4", b"mp4a", b"\x40\x15")  # the second code means AAC too
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    expected = {
        "mute.mp4": "no audio stream",
        "blind.mp4": "no video stream",
        "odd_picture.mp4": "no decoder for the video stream",
        "odd_sound.mp4": "no decoder for the audio stream",
        "truncated.mp4": "video file can't be opened: Invalid data found when processing input",
        "text.mp4": "video file can't be opened: Invalid data found when processing input",
        "empty.mp4": "video file can't be opened: Invalid data found when processing input",
        "folder.mp4": "video file is missing",
        "absent.mp4": "video file is missing",
        "a\0b.mp4": "video file is missing",
        "x" * 300 + ".mp4": "video file can't be opened: File name too long",
    }
    assert {name: cut(tmp_path / name, (0.5, 2.0)) for name in expected} == {
        name: [reason, reason] for name, reason in expected.items()
    }


@pytest.mark.parametrize(
    ("matrix", "stored"),
    [
        ((1, 0, 0, 1), lambda shown: shown),
        ((0, 1, -1, 0), lambda shown: np.rot90(shown, 1)),  # to be rotated to the right
        ((0, -1, 1, 0), lambda shown: np.rot90(shown, -1)),
        ((-1, 0, 0, -1), lambda shown: np.rot90(shown, 2)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda shown: np.swapaxes(shown, 0, 1)),
        ((0, -1, -1, 0), lambda shown: np.rot90(np.swapaxes(shown, 0, 1), 2)),
    ],
)
def test_a_turned_or_mirrored_video_is_cut_as_it_is_shown(tmp_path, matrix, stored, monkeypatch):
    shown = picture_of(0b1011, WIDTH, HEIGHT)
    shown[: HEIGHT // 4] = 128  # marks the top
    lies = np.ascontiguousarray(stored(shown))
    monkeypatch.setitem(globals(), "picture_of", lambda *_: lies)
    write(tmp_path / "a.mp4", seconds=2.0, matrix=matrix, size=lies.shape[1::-1])
    (part,) = cut(tmp_path / "a.mp4", (0.9,))
    assert (part.height, part.width) == (HEIGHT, WIDTH)
    for jpeg in part.frames:
        grey = simplejpeg.decode_jpeg(jpeg, colorspace="GRAY")[..., 0].astype(float)
        assert np.abs(grey - shown.mean(axis=2)).mean() < 10
    (left,) = cut(tmp_path / "a.mp4", (0.9,), stereo=True)
    assert (left.height, left.width) == (HEIGHT, WIDTH // 2)
    for jpeg in left.frames:
        grey = simplejpeg.decode_jpeg(jpeg, colorspace="GRAY")[..., 0].astype(float)
        assert np.abs(grey - shown.mean(axis=2)[:, : WIDTH // 2]).mean() < 10


def test_a_video_that_is_to_be_shown_askew_is_refused(tmp_path):
    write(tmp_path / "a.mp4", seconds=2.0, matrix=(0.8, 0.6, -0.6, 0.8))
    assert cut(tmp_path / "a.mp4", (0.9,)) == ["display matrix is not a right-angle rotation or mirroring"]


@pytest.mark.parametrize(
    ("size", "aspect", "short_side", "expected"),
    [
        ((192, 144), Fraction(4, 3), 96, (96, 170)),  # 256 x 144: anamorphic 16:9
        ((144, 144), Fraction(1, 2), 36, (72, 36)),
        ((144, 96), Fraction(4, 3), 256, (96, 192)),  # the height is kept
        ((96, 192), Fraction(1, 1), 48, (96, 48)),
    ],
)
def test_pixels_that_are_not_square_are_made_so(tmp_path, size, aspect, short_side, expected):
    write(tmp_path / "a.mp4", seconds=2.0, size=size, aspect=aspect)
    (part,) = cut(tmp_path / "a.mp4", (0.9,), short_side_px=short_side)
    assert (part.height, part.width) == expected
    assert_in_time(part, 0.9, np.arange(60) / 30)


@pytest.mark.parametrize(
    ("size", "aspect", "short_side", "expected"),
    [
        ((384, 96), None, 96, (96, 192)),
        ((384, 96), None, 36, (36, 72)),
        ((192, 192), None, 48, (96, 48)),  # as wide as high: the view is upright
        ((385, 97), None, 96, (96, 190)),  # the middle column belongs to neither view
        ((192, 144), Fraction(4, 3), 96, (108, 96)),  # views of 128 x 144
        ((144, 192), None, 256, (72, 96)),  # higher than wide: encoded wrongly
        ((144, 192), None, 36, (36, 48)),
    ],
)
def test_of_a_stereoscopic_video_only_the_left_view_is_cut_and_its_short_side_counts(
    tmp_path, monkeypatch, size, aspect, short_side, expected
):
    monkeypatch.setitem(globals(), "picture_of", two_views)
    lossless = {"preset": "ultrafast", "qp": "0", "g": "60", "threads": "1"}
    write(tmp_path / "a.mp4", seconds=2.0, size=size, aspect=aspect, pixels="yuv444p", video_options=lossless)
    (part,) = cut(tmp_path / "a.mp4", (0.9,), short_side_px=short_side, stereo=True)
    assert (part.height, part.width) == expected
    assert {simplejpeg.decode_jpeg(jpeg).shape[:2] for jpeg in part.frames} == {expected}
    assert_in_time(part, 0.9, np.arange(60) / 30)
    for jpeg in part.frames:  # at most half a column of red at the seam
        assert simplejpeg.decode_jpeg(jpeg, colorspace="RGB")[:, -3:].max() < 60


def test_a_picture_wider_than_a_jpeg_can_be_is_refused():
    frame, reformatter = av.VideoFrame(WIDTH, HEIGHT, "yuv420p"), media.VideoReformatter()
    upright = media._orientation(frame)
    told = media._encode(frame, reformatter, Fraction(1000), upright, origin_s=0.0, short_side_px=HEIGHT, quality=90)
    assert told == "picture does not fit into a JPEG: 192000 x 96 px"


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((192, 96), 48, (48, 96)),
        ((96, 192), 48, (96, 48)),  # upright: the short side is the width
        ((193, 97), 96, (96, 192)),
        ((101, 75), 256, (74, 100)),  # never scaled up; sides are even
        ((640, 360), 256, (256, 456)),  # 455.1: the canvas for 16:9
        ((192, 108), 72, (72, 128)),
    ],
)
def test_frames_are_scaled_down_to_the_short_side_and_never_up(tmp_path, size, short_side, expected):
    write(tmp_path / "a.mp4", size=size, pixels="yuv444p", seconds=2.0)  # 4:2:0 has no odd sides
    (part,) = cut(tmp_path / "a.mp4", (0.9,), short_side_px=short_side)
    assert (part.height, part.width) == expected
    assert {simplejpeg.decode_jpeg(jpeg).shape[:2] for jpeg in part.frames} == {expected}
    assert_in_time(part, 0.9, np.arange(60) / 30)


def test_red_stays_red(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "picture_of", lambda n, w, h: np.full((h, w, 3), (200, 40, 90), np.uint8))
    write(tmp_path / "a.mp4", seconds=2.0)
    (part,) = cut(tmp_path / "a.mp4", (0.6,), quality=95)
    pixels = simplejpeg.decode_jpeg(part.frames[0], colorspace="RGB")
    np.testing.assert_allclose(pixels.mean((0, 1)), (200, 40, 90), atol=6)


def test_pictures_that_change_their_size_within_a_clip_are_refused(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        sound = container.add_stream("aac", rate=48000, layout="mono")
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        container.start_encoding()
        container.mux(_encode_sound(sound, 0.0, 6.0, 48000, "mono", 1.0))
        for number in range(60):
            height = HEIGHT if number < 30 else HEIGHT // 2
            packet = av.Packet(simplejpeg.encode_jpeg(picture_of(number, WIDTH, height), colorsubsampling="420"))
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 10), number, number
            container.mux(packet)
    before, across, after = cut(tmp_path / "a.mkv", (1.0, 2.5, 4.0), short_side_px=HEIGHT)
    assert (before.height, before.width) == (HEIGHT, WIDTH)
    assert across == "picture size changes within the clip"
    assert (after.height, after.width) == (HEIGHT // 2, WIDTH)


def test_windows_of_equal_length_have_equally_many_samples():
    # By rounding, (time + after) - (time - before) is not exactly the window's length.
    before, after = 0.25, 0.25003125  # 8,000.5 samples
    lengths = {num_samples((t + after) - (t - before)) for t in np.random.default_rng(0).uniform(0, 1e4, 1000)}
    assert lengths == {num_samples(before + after)}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no folder {REAL}")
@pytest.mark.parametrize(
    ("name", "seconds", "size"), [("nasa_13013.mp4", 13.0, (144, 256)), ("flipping_a_pancake.mkv", 10.38, (144, 256))]
)
def test_real_videos_are_cut_from_their_first_second_to_their_last(name, seconds, size):
    times = np.arange(0.5, seconds - 1.0, 0.5)
    parts = cut(REAL / name, [*times, seconds + 0.5], short_side_px=144)
    assert parts[-1].endswith("does not cover the clip")
    for time_s, part in zip(times, parts[:-1], strict=True):
        assert (part.height, part.width) == size, time_s
        wanted_us = np.array(window(time_s).frame_times_s) * 1e6
        assert (part.frame_times_us <= wanted_us + 1).all()
        assert (part.frame_times_us > wanted_us - 1e6 / 20).all()
        assert part.audio.std() > 10


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no folder {REAL}")
def test_a_real_corrupted_video_has_a_reason():
    assert cut(REAL / "corrupted.mp4", (0.5, 3.0)) == ["no audio stream"] * 2
