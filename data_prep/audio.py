"""Audio of a stream between given times as 16 kHz int16, placed by its time stamps.

Missing audio is reported, never filled in. Packets are read once and in order. The packets of each clip are decoded by a new
or flushed decoder, since AAC's and AC-3's noise depends on everything that was decoded before.
"""

import collections
import itertools
import math
from collections.abc import Iterator

import av
import numpy as np
import soxr
from jaxtyping import Bool, Float, Int16

from data_prep import streams, windows
from mc3_jax.data.records import SAMPLE_RATE_HZ

_MARGIN_S = 0.1  # around a clip, for the resampler's filter
_LEAD_S = 0.3  # decoded before a clip: the margin, and a packet or two until a decoder's output is right
_TOLERANCE_S = 0.001  # of audio that may be missing at a clip's edge
_JITTER_S = 0.002  # pieces whose time stamps are off by less count as adjacent: Matroska and FLV round stamps to 1 ms
_SEEK_S = 10.0  # shorter stretches are read rather than skipped by a seek
NOT_COVERED = "audio does not cover the clip"
# Codecs for which a new decoder can be made from what PyAV knows of the stream. Other decoders need more and are flushed.
_RENEWABLE = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "opus", "vorbis")


def heard(container, wanted: list[windows.Window]) -> Iterator[Int16[np.ndarray, " n"] | str]:
    """Yields each window's audio, mono at 16 kHz, or the reason why there is none.

    Args:
      container: Opened container of which nothing was read yet; see `streams.take`.
      wanted: Windows in any order. Memory holds the packets from the earliest start among the windows left to the end of the
        present window.
    """
    stream = streams.take(container, "audio")
    packets = _Packets(container, stream)
    origin_s = streams.origin_s(container)
    earliest_s = list(itertools.accumulate((window.start_s for window in reversed(wanted)), min))[::-1]
    for window, keep_s in zip(wanted, earliest_s, strict=True):
        try:
            begin_s, end_s = window.start_s + origin_s - _LEAD_S, window.stop_s + origin_s + _MARGIN_S
            held = packets.between(begin_s, end_s, keep_s + origin_s - _LEAD_S)
            wave = _decode_window(stream, held, origin_s, window)
        except streams.DAMAGE as error:
            yield streams.why("decoding failed", error)
        else:
            yield NOT_COVERED if wave is None else wave


class _Packets:
    """Packets of an audio stream, each read once if intervals are asked for in order.

    Args:
      container, stream: Container and stream of the audio.
    """

    def __init__(self, container, stream):
        self._container, self._stream = container, stream
        self._source = container.demux(stream)
        self._held: collections.deque[tuple[float, av.Packet]] = collections.deque()  # (time in seconds, packet)
        self._ended = False
        self._read_s = float((stream.start_time or 0) * stream.time_base)

    def between(self, start_s: float, stop_s: float, keep_s: float) -> list[av.Packet | None]:
        """Returns the packets to decode for an interval, followed by None if the stream ends there. Times are stream seconds.

        Packets before `keep_s` are dropped: later calls must not need them.
        """
        if keep_s - self._read_s > _SEEK_S:
            self._go_to(keep_s)
        while not self._ended and self._read_s < stop_s:
            self._read()
        for _ in range(self._first(keep_s)):
            self._held.popleft()
        begin = self._first(start_s)
        behind = next(
            (i for i, (time_s, _) in enumerate(self._held) if i >= begin and time_s >= stop_s), len(self._held)
        )
        packets = [packet for _, packet in itertools.islice(self._held, begin, behind)]
        return packets + ([None] if self._ended and behind == len(self._held) else [])

    def _first(self, start_s: float) -> int:
        """Returns the index of the held packet to begin with so that the decoder's output is right at a time."""
        found = 0
        for i, (time_s, packet) in enumerate(self._held):
            if time_s > start_s:
                break
            if packet.is_keyframe:
                found = i
        return found

    def _go_to(self, start_s: float) -> None:
        for back_s in streams.BACK_S:
            streams.seek(self._container, self._stream, start_s - back_s)
            self._source = self._container.demux(self._stream)
            self._held.clear()
            self._ended = False
            self._read()
            if math.isinf(back_s) or (self._held and self._held[0][0] <= start_s):
                return

    def _read(self) -> None:
        try:
            packet = next(self._source, None)
        except streams.DAMAGE:
            self._source = self._container.demux(self._stream)  # what follows may be intact
            raise
        if packet is None or not packet.size:
            self._ended = True
            return
        if packet.pts is not None:
            self._read_s = float(packet.pts * packet.time_base)
        self._held.append((self._read_s, packet))


def _decode_window(
    stream, packets: list[av.Packet | None], origin_s: float, window: windows.Window
) -> Int16[np.ndarray, " n"] | None:
    """Returns a window's audio, or None if samples are missing; `packets` end with None if the stream ends there."""
    context = _decoder(stream)
    resampler = av.AudioResampler(format="fltp")
    rate, pieces = 0, []
    decoded = ((frame, packet is None) for packet in packets for frame in context.decode(packet))
    for frame, drained in decoded:
        rate = rate or frame.sample_rate
        if frame.sample_rate != rate:
            raise ValueError("the audio's sample rate changes")
        if frame.pts is not None:
            stamp = (float(frame.pts * stream.time_base) - origin_s) * rate
        elif drained and pieces:  # samples that WMA's decoder holds back until the end
            stamp = pieces[-1][0] + len(pieces[-1][1])
        else:
            raise ValueError("audio without time stamps")
        parts = [frame] if frame.format.name == "fltp" else resampler.resample(frame)
        pieces += [(stamp, part.to_ndarray().mean(axis=0)) for part in parts]
    if not pieces:
        return None
    begin = int(np.floor((window.start_s - _MARGIN_S) * rate))
    pieces = _mend_stamps(pieces, _JITTER_S * rate)
    wave, covered = _join(pieces, begin, int(np.ceil((window.stop_s + _MARGIN_S) * rate)), _JITTER_S * rate)
    if not np.isfinite(wave).all():
        raise ValueError("audio is not finite")
    return resample_window(wave, covered, begin, rate, window)


def _decoder(stream) -> av.AudioCodecContext:
    """Returns a decoder for the stream without memory of earlier packets."""
    own = stream.codec_context
    if own.name not in _RENEWABLE:
        own.flush_buffers()
        return own
    context = av.CodecContext.create(own.codec, "r")
    context.extradata, context.sample_rate, context.layout = own.extradata, own.sample_rate, own.layout
    # A decoder corrects time stamps for the samples that it drops at the beginning only if it knows the stamps' unit.
    context.options = {"err_detect": "explode", "pkt_timebase": str(stream.time_base)}
    return context


def resample_window(
    wave: Float[np.ndarray, " n"], covered: Bool[np.ndarray, " n"], begin: int, rate: int, window: windows.Window
) -> Int16[np.ndarray, " samples"] | None:
    """Returns a window's audio at 16 kHz, or None if samples are missing.

    Args:
      wave: Samples of the stream, with 0 for missing ones.
      covered: Whether the stream holds each of these samples.
      begin: Position of the first of these samples in the stream.
      rate: Sample rate of the stream, Hz.
      window: Window to cut.
    """
    first = int(np.floor((window.start_s + _TOLERANCE_S) * rate)) - begin
    last = int(np.ceil((window.stop_s - _TOLERANCE_S) * rate)) - begin
    stop_s = window.stop_s
    if window.open_end and not covered[first:last].all():
        last = first + int(np.argmin(covered[first:last]))
        stop_s = (begin + last) / rate
        if last == first or covered[last:].any():  # nothing is there, or the audio continues after a hole
            return None
    if window.start_s < 0 or not covered[first:last].all():
        return None
    # Each window is resampled separately, from a sample that lies on the grid of 16 kHz, so that a clip's audio does not
    # depend on what is decoded with it.
    step = rate // math.gcd(rate, SAMPLE_RATE_HZ)
    if step > _MARGIN_S * rate / 2:  # odd rates, e.g. 22,255 Hz: the position is off by less than a 16 kHz sample
        step = 1
    left = int(np.ceil((window.start_s - _MARGIN_S) * rate / step)) * step
    right = int(np.ceil((window.stop_s + _MARGIN_S) * rate))
    resampled = soxr.resample(wave[left - begin : right - begin], rate, SAMPLE_RATE_HZ, quality="HQ")
    at = round(window.start_s * SAMPLE_RATE_HZ) - round(left * SAMPLE_RATE_HZ / rate)
    num = max(windows.num_samples(stop_s - window.start_s), 1)
    part = np.round(resampled[at : at + num] * 32768.0)
    return np.clip(part, -32768, 32767).astype(np.int16) if len(part) == num else None


def _mend_stamps(pieces: list[tuple[float, np.ndarray]], jitter: float) -> list[tuple[float, np.ndarray]]:
    """Returns the pieces with single wrong time stamps mended: a piece is moved if it then fits between its two neighbours.

    FFmpeg stamps the first Vorbis packet of an Ogg page some 10 ms late where long and short blocks meet. Lost sound is not
    hidden by this, since the pieces after a loss do not fit either.
    """
    mended = pieces[:1]
    for i, (stamp, part) in enumerate(pieces[1:-1], 1):
        due = mended[-1][0] + len(mended[-1][1])
        if abs(stamp - due) > jitter and abs(pieces[i + 1][0] - due - len(part)) <= jitter:
            stamp = due
        mended.append((stamp, part))
    return mended + pieces[max(len(mended), 1) :]


def _join(
    pieces: list[tuple[float, np.ndarray]], begin: int, end: int, jitter: float
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Returns the wave from sample `begin` to `end`, and whether the pieces cover each of its samples.

    Time stamps are rounded, numbers of samples are not. So pieces that are adjacent up to this rounding form one stretch,
    whose position is the average of what their stamps say.

    Args:
      pieces: (time stamp in samples, samples) of each piece, in order.
      begin, end: Positions in the stream, samples.
      jitter: Largest rounding error of a time stamp, samples.
    """
    wave, covered = np.zeros(end - begin, np.float32), np.zeros(end - begin, bool)
    stretches: list[tuple[list[float], list[np.ndarray]]] = []
    length, mean = 0, 0.0
    for stamp, part in pieces:
        if not stretches or abs(stamp - length - mean) > jitter:
            stretches.append(([], []))
            length, mean = 0, 0.0
        starts, parts = stretches[-1]
        starts.append(stamp - length)
        parts.append(part)
        mean += (starts[-1] - mean) / len(starts)
        length += len(part)
    for starts, parts in stretches:
        at, joined = round(sum(starts) / len(starts)) - begin, np.concatenate(parts)
        skip, stop = max(-at, 0), min(at + len(joined), len(wave))
        if stop > at + skip:
            wave[at + skip : stop] = joined[skip : stop - at]
            covered[at + skip : stop] = True
    return wave, covered
