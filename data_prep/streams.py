"""Streams of a media file: which one is used, where its time begins, how to seek, and how damage is reported.

Time stamps are taken as FFmpeg gives them. In FLV, WMV and Matroska files that begin at a small offset, e.g. an encoder's
delay, times count from 0 and not from the first picture. In an mp4 with several edits, FFmpeg places what follows the second
edit a few frames off, picture and sound by different times.
"""

import errno
import functools
import os
import pathlib

import av

# A time before all packets of a file that begins at 0. AAC's first packet, which primes the decoder, has a negative time, and
# so have the decoding times of B-frames.
START_S = -1.0
# How far before a time to seek, in turn, as long as a seek ends too late. The last value means the beginning of the file.
BACK_S = (0.0, 0.5, 4.0, 32.0, float("inf"))
EPSILON_S = 1e-6  # times are given in µs
OUT_OF_MEMORY = "decoder ran out of memory"
DAMAGED = "picture is damaged"
# The file is not to blame, but a permission, a disk or a network. A rerun tries such files again.
UNREADABLE = "video file can't be read"
_END_BYTES = 1 << 20
# Errors about a name, not about the machine. The error of a decoder names a function of FFmpeg instead of a file.
_OF_NAMES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
# Errors that reading a damaged file raises: FFmpeg's, PyAV's, and those of sums over absurd time stamps, rates or sizes.
DAMAGE = (av.error.FFmpegError, ValueError, ArithmeticError, MemoryError)
_NO_VIDEO = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
# Formats whose time stamps start at an arbitrary clock value. Players show the first picture at 0.
_CLOCKED = ("mpegts", "mpeg")
# FFmpeg guesses time stamps of MPEG-PS from earlier ones, and after a seek it guesses wrong.
_STAMPED_IN_ORDER = ("mpeg",)
_WITHOUT_DECODING_TIMES = ("matroska,webm",)
# In H.264 and HEVC, a picture is shown at most 16 pictures later than it is decoded. So once 17 packets have been read whose
# pictures are shown after some time, no later packet is shown before that time.
REORDER = 17
_MIN_HOLE_S, _MIN_HOLE_FRAMES = 1.0, 10


class CorruptError(ValueError):
    """The decoder has marked a picture as corrupt; `pts` is the picture's time stamp."""

    def __init__(self, pts: int):
        super().__init__(DAMAGED)
        self.pts = pts


def choose(container, kind: str):
    """Returns the stream to use of a kind ("video" or "audio"), or None if there is none.

    It is the first that the container marks as default, or else the first. Cover art does not count as video.
    """
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & _NO_VIDEO]
    return next((s for s in streams if s.disposition & av.stream.Disposition.default), next(iter(streams), None))


def probe(path: pathlib.Path, kinds: tuple[str, ...]) -> str | None:
    """Returns the reason why a file can't give any clips, or None if it can; `kinds` are the kinds of streams they need."""
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
    """Returns the time in the video, seconds, up to which a file has all these kinds of streams according to its container.

    Returns None if the container doesn't say. Call it only for files of which `probe` returns None.
    """
    try:
        with av.open(str(path)) as container:
            ends = [_end_s(container, choose(container, kind)) for kind in kinds]
            return None if None in ends else min(ends) - origin_s(container)
    except (*DAMAGE, OSError):
        return None


def _end_s(container, stream) -> float | None:
    """Returns the stream time at which a stream ends, or else the container's end, seconds; None if neither is given."""
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return None if container.duration is None else ((container.start_time or 0) + container.duration) / av.time_base


def take(container, kind: str):
    """Returns the stream to use of a kind; from now on only its packets are read, and its decoder reports damage."""
    stream = choose(container, kind)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    stream.codec_context.thread_count = 1  # the other cores are busy with other videos
    stream.codec_context.options = {"err_detect": "explode"}  # without it, FFmpeg conceals damage silently
    return stream


def origin_s(container) -> float:
    """Returns the stream time, seconds, that counts as time 0 of the video.

    For a file with audio only, it is the time stamp of the first sample, which in MP3 is the encoder's delay.
    """
    video, sound = (choose(container, kind) for kind in ("video", "audio"))
    if video is not None and container.format.name not in _CLOCKED:
        return 0.0
    first = sound if video is None else video
    if first is None or first.start_time is None:
        return (container.start_time or 0) / av.time_base
    return float(first.start_time * first.time_base)


def can_seek(container) -> bool:
    """Returns whether time stamps are correct after a seek."""
    return container.format.name not in _STAMPED_IN_ORDER


class Holes:
    """Finds holes in a video stream, i.e. places where pictures are lost.

    At a varying frame rate, mp4 says how long each picture lasts. Other containers do not, so only a gap that exceeds the
    average duration by more than a second and more than ten pictures counts as a hole. Matroska has no decoding times for
    B-frames, and those that FFmpeg guesses are a few packets late after a hole. So there the times of showing are compared,
    and the gap must be `REORDER` pictures longer, since up to 16 pictures are shown earlier or later than others.

    Args:
      container, stream: Container and stream of the video.
    """

    def __init__(self, container, stream):
        self._tick_s, self._frame_s = float(stream.time_base), frame_s(stream)
        self._by_shown = container.format.name in _WITHOUT_DECODING_TIMES and stream.codec_context.has_b_frames
        self._min_frames = _MIN_HOLE_FRAMES + (REORDER if self._by_shown else 0)
        self._before: tuple[int, int] | None = None  # time stamp and duration of the last packet, or the last shown

    def is_behind(self, packet: av.Packet) -> bool:
        """Returns whether pictures are lost right before a packet. Must be called for every packet, in order."""
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
    """Returns the average duration of a picture, seconds."""
    return 1.0 / float(stream.average_rate or 30)


def seek(container, stream, time_s: float) -> None:
    """Seeks to the keyframe at or before a stream time, or for -inf to the beginning; decoders are flushed."""
    start = stream.start_time or 0
    begin = min(START_S, float(start * stream.time_base) + START_S)
    # Mp4 refuses a time before the first keyframe, MP3 and FLV a time before the first packet.
    for place in (int(max(time_s, begin) / stream.time_base), int(begin / stream.time_base)):
        try:
            container.seek(place, stream=stream, backward=True)
            return
        except av.error.PermissionError:
            continue
    container.seek(start, stream=stream, backward=True)


def why(reason: str, error: Exception) -> str:
    """Returns `reason: detail`, where the detail is the error's message without file names.

    Too little memory, corrupt pictures and files that this machine can't read replace `reason` by a reason of their own.
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
    """Returns the error that keeps this machine from reading the file that `error` is about, or None if it can be read.

    FFmpeg reports damage also as an input error, and disk errors as damage. So the file is read to find out.
    """
    path = getattr(error, "filename", None)
    if not path:
        return None
    try:
        _read(os.fspath(path), isinstance(error, OSError))
    except OSError as fault:
        return None if fault.errno in _OF_NAMES else fault
    return None


@functools.lru_cache(maxsize=1)  # every clip of a damaged file may have such an error; exceptions are not cached
def _read(path: str, whole: bool) -> None:
    """Reads a whole file, or only its first and last MiB, where containers keep what is needed to open them.

    Raises:
      OSError: This machine can't read the file.
    """
    with open(path, "rb", buffering=0) as file:
        if whole:
            while file.read(_END_BYTES):
                pass
            return
        for start in (0, max(os.fstat(file.fileno()).st_size - _END_BYTES, 0)):
            file.seek(start)
            file.read(_END_BYTES)
