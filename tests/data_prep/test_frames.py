"""The frame shown at a time is that of a full decode, for any codec and container and any way through the file."""

import bisect
import collections
import contextlib
from fractions import Fraction

import av
import numpy as np
import pytest
import simplejpeg

from data_prep import frames, full_decode, packets, streams
from tests.data_prep import test_media
from tests.data_prep.test_media import assert_in_time, cut, write

B_FRAMES = {"preset": "veryfast", "g": "50", "bf": "3", "sc_threshold": "0"}
HEVC = {"preset": "ultrafast", "x265-params": "keyint=50:bframes=3:b-pyramid=1:scenecut=0:log-level=none:pools=none"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "50", "auto-alt-ref": "1", "lag-in-frames": "8"}
AV1 = {"preset": "10", "crf": "20", "g": "50", "svtav1-params": "lp=1"}
# Name of the file → (options of `write`, largest rounding of time stamps in s, lateness of the audio in samples at 16 kHz).
KINDS = {
    "h264.mp4": ({"video_options": B_FRAMES}, 0.0, 0.6),
    "h264.mkv": ({"video_options": B_FRAMES}, 0.001, 8.6),
    "open_gop.mp4": ({"video_options": {**B_FRAMES, "x264-params": "open-gop=1"}}, 0.0, 0.6),
    "open_gop.mkv": ({"video_options": {**B_FRAMES, "x264-params": "open-gop=1"}}, 0.001, 8.6),
    "without_cues.mkv": ({"video_options": B_FRAMES, "options": {"live": "1"}}, 0.001, 8.6),
    "fragments.mp4": ({"video_options": B_FRAMES, "options": {"movflags": "frag_keyframe+delay_moov"}}, 0.0, 0.6),
    "no_index.ts": ({"video_options": B_FRAMES}, 0.0, 0.6),
    "ten_bit.mp4": ({"video_options": B_FRAMES, "pixels": "yuv420p10le"}, 0.0, 0.6),
    "hevc.mp4": ({"video": "libx265", "video_options": HEVC}, 0.0, 0.6),
    "hevc_ten_bit.mkv": ({"video": "libx265", "video_options": HEVC, "pixels": "yuv420p10le"}, 0.001, 8.6),
    "vp9.webm": ({"video": "libvpx-vp9", "video_options": VP9, "audio": "libopus"}, 0.001, 8.6),
    "av1.mp4": ({"video": "libsvtav1", "video_options": AV1}, 0.0, 0.6),
    "mpeg2.mpg": ({"video": "mpeg2video", "video_options": {"g": "15", "bf": "2"}, "audio": "mp2", "clock_hz": 25}, 0.0, 0.6),
    "intra_refresh.mp4": ({"video_options": {**B_FRAMES, "x264-params": "intra-refresh=1"}}, 0.0, 0.6),
    "hidden_frames.webm": ({"video": "libvpx", "video_options": {**VP9, "deadline": "good"}, "audio": "libopus"}, 0.001, 8.6),
}  # fmt: skip
SECONDS, FPS = 12.0, 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


def video(folder, name: str):
    """Returns the path of a file of `KINDS`, which the first call makes."""
    path = folder / name
    if not path.exists():
        write(path, seconds=SECONDS, fps=FPS, **KINDS[name][0])
    return path


def shown_by_full_decode(path, times_s) -> list[tuple[int, np.ndarray]]:
    """Returns (time stamp, pixels) of the frame shown at each time, by decoding the whole file from its beginning."""
    with av.open(str(path)) as container:
        stream = streams.choose(container, "video")
        decoded = [(float(f.pts * f.time_base), f.pts, f.to_ndarray()) for f in container.decode(stream)]
        origin_s = streams.origin_s(container)
    decoded.sort(key=lambda frame: frame[0])
    starts = [start for start, _, _ in decoded]
    return [decoded[max(bisect.bisect_right(starts, t + origin_s + 1e-6) - 1, 0)][1:] for t in times_s]


def shown(path, times_s) -> list[tuple[int, np.ndarray]]:
    with av.open(str(path)) as container:
        found = {t: (f.pts, f.to_ndarray()) for t, f in frames.shown(container, list(times_s))}
    assert sorted(found) == list(times_s)
    return [found[t] for t in times_s]


# Dense times; gaps within a group of pictures, across one and across several; a keyframe and right before it.
TIMES = sorted([*np.arange(0.0, 1.5, 0.09375).tolist(), 1.96, 1.98, 2.0, 2.02, 3.5, 3.95, 4.3, 9.99, 10.0, 11.9])


@pytest.mark.parametrize("name", KINDS)
def test_what_is_shown_has_the_pixels_of_a_full_decode(folder, name, monkeypatch):
    path = video(folder, name)
    if name != "intra_refresh.mp4":
        monkeypatch.setattr(full_decode, "shown", None)  # their packets describe their frames
    expected = shown_by_full_decode(path, TIMES)
    alone = [shown(path, [t])[0] for t in TIMES[14::2]]
    for found, right in ((shown(path, TIMES), expected), (alone, expected[14::2])):
        assert [pts for pts, _ in found] == [pts for pts, _ in right]
        if name != "intra_refresh.mp4":  # there, recovery after a seek is not exact
            assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, right, strict=True))


@pytest.mark.parametrize(("ending", "b_frames", "keyframes"), [("mp4", 1, 5), ("mp4", 2, 10), ("mkv", 2, 10)])
def test_pictures_behind_a_keyframe_that_forgets_those_before_it_are_shown(tmp_path, ending, b_frames, keyframes):
    # In an open group of pictures the first frame decoded after the keyframe may discard a reference from before it.
    path = tmp_path / f"a.{ending}"
    options = {"preset": "ultrafast", "g": str(keyframes), "bf": str(b_frames), "x264-params": "open-gop=1"}
    write(path, seconds=6.0, fps=FPS, video_options=options, audio=None)
    times = np.arange(0.5, 5.9, 0.0931).tolist()
    whole = dict(zip(times, shown_by_full_decode(path, times), strict=True))
    for together in (times, times[::9], *([time_s] for time_s in times)):
        for time_s, (stamp, pixels) in zip(together, shown(path, together), strict=True):
            assert stamp == whole[time_s][0]
            np.testing.assert_array_equal(pixels, whole[time_s][1])


@pytest.mark.parametrize("name", KINDS)
def test_a_clip_is_in_time_and_the_same_cut_alone_and_among_others(folder, name):
    path, (_, tick_s, lag) = video(folder, name), KINDS[name]
    times = (0.5, 1.2, 1.99, 2.02, 4.3, 4.5, 9.97, 10.9)
    for time_s, part in zip(times, cut(path, times), strict=True):
        assert_in_time(part, time_s, np.arange(SECONDS * FPS) / FPS, lag=lag, tick_s=tick_s)
        (alone,) = cut(path, [time_s])
        assert part.frames == alone.frames or name == "intra_refresh.mp4"
        np.testing.assert_array_equal(part.frame_times_us, alone.frame_times_us)
        np.testing.assert_array_equal(part.audio, alone.audio)


def test_b_frames_in_avi_which_does_not_tell_when_pictures_are_shown_are_refused(tmp_path):
    reason = "container does not say when pictures are shown: B-frames in AVI"
    for name, (codec, options), expected in (
        ("a.avi", ("libx264", B_FRAMES), [reason] * 2),
        ("b.avi", ("mpeg4", {"g": "50", "bf": "2"}), [reason] * 2),
        ("c.avi", ("mpeg4", {"g": "50"}), None),
    ):
        write(tmp_path / name, fps=FPS, video=codec, video_options=options, audio="pcm_s16le", clock_hz=FPS)
        found = cut(tmp_path / name, (0.6, 2.1))
        assert expected in (None, found)
        for time_s, part in zip((0.6, 2.1), found, strict=True):
            if expected is None:
                assert_in_time(part, time_s, np.arange(100) / FPS)


def test_stamps_that_contradict_the_order_of_pictures_are_not_believed(tmp_path):
    write(tmp_path / "a.mp4", fps=FPS, seconds=6.0, video_options=B_FRAMES, audio="pcm_s16le")
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "lies.mkv"), "w") as out:
        made = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                if packet.stream.type == "video":
                    packet.pts = packet.dts
                packet.stream = made[packet.stream_index]
                out.mux(packet)
    reason = "decoding failed: time stamps contradict the order of pictures"
    assert cut(tmp_path / "lies.mkv", (0.9, 2.5, 4.1)) == [reason] * 3


@pytest.fixture
def decoded(monkeypatch) -> collections.Counter:
    """Counts how often the decoder gives each frame: time stamp → number."""
    counts, give = collections.Counter(), frames._Run._give

    def counting(self, given, **kwargs):
        counts.update(frame.pts for frame in given)
        return give(self, given, **kwargs)

    monkeypatch.setattr(frames._Run, "_give", counting)
    return counts


@pytest.mark.parametrize("name", ["h264.mp4", "open_gop.mp4", "hevc.mp4", "no_index.ts"])
def test_a_frame_is_decoded_once_however_many_clips_hold_it(folder, decoded, name):
    cut(video(folder, name), [*np.arange(0.5, 4.0, 0.1), 9.0, 9.01, 9.02])
    assert max(decoded.values()) == 1


def test_what_is_not_wanted_and_not_referred_to_is_not_decoded(folder, decoded, monkeypatch):
    path, times = video(folder, "h264.mp4"), [1.5, 3.5, 7.5]  # keyframes are at 0, 2, 4, ...
    shown(path, times)
    some = dict(decoded)
    decoded.clear()
    monkeypatch.setattr(frames, "_CAN_SKIP", ())
    shown(path, times)
    # Frames from the keyframe to the wanted one, and frames decoded before it. Two of four are B-frames without references.
    assert sum(decoded.values()) <= 3 * (0.75 + 1.5) * FPS
    assert some.keys() < decoded.keys()
    assert len(some) < 0.6 * len(decoded)


@pytest.mark.parametrize(("layers", "skips"), [(1, True), (3, False)])
def test_in_hevc_of_several_temporal_layers_nothing_is_left_out(tmp_path, layers, skips):
    options = {
        **HEVC,
        "x265-params": f"{HEVC['x265-params']}:temporal-layers={layers}" if layers > 1 else HEVC["x265-params"],
    }
    write(tmp_path / "a.mp4", video="libx265", video_options=options, seconds=4.0)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert frames._can_skip(container.streams.video[0].codec_context) == skips
    times = [0.5, 1.03, 2.5, 3.7]
    for (a, x), (b, y) in zip(
        shown(tmp_path / "a.mp4", times), shown_by_full_decode(tmp_path / "a.mp4", times), strict=True
    ):
        assert a == b
        assert np.array_equal(x, y)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "open_gop.mp4", "no_index.ts", "vp9.webm", "mpeg2.mpg"])
def test_files_whose_packets_do_not_tell_their_pictures_are_cut_the_same(folder, name, monkeypatch):
    path, times = video(folder, name), (0.5, 2.02, 4.3, 10.9)
    told = cut(path, times)

    def refuse(*_):
        raise packets.UnclearError

    monkeypatch.setattr(packets.Packets, "read_past", refuse)
    for a, b in zip(told, cut(path, times), strict=True):
        assert a.frames == b.frames


def test_packets_are_held_up_to_a_limit_where_no_keyframe_comes(folder, monkeypatch):
    write(folder / "one_keyframe.mp4", seconds=SECONDS, fps=FPS, video_options={**B_FRAMES, "g": "10000"})
    times = [0.5, 6.0, 11.0]
    expected = shown(folder / "one_keyframe.mp4", times)
    monkeypatch.setattr(packets, "_MAX_HELD_BYTES", 4096)
    for (a, x), (b, y) in zip(shown(folder / "one_keyframe.mp4", times), expected, strict=True):
        assert a == b
        assert np.array_equal(x, y)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "hevc.mp4", "no_index.ts"])
def test_a_seek_goes_where_the_index_says_and_only_across_what_is_far(folder, name, monkeypatch):
    path, gone = video(folder, name), []
    go_to = packets.Packets.go_to
    monkeypatch.setattr(packets.Packets, "go_to", lambda self, limit: (gone.append(limit), go_to(self, limit)))
    shown(path, [0.5, 1.0, 3.0, 4.1])
    assert gone == []
    shown(path, [0.5, 9.0])
    assert len(gone) == (0 if name == "no_index.ts" else 1)


def _copy(path, sources, default: int | None = None, cover: bytes = b""):
    """Writes the streams of several files into one; `default` is the index of the source whose streams are marked default."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(av.open(str(source))) for source in sources]
        out = stack.enter_context(av.open(str(path), "w"))
        made = {}
        if cover and path.suffix == ".mkv":
            out.add_attachment("cover.jpg", "image/jpeg", cover)
        for k, source in enumerate(opened):
            for stream in source.streams:
                made[k, stream.index] = out.add_stream_from_template(stream)
                if default is not None:
                    made[k, stream.index].disposition = av.stream.Disposition(int(k == default))
        if cover and path.suffix != ".mkv":
            picture = out.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            out.start_encoding()
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts, packet.time_base = picture, 0, 0, Fraction(1, 1)
            out.mux(packet)
        for k, source in enumerate(opened):
            for packet in source.demux():
                if packet.size:
                    packet.stream = made[k, packet.stream_index]
                    out.mux(packet)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize(("default", "taken"), [(0, 0), (1, 1), (None, 0)])
def test_of_several_streams_the_default_one_is_taken_else_the_first(tmp_path, ending, default, taken):
    write(tmp_path / "small.mp4", seconds=3.0, layout="stereo", right=0.0)  # half as loud
    write(tmp_path / "large.mp4", seconds=3.0, size=(384, 192))
    _copy(tmp_path / f"a.{ending}", [tmp_path / "small.mp4", tmp_path / "large.mp4"], default)
    (part,) = cut(tmp_path / f"a.{ending}", [1.0], short_side_px=192)
    assert (part.height, part.width) == ((96, 192), (192, 384))[taken]
    loudness = np.std(part.audio / 32768)
    assert 0.9 < loudness / np.std(test_media.sound_at(0.5 + np.arange(24_000) / 16_000)) * (2, 1)[taken] < 1.1


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_cover_art_is_no_video(tmp_path, ending):
    write(tmp_path / "a.mp4", seconds=3.0)
    write(tmp_path / "blind.mp4", seconds=3.0, video=None)
    cover = simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8), colorsubsampling="420")
    _copy(tmp_path / f"seen.{ending}", [tmp_path / "a.mp4"], cover=cover)
    _copy(tmp_path / f"unseen.{ending}", [tmp_path / "blind.mp4"], cover=cover)
    with av.open(str(tmp_path / f"seen.{ending}")) as container:
        assert len(container.streams.video) == 2
    (part,) = cut(tmp_path / f"seen.{ending}", [1.0])
    assert (part.height, part.width) == (96, 192)
    assert abs(test_media.number_in(part.frames[0]) - 15) <= 1  # copied, Matroska begins with the audio's lead-in
    assert cut(tmp_path / f"unseen.{ending}", [1.0]) == ["no video stream"]


def test_what_lies_before_time_zero_is_not_shown_at_zero(tmp_path):
    # Nothing in Matroska can begin before time 0. In mp4 it can, and the edit list cuts it off.
    write(tmp_path / "a.mp4", seconds=4.0, frame_starts_s=np.arange(-30, 90) / 30, audio_span=(-1.0, 3.0))
    for time_s, part in zip((0.5, 1.3), cut(tmp_path / "a.mp4", (0.5, 1.3)), strict=True):
        assert [test_media.number_in(jpeg) - 30 for jpeg in part.frames] == [
            int((t + 1e-6) * 30) for t in test_media.window(time_s).frame_times_s
        ]
        late, correlation = test_media.lag_of(part.audio, time_s - 0.5)
        assert abs(late) < 0.6
        assert correlation > 0.97
