"""Cuts clips out of a video file: frames at given times as JPEG, audio as 16 kHz int16 placed by its time stamps.

PyAV decodes (its wheel holds FFmpeg). Frames and audio are each read once and forward: frames by `data_prep.frames`, each
once however many clips hold it, and audio by `data_prep.audio`. A clip is yielded as soon as its last frame is decoded, so
memory holds only the clips that are being cut. A clip that can't be cut is reported with the reason; nothing is filled in.

Of several video or audio streams the first that the container marks as default is used, or else the first. Cover art does not
count as video.
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
from data_prep.windows import Window, order

# Raise this number with every change of code that gives other clips or reasons for the same file. Then a conversion that is
# resumed with newer code does not mix the two.
VERSION = f"2, PyAV {av.__version__}"
_MAX_SIDE_PX = 65535
_MAX_SKEW = 0.0175  # of a display matrix: one degree, as in FFmpeg's autorotate


@dataclasses.dataclass
class Cut:
    """Frames and audio of one window.

    Attributes:
      frames: JPEG files, one for each frame time of the window.
      frame_times_us: Time in the video at which each of these frames begins, µs.
      height, width: Size of the JPEG files, px; 0 without frames.
      audio: Samples at 16 kHz, int16 [samples].
    """

    frames: list[bytes]
    frame_times_us: Int64[np.ndarray, " n"]
    height: int
    width: int
    audio: Int16[np.ndarray, " samples"]


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A frame as JPEG file, the time at which it begins, and its size in px."""

    jpeg: bytes
    time_us: int
    height: int
    width: int


def cut_windows(
    path: pathlib.Path, windows: list[Window], *, short_side_px: int, quality: int = 90, stereo: bool = False
) -> Iterator[tuple[int, Cut | str]]:
    """Yields (index of the window, its cut or the reason why there is none), every window once.

    A reason is text of the form `reason` or `reason: detail`.

    Args:
      path: File with a video and an audio stream; for windows without frames, an audio stream is enough.
      windows: Windows in any order; they are cut in the order of `order`.
      short_side_px: Length to which the short side of the frames is scaled down, px. Frames are never scaled up.
      quality: JPEG quality, 1 to 100.
      stereo: Whether each picture holds two views side by side. Then frames are the left view only.
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
            pictures = _pictures(stack.enter_context(av.open(str(path))), times_s, short_side_px, quality, stereo)
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
    container, times_s: list[float], short_side_px: int, quality: int, stereo: bool
) -> Iterator[tuple[float, _Picture | str]]:
    """Yields (time, the picture shown at this time or the reason why there is none), every time once.

    A frame that is shown at several times is encoded once.
    """
    origin_s, reformatter = streams.origin_s(container), VideoReformatter()
    ratio = streams.choose(container, "video").sample_aspect_ratio
    aspect = Fraction(ratio.numerator, ratio.denominator) if ratio else Fraction(1)  # from PyAV 19 on, `ratio` is no Fraction
    last, picture = None, ""
    orientations: dict[int, tuple[bool, bool, bool] | None] = {}  # by rotation, since reading that takes 1/40 of the time
    for time_s, frame in frames.shown(container, times_s):
        if isinstance(frame, str):
            yield time_s, frame
            continue
        if frame is not last:
            if frame.rotation not in orientations:
                orientations[frame.rotation] = _orientation(frame)
            orientation = orientations[frame.rotation]
            try:
                last, picture = frame, _encode(
                    frame, reformatter, aspect, orientation, origin_s, short_side_px, quality, stereo
                )
            except streams.DAMAGE as error:
                last, picture = frame, streams.why("decoding failed", error)
        yield time_s, picture


def _encode(
    frame: av.VideoFrame, reformatter: VideoReformatter, aspect: Fraction, orientation: tuple[bool, bool, bool] | None,
    origin_s: float, short_side_px: int, quality: int, stereo: bool = False,
) -> _Picture | str:  # fmt: skip
    """Returns a frame as JPEG, turned upright, with square pixels and scaled down; or the reason why that is impossible.

    Args:
      frame: Frame to encode.
      reformatter: Scaler, the same for all frames.
      aspect: Width of a pixel divided by its height; the frame's width is changed, as by FFmpeg's `scale=iw*sar:ih`.
      orientation: Result of `_orientation` for the frame.
      origin_s: Stream time that counts as time 0 of the video, seconds.
      short_side_px, quality, stereo: See `cut_windows`.
    """
    if frame.is_corrupt:
        return streams.DAMAGED
    if orientation is None:
        return "display matrix is not a right-angle rotation or mirroring"
    swapped = orientation[0]
    shown = _swap((frame.height, max(round(frame.width * aspect), 1)), swapped)
    view = _left_view(*shown) if stereo else shown
    scale = min(short_side_px / min(view), 1.0)
    # 4:2:0 needs even sides, and they must not become larger than they were.
    height, width = (max(min(2 * round(side * scale / 2), side - side % 2), 2) for side in view)
    if max(height, width) > _MAX_SIDE_PX:
        return f"picture does not fit into a JPEG: {width} x {height} px"
    # Converted to the planes that a JPEG holds without a detour over RGB, which is three times as fast and closer to the
    # original picture (RESULTS.md). One thread, since more would be started for every frame, which takes longer than scaling.
    # Both views are scaled and the right one is cut off afterwards, since the scaler takes whole pictures only.
    height, width = _swap((height, 2 * width if stereo else width), swapped)
    scaled = reformatter.reformat(
        frame, width=width, height=height, format="yuv420p", dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.JPEG, interpolation="AREA", threads=1,
    )  # fmt: skip
    planes = []
    for plane in scaled.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        upright = _turn(rows, *orientation)
        planes.append(np.ascontiguousarray(upright[:, : upright.shape[1] // 2] if stereo else upright))
    jpeg = simplejpeg.encode_jpeg_yuv_planes(*planes, quality=quality)
    return _Picture(jpeg, round((float(frame.time) - origin_s) * 1e6), *planes[0].shape)


def _swap(size: tuple[int, int], swapped: bool) -> tuple[int, int]:
    return size[::-1] if swapped else size


def _left_view(height: int, width: int) -> tuple[int, int]:
    """Returns the (height, width) at which to show the left half of a stereoscopic picture of this size, px.

    A picture that is higher than wide was encoded wrongly. As for Ego4D's own features, its left half becomes width / 2 high
    and height / 2 wide (facebookresearch/Ego4d, `CropIfStereo`). Stretching blends the columns at its right edge with the
    right view.
    """
    half = max(width // 2, 1)
    return (half, height // 2) if width < height else (height, half)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool] | None:
    """Returns whether the display matrix (1) swaps the axes, then (2) mirrors the order of rows and (3) of columns.

    None if it does anything else.
    """
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    # The matrix maps a pixel (x, y) to (a x + c y, b x + d y).
    a, b, _, c, d = (float(value) for value in np.frombuffer(data, np.int32)[:5])
    if max(abs(b), abs(c)) < _MAX_SKEW * min(abs(a), abs(d)):
        return False, d < 0, a < 0
    if max(abs(a), abs(d)) < _MAX_SKEW * min(abs(b), abs(c)):
        return True, b < 0, c < 0
    return None


def _turn(rows: np.ndarray, swapped: bool, rows_mirrored: bool, columns_mirrored: bool) -> np.ndarray:
    rows = rows.T if swapped else rows
    return rows[:: -1 if rows_mirrored else 1, :: -1 if columns_mirrored else 1]
