"""Packets of a video stream, read ahead of the decoder, so that the times of their pictures are known before decoding."""

import bisect
import collections
import contextlib
import math

import av

from data_prep import streams

_SEEK_S = 2.0  # across less than this, reading on costs less than a seek
_SEEK_BLIND_S = 60.0  # the same for a file without an index
_LEAD_S = 10.0  # without an index, how far before a time to seek, in the hope of finding a keyframe
_MAX_HELD_BYTES = 64 << 20  # of packets that are held while later ones are read


class UnclearError(Exception):
    """Packets do not tell which of them holds which picture."""


class Packets:
    """Packets of a video stream, read ahead of the decoder.

    `limit` is a time in units of the stream's time base: the picture shown then is wanted.

    Attributes:
      queue: Packets to decode next.
      gap: Whether there is a gap between the packets decoded so far and those of `queue`.
      can_seek: Whether time stamps are correct after a seek.
      first_pts: Time stamp of the file's first packet, None until it was read.
      last_pts: Time stamp of the packet that was last taken from `queue`, None before.
    """

    def __init__(self, container, stream):
        self._container, self._stream = container, stream
        self._index, self.can_seek = stream.index_entries, streams.can_seek(container)
        tick_s = float(stream.time_base)
        self._per_s = 1 / tick_s
        self._frame = round(self._per_s * streams.frame_s(stream))
        self._late = 0  # largest delay so far from decoding to showing a keyframe, in ticks of the time base
        self.last_pts, self.first_pts = None, None
        self._reset()
        if self.can_seek:
            with contextlib.suppress(*streams.DAMAGE):  # Matroska reads its index at the first seek
                streams.seek(container, stream, -math.inf)
        self._from_start = True

    def _reset(self) -> None:
        self._source = self._container.demux(self._stream)
        self.queue, self.gap = collections.deque(), True
        self._stamps: list[int] = []  # sorted time stamps of packets read, from the one shown at the last `limit` on
        self._held_bytes, self._ended, self._end, self._from_start = 0, False, 0, False
        self._holes = streams.Holes(self._container, self._stream)
        self._behind_hole = -math.inf  # time stamp of the first keyframe after the last hole; inf until it is read
        self._ends: dict[int, int] = {}  # time stamp of a keyframe after a hole → end of what is shown before the hole
        self._settled = -math.inf  # no packet with a time stamp up to this one may follow

    def is_far(self, limit: int, broken: bool) -> bool:
        """Returns whether to seek to the keyframe before `limit` instead of reading on up to it.

        Args:
          limit: Wanted time.
          broken: Whether nothing can be decoded before the next keyframe; then a near one is worth a seek, too.
        """
        if not self.can_seek:
            return False
        read = self._stamps[-1] if self._stamps else (self._stream.start_time or 0)
        keyframe = self._keyframe(limit)
        if keyframe is None:
            return limit - read > _SEEK_BLIND_S * self._per_s
        return keyframe > read + (0 if broken and self._stamps else _SEEK_S * self._per_s)

    def _keyframe(self, limit: int) -> int | None:
        """Returns the index's time stamp of the last keyframe at or before `limit`; in mp4 this is the time of decoding."""
        at = self._index.search_timestamp(limit - self._late) if len(self._index) else -1
        return self._index[at].timestamp if at >= 0 else None

    def go_to(self, limit: int) -> None:
        """Seeks to a keyframe from which the picture shown at `limit` can be decoded, or else to the beginning."""
        for back_s in streams.BACK_S:
            begin = limit - back_s * self._per_s
            keyframe = self._keyframe(int(begin)) if math.isfinite(begin) else None
            if keyframe is None:
                begin -= _LEAD_S * self._per_s
            self._reset()
            streams.seek(self._container, self._stream, (begin if keyframe is None else keyframe) / self._per_s)
            self._from_start = not math.isfinite(begin)
            self.read_past(limit)
            first = self.queue[0] if self.queue else None
            if self._from_start or (first is not None and first.is_keyframe and first.pts <= limit):
                return

    def read_past(self, limit: int) -> bool:
        """Reads until it is known which picture is shown at `limit`; returns False if too many bytes are held before that.

        Drops the packets before the last keyframe at or before `limit`.
        """
        for i in reversed(range(len(self.queue))):
            if self.queue[i].is_keyframe and self.queue[i].pts <= limit:
                self._drop(i)
                break
        while not self._ended and len(self._stamps) - bisect.bisect_right(self._stamps, limit) < streams.REORDER:
            if self._held_bytes > _MAX_HELD_BYTES and len(self.queue) > 4 * streams.REORDER:
                return False
            self._read(limit)
        self._settled = limit
        del self._stamps[: max(bisect.bisect_right(self._stamps, limit) - 1, 0)]
        return True

    def _read(self, limit: int) -> None:
        try:
            packet = next(self._source, None)
        except streams.DAMAGE:
            self._source = self._container.demux(self._stream)  # what follows may be intact
            raise
        if packet is None or not packet.size:
            self._ended = True
            return
        if packet.pts is None:
            raise UnclearError
        if self._from_start and self.first_pts is None:
            self.first_pts = packet.pts
        if self._holes.is_behind(packet):
            self._behind_hole = math.inf
        if packet.is_keyframe and math.isinf(self._behind_hole) and self._behind_hole > 0:
            self._behind_hole = packet.pts
            self._ends[packet.pts] = self._end
        if packet.pts < self._behind_hole:  # it may refer to lost pictures
            return
        if packet.pts <= self._settled:
            raise UnclearError
        if packet.is_keyframe:
            self._late = max(self._late, packet.pts - (packet.pts if packet.dts is None else packet.dts))
            if packet.pts <= limit:
                self._drop(len(self.queue))
        self.queue.append(packet)
        self._held_bytes += packet.size
        if packet.is_discard:
            return
        at = bisect.bisect_left(self._stamps, packet.pts)
        if at < len(self._stamps) and self._stamps[at] == packet.pts:
            raise UnclearError  # two fields of a frame
        self._stamps.insert(at, packet.pts)
        if at == len(self._stamps) - 1:
            self._end = packet.pts + (packet.duration or self._frame)

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._held_bytes -= self.queue.popleft().size
        self.gap = self.gap or count > 0

    def next(self) -> av.Packet:
        packet = self.queue.popleft()
        self._held_bytes -= packet.size
        self.last_pts = packet.pts
        return packet

    def shown_at(self, limit: int) -> int | None:
        """Returns the time stamp of the picture shown at `limit`, or None; call `read_past` with the same `limit` before."""
        at = bisect.bisect_right(self._stamps, limit) - 1
        if at < 0:
            early = self._from_start and self._stamps and limit >= self._stamps[0] - self._frame
            return self._stamps[0] if early else None
        following = self._stamps[at + 1 : at + 2]
        end = self._ends.get(following[0], math.inf) if following else self._end if self._ended else math.inf
        return None if limit >= end else self._stamps[at]

    def holds(self, stamp: int) -> bool:
        """Returns whether the packet with this time stamp still has to be decoded."""
        return any(packet.pts == stamp for packet in self.queue)
