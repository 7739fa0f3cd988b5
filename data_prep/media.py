"""Cuts clips out of a video file: frames at given times as JPEG, audio as 16 kHz int16 placed by its time stamps.

PyAV decodes (its wheel holds FFmpeg). A file is opened once. Clips near each other are decoded in one go; across a longer
gap the decoder seeks to the keyframe before the next clip. What can't be cut is told with its reason, never filled in.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator

import av
import numpy as np
import simplejpeg
import soxr
from jaxtyping import Float, Int64

from mc3_jax.data.records import SAMPLE_RATE_HZ

# Decoding on across a gap costs its frames, seeking costs those since the keyframe before (Ego4D: every 250): about even
# at six seconds of 30 fps.
_SEEK_GAP_S = 6.0
_MAX_RUN_S = 120.0  # what is decoded in one go, so that memory is bounded
_MARGIN_S = 0.1  # of audio around a run, for the resampler's filter
_TOLERANCE_S = 0.001  # of audio that may lack at a clip's edge
_JITTER_S = 0.002  # audio stamps off by less follow on: Matroska and FLV round them to 1 ms
# Before any packet of a file that begins at 0: AAC's first, which primes the decoder and B-frames' decoding times are
# negative.
_START_S = -1.0
_EPSILON_S = 1e-6  # frame times are told in µs
OUT_OF_MEMORY = "decoder ran out of memory"
# What a damaged file raises while it is read: FFmpeg's own, PyAV's, and sums over absurd time stamps, rates or sizes.
_DAMAGE = (av.error.FFmpegError, ValueError, ArithmeticError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Window:
    """What to cut: an interval of the video and the times of its frames, seconds; without frames, of sound alone.

    Attributes:
      start_s, stop_s, frame_times_s: As above.
      open_end: Whether the sound may end before `stop_s`; what there is of it is then cut.
    """

    start_s: float
    stop_s: float
    frame_times_s: tuple[float, ...]
    open_end: bool = False


@dataclasses.dataclass
class Cut:
    """What was cut.

    Attributes:
      frames: JPEG files, one for each frame time.
      frame_times_us: When the frame shown at that time began, µs.
      height, width: Of the JPEG files, px; 0 without frames.
      audio: int16 [samples] at 16 kHz.
    """

    frames: list[bytes]
    frame_times_us: Int64[np.ndarray, " n"]
    height: int
    width: int
    audio: np.ndarray


def frame_times(start_s: float, stop_s: float, num_intervals: int, num_candidates: int) -> tuple[float, ...]:
    """Returns the times of T x C frames, interval-major: candidate C // 2 is the middle of its interval."""
    width = (stop_s - start_s) / num_intervals
    offsets = [0.5 + (c - num_candidates // 2) / num_candidates for c in range(num_candidates)]
    return tuple(start_s + (t + offset) * width for t in range(num_intervals) for offset in offsets)


def num_samples(duration_s: float) -> int:
    """Returns the audio samples of a window; durations equal to the µs give equal numbers."""
    return round(round(duration_s, 6) * SAMPLE_RATE_HZ)


def probe_streams(path: pathlib.Path, kinds: tuple[str, ...] = ("video", "audio")) -> str | None:
    """Returns why a file can't give clips at all, or None; `kinds` are the streams that they need."""
    try:
        if not path.is_file():
            return "video file is missing"
        with av.open(str(path)) as container:
            for kind in kinds:
                streams = getattr(container.streams, kind)
                if not streams:
                    return f"no {kind} stream"
                if streams[0].codec_context is None:
                    return f"no decoder for the {kind} stream"
    except (*_DAMAGE, OSError) as error:
        return _why("video file can't be opened", error)
    return None


def cut_windows(
    path: pathlib.Path, windows: list[Window], *, short_side_px: int, quality: int = 90
) -> Iterator[tuple[int, Cut | str]]:
    """Yields (index of the window, what was cut or why not), every window once; why is `reason` or `reason: detail`.

    Args:
      path: Video file with a video and an audio stream, or for windows without frames with an audio stream; of several the
        first is taken.
      windows: In any order.
      short_side_px: Frames are scaled so that their short side is this; never up.
      quality: Of the JPEG, 1 to 100.
    """
    shown = any(window.frame_times_s for window in windows)
    reason = probe_streams(path) if shown else probe_streams(path, ("audio",))
    if reason is not None:
        yield from ((i, reason) for i in range(len(windows)))
        return
    with av.open(str(path)) as pictures, av.open(str(path)) as sounds:
        contexts = [sounds.streams.audio[0].codec_context]
        if shown:
            contexts.append(pictures.streams.video[0].codec_context)
            contexts[-1].thread_count = 1  # all cores are at work on other videos
        for context in contexts:
            context.options = {"err_detect": "explode"}  # without it, FFmpeg patches damage up and says nothing
        for run in runs(windows):
            cuts = _cut_run(pictures, sounds, [windows[i] for i in run], short_side_px, quality)
            yield from zip(run, cuts, strict=True)


def _cut_run(pictures, sounds, windows: list[Window], short_side_px: int, quality: int) -> list[Cut | str]:
    """Returns what was cut, or why not, of windows decoded in one go."""
    try:
        audio = _read_audio(sounds, windows)
        frames = _read_frames(pictures, windows, short_side_px, quality)
    except _DAMAGE as error:
        if len(windows) == 1:
            return [_why("decoding failed", error)]
        # A damaged packet costs the windows that need it, not their neighbours.
        half = len(windows) // 2
        parts = (windows[:half], windows[half:])
        return [cut for part in parts for cut in _cut_run(pictures, sounds, part, short_side_px, quality)]
    cuts = []
    for sound, shown in zip(audio, frames, strict=True):
        if sound is None:
            cuts.append("audio does not cover the clip")
        elif isinstance(shown, str):
            cuts.append(shown)
        else:
            jpegs, times_us, height, width = shown
            cuts.append(Cut(jpegs, times_us, height, width, sound))
    return cuts


def _why(reason: str, error: Exception) -> str:
    """Returns `reason: detail`; the detail is the error's words without file names. Too little memory is its own reason."""
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    words = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:160]
    return f"{reason}: {words}"


def runs(windows: list[Window]) -> Iterator[list[int]]:
    """Yields the indices of windows that are decoded in one go, in order of time."""
    run: list[int] = []
    for i in sorted(range(len(windows)), key=lambda i: windows[i].start_s):
        far = run and windows[i].start_s - max(windows[j].stop_s for j in run[-8:]) > _SEEK_GAP_S
        if far or (run and windows[i].stop_s - windows[run[0]].start_s > _MAX_RUN_S):
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def _seek(container, stream, time_s: float) -> None:
    """Goes to the keyframe at or before a time, which may be `_START_S`."""
    container.seek(int(max(time_s, _START_S) / stream.time_base), stream=stream, backward=True)


def _read_audio(container, windows: list[Window]) -> list[np.ndarray | None]:
    """Returns each window's audio, int16 mono at 16 kHz, None where the stream does not cover it."""
    stream = container.streams.audio[0]
    start_s, stop_s = min(w.start_s for w in windows) - _MARGIN_S, max(w.stop_s for w in windows) + _MARGIN_S
    _seek(container, stream, start_s - 0.2)  # decoders need a packet or two before they are right
    resampler = av.AudioResampler(format="fltp")
    rate, pieces = 0, []
    for frame in container.decode(stream):
        if frame.pts is None:
            raise ValueError("audio without time stamps")
        rate = rate or frame.sample_rate
        if frame.sample_rate != rate:
            raise ValueError("the audio's sample rate changes")
        if frame.time >= stop_s:
            break
        pieces += [(float(frame.time) * rate, part.to_ndarray().mean(axis=0)) for part in resampler.resample(frame)]
    if not pieces:
        return [None] * len(windows)
    begin = int(np.floor(start_s * rate))
    pieces = _mend_stamps(pieces, _JITTER_S * rate)
    wave, covered = _join(pieces, begin, int(np.ceil(stop_s * rate)), _JITTER_S * rate)
    if not np.isfinite(wave).all():
        raise ValueError("audio is not finite")
    return [resample_window(wave, covered, begin, rate, window) for window in windows]


def resample_window(
    wave: Float[np.ndarray, " n"], covered: np.ndarray, begin: int, rate: int, window: Window
) -> np.ndarray | None:
    """Returns a window's audio at 16 kHz, or None where samples of it lack.

    Args:
      wave: Samples from number `begin` of the stream on, at `rate`.
      covered: Which of them the stream gave.
      begin, rate: Of the wave.
      window: What to cut.
    """
    first = int(np.floor((window.start_s + _TOLERANCE_S) * rate)) - begin
    last = int(np.ceil((window.stop_s - _TOLERANCE_S) * rate)) - begin
    stop_s = window.stop_s
    if window.open_end and not covered[first:last].all():
        last = first + int(np.argmin(covered[first:last]))
        stop_s = (begin + last) / rate
        if last == first or covered[last:].any():  # none of it, or it goes on behind a hole
            return None
    if window.start_s < 0 or not covered[first:last].all():
        return None
    # By itself and on the grid of 16 kHz, so that a clip's audio does not depend on what is decoded with it.
    step = rate // math.gcd(rate, SAMPLE_RATE_HZ)
    left = int(np.ceil((window.start_s - _MARGIN_S) * rate / step)) * step
    right = int(np.ceil((window.stop_s + _MARGIN_S) * rate))
    resampled = soxr.resample(wave[left - begin : right - begin], rate, SAMPLE_RATE_HZ, quality="HQ")
    at = round(window.start_s * SAMPLE_RATE_HZ) - left * SAMPLE_RATE_HZ // rate
    num = max(num_samples(stop_s - window.start_s), 1)
    part = np.round(resampled[at : at + num] * 32768.0)
    return np.clip(part, -32768, 32767).astype(np.int16) if len(part) == num else None


def _mend_stamps(pieces: list[tuple[float, np.ndarray]], jitter: float) -> list[tuple[float, np.ndarray]]:
    """Returns the pieces, one that is off between two that follow on at the time between them.

    FFmpeg stamps an Ogg page's first Vorbis packet some 10 ms late where long and short blocks meet. Behind sound that is
    lost, no later stamp follows on.
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
) -> tuple[Float[np.ndarray, " n"], np.ndarray]:
    """Returns the wave from sample `begin` to `end`, and which of its samples the pieces cover.

    Time stamps are rounded, samples are not: pieces whose stamps follow on within the rounding are one stretch, which
    lies where its stamps say on average.

    Args:
      pieces: (time stamp in samples, samples), in order.
      begin, end: Samples of the stream.
      jitter: Largest rounding of a time stamp, samples.
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


def _frames_from(container, stream, time_s: float) -> Iterator[av.VideoFrame]:
    """Yields frames in order from one that begins at or before `time_s` on, or else from the stream's first."""
    # mp4 seeks by decoding times, which are before those of showing where there are B-frames: the keyframe found may be
    # shown too late.
    for back_s in (0.0, 0.5, 4.0, 32.0, float("inf")):
        target_s = max(time_s - back_s, _START_S)
        _seek(container, stream, target_s)
        frames = _decode(container, stream, lenient=target_s > _START_S)
        first = next(frames, None)
        if target_s == _START_S or (first is not None and first.time <= time_s + _EPSILON_S):
            yield from itertools.chain([first] if first is not None else [], frames)
            return


def _decode(container, stream, *, lenient: bool) -> Iterator[av.VideoFrame]:
    """Yields frames; if lenient, what can't be decoded before the first of them is skipped.

    Pictures that come after a keyframe but are shown before it may refer to what a seek left out (an open GOP).
    """
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if not lenient:
                raise
            continue
        for frame in frames:
            if frame.pts is None:
                raise ValueError("video without time stamps")
            lenient = False
            yield frame


def _read_frames(container, windows: list[Window], short_side_px: int, quality: int) -> list[tuple | str]:
    """Returns (JPEGs, times in µs, height, width) of each window, or why the stream does not give them."""
    wanted = sorted({t for w in windows for t in w.frame_times_s})
    if not wanted:
        return [([], np.zeros(0, np.int64), 0, 0)] * len(windows)
    stream = container.streams.video[0]
    frame_s = 1.0 / float(stream.average_rate or 30)
    shown: dict[float, tuple[bytes, int, int, int] | str] = {}
    position, begin_s = 0, None
    frames = _frames_from(container, stream, wanted[0])
    for frame, following in itertools.pairwise(itertools.chain(frames, [None])):
        # A frame is shown until the next begins; the last as long as it says. A player shows the first one from the start.
        begin_s = frame.time - frame_s if begin_s is None else frame.time
        own_s = float(frame.duration * frame.time_base) if frame.duration else frame_s
        end_s = frame.time + own_s if following is None else following.time
        encoded = None
        while position < len(wanted) and wanted[position] < end_s - _EPSILON_S:
            if wanted[position] >= begin_s - _EPSILON_S:
                encoded = encoded or _encode(frame, short_side_px, quality)
                shown[wanted[position]] = encoded
            position += 1
        if position == len(wanted):
            break
    out = []
    for window in windows:
        found = [shown.get(t, "video does not cover the clip") for t in window.frame_times_s]
        reason = next((f for f in found if isinstance(f, str)), None)
        if reason is None and len({f[2:] for f in found}) > 1:
            reason = "picture size changes within the clip"
        if reason is not None:
            out.append(reason)
            continue
        jpegs, times_us, heights, widths = zip(*found, strict=True) if found else ((), (), (0,), (0,))
        out.append((list(jpegs), np.array(times_us, np.int64), heights[0], widths[0]))
    return out


def _encode(frame: av.VideoFrame, short_side_px: int, quality: int) -> tuple[bytes, int, int, int] | str:
    """Returns (JPEG, time in µs, height, width) of a frame, upright and scaled down to the short side, or why not."""
    if frame.is_corrupt:
        return "picture is damaged"
    scale = min(short_side_px / min(frame.height, frame.width), 1.0)
    # Even sides for 4:2:0, and not larger than they were.
    height, width = (max(min(2 * round(side * scale / 2), side - side % 2), 2) for side in (frame.height, frame.width))
    # One thread: more would be started anew for every frame, which takes longer than the scaling.
    pixels = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA", threads=1).to_ndarray()
    pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))  # as the file's display matrix says
    jpeg = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")
    return jpeg, round(float(frame.time) * 1e6), pixels.shape[0], pixels.shape[1]
