"""Frames of a video stream at given times, for streams whose packets do not tell which picture they hold, such as fields.

Decodes every picture and then selects. This is slower than `data_prep.frames`, which knows each picture before decoding it.
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
_MAX_RUN_GAP_S = 6.0  # shorter gaps between times are decoded rather than skipped by a seek
_B_FRAMES = (PictureType.B, PictureType.BI)


class _HoleError(Exception):
    """Pictures are lost before the next packet."""


class _DoubtError(Exception):
    """Pictures after the first keyframe can't be decoded: they refer to pictures before it, or are damaged."""


def shown(container, stream, times_s: list[float]) -> Iterator[tuple[float, av.VideoFrame | str]]:
    """Yields what `frames.shown` yields.

    Args:
      container, stream: Container and stream of the video.
      times_s: Times in the video, sorted and without duplicates, seconds.
    """
    stream.codec_context.skip_frame = "DEFAULT"
    todo = collections.deque(times_s)
    while todo:
        yield from _run(container, stream, todo)


def _run(container, stream, todo: collections.deque[float]) -> Iterator[tuple[float, av.VideoFrame | str]]:
    """Removes times from `todo` until the next one is far ahead; yields what is shown at these times."""
    origin_s, frame_s = streams.origin_s(container), streams.frame_s(stream)
    # B-frames may refer to a later picture that is corrupt, so they are held until a picture comes that is no B-frame.
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
    """Yields what `_decode_all` yields, starting with a frame at or before a stream time, or with the stream's first."""
    # There are two reasons to seek further back. mp4 seeks by decoding times, which with B-frames are earlier than the times
    # of showing, so the keyframe found may be shown too late. Or it is in doubt whether pictures after the keyframe are
    # damaged, which decoding from an earlier keyframe settles. Without an earlier one, the file may begin in the middle of an
    # open group of pictures.
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
    """Yields frames, and an exception for each damage, after which frames continue from the next keyframe.

    If `lenient`, and after each damage, pictures between a keyframe and the first intact frame may be incomplete, since they
    may refer to pictures before the keyframe. If `lenient`, a _DoubtError before the first frame says that some were.
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
                frame.time_base = stream.time_base  # PyAV does not set it on frames of a drained decoder
                sound, may_doubt, latest = True, False, frame.pts
                yield frame
                continue
            break
        if error is not None:
            yield error
            context.flush_buffers()
            lenient, may_doubt, waiting, sound, latest = True, False, True, False, -math.inf


def _packets(container, stream) -> Iterator[av.Packet | Exception]:
    """Yields packets, and an exception for each damage or hole between them; ends at two damages without a packet between."""
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
