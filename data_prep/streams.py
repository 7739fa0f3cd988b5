"""Streams of a media file: which is taken, where its time begins, how to get to a time, and what is said of damage.

Stamps are believed as FFmpeg gives them. FLV, WMV and Matroska that begin at a small offset, e.g. an encoder's delay, are
counted from 0 and not from their first picture. In an mp4 with several edits, FFmpeg puts what is behind the second a few
frames off, picture and sound by different times.
"""

import errno
import functools
import os
import pathlib

import av

# Before any packet of a file that begins at 0: AAC's first, which primes the decoder and B-frames' decoding times are
# negative.
START_S = -1.0
# How far before a time to go where what is found is too late: first not at all, at last to the beginning.
BACK_S = (0.0, 0.5, 4.0, 32.0, float("inf"))
EPSILON_S = 1e-6  # times are told in µs
OUT_OF_MEMORY = "decoder ran out of memory"
DAMAGED = "picture is damaged"
# No fault of the file's: a permission, a disk, a network. A rerun tries such files again.
UNREADABLE = "video file can't be read"
_END_BYTES = 1 << 20
# Errors of names, not of machines. A decoder's error names a function of FFmpeg's instead of a file.
_OF_NAMES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
# What a damaged file raises while it is read: FFmpeg's own, PyAV's, and sums over absurd time stamps, rates or sizes.
DAMAGE = (av.error.FFmpegError, ValueError, ArithmeticError, MemoryError)
_NO_VIDEO = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
# Their times go on from whatever clock there was; a player begins at 0 with the first picture.
_CLOCKED = ("mpegts", "mpeg")
# FFmpeg guesses stamps of MPEG-PS from those before, and behind a seek it guesses wrong.
_STAMPED_IN_ORDER = ("mpeg",)
_WITHOUT_DECODING_TIMES = ("matroska,webm",)
# H.264 and HEVC show a picture at most 16 later than it is decoded: behind more of them that come after a time, none is shown
# before.
REORDER = 17
_MIN_HOLE_S, _MIN_HOLE_FRAMES = 1.0, 10


class CorruptError(ValueError):
    """The decoder says that a picture which it gave is corrupt; `pts` is its time stamp."""

    def __init__(self, pts: int):
        super().__init__(DAMAGED)
        self.pts = pts


def choose(container, kind: str):
    """Returns the stream that is taken of a kind ("video", "audio"), or None.

    The first that the container marks as default, else the first. Cover art is no video.
    """
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & _NO_VIDEO]
    return next((s for s in streams if s.disposition & av.stream.Disposition.default), next(iter(streams), None))


def probe(path: pathlib.Path, kinds: tuple[str, ...]) -> str | None:
    """Returns why a file can't give clips at all, or None; `kinds` are the streams that they need."""
    try:
        if not path.is_file():
            return "video file is missing"
        with av.open(str(path)) as container:
            for kind in kinds:
                stream = choose(container, kind)
                if stream is None:
                    return f"no {kind} stream"
                if stream.codec_context is None:
                    return f"no decoder for the {kind} stream"
    except (*DAMAGE, OSError) as error:
        return why("video file can't be opened", error)
    return None


def length_s(path: pathlib.Path, kinds: tuple[str, ...]) -> float | None:
    """Returns until when a file has all of these kinds of streams, in seconds of the video, as its container says.

    None where it doesn't say. `probe` must have found nothing against the file.
    """
    try:
        with av.open(str(path)) as container:
            ends = [_end_s(container, choose(container, kind)) for kind in kinds]
            return None if None in ends else min(ends) - origin_s(container)
    except (*DAMAGE, OSError):
        return None


def _end_s(container, stream) -> float | None:
    """Returns the stream time at which a stream ends, the container's end where the stream names none; None without."""
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return None if container.duration is None else ((container.start_time or 0) + container.duration) / av.time_base


def take(container, kind: str):
    """Returns the stream that is taken of a kind, of which alone packets will come; its decoder says what is damaged."""
    stream = choose(container, kind)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    stream.codec_context.thread_count = 1  # all cores are at work on other videos
    stream.codec_context.options = {"err_detect": "explode"}  # without it, FFmpeg patches damage up and says nothing
    return stream


def origin_s(container) -> float:
    """Returns the stream time that is 0 of the video, seconds.

    A file of sound alone begins with its first sample, whose stamp is the encoder's delay in MP3.
    """
    video, sound = (choose(container, kind) for kind in ("video", "audio"))
    if video is not None and container.format.name not in _CLOCKED:
        return 0.0
    first = sound if video is None else video
    if first is None or first.start_time is None:
        return (container.start_time or 0) / av.time_base
    return float(first.start_time * first.time_base)


def can_seek(container) -> bool:
    """Returns whether time stamps are right behind a seek."""
    return container.format.name not in _STAMPED_IN_ORDER


class Holes:
    """Finds where pictures of a video stream are lost.

    Where the frame rate varies, mp4 says how long it is until the next picture. Other containers do not: there it must not be
    longer than on average by a second and ten pictures. Matroska does not say when B-frames are decoded, and FFmpeg guesses
    it a few packets late behind a hole. So there it counts when they are shown, up to 16 pictures before or behind others.

    Args:
      container, stream: Of the video.
    """

    def __init__(self, container, stream):
        self._tick_s, self._frame_s = float(stream.time_base), frame_s(stream)
        self._by_shown = container.format.name in _WITHOUT_DECODING_TIMES and stream.codec_context.has_b_frames
        self._min_frames = _MIN_HOLE_FRAMES + (REORDER if self._by_shown else 0)
        self._before: tuple[int, int] | None = None  # stamp and duration of the packet before, or of the last one shown

    def is_behind(self, packet: av.Packet) -> bool:
        """Returns whether pictures are lost right before a packet. Asked for each, in their order."""
        stamp, before = packet.pts if self._by_shown else packet.dts, self._before
        if stamp is None:
            self._before = None
            return False
        if before is None or not self._by_shown or stamp > before[0]:
            self._before = stamp, packet.duration
        if before is None:
            return False
        step_s, length_s = (stamp - before[0]) * self._tick_s, before[1] * self._tick_s or self._frame_s
        return step_s - length_s > max(_MIN_HOLE_S, self._min_frames * length_s)


def frame_s(stream) -> float:
    """Returns how long a picture is shown on average, seconds."""
    return 1.0 / float(stream.average_rate or 30)


def seek(container, stream, time_s: float) -> None:
    """Goes to the keyframe at or before a stream time, or for -inf to the beginning; decoders forget what they had."""
    start = stream.start_time or 0
    begin = min(START_S, float(start * stream.time_base) + START_S)
    # Mp4 without a keyframe up to the time refuses it. MP3 and FLV refuse what is before the first packet.
    for place in (int(max(time_s, begin) / stream.time_base), int(begin / stream.time_base)):
        try:
            container.seek(place, stream=stream, backward=True)
            return
        except av.error.PermissionError:
            continue
    container.seek(start, stream=stream, backward=True)


def why(reason: str, error: Exception) -> str:
    """Returns `reason: detail`; the detail is the error's words without file names.

    Too little memory, corrupt pictures and files that this machine can't read are reasons of their own.
    """
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, CorruptError):
        return DAMAGED
    fault = _fault_of(error)
    if fault is not None:
        reason, error = UNREADABLE, fault
    words = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:160]
    return f"{reason}: {words}"


def _fault_of(error: Exception) -> OSError | None:
    """Returns what keeps this machine from reading the file that an error is about, None if nothing does.

    FFmpeg tells damage as an input error too, and a disk's error as damage, so the file itself is asked.
    """
    path = getattr(error, "filename", None)
    if not path:
        return None
    try:
        _read(os.fspath(path), isinstance(error, OSError))
    except OSError as fault:
        return None if fault.errno in _OF_NAMES else fault
    return None


@functools.lru_cache(maxsize=1)  # of a damaged file every clip may have such an error; what is raised is not kept
def _read(path: str, whole: bool) -> None:
    """Reads a file, or its first and last MiB, where containers have what opening needs.

    Raises:
      OSError: The machine can't.
    """
    with open(path, "rb", buffering=0) as file:
        if whole:
            while file.read(_END_BYTES):
                pass
            return
        for start in (0, max(os.fstat(file.fileno()).st_size - _END_BYTES, 0)):
            file.seek(start)
            file.read(_END_BYTES)
