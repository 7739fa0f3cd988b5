"""Cuts clips out of a video file: frames at given times as JPEG, audio as 16 kHz int16 placed by its time stamps.

PyAV decodes (its wheel holds FFmpeg). A file is opened once. Clips near each other are decoded in one go; across a longer
gap the decoder seeks to the keyframe before the next clip. What can't be cut is told with its reason, never filled in.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Window:
    """What to cut: an interval of the video and the times of its frames, seconds."""

    start_s: float
    stop_s: float
    frame_times_s: tuple[float, ...]


@dataclasses.dataclass
class Cut:
    """What was cut.

    Attributes:
      frames: JPEG files, one for each frame time.
      frame_times_us: When the frame shown at that time began, µs.
      height, width: Of the JPEG files, px.
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


def probe_streams(path: pathlib.Path) -> str | None:
    """Returns why a file can't give clips at all, or None."""
    if not path.is_file():
        return "video file is missing"
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return "no video stream"
            return None if container.streams.audio else "no audio stream"
    except (av.error.FFmpegError, ValueError) as error:
        return f"video file can't be opened: {_short(error)}"


def cut_windows(
    path: pathlib.Path, windows: list[Window], *, short_side_px: int, quality: int = 90
) -> Iterator[tuple[int, Cut | str]]:
    """Yields (index of the window, what was cut or why not), every window once.

    Args:
      path: Video file with a video and an audio stream; of several the first is taken.
      windows: In any order.
      short_side_px: Frames are scaled so that their short side is this; never up.
      quality: Of the JPEG, 1 to 100.
    """
    reason = probe_streams(path)
    if reason is not None:
        yield from ((i, reason) for i in range(len(windows)))
        return
    order = sorted(range(len(windows)), key=lambda i: windows[i].start_s)
    with av.open(str(path)) as pictures, av.open(str(path)) as sounds:
        pictures.streams.video[0].codec_context.thread_count = 1  # all cores are at work on other videos
        for run in _runs(order, windows):
            try:
                audio = _read_audio(sounds, [windows[i] for i in run])
                frames = _read_frames(pictures, [windows[i] for i in run], short_side_px, quality)
            except (av.error.FFmpegError, ValueError) as error:
                yield from ((i, f"decoding failed: {_short(error)}") for i in run)
                continue
            for i, sound, shown in zip(run, audio, frames, strict=True):
                if sound is None:
                    yield i, "audio does not cover the clip"
                elif shown is None:
                    yield i, "video does not cover the clip"
                else:
                    jpegs, times_us, height, width = shown
                    yield i, Cut(jpegs, times_us, height, width, sound)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _runs(order: list[int], windows: list[Window]) -> Iterator[list[int]]:
    """Yields windows to decode in one go."""
    run: list[int] = []
    for i in order:
        far = run and windows[i].start_s - max(windows[j].stop_s for j in run[-8:]) > _SEEK_GAP_S
        if far or (run and windows[i].stop_s - windows[run[0]].start_s > _MAX_RUN_S):
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def _seek(container, stream, time_s: float) -> None:
    """Goes to the keyframe at or before a time."""
    container.seek(max(int(time_s / stream.time_base), 0), stream=stream, backward=True)


def _read_audio(container, windows: list[Window]) -> list[np.ndarray | None]:
    """Returns each window's audio, int16 mono at 16 kHz, None where the stream does not cover it."""
    stream = container.streams.audio[0]
    rate = stream.codec_context.sample_rate
    begin = int(np.floor((min(w.start_s for w in windows) - _MARGIN_S) * rate))
    end = int(np.ceil((max(w.stop_s for w in windows) + _MARGIN_S) * rate))
    wave, covered = np.zeros(end - begin, np.float32), np.zeros(end - begin, bool)
    resampler = av.AudioResampler(format="fltp", layout=stream.layout.name or "mono", rate=rate)
    _seek(container, stream, max(begin / rate - 0.2, 0.0))
    for frame in container.decode(stream):
        if frame.pts is None:
            raise ValueError("audio without time stamps")
        at = round(float(frame.time) * rate) - begin
        if at >= len(wave):
            break
        if at + frame.samples <= 0:
            continue
        for part in resampler.resample(frame):
            _place(wave, covered, at, part.to_ndarray().mean(axis=0))
    out = []
    resampled = soxr.resample(wave, rate, SAMPLE_RATE_HZ, quality="HQ")
    for window in windows:
        first = int(np.floor((window.start_s + _TOLERANCE_S) * rate)) - begin
        last = int(np.ceil((window.stop_s - _TOLERANCE_S) * rate)) - begin
        if window.start_s < 0 or not covered[first:last].all():
            out.append(None)
            continue
        at = round((window.start_s - begin / rate) * SAMPLE_RATE_HZ)
        num = round((window.stop_s - window.start_s) * SAMPLE_RATE_HZ)
        part = np.round(resampled[at : at + num] * 32768.0)
        out.append(np.clip(part, -32768, 32767).astype(np.int16) if len(part) == num else None)
    return out


def _place(wave: Float[np.ndarray, " n"], covered: np.ndarray, at: int, part: Float[np.ndarray, " m"]) -> None:
    """Writes `part` into `wave` from sample `at` on, cut at either end, and notes what is covered."""
    skip = max(-at, 0)
    stop = min(at + len(part), len(wave))
    if stop > at + skip:
        wave[at + skip : stop] = part[skip : stop - at]
        covered[at + skip : stop] = True


def _read_frames(container, windows: list[Window], short_side_px: int, quality: int) -> list[tuple | None]:
    """Returns (JPEGs, times in µs, height, width) of each window, None where the stream does not cover it."""
    stream = container.streams.video[0]
    wanted = sorted({t for w in windows for t in w.frame_times_s})
    patience_s = 2.5 / float(stream.average_rate or 30)
    shown: dict[float, tuple[bytes, int, int, int]] = {}
    _seek(container, stream, max(wanted[0] - 0.001, 0.0))
    previous, encoded, position = None, None, 0
    for frame in container.decode(stream):
        if frame.pts is None:
            raise ValueError("video without time stamps")
        # The frame shown at t is the last that begins at or before it.
        while position < len(wanted) and previous is not None and wanted[position] < frame.time - 1e-6:
            encoded = encoded or _encode(previous, short_side_px, quality)
            if wanted[position] > previous.time - patience_s:
                shown[wanted[position]] = encoded
            position += 1
        if position == len(wanted):
            break
        previous, encoded = frame, None
    for t in wanted[position:]:
        if previous is not None and 0 <= t - previous.time < patience_s:
            encoded = encoded or _encode(previous, short_side_px, quality)
            shown[t] = encoded
    out = []
    for window in windows:
        found = [shown.get(t) for t in window.frame_times_s]
        if None in found:
            out.append(None)
            continue
        jpegs, times_us, heights, widths = zip(*found, strict=True)
        out.append((list(jpegs), np.array(times_us, np.int64), heights[0], widths[0]))
    return out


def _encode(frame: av.VideoFrame, short_side_px: int, quality: int) -> tuple[bytes, int, int, int]:
    """Returns (JPEG, time in µs, height, width) of a frame, scaled down to the short side."""
    scale = min(short_side_px / min(frame.height, frame.width), 1.0)
    height, width = (max(2 * round(side * scale / 2), 2) for side in (frame.height, frame.width))
    pixels = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return jpeg, round(float(frame.time) * 1e6), height, width
