"""Frames of a video stream at given times, each decoded once and in order, with as few other frames decoded as possible.

Packets are read ahead of the decoder, so it is known before a packet is decoded whether its picture is wanted. If a keyframe
lies between the last decoded picture and the next wanted one, decoding continues from that keyframe. Longer stretches are
skipped by seeking with the file's index of keyframes. Pictures that are not wanted and that no other refers to are not
decoded. The frames have the same pixels as if the whole stream were decoded (`tests/data_prep/test_frames.py`).
"""

import collections
import contextlib
import itertools
import math
from collections.abc import Iterator

import av

from data_prep import full_decode, streams
from data_prep.full_decode import NOT_COVERED
from data_prep.packets import Packets, UnclearError

_AVI = "container does not say when pictures are shown: B-frames in AVI"
# Decoders that can skip single pictures: `skip_frame` is set before each packet. VP9's ignores it, dav1d reads it only once.
_CAN_SKIP = ("h264", "hevc")
_MAX_FED = 64  # packets that are kept track of although their pictures have come out of the decoder


def shown(container, times_s: list[float]) -> Iterator[tuple[float, av.VideoFrame | str]]:
    """Yields (time, the frame shown at this time or the reason why there is none), every time once.

    A frame is shown until the next one begins. The last frame, and one before a hole (lost pictures), are shown for their own
    duration. The first is also shown for one frame's duration before it begins, as players do. After a hole, nothing is shown
    until the next keyframe.

    Args:
      container: Opened container of which nothing was read yet; see `streams.take`.
      times_s: Times in the video, sorted and without duplicates, seconds.
    """
    stream = streams.take(container, "video")
    if container.format.name == "avi" and stream.codec_context.has_b_frames:  # FFmpeg guesses their times
        yield from ((time_s, _AVI) for time_s in times_s)
        return
    todo = collections.deque(times_s)
    run = _Run(container, stream)
    try:
        while todo:
            yield from run.show(todo)
        yield from run.end()
    except UnclearError:
        left = sorted({*todo, *run.waiting_s()})
        yield from full_decode.shown(container, stream, left)


class _Run:
    """Decoder of a video stream that returns the frames wanted, in order.

    `show` is called for one wanted time after the other. It goes to a keyframe if the time is far (`finish`, `Packets.go_to`,
    `_start`), finds out which picture is shown then, decodes up to that picture (`_decode`), and yields it when it has come
    out of the decoder (`_give`). If something is damaged, `_break` notes the reason, and all times up to the next keyframe
    get this reason instead of a picture.

    `limit` is a time in units of the stream's time base, mostly a wanted one; `stamp` is the time stamp of the picture shown
    then.

    Args:
      container, stream: Container and stream of the video.
    """

    def __init__(self, container, stream):
        self._packets = Packets(container, stream)
        self._context = stream.codec_context
        self._can_skip = _can_skip(self._context)
        self._origin_s, self._time_base = streams.origin_s(container), stream.time_base
        # Time stamp of a frame not yielded yet → the times that it is wanted for.
        self._waiting: dict[int, list[float]] = {}
        self._recent: dict[int, av.VideoFrame] = {}  # frames that may be wanted for later times
        # Time stamp → position in the order of decoding, at least of pictures still in the decoder or waited for.
        self._fed: dict[int, int] = {}
        self._num_fed = 0
        self._out = -math.inf  # time stamp of the last frame that came out of the decoder
        self._sound_from = math.inf  # pictures from this time stamp on must not be corrupt
        self._stamp = -math.inf  # time stamp of the last frame wanted
        self._dirty = False  # whether the decoder holds anything
        self._lenient = False  # whether packets that can't be decoded are skipped
        self._broken = ""  # reason why nothing can be shown before the next keyframe
        # Time stamp of the keyframe that decoding began with; None from the next keyframe on, or once an error was retried
        # (`_go_back`). In an open GOP, H.264 may tell the decoder to forget pictures before that keyframe. If the decoder
        # never had them it reports an error, but that is no damage.
        self._open_from: int | None = None

    def waiting_s(self) -> list[float]:
        return list(itertools.chain.from_iterable(self._waiting.values()))

    def show(self, todo: collections.deque[float]) -> Iterator[tuple[float, av.VideoFrame | str]]:
        """Removes the first time from `todo`; yields the results for it and earlier times that are known by now."""
        packets, time_s = self._packets, todo[0]
        limit = math.floor((time_s + self._origin_s + streams.EPSILON_S) / float(self._time_base))
        try:
            if packets.is_far(limit, bool(self._broken)):
                yield from self.finish()
                packets.go_to(limit)
                self._broken = ""
            while not packets.read_past(limit):  # too many packets are held
                if packets.gap:
                    yield from self._start(limit)
                yield from self._decode(limit)
            if packets.gap:
                yield from self._start(limit)
            stamp = None if self._broken else packets.shown_at(limit)
            if stamp is not None:
                todo.popleft()
                self._stamp = stamp
                self._waiting.setdefault(stamp, []).append(time_s)
                self._recent = {
                    pts: frame for pts, frame in self._recent.items() if pts >= stamp or pts in self._waiting
                }
                while packets.holds(stamp):
                    yield from self._decode(limit)
                yield from self._give([])
                return
        except streams.DAMAGE as error:
            if self._open_from is not None and isinstance(error, av.error.InvalidDataError) and self._go_back():
                yield from self._again()
                if todo and todo[0] == time_s:
                    yield from self.show(todo)
                return
            yield from self._break(error)
        if todo and todo[0] == time_s:
            todo.popleft()
            yield time_s, self._broken or NOT_COVERED

    def end(self) -> Iterator[tuple[float, av.VideoFrame | str]]:
        """Yields the results that have not come out of the decoder yet."""
        try:
            yield from self.finish()
        except streams.DAMAGE as error:
            yield from self._break(error)

    def finish(self) -> Iterator[tuple[float, av.VideoFrame | str]]:
        """Drains the decoder, so that it can begin at another keyframe; yields the frames it held, or reasons if damaged."""
        if self._dirty:
            self._context.skip_frame = "DEFAULT"
            try:
                yield from self._give(self._context.decode(None), last=True)
            except streams.DAMAGE as error:
                yield from self._lose(list(self._waiting), streams.why("decoding failed", error))
            finally:
                self._context.flush_buffers()
                self._dirty = False
            if self._waiting:
                raise UnclearError
        self._recent, self._fed, self._out = {}, {}, -math.inf

    def _start(self, limit: int) -> Iterator[tuple[float, av.VideoFrame | str]]:
        """Lets the decoder begin with the first packet held; after damage only if that is a keyframe not after `limit`."""
        yield from self.finish()
        first, *others = self._packets.queue or [None]
        whole = first is not None and first.is_keyframe and first.pts <= limit
        if self._broken and not whole:
            return
        # Pictures decoded after a keyframe but shown before it may refer to pictures before the keyframe (an open GOP).
        self._lenient = not whole or any(packet.pts < first.pts for packet in others)
        self._sound_from = first.pts if whole else math.inf
        self._broken, self._packets.gap = "", False
        self._open_from = first.pts if whole and self._context.name == "h264" else None

    def _go_back(self) -> bool:
        """Decodes the group of pictures before the keyframe that decoding began with; returns False if that is impossible."""
        packets, start = self._packets, self._open_from
        self._open_from = None
        if not packets.can_seek or start == packets.first_pts:
            return False
        try:
            packets.go_to(start - 1)
        except streams.DAMAGE:
            return False
        before = list(itertools.takewhile(lambda packet: packet.pts != start, packets.queue))
        if not before or len(before) == len(packets.queue) or not before[0].is_keyframe:
            return False
        self._context.flush_buffers()
        self._context.skip_frame = "DEFAULT"
        for _ in before:
            with contextlib.suppress(*streams.DAMAGE):  # none of these frames is shown
                packets.next().decode()
        self._recent, self._fed, self._out = {}, {}, -math.inf
        self._dirty, self._lenient, self._sound_from, packets.gap = True, False, start, False
        return True

    def _again(self) -> Iterator[tuple[float, av.VideoFrame | str]]:
        """Decodes again, after `_go_back`, the frames that are waited for."""
        last = self._stamp
        try:
            for stamp in sorted(self._waiting):
                self._stamp = stamp
                self._packets.read_past(stamp)
                while self._packets.holds(stamp):
                    yield from self._decode(stamp)
            yield from self._give([])
        except streams.DAMAGE as error:
            yield from self._break(error)
        self._stamp = max(last, self._stamp)

    def _decode(self, limit: int) -> Iterator[tuple[float, av.VideoFrame]]:
        """Decodes the next packet. Its picture is the one wanted, one shown before it, or one shown after `limit`."""
        packet = self._packets.next()
        if self._broken:
            return
        if self._dirty and packet.is_keyframe:
            self._open_from = None
        skip = self._can_skip and packet.pts <= limit and packet.pts != self._stamp
        self._context.skip_frame = "NONREF" if skip else "DEFAULT"
        self._dirty, self._num_fed = True, self._num_fed + 1
        self._fed[packet.pts] = self._num_fed
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if not self._lenient:
                raise
            return
        yield from self._give(frames)

    def _give(self, frames, *, last: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
        """Takes frames from the decoder, `last` if it is drained; yields the wanted frames that are certain to be intact.

        A picture may refer to one that comes out of the decoder later and turns out to be corrupt. So a frame is held until
        all pictures that were decoded before it have come out.
        """
        for frame in frames:
            pts = frame.pts
            if pts is None or pts < self._out:
                raise UnclearError
            self._out = pts
            if not frame.is_corrupt:
                self._lenient = False
                if self._sound_from == math.inf:
                    self._sound_from = pts
            elif pts >= self._sound_from:
                raise streams.CorruptError(pts)
            if pts >= self._stamp or pts in self._waiting:
                frame.time_base = self._time_base  # PyAV does not set it on frames of a drained decoder
                self._recent[pts] = frame
        if len(self._fed) > _MAX_FED:
            kept = self._waiting.keys() | self._recent.keys()
            self._fed = {pts: number for pts, number in self._fed.items() if pts > self._out or pts in kept}
        if not self._waiting:
            return
        for stamp in [stamp for stamp in self._waiting if stamp in self._recent and (last or self._is_settled(stamp))]:
            for time_s in self._waiting.pop(stamp):
                yield time_s, self._recent[stamp]
            if stamp < self._stamp:
                del self._recent[stamp]
        if any(stamp < self._out and stamp not in self._recent for stamp in self._waiting):
            raise UnclearError

    def _is_settled(self, stamp: int) -> bool:
        """Returns whether all pictures that were decoded before this one have come out of the decoder."""
        number = self._fed[stamp]
        return not any(before < number and pts > self._out for pts, before in self._fed.items())

    def _break(self, error: Exception) -> Iterator[tuple[float, av.VideoFrame | str]]:
        """Yields frames decoded before the damage, and for the others the reason, which holds up to the next keyframe."""
        self._broken = streams.why("decoding failed", error)
        damaged = error.pts if isinstance(error, streams.CorruptError) else self._packets.last_pts
        first = self._fed.get(damaged, math.inf)
        lost = [stamp for stamp in self._waiting if stamp == damaged or self._fed.get(stamp, -1) >= first]
        yield from self._lose(lost, self._broken)
        self._packets.gap = True
        with contextlib.suppress(UnclearError):
            yield from self.finish()
        yield from self._lose(list(self._waiting), self._broken)

    def _lose(self, stamps: list[int], reason: str) -> Iterator[tuple[float, str]]:
        for stamp in stamps:
            yield from ((time_s, reason) for time_s in self._waiting.pop(stamp))


def _can_skip(context) -> bool:
    """Returns whether the decoder may skip pictures that no other picture refers to."""
    if context.name != "hevc":
        return context.name in _CAN_SKIP
    # HEVC calls a picture unreferenced if none of its own temporal layer refers to it, so there must be only one layer
    # (hvcC, ISO/IEC 14496-15: numTemporalLayers is 1).
    record = context.extradata or b""
    return len(record) > 21 and record[0] == 1 and record[21] >> 3 & 7 == 1
