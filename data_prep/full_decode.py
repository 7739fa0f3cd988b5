"""Frames of a video stream at given times where packets do not tell which picture they hold, such as fields.

Decodes all, then looks: slower than `data_prep.frames`, which knows each picture before it is decoded.
"""

import collections
import contextlib
import itertools
import math
from collections.abc import Iterator

import av
from av.video.frame import PictureType

from data_prep import streams

NOT_COVERED = "video does not cover the clip"
_MAX_RUN_GAP_S = 6.0  # decoded on across less
_B_FRAMES = (PictureType.B, PictureType.BI)


class _HoleError(Exception):
    """Pictures are lost."""


class _DoubtError(Exception):
    """What can't be decoded right behind the first keyframe refers to what is before it, or is damaged."""


def shown(container, stream, times_s: list[float]) -> Iterator[tuple[float, av.VideoFrame | str]]:
    """Yields what `frames.shown` does.

    Args:
      container, stream: Of the video.
      times_s: Of the video, in order, no time twice, seconds.
    """
    stream.codec_context.skip_frame = "DEFAULT"
    todo = collections.deque(times_s)
    while todo:
        yield from _run(container, stream, todo)


def _run(container, stream, todo: collections.deque[float]) -> Iterator[tuple[float, av.VideoFrame | str]]:
    """Takes times from `todo` until the next is far; yields what is shown then."""
    origin_s, frame_s = streams.origin_s(container), streams.frame_s(stream)
    # B-frames may refer to a picture behind them that is corrupt: they are held until one comes that is no B-frame.
    held: list[tuple[float, av.VideoFrame | str]] = []
    now, first, broken = None, True, ""

    def hold(stop_s: float, what: av.VideoFrame | str) -> None:
        while todo and todo[0] + origin_s < stop_s - streams.EPSILON_S:
            held.append((todo.popleft(), what))

    for item in itertools.chain(_frames_from(container, stream, todo[0] + origin_s), [None]):
        own_s = frame_s if now is None or not now.duration else float(now.duration * now.time_base)
        if isinstance(item, Exception):
            broken = NOT_COVERED if isinstance(item, _HoleError) else streams.why("decoding failed", item)
            if now is not None and now.pict_type not in _B_FRAMES:
                hold(now.time + own_s, now)
                yield from held
            else:
                yield from ((time_s, what if isinstance(what, str) else broken) for time_s, what in held)
            held.clear()
            now = None
            continue
        if now is not None:
            hold(now.time + own_s if item is None else item.time, now)
        if item is not None:
            hold(item.time - (frame_s if first and not broken else 0.0), broken or NOT_COVERED)
            first, broken = False, ""
        if item is None or item.pict_type not in _B_FRAMES or (now is not None and now.pict_type not in _B_FRAMES):
            served_s = held[-1][0] if held else math.inf
            yield from held
            held.clear()
            if not todo or (streams.can_seek(container) and todo[0] - served_s > _MAX_RUN_GAP_S):
                return
        now = item
    hold(math.inf, broken or NOT_COVERED)
    yield from held


def _frames_from(container, stream, time_s: float) -> Iterator[av.VideoFrame | Exception]:
    """Yields what `_decode_all` does, from a frame on that begins at or before a stream time or is the stream's first."""
    # mp4 seeks by decoding times, which are before those of showing where there are B-frames: the keyframe found may be
    # shown too late. Or it is in doubt whether what follows it is damaged, and one before it will tell; where there is none,
    # the file may begin amid an open group of pictures.
    doubtful_s = None
    for back_s in streams.BACK_S if streams.can_seek(container) else streams.BACK_S[-1:]:
        try:
            streams.seek(container, stream, time_s - back_s)
        except streams.DAMAGE as error:
            yield error
            return
        whole = math.isinf(back_s)
        items = _decode_all(container, stream, lenient=not whole or doubtful_s is not None)
        first = next(items, None)
        is_doubtful = isinstance(first, _DoubtError)
        if is_doubtful:
            first = next(items, None)
        is_before = isinstance(first, av.VideoFrame) and first.time <= time_s + streams.EPSILON_S
        if not whole and is_before and is_doubtful and (doubtful_s is None or first.time == doubtful_s):
            doubtful_s = first.time
            continue
        if whole or is_before:
            yield from itertools.chain([first] if first is not None else [], items)
            return


def _decode_all(container, stream, *, lenient: bool) -> Iterator[av.VideoFrame | Exception]:
    """Yields frames, and for damage its exception, behind which they begin anew with a keyframe.

    If lenient, and behind each damage, pictures between a keyframe and the first sound one need not be whole: they may refer
    to what is before it. If lenient, a _DoubtError tells once that some were not, before the first frame.
    """
    context, waiting, sound, latest = stream.codec_context, False, False, -math.inf
    may_doubt = lenient
    for packet in _packets(container, stream):
        error, given = None, []
        if isinstance(packet, Exception):
            error = packet
        elif waiting and packet.size and not packet.is_keyframe:
            continue
        else:
            waiting = False
            try:
                given = packet.decode()
            except streams.DAMAGE as damage:
                if lenient and not sound and not packet.is_keyframe:
                    if may_doubt:
                        yield _DoubtError()
                    may_doubt = False
                    continue
                error = damage
        if error is not None:
            with contextlib.suppress(*streams.DAMAGE):
                given = context.decode(None)
        for frame in given:
            if frame.pts is None:
                error = ValueError("video without time stamps")
            elif frame.pts < latest:
                error = ValueError("time stamps contradict the order of pictures")
            elif frame.is_corrupt and sound:
                error = streams.CorruptError(frame.pts)
            elif frame.is_corrupt:
                continue
            else:
                frame.time_base = stream.time_base  # PyAV does not know it of what a drained decoder gives
                sound, may_doubt, latest = True, False, frame.pts
                yield frame
                continue
            break
        if error is not None:
            yield error
            context.flush_buffers()
            lenient, may_doubt, waiting, sound, latest = True, False, True, False, -math.inf


def _packets(container, stream) -> Iterator[av.Packet | Exception]:
    """Yields packets, and for damage and holes between them an exception; twice the damage without a packet is the end."""
    damaged, holes = False, streams.Holes(container, stream)
    while True:
        try:
            for packet in container.demux(stream):
                if holes.is_behind(packet):
                    yield _HoleError()
                damaged = False
                yield packet
            return
        except streams.DAMAGE as error:
            yield error
            if damaged:
                return
            damaged = True
