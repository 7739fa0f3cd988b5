"""Only the clips that need what is damaged are lost, each with its reason."""

import collections
import random

import av
import numpy as np
import pytest

from data_prep import media, packets
from data_prep.windows import Window
from tests.data_prep.test_media import cut, number_in, window, write


def test_the_intact_part_of_a_truncated_file_is_cut(tmp_path):
    options = {"movflags": "faststart"}
    write(tmp_path / "whole.mp4", seconds=10.0, options=options, video_options={"preset": "ultrafast", "g": "25"})
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "short.mp4").write_bytes(content[: 6 * len(content) // 10])
    times = np.arange(0.5, 9.0, 0.5)
    whole, short = (cut(tmp_path / name, times) for name in ("whole.mp4", "short.mp4"))
    there = [isinstance(part, media.Cut) for part in short]
    assert there == sorted(there, reverse=True)
    assert 4 <= sum(there) <= 12
    for a, b in zip(whole, short, strict=True):
        if isinstance(b, media.Cut):
            assert b.frames == a.frames
            np.testing.assert_allclose(b.audio, a.audio, atol=2)


def _offsets(path, kind: str) -> list[tuple[float, int, int]]:
    """Returns (time in s, offset in the file, size in bytes) of each packet of the stream."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return [(float(p.pts * p.time_base), p.pos, p.size) for p in container.demux(stream) if p.size]


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_a_damaged_packet_costs_the_clips_that_need_it_and_no_other(tmp_path, kind):
    path = tmp_path / "a.mp4"
    write(path, seconds=12.0, fps=25, video_options={"preset": "ultrafast", "g": "25"})
    content = bytearray(path.read_bytes())
    for time_s, at, size in _offsets(path, kind):
        if 6.0 <= time_s < 6.1:
            content[at : at + size] = b"\xff" * size
    (tmp_path / "damaged.mp4").write_bytes(content)
    times = np.arange(0.5, 10.6, 0.25)
    whole, damaged = cut(path, times), cut(tmp_path / "damaged.mp4", times)
    for time_s, a, b in zip(times, whole, damaged, strict=True):
        # Lost are frames up to the next keyframe; of sound also what a decoder needs before the clip.
        lost = any(6.0 <= t < 7.0 for t in window(time_s).frame_times_s)
        if kind == "audio":
            lost = time_s - 0.5 < 6.1 and time_s + 1.0 > 6.0
            if not lost and time_s - 1.0 < 6.1 and time_s + 1.2 > 6.0:
                continue
        if lost:
            assert isinstance(b, str), time_s
            assert b.startswith("decoding failed: "), time_s
        else:
            assert b.frames == a.frames, time_s
            np.testing.assert_array_equal(b.audio, a.audio)


SLICED = {
    "preset": "veryfast", "g": "50", "bf": "3", "sc_threshold": "0", "threads": "1",
    "x264-params": "slices=4:b-pyramid=none:b-adapt=0",
}  # fmt: skip


def _units(content: bytes, at: int, size: int) -> list[int]:
    """Returns the offsets of the NAL units of a packet; each follows its length, which has four bytes."""
    found, stop = [], at + size
    while at < stop:
        found.append(at + 4)
        at += 4 + int.from_bytes(content[at : at + 4], "big")
    return found


def _without_a_slice(path, to, number: int) -> tuple[list[int], int]:
    """Writes an H.264 file in which a frame's last slice is filler, which the decoder conceals without an error.

    Returns (numbers of all frames in decoding order, index of that frame among them).
    """
    content, places = bytearray(path.read_bytes()), _offsets(path, "video")
    numbers = [round(time_s * 25) for time_s, _, _ in places]
    place = numbers.index(number)
    units = _units(content, *places[place][1:])
    assert all(content[at] >> 5 & 3 for at in units)  # other frames refer to it
    content[units[-1]] = content[units[-1]] & 0xE0 | 12
    to.write_bytes(content)
    return numbers, place


def _pictures(path, times_s) -> list[media.Cut | str]:
    """Returns the result for a window of one frame at each time, all cut by one call."""
    windows = [Window(t, t + 0.1, (t,)) for t in times_s]
    return [part for _, part in sorted(media.cut_windows(path, windows, short_side_px=96), key=lambda pair: pair[0])]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("step", [1, 12, 30])
def test_frames_that_refer_to_a_concealed_frame_are_lost_whether_that_is_wanted_or_not(tmp_path, monkeypatch, told, step):
    path = tmp_path / "a.mp4"
    write(path, seconds=8.0, fps=25, video_options=SLICED)
    if not told:  # as if packets did not describe their frames: all are decoded
        monkeypatch.setattr(packets.Packets, "read_past", _refuse)
    numbers, place = _without_a_slice(path, tmp_path / "damaged.mp4", 116)  # the keyframe before it is 100
    times = [n / 25 + 0.01 for n in range(0, 190, step) if n != 116]
    outcomes = collections.Counter()
    for time_s, a, b in zip(times, _pictures(path, times), _pictures(tmp_path / "damaged.mp4", times), strict=True):
        number = int(time_s * 25)
        if 100 <= number < 150 and numbers.index(number) > place:
            assert b == "picture is damaged", number
        else:
            assert b.frames == a.frames, number
        outcomes[isinstance(b, str)] += 1
    assert outcomes[True] > 0
    assert outcomes[False] > 2 * outcomes[True]


def _refuse(*_):
    raise packets.UnclearError


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("ending", "b_frames"), [("ts", 0), ("mkv", 0), ("mkv", 3)])
@pytest.mark.parametrize(("stop", "next_key"), [(5.0, 5.0), (4.8, 5.0)])
def test_no_frame_is_shown_for_long_in_place_of_lost_ones(tmp_path, monkeypatch, told, ending, b_frames, stop, next_key):
    path = tmp_path / f"a.{ending}"
    write(path, seconds=8.0, fps=25, video_options={"preset": "ultrafast", "g": "25", "bf": str(b_frames)})
    with av.open(str(path)) as source, av.open(str(tmp_path / f"hole.{ending}"), "w") as out:
        made = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        origin = source.streams.video[0].start_time
        for packet in source.demux():
            time_s = float((packet.pts - origin) * packet.time_base) if packet.size else 0.0
            if packet.size and not (packet.stream.type == "video" and 3.0 - 1e-3 <= time_s < stop - 1e-3):
                packet.stream = made[packet.stream_index]
                out.mux(packet)
    if not told:
        monkeypatch.setattr(packets.Packets, "read_past", _refuse)
    times = [2.9, 2.99, 3.01, 3.5, 4.5, 4.7, 4.9, 4.99, 5.01, 6.0]
    for time_s, a, b in zip(times, _pictures(path, times), _pictures(tmp_path / f"hole.{ending}", times), strict=True):
        if 3.0 < time_s < next_key:
            assert b == "video does not cover the clip", time_s
        else:
            assert b.frames == a.frames, time_s


@pytest.mark.parametrize("told", [True, False])
def test_damage_right_behind_a_keyframe_is_found_though_an_open_gop_may_have_some_there(tmp_path, monkeypatch, told):
    path = tmp_path / "a.mp4"
    write(path, seconds=12.0, fps=25, video_options={"preset": "veryfast", "g": "50", "bf": "3", "sc_threshold": "0"})
    content = bytearray(path.read_bytes())
    _, at, size = _offsets(path, "video")[201]  # the first that refers to the keyframe at 8 s
    content[at + 5 : at + size] = b"\xff" * (size - 5)
    (tmp_path / "damaged.mp4").write_bytes(content)
    if not told:
        monkeypatch.setattr(packets.Packets, "read_past", _refuse)
    before, behind = cut(tmp_path / "damaged.mp4", [0.5, 9.0])
    assert isinstance(before, media.Cut)
    assert isinstance(behind, str)
    assert behind.startswith("decoding failed: ")


def test_an_mp4_that_begins_amid_a_group_of_pictures_is_cut_from_its_first_keyframe_on(tmp_path):
    write(tmp_path / "a.mp4", seconds=8.0, fps=25, video_options={**SLICED, "x264-params": "bframes=3"})
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "amid.mp4"), "w") as out:
        made = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            late = packet.dts is not None and packet.pts * packet.time_base >= (2.6 if packet.stream.type == "video" else 3.0)
            if late:  # its edit list begins at 3 s; the first keyframe is at 4 s
                packet.pts, packet.dts = (stamp - round(3 / packet.time_base) for stamp in (packet.pts, packet.dts))
                packet.stream = made[packet.stream_index]
                out.mux(packet)
    times = [0.6, 1.5, 1.9, 3.4]
    lost, *found = cut(tmp_path / "amid.mp4", times)
    assert isinstance(lost, str)
    for time_s, part in zip(times[1:], found, strict=True):
        assert [number_in(jpeg) for jpeg in part.frames] == [int((t + 3.0) * 25 + 1e-4) for t in window(time_s).frame_times_s]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_file_that_begins_with_an_open_group_of_pictures_is_cut(tmp_path, monkeypatch, ending, told):
    path, options = tmp_path / f"a.{ending}", {**SLICED, "x264-params": "open-gop=1"}
    write(path, seconds=6.0, fps=25, video_options=options)
    with av.open(str(path)) as source, av.open(str(tmp_path / f"open.{ending}"), "w") as out:
        made, begun = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}, False
        for packet in source.demux():
            is_video = packet.stream.type == "video"
            begun = begun or (is_video and packet.is_keyframe and packet.pts * packet.time_base > 1)
            if packet.size and (begun or not is_video):  # frames shown before the keyframe follow it
                packet.stream = made[packet.stream_index]
                out.mux(packet)
    if not told:
        monkeypatch.setattr(packets.Packets, "read_past", _refuse)
    times = [2.1, 2.5, 3.3, 4.1]
    for a, b in zip(_pictures(path, times), _pictures(tmp_path / f"open.{ending}", times), strict=True):
        assert b.frames == a.frames


def test_damage_of_what_is_not_wanted_and_not_referred_to_costs_nothing(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, seconds=6.0, fps=25, video_options={"preset": "veryfast", "g": "50", "bf": "3", "sc_threshold": "0"})
    content, wanted = bytearray(path.read_bytes()), []
    for time_s, at, size in _offsets(path, "video"):
        # The last NAL unit of a packet is the slice, whose header says whether it is referred to.
        unit = content[_units(content, at, size)[-1]]
        if unit >> 5 & 3:
            wanted.append(time_s)
        else:
            content[at + 5 : at + size] = b"\xff" * (size - 5)
    (tmp_path / "damaged.mp4").write_bytes(content)
    assert 50 < len(wanted) < 100
    wanted_window = [Window(0.0, 5.9, tuple(sorted(wanted)))]
    ((_, a),), ((_, b),) = (
        media.cut_windows(tmp_path / name, wanted_window, short_side_px=96) for name in ("a.mp4", "damaged.mp4")
    )
    assert a.frames == b.frames


def test_whatever_bytes_are_wrong_every_window_comes_once_and_nothing_is_raised(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, seconds=3.0, options={"movflags": "faststart"})
    content, rng = path.read_bytes(), random.Random(0)
    header = content.index(b"mdat")
    outcomes = collections.Counter()
    for trial in range(120):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 3, 30])):
            # In every second trial in the tables, which hold sizes, rates and time stamps.
            damaged[rng.randrange(header if trial % 2 else len(content))] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(damaged)
        outcomes.update(part if isinstance(part, str) else "cut" for part in cut(path, (0.5, 1.0, 2.0)))
    assert len(outcomes) > 4
    assert outcomes["cut"] > 20
