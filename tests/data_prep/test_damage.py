"""Damage costs the clips that need what is damaged, each with its reason, and no others."""

import collections
import random

import av
import numpy as np
import pytest

from data_prep import media
from tests.data_prep.test_media import cut, window, write


def test_of_a_file_cut_short_the_part_that_is_there_is_cut(tmp_path):
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
    """Returns (time, place in the file, bytes) of a stream's packets."""
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
        # Of pictures, those up to the next keyframe; of sound, what a decoder needs before the clip too.
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


def test_damage_right_behind_a_keyframe_is_told_though_there_an_open_gop_may_have_some(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, seconds=12.0, fps=25, video_options={"preset": "veryfast", "g": "50", "bf": "3", "sc_threshold": "0"})
    content = bytearray(path.read_bytes())
    _, at, size = _offsets(path, "video")[201]  # the first that refers to the keyframe at 8 s
    content[at + 5 : at + size] = b"\xff" * (size - 5)
    (tmp_path / "damaged.mp4").write_bytes(content)
    before, behind = cut(tmp_path / "damaged.mp4", [0.5, 9.0])
    assert isinstance(before, media.Cut)
    assert isinstance(behind, str)
    assert behind.startswith("decoding failed: ")


def test_damage_of_what_is_not_wanted_and_not_referred_to_costs_nothing(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, seconds=6.0, fps=25, video_options={"preset": "veryfast", "g": "50", "bf": "3", "sc_threshold": "0"})
    content, wanted = bytearray(path.read_bytes()), []
    for time_s, at, size in _offsets(path, "video"):
        # The last NAL unit of a packet is the slice, whose header says whether it is referred to.
        unit = content[at + size - _last_unit(content[at : at + size])]
        if unit >> 5 & 3:
            wanted.append(time_s)
        else:
            content[at + 5 : at + size] = b"\xff" * (size - 5)
    (tmp_path / "damaged.mp4").write_bytes(content)
    assert 50 < len(wanted) < 100
    wanted_window = [media.Window(0.0, 5.9, tuple(sorted(wanted)))]
    ((_, a),), ((_, b),) = (
        media.cut_windows(tmp_path / name, wanted_window, short_side_px=96) for name in ("a.mp4", "damaged.mp4")
    )
    assert a.frames == b.frames


def _last_unit(packet: bytearray) -> int:
    """Returns the length of the last NAL unit of a packet, each of which follows its length of four bytes."""
    at = 0
    while True:
        length = int.from_bytes(packet[at : at + 4], "big")
        at += 4 + length
        if at >= len(packet):
            return length


def test_whatever_bytes_are_wrong_every_window_comes_once_and_nothing_is_raised(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, seconds=3.0, options={"movflags": "faststart"})
    content, rng = path.read_bytes(), random.Random(0)
    header = content.index(b"mdat")
    outcomes = collections.Counter()
    for trial in range(120):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 3, 30])):
            # Every second time in the tables, where sizes, rates and time stamps are.
            damaged[rng.randrange(header if trial % 2 else len(content))] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(damaged)
        outcomes.update(part if isinstance(part, str) else "cut" for part in cut(path, (0.5, 1.0, 2.0)))
    assert len(outcomes) > 4
    assert outcomes["cut"] > 20
