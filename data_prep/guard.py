"""Runs `media.cut_windows` in a child process: a video that crashes the decoder, hangs or eats memory harms no other.

Media files are untrusted and decoders are written in C. So a worker keeps a child process that decodes
(`data_prep.decoder_child`), limits its time and memory, and starts another one when it dies. A request is one JSON line. The
reply is a JSON line for each window and the bytes that it announces. Nothing is unpickled, and an answer is accepted only if
it is possible for this request.

An HDF5 file in a bucket may be too large to copy. The parent reads it and the child parses it, asking the parent for parts of
the file between its replies. So the parser needs no network, and a slow or failing network costs no clip: the child's time
limit does not run while the parent reads, and an error of the bucket ends the run.

If a child is killed by a signal from outside, such as SIGKILL when memory runs out, or if the machine does not let it have
its limits, the video is not to blame: the run ends.
"""

import atexit
import base64
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from data_prep import decoder_answers, decoder_child, media, process_limits, streams
from data_prep.windows import Window, order

COMMAND = (sys.executable, "-P", "-m", "data_prep.decoder_child")
# Limit of wall-clock time per CPU second: a busy machine or slow disk may make the decoder wait twice as long as it computes.
_WALL_PER_CPU = 3.0
MIN_MEMORY_MB = 128
TOOK_TOO_LONG = "decoder took too long"
# Signals that a process causes by itself. Others come from outside: from a user, or the kernel or Slurm when memory runs out.
_CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
            signal.SIGPIPE, signal.SIGXFSZ)  # fmt: skip
_MAX_CHILDREN = 8  # that may die of one video
_LOOK_S = 0.02  # interval at which a decoder's memory is checked
_START_S = 120.0  # time limit for a child's imports, on a busy machine
_START_CPU_S = 5  # CPU time for them, which has been measured as 0.25 s
_MAX_LINE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of CPU time and memory for decoding a video.

    Attributes:
      video_cpu_s, clip_cpu_s: CPU seconds for a video and, on top, for each of its clips. Cores have been measured to
        decode 30 to 50 frames of 10-bit 4K HEVC per second, so a clip that needs the 250 frames since the last keyframe takes
        5 to 9 s. The parent waits three times as many seconds in total, and for each answer three times the seconds of a
        video with one clip.
      memory_mb: Resident memory of the child, MiB. A child needs 60 MiB for itself, 180 MiB with 4K H.264 and 300 MiB with
        10-bit 4K HEVC.
    """

    video_cpu_s: float = 60.0
    clip_cpu_s: float = 10.0
    memory_mb: int = 2048

    def cpu_s(self, num_clips: int) -> int:
        """Returns the limit of CPU seconds for a video with so many clips, rounded up: the kernel takes whole seconds."""
        return math.ceil(self.video_cpu_s + self.clip_cpu_s * num_clips)


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file in a bucket, which the parent reads for the child.

    Attributes:
      num_bytes: Size of the file.
      read: Function (start, stop) → these bytes of the file. An error that it raises ends the run, not just the file.
    """

    num_bytes: int
    read: Callable[[int, int], bytes]


def check_machine(limits: Limits, num_clips: int) -> None:
    """Checks that this machine lets a decoder have its limits for a video with so many clips.

    Raises:
      ValueError: A hard limit of this process, which its decoders inherit, is too low.
    """
    process_limits.check(_START_CPU_S + limits.cpu_s(num_clips), limits.memory_mb)


class DecoderError(Exception):
    """The child died or had to be given up. The message is `reason` or `reason: detail`, as `media.cut_windows` yields it."""


class DecoderTimeoutError(DecoderError):
    """The child exceeded its time limit."""


def cut_windows(
    path: str | os.PathLike, windows: list[Window], *, short_side_px: int, quality: int = 90,
    limits: Limits, hdf5: tuple[str, int] | None = None, remote: Remote | None = None, stereo: bool = False,
) -> Iterator[tuple[int, media.Cut | str]]:  # fmt: skip
    """Yields what `media.cut_windows` yields, every window once, whatever the video does to the decoder.

    When the child dies, windows that were answered keep their result. Those that were being cut get the reason: the next in
    the order of `windows.order`, and all that begin before that one ends. A new child cuts the rest. If a time limit was
    exceeded or `_MAX_CHILDREN` have died, all windows left get the reason.

    Args:
      path, windows, short_side_px, quality, stereo: As for `media.cut_windows`.
      limits: Limits of each child.
      hdf5: For sound from an HDF5 file, the name of the data set in it and its sample rate, Hz.
      remote: The HDF5 file if it is not on this machine; `path` is not opened then.

    Raises:
      ChildProcessError: A child can't be started or limited, or something other than the video killed it.
      OSError: `remote` can't be read.
    """
    left = order(windows)
    for died in range(1, _MAX_CHILDREN + 1):
        asked = list(left)
        try:
            with _child() as decoder:
                asked_for = [windows[i] for i in asked]
                for k, cut in decoder.cut(path, asked_for, short_side_px, quality, limits, hdf5, remote, stereo):
                    left.remove(asked[k])
                    yield asked[k], cut
        except DecoderError as error:
            lost = list(left)
            if died < _MAX_CHILDREN and not isinstance(error, DecoderTimeoutError):
                lost = [i for i in left if windows[i].start_s < windows[left[0]].stop_s or i == left[0]]
            left = [i for i in left if i not in lost]
            yield from ((i, str(error)) for i in lost)
        if not left:
            return


def probe(path: str | pathlib.Path, kinds: tuple[str, ...], limits: Limits = Limits()) -> str | None:
    """Returns the reason why a file can't give any clips, or None if it can; safe for files that crash the decoder.

    Args:
      path: Media file.
      kinds: Kinds of streams that the clips need: "video", "audio" or both.
      limits: Limits of the child.

    Raises:
      ChildProcessError: A child can't be started or limited, or something other than the file killed it.
    """
    found = length_s(path, kinds, limits)
    return found if isinstance(found, str) else None


def length_s(path: str | pathlib.Path, kinds: tuple[str, ...], limits: Limits = Limits()) -> float | str | None:
    """Returns the time up to which a file has all these streams, seconds, by its own account; None if it doesn't say.

    For a file that can't give any clips, returns the reason as text. Arguments and errors are those of `probe`.
    """
    try:
        with _child() as decoder:
            return decoder.probe(path, kinds, limits)
    except DecoderError as error:
        return str(error)


@contextlib.contextmanager
def _child() -> Iterator["Decoder"]:
    """Yields a child to decode with. It is kept for the next video if the block ends normally, and killed if not.

    A block that fails, or whose caller stops early, leaves answers unread or a child that can't be trusted. Nor is a child
    kept if the machine limits the CPU time of a process, since several videos may use up what is enough for one.
    """
    decoder = _take()
    try:
        yield decoder
    except BaseException:
        decoder.kill()
        raise
    if resource.getrlimit(resource.RLIMIT_CPU)[1] == resource.RLIM_INFINITY:
        _idle.append(decoder)
    else:
        decoder.kill()


_idle: list["Decoder"] = []  # children waiting for a video, one for every thread that decodes


def _take() -> "Decoder":
    while _idle:
        with contextlib.suppress(IndexError):  # another thread was faster
            decoder = _idle.pop()
            if decoder.alive():
                return decoder
            decoder.kill()
    return Decoder(COMMAND)


def ready() -> "Decoder":
    """Returns the decoder that the next cut will use, already started; for measurements."""
    decoder = _take()
    _idle.append(decoder)
    return decoder


os.register_at_fork(after_in_child=_idle.clear)  # a forked process must start children of its own


@atexit.register
def stop() -> None:
    """Kills the children that wait for a video."""
    while _idle:
        _idle.pop().kill()


class Decoder:
    """A child process that decodes, with its limits and what the parent has received from it.

    Args:
      command: Command line that starts the child.

    Raises:
      ChildProcessError: The child does not report that it is ready.
    """

    def __init__(self, command: tuple[str, ...]):
        # A file, since nobody would empty a pipe while the child decodes. The child limits the size of its files.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        root = str(pathlib.Path(__file__).parents[1])
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "OPENBLAS_NUM_THREADS": "1",  # on a large machine, the threads' stacks and buffers would use up the memory limit
        }
        # A session of its own, so that Ctrl-C ends only the parent. The child then ends with its input, not by a signal that
        # would look like a crash of the video.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=env, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._buffer, self._path = bytearray(), ""
        self._limits, self._cpu_s = Limits(), 0
        self._left_s = self._wall_s = self._answer_left_s = self._answer_wall_s = _START_S
        try:
            if self._line() != b'{"ready": true}':
                raise DecoderError("it does not report that it is ready")
        except (DecoderError, ChildProcessError) as error:
            self.kill()
            raise ChildProcessError(f"the decoder process can't be started: {error}") from error

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Kills the child, whatever it is doing, and waits until it has ended."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            file.close()

    def cut(
        self, path: str | os.PathLike, windows: list[Window], short_side_px: int, quality: int, limits: Limits,
        hdf5: tuple[str, int] | None = None, remote: Remote | None = None, stereo: bool = False,
    ) -> Iterator[tuple[int, media.Cut | str]]:  # fmt: skip
        """Yields (index of the window, the cut or the reason why there is none), every window once.

        Raises:
          DecoderError: The child died, exceeded a limit or gave an impossible answer.
          ChildProcessError: The child was killed from outside or can't be limited.
          OSError: `remote` can't be read.
        """
        request = {
            "windows": [dataclasses.astuple(w) for w in windows], "short_side_px": short_side_px, "quality": quality,
            "hdf5": hdf5, "remote_bytes": remote and remote.num_bytes, "stereo": stereo,
        }  # fmt: skip
        self._send({"path": str(path), "probe": None, **request}, limits, len(windows))
        open_windows = set(range(len(windows)))
        while open_windows:
            line = self._line()
            try:
                part = decoder_answers.check_question(line, remote.num_bytes) if remote else None
                answer = decoder_answers.check_answer(line, windows) if part is None else {}
            except ValueError as error:
                raise DecoderError(f"decoder's answer is invalid: {error}") from None
            if part is not None:
                self._write(base64.b64encode(remote.read(*part)) + b"\n")
                continue
            if answer["index"] not in open_windows:
                raise DecoderError(f"decoder's answer is invalid: window {answer['index']} was answered twice")
            open_windows.remove(answer["index"])
            self._answer_left_s = self._answer_wall_s
            if "reason" in answer:
                told = answer["reason"]
                yield answer["index"], f"{told}: limit {limits.memory_mb} MiB" if told == streams.OUT_OF_MEMORY else told
                continue
            jpegs = [self._bytes(size) for size in answer["jpegs"]]
            audio = np.frombuffer(self._bytes(answer["audio"]), "<i2").astype(np.int16)
            times_us = np.array(answer["times_us"], np.int64)
            yield answer["index"], media.Cut(jpegs, times_us, answer["height"], answer["width"], audio)

    def probe(self, path: str | pathlib.Path, kinds: tuple[str, ...], limits: Limits) -> float | str | None:
        """Returns the length of a file in seconds, None if it doesn't say, or the reason why it can't give clips.

        Raises:
          DecoderError: The child died, exceeded a limit or gave an impossible answer.
          ChildProcessError: The child was killed from outside or can't be limited.
        """
        self._send({"path": str(path), "probe": kinds}, limits, 0)
        try:
            return decoder_answers.check_length(self._line())
        except ValueError as error:
            raise DecoderError(f"decoder's answer is invalid: {error}") from None

    def _send(self, request: dict, limits: Limits, num_clips: int) -> None:
        """Sends a request, whose limits hold from now on."""
        self._limits, self._cpu_s, self._path = limits, limits.cpu_s(num_clips), request["path"]
        self._left_s = self._wall_s = _WALL_PER_CPU * self._cpu_s
        self._answer_left_s = self._answer_wall_s = _WALL_PER_CPU * (limits.video_cpu_s + limits.clip_cpu_s)
        request = {**request, "cpu_s": self._cpu_s, "memory_mb": limits.memory_mb}
        self._write(json.dumps(request).encode() + b"\n")

    def _line(self) -> bytes:
        at = -1
        while at < 0:
            if len(self._buffer) > _MAX_LINE_BYTES:
                raise DecoderError(f"decoder's answer is invalid: a line of more than {_MAX_LINE_BYTES} bytes")
            at = self._buffer.find(b"\n") if self._buffer else -1
            if at < 0:
                self._fill()
        return self._cut_off(at + 1)[:-1]

    def _bytes(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        return self._cut_off(size)

    def _cut_off(self, size: int) -> bytes:
        part = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return part

    def _fill(self) -> None:
        self._wait(self._process.stdout, select.POLLIN)
        more = os.read(self._process.stdout.fileno(), 1 << 20)
        if not more:
            raise self._death()
        self._buffer += more

    def _write(self, content: bytes) -> None:
        content = memoryview(content)
        while content:
            self._wait(self._process.stdin, select.POLLOUT)
            try:
                content = content[os.write(self._process.stdin.fileno(), content) :]
            except BrokenPipeError:
                raise self._death() from None

    def _wait(self, pipe, event: int) -> None:
        """Waits until a pipe to the child is ready, and checks the child's memory meanwhile.

        Only this waiting counts towards the time limits, not what the parent does in between.
        """
        poll = select.poll()
        poll.register(pipe, event)
        ready = False
        while not ready:
            if self._left_s <= 0:
                raise DecoderTimeoutError(f"{TOOK_TOO_LONG}: more than {self._wall_s:g} s")
            if self._answer_left_s <= 0:
                raise DecoderTimeoutError(f"{TOOK_TOO_LONG}: more than {self._answer_wall_s:g} s for one clip")
            begin_s = time.monotonic()
            ready = bool(poll.poll(1000 * min(self._left_s, self._answer_left_s, _LOOK_S)))
            spent_s = time.monotonic() - begin_s
            self._left_s, self._answer_left_s = self._left_s - spent_s, self._answer_left_s - spent_s
            if _resident_mb(self.pid) > self._limits.memory_mb:
                raise self._memory_error()

    def _death(self) -> DecoderError:
        """Returns an error that says why the child closed its pipe.

        Raises:
          ChildProcessError: The child was killed from outside or can't be limited.
        """
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return DecoderError("decoder crashed: it closed its pipe")
        if status == -signal.SIGXCPU:
            return DecoderTimeoutError(f"{TOOK_TOO_LONG}: more than {self._cpu_s:g} s of CPU time")
        if status == decoder_child.OUT_OF_MEMORY_STATUS:
            return self._memory_error()
        of_what = self._path and f" of {self._path}"
        if status == decoder_child.HARD_LIMIT_STATUS:
            raise ChildProcessError(f"the decoder{of_what} can't work: {self._last_words()}")
        if status < 0:
            names = {s.value: s.name for s in signal.Signals}
            name = names.get(-status, -status)
            if -status in _CRASHES:
                return DecoderError(f"decoder crashed: signal {name}")
            how = f"was ended from outside by {name}"
            if status == -signal.SIGKILL:
                how = "was killed, perhaps because memory ran out: use fewer --num_workers or a smaller --memory_limit"
            raise ChildProcessError(f"the decoder{of_what} {how}")
        return DecoderError(f"decoder crashed: {self._last_words() or f'exit status {status}'}")

    def _memory_error(self) -> DecoderError:
        return DecoderError(f"{streams.OUT_OF_MEMORY}: limit {self._limits.memory_mb} MiB")

    def _last_words(self) -> str:
        self._stderr.seek(max(self._stderr.seek(0, os.SEEK_END) - 4096, 0))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return decoder_answers.printable(lines[-1]) if lines else ""


def _resident_mb(pid: int) -> float:
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
