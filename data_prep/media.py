"""Cuts clips out of a video file: frames at given times as JPEG, audio as 16 kHz int16 placed by its time stamps.

PyAV decodes (its wheel holds FFmpeg). A file is opened once and read forward: frames by `data_prep.frames`, each once
however many clips hold it, and audio by `data_prep.audio`. A clip is there as soon as its last frame is, so memory holds
those that are open. What can't be cut is told with its reason, never filled in.

Of several streams of a kind the first that the container marks as default is taken, else the first; cover art is no video.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import simplejpeg
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from jaxtyping import Int16, Int64

from data_prep import audio, frames, streams
from data_prep.windows import Window, frame_times, num_samples, order

__all__ = ["OUT_OF_MEMORY", "Cut", "Window", "cut_windows", "frame_times", "num_samples", "order", "probe_streams"]
OUT_OF_MEMORY = streams.OUT_OF_MEMORY
# Of what is cut from one and the same file. A change that gives other clips or reasons raises it, so that a conversion which
# goes on with newer code does not mix the two.
VERSION = f"2, PyAV {av.__version__}"
_MAX_SIDE_PX = 65535
_MAX_SKEW = 0.0175  # of a display matrix: a degree, as FFmpeg's autorotate


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
    audio: Int16[np.ndarray, " samples"]


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A JPEG file, when its frame began, and its sides."""

    jpeg: bytes
    time_us: int
    height: int
    width: int


def probe_streams(path: pathlib.Path, kinds: tuple[str, ...] = ("video", "audio")) -> str | None:
    """Returns why a file can't give clips at all, or None; `kinds` are the streams that they need."""
    return streams.probe(path, kinds)


def cut_windows(
    path: pathlib.Path, windows: list[Window], *, short_side_px: int, quality: int = 90
) -> Iterator[tuple[int, Cut | str]]:
    """Yields (index of the window, what was cut or why not), every window once; why is `reason` or `reason: detail`.

    Args:
      path: Video file with a video and an audio stream, or for windows without frames with an audio stream.
      windows: In any order; they are cut in that of `order`.
      short_side_px: Frames are scaled so that their short side is this; never up.
      quality: Of the JPEG, 1 to 100.
    """
    times_s = sorted({t for window in windows for t in window.frame_times_s})
    reason = streams.probe(path, ("video", "audio") if times_s else ("audio",))
    if reason is not None:
        yield from ((i, reason) for i in range(len(windows)))
        return
    asked = order(windows)
    uses = {t: 0 for t in times_s}
    for window in windows:
        for t in set(window.frame_times_s):
            uses[t] += 1
    with contextlib.ExitStack() as stack:
        waves = audio.heard(stack.enter_context(av.open(str(path))), [windows[i] for i in asked])
        pictures: Iterator[tuple[float, _Picture | str]] = iter(())
        if times_s:
            pictures = _pictures(stack.enter_context(av.open(str(path))), times_s, short_side_px, quality)
        there: dict[float, _Picture | str] = {}
        for i in asked:
            wanted = windows[i].frame_times_s
            while not there.keys() >= set(wanted):
                time_s, picture = next(pictures)
                there[time_s] = picture
            wave, found = next(waves), [there[t] for t in wanted]
            yield i, wave if isinstance(wave, str) else _cut(found, wave)
            for t in set(wanted):
                uses[t] -= 1
                if not uses[t]:
                    del there[t]


def _cut(pictures: list[_Picture | str], wave: Int16[np.ndarray, " samples"]) -> Cut | str:
    reason = next((picture for picture in pictures if isinstance(picture, str)), None)
    if reason is not None:
        return reason
    sides = {(picture.height, picture.width) for picture in pictures} or {(0, 0)}
    if len(sides) > 1:
        return "picture size changes within the clip"
    times_us = np.array([picture.time_us for picture in pictures], np.int64)
    return Cut([picture.jpeg for picture in pictures], times_us, *sides.pop(), wave)


def _pictures(
    container, times_s: list[float], short_side_px: int, quality: int
) -> Iterator[tuple[float, _Picture | str]]:
    """Yields (time, the picture shown then or why there is none), every time once; a frame is encoded once."""
    origin_s, reformatter = streams.origin_s(container), VideoReformatter()
    ratio = streams.choose(container, "video").sample_aspect_ratio
    aspect = Fraction(ratio.numerator, ratio.denominator) if ratio else Fraction(1)  # from PyAV 19 on it is no Fraction
    last, picture = None, ""
    orientations: dict[int, tuple[bool, bool, bool] | None] = {}  # by rotation, which is read in a fortieth of the time
    for time_s, frame in frames.shown(container, times_s):
        if isinstance(frame, str):
            yield time_s, frame
            continue
        if frame is not last:
            if frame.rotation not in orientations:
                orientations[frame.rotation] = _orientation(frame)
            orientation = orientations[frame.rotation]
            try:
                last, picture = frame, _encode(frame, reformatter, aspect, orientation, origin_s, short_side_px, quality)
            except streams.DAMAGE as error:
                last, picture = frame, streams.why("decoding failed", error)
        yield time_s, picture


def _encode(
    frame: av.VideoFrame, reformatter: VideoReformatter, aspect: Fraction, orientation: tuple[bool, bool, bool] | None,
    origin_s: float, short_side_px: int, quality: int,
) -> _Picture | str:  # fmt: skip
    """Returns a frame upright, its pixels square, scaled down to the short side, or why not.

    Args:
      frame: To encode.
      reformatter: Kept from frame to frame.
      aspect: A pixel's width by its height; the width is changed, as by FFmpeg's `scale=iw*sar:ih`.
      orientation: See `_orientation`.
      origin_s: Stream time that is 0 of the video, seconds.
      short_side_px, quality: See `cut_windows`.
    """
    if frame.is_corrupt:
        return streams.DAMAGED
    if orientation is None:
        return "display matrix is no turn by right angles"
    shown = (frame.height, max(round(frame.width * aspect), 1))
    scale = min(short_side_px / min(shown), 1.0)
    # Even sides for 4:2:0, and not larger than they were.
    height, width = (max(min(2 * round(side * scale / 2), side - side % 2), 2) for side in shown)
    if max(height, width) > _MAX_SIDE_PX:
        return f"picture does not fit into a JPEG: {width} x {height} px"
    # As a JPEG holds it, without a detour over RGB: three times as fast, and nearer to the picture (RESULTS.md). One thread:
    # more would be started anew for every frame, which takes longer than the scaling.
    scaled = reformatter.reformat(
        frame, width=width, height=height, format="yuv420p", dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.JPEG, interpolation="AREA", threads=1,
    )  # fmt: skip
    planes = []
    for plane in scaled.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        planes.append(np.ascontiguousarray(_turn(rows, *orientation)))
    jpeg = simplejpeg.encode_jpeg_yuv_planes(*planes, quality=quality)
    return _Picture(jpeg, round((float(frame.time) - origin_s) * 1e6), *planes[0].shape)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool] | None:
    """Returns whether the display matrix swaps the axes, then mirrors rows and columns; None if it does anything else."""
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    # A picture's (x, y) goes to (a x + c y, b x + d y).
    a, b, _, c, d = (float(value) for value in np.frombuffer(data, np.int32)[:5])
    if max(abs(b), abs(c)) < _MAX_SKEW * min(abs(a), abs(d)):
        return False, d < 0, a < 0
    if max(abs(a), abs(d)) < _MAX_SKEW * min(abs(b), abs(c)):
        return True, b < 0, c < 0
    return None


def _turn(rows: np.ndarray, swapped: bool, rows_mirrored: bool, columns_mirrored: bool) -> np.ndarray:
    rows = rows.T if swapped else rows
    return rows[:: -1 if rows_mirrored else 1, :: -1 if columns_mirrored else 1]
