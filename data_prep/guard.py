"""`media.cut_windows` in a process of its own: a video that crashes the decoder, hangs or eats memory costs only itself.

Media come from strangers and decoders are C: a worker keeps one child that decodes (`data_prep.decoder_child`), limits what
it may take, and starts another when it dies. Request: one JSON line. Reply: for each window a JSON line and the bytes that it
announces. Nothing is unpickled, and what the child says is believed only as far as it can be true of what was asked.

A file in a bucket that may be too large to copy, HDF5, is read by the parent and parsed by the child, which asks for parts
of it between its replies. So what parses needs no network, and a network that is slow or away costs no clip: the child's time
does not run while the parent reads, and what fails then ends the run.

A child that gets a signal from outside, such as SIGKILL where memory runs out, is no fault of the video's: that ends the run.
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

from data_prep import decoder_answers, decoder_child, media

COMMAND = (sys.executable, "-P", "-m", "data_prep.decoder_child")
# A busy machine or a slow disk may make the decoder wait for twice as long as it computes.
_WALL_PER_CPU = 3.0
MIN_MEMORY_MB = 128
TOOK_TOO_LONG = "decoder took too long"
# What a process does to itself. Other signals come from outside: the kernel's or Slurm's where memory runs out, a user's.
_CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
            signal.SIGPIPE, signal.SIGXFSZ)  # fmt: skip
_MAX_CHILDREN = 8  # that a video may cost
_LOOK_S = 0.02  # how often a decoder's memory is looked at
_START_S = 120.0  # for the imports of a child, on a busy machine
_MAX_LINE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What decoding a video may take.

    Attributes:
      video_cpu_s, clip_cpu_s: CPU seconds for a video and, on top, for each of its clips. A core decodes 50 frames of 10-bit
        4K HEVC in a second, so a clip that needs the 250 since the keyframe before takes six. The parent waits for three
        times as many seconds in all, and from one answer to the next for three times those of a video with one clip.
      memory_mb: Resident memory of the child, MiB. It takes 60 by itself, 180 with 4K H.264 and 300 with 10-bit 4K HEVC.
    """

    video_cpu_s: float = 60.0
    clip_cpu_s: float = 10.0
    memory_mb: int = 2048

    def cpu_s(self, num_clips: int) -> int:
        """Returns the CPU seconds that so many clips of a video may take; the kernel counts whole ones."""
        return math.ceil(self.video_cpu_s + self.clip_cpu_s * num_clips)


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file that the parent reads.

    Attributes:
      num_bytes: Its size.
      read: (start, stop) → those bytes of it; what it raises is no fault of the file's.
    """

    num_bytes: int
    read: Callable[[int, int], bytes]


class DecoderError(Exception):
    """A child that is no more. The words are `reason: detail`, as `media.cut_windows` says why there is no clip."""


class DecoderTimeoutError(DecoderError):
    """Its time was over."""


def cut_windows(
    path: str | os.PathLike, windows: list[media.Window], *, short_side_px: int, quality: int = 90,
    limits: Limits, hdf5: tuple[str, int] | None = None, remote: Remote | None = None,
) -> Iterator[tuple[int, media.Cut | str]]:  # fmt: skip
    """Yields what `media.cut_windows` yields, every window once, whatever the video does.

    When the child dies, the windows that were answered stay. Those that were being cut have the reason: the next in the order
    of `media.order` and those that begin before it ends. A new child goes on with the others, unless the time was over or
    `_MAX_CHILDREN` died.

    Args:
      path, windows, short_side_px, quality: As there.
      limits: Of each child.
      hdf5: For sound from an HDF5 file, the name of the data set in it and its sample rate, Hz.
      remote: The HDF5 file where it is not on this machine; `path` is not looked at then.

    Raises:
      ChildProcessError: No child starts, or something else than the video killed one.
      OSError: `remote` can't be read.
    """
    left = media.order(windows)
    for died in range(1, _MAX_CHILDREN + 1):
        asked = list(left)
        try:
            with _child() as decoder:
                asked_for = [windows[i] for i in asked]
                for k, cut in decoder.cut(path, asked_for, short_side_px, quality, limits, hdf5, remote):
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
    """Returns why a file can't give clips at all, or None, whatever the file does.

    Args:
      path: Of the file.
      kinds: Streams that the clips need, "video" and "audio" or one of them.
      limits: Of the child.

    Raises:
      ChildProcessError: No child starts, or something else than the file killed one.
    """
    found = length_s(path, kinds, limits)
    return found if isinstance(found, str) else None


def length_s(path: str | pathlib.Path, kinds: tuple[str, ...], limits: Limits = Limits()) -> float | str | None:
    """Returns until when a file has these kinds of streams, seconds, as it says itself; None where it doesn't say.

    A file that can't give clips at all gives the reason. Arguments and errors are those of `probe`.
    """
    try:
        with _child() as decoder:
            return decoder.probe(path, kinds, limits)
    except DecoderError as error:
        return str(error)


@contextlib.contextmanager
def _child() -> Iterator["Decoder"]:
    """Lends this process's child, which lives on if its answers were good and wanted to the last, else is no more."""
    decoder = _take()
    try:
        yield decoder
    except BaseException:
        decoder.kill()
        raise
    _idle.append(decoder)


_idle: list["Decoder"] = []  # one for every thread that decodes


def _take() -> "Decoder":
    while _idle:
        with contextlib.suppress(IndexError):  # another thread was faster
            decoder = _idle.pop()
            if decoder.alive():
                return decoder
            decoder.kill()
    return Decoder(COMMAND)


def ready() -> "Decoder":
    """Returns the decoder that the next cut takes, started; for whoever measures it."""
    decoder = _take()
    _idle.append(decoder)
    return decoder


os.register_at_fork(after_in_child=_idle.clear)  # a fork's children are its own


@atexit.register
def stop() -> None:
    """Ends the children that wait for a video."""
    while _idle:
        _idle.pop().kill()


class Decoder:
    """A child that decodes, and what its parent knows of it.

    Args:
      command: That starts it.

    Raises:
      ChildProcessError: It does not say that it is ready.
    """

    def __init__(self, command: tuple[str, ...]):
        # A file, because nobody reads a pipe while the child decodes. The child may not make it large.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        root = str(pathlib.Path(__file__).parents[1])
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "OPENBLAS_NUM_THREADS": "1",  # the stacks and buffers of a large machine's threads would fill the limit
        }
        # A session of its own: Ctrl-C ends the parent, and the child by the end of its input, not as a crash of the video.
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
                raise DecoderError("it says something else than that it is ready")
        except (DecoderError, ChildProcessError) as error:
            self.kill()
            raise ChildProcessError(f"the decoder's process does not start: {error}") from error

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the child, whatever it is at, and waits until it is gone."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            file.close()

    def cut(
        self, path: str | os.PathLike, windows: list[media.Window], short_side_px: int, quality: int, limits: Limits,
        hdf5: tuple[str, int] | None = None, remote: Remote | None = None,
    ) -> Iterator[tuple[int, media.Cut | str]]:  # fmt: skip
        """Yields (index of the window, what was cut or why not), every window once.

        Raises:
          DecoderError: The child died, took too long or answered what can't be.
          ChildProcessError: It was killed from outside.
          OSError: `remote` can't be read.
        """
        request = {
            "windows": [dataclasses.astuple(w) for w in windows], "short_side_px": short_side_px, "quality": quality,
            "hdf5": hdf5, "remote_bytes": remote and remote.num_bytes,
        }  # fmt: skip
        self._send({"path": str(path), "probe": None, **request}, limits, len(windows))
        open_windows = set(range(len(windows)))
        while open_windows:
            line = self._line()
            try:
                part = decoder_answers.check_question(line, remote.num_bytes) if remote else None
                answer = decoder_answers.check_answer(line, windows) if part is None else {}
            except ValueError as error:
                raise DecoderError(f"decoder's answer makes no sense: {error}") from None
            if part is not None:
                self._write(base64.b64encode(remote.read(*part)) + b"\n")
                continue
            if answer["index"] not in open_windows:
                raise DecoderError(f"decoder's answer makes no sense: window {answer['index']} twice")
            open_windows.remove(answer["index"])
            self._answer_left_s = self._answer_wall_s
            if "reason" in answer:
                told = answer["reason"]
                yield answer["index"], f"{told}: limit {limits.memory_mb} MiB" if told == media.OUT_OF_MEMORY else told
                continue
            jpegs = [self._bytes(size) for size in answer["jpegs"]]
            audio = np.frombuffer(self._bytes(answer["audio"]), "<i2").astype(np.int16)
            times_us = np.array(answer["times_us"], np.int64)
            yield answer["index"], media.Cut(jpegs, times_us, answer["height"], answer["width"], audio)

    def probe(self, path: str | pathlib.Path, kinds: tuple[str, ...], limits: Limits) -> float | str | None:
        """Returns the length of a file, seconds, None where it does not say; or why it can't give clips.

        Raises:
          DecoderError: The child died, took too long or answered what can't be.
          ChildProcessError: It was killed from outside.
        """
        self._send({"path": str(path), "probe": kinds}, limits, 0)
        try:
            return decoder_answers.check_length(self._line())
        except ValueError as error:
            raise DecoderError(f"decoder's answer makes no sense: {error}") from None

    def _send(self, request: dict, limits: Limits, num_clips: int) -> None:
        """Sends a request; from now on its limits count."""
        self._limits, self._cpu_s, self._path = limits, limits.cpu_s(num_clips), request["path"]
        self._left_s = self._wall_s = _WALL_PER_CPU * self._cpu_s
        self._answer_left_s = self._answer_wall_s = _WALL_PER_CPU * (limits.video_cpu_s + limits.clip_cpu_s)
        request = {**request, "cpu_s": self._cpu_s, "memory_mb": limits.memory_mb}
        self._write(json.dumps(request).encode() + b"\n")

    def _line(self) -> bytes:
        at = -1
        while at < 0:
            if len(self._buffer) > _MAX_LINE_BYTES:
                raise DecoderError("decoder's answer makes no sense: a line without end")
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
        """Waits for the child, whose time that is (what the parent does between is not), and looks at its memory."""
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
        """Returns why the child closed its pipe.

        Raises:
          ChildProcessError: It was killed from outside.
        """
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return DecoderError("decoder crashed: it closed its pipe")
        if status == -signal.SIGXCPU:
            return DecoderTimeoutError(f"{TOOK_TOO_LONG}: more than {self._cpu_s:g} s of CPU")
        if status == decoder_child.OUT_OF_MEMORY:
            return self._memory_error()
        if status < 0:
            names = {s.value: s.name for s in signal.Signals}
            name = names.get(-status, -status)
            if -status in _CRASHES:
                return DecoderError(f"decoder crashed: signal {name}")
            how = f"got {name} from outside"
            if status == -signal.SIGKILL:
                how = "was killed, perhaps because memory ran out: take fewer --num_workers or a smaller --memory_limit"
            raise ChildProcessError(f"the decoder{self._path and f' of {self._path}'} {how}")
        return DecoderError(f"decoder crashed: {self._last_words() or f'exit status {status}'}")

    def _memory_error(self) -> DecoderError:
        return DecoderError(f"{media.OUT_OF_MEMORY}: limit {self._limits.memory_mb} MiB")

    def _last_words(self) -> str:
        self._stderr.seek(max(self._stderr.seek(0, os.SEEK_END) - 4096, 0))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return decoder_answers.printable(lines[-1]) if lines else ""


def _resident_mb(pid: int) -> float:
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
