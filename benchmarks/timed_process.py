"""A system that is timed in a process of its own: both ends of the pipe between that process and the benchmark.

The process says once that its first step is done. Then each line it reads is a number of steps, and it answers with the
seconds of one and the most memory it has held.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

# Set for every process where there is no GPU. XLA and PyTorch allocate a step's memory by malloc, which would otherwise
# return it to the kernel, to be cleared again for the next step. The Makefile sets the same for training on a CPU, without
# the single arena: glibc takes what is too large for a thread's own arena from mmap, whatever `mmap_max` says, such as half a
# gigabyte that one of XLA's threads allocates. The demo, whose arrays are small, is slower with a single arena.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:"
    "glibc.malloc.top_pad=67108864:glibc.malloc.arena_max=1"
}


def settings(devices: str | os.PathLike = "/dev") -> dict[str, str]:
    """Returns environment variables for the processes; `devices` is the folder that lists the machine's devices.

    On a GPU malloc holds nothing of a step, and with a single arena programs take longer to compile.
    """
    keep = {} if any(pathlib.Path(devices).glob("nvidia[0-9]*")) else KEEP_MEMORY
    return keep | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had resident; `getrusage` may give that of the process it comes from."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def serve(
    step: Callable[[], object],
    peak_bytes: Callable[[], int],
    platform: str,
    *,
    is_first_done: bool = False,
    note: str = "",
) -> None:
    """Runs the first step, then as many as each line of stdin says; the process's side.

    One step that is not timed comes before those of a line: while the other systems had their turn, caches have gone cold,
    and a hypervisor may have reclaimed idle memory.

    Args:
      step: Runs a step and returns when it is done.
      peak_bytes: The most memory held so far, 0 where that is not known.
      platform: "cpu", "gpu" or "tpu".
      is_first_done: Whether the first step has been run already.
      note: Remark that follows the system's name in the table.
    """
    if not is_first_done:
        step()
    print(json.dumps({"platform": platform, "ready": time.time(), "note": note}), flush=True)
    for line in sys.stdin:
        step()
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps({"seconds": (time.perf_counter() - begin) / int(line), "bytes": peak_bytes()}), flush=True)


class TimedProcess:
    """A process that `serve`s; the benchmark's side.

    Attributes:
      answers: Seconds per step and bytes of memory in each round.
      platform: "cpu", "gpu" or "tpu".
      started_s: Seconds from the start of the process to the end of its first step.
      failed: Why the system has failed, "" if it has not.
      note: Remark that follows its name in the table.
    """

    def __init__(self, words: list[str]):
        """Starts `python -m` with these words; call `wait` before anything else."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | settings(),
        )  # fmt: skip
        self.answers, self.failed, self.note, self.platform, self.started_s = [], "", "", "", float("nan")
        self._began = time.time()

    def wait(self, limit_s: float = 0.0) -> None:
        """Waits for the first step; ends the process if that takes longer than `limit_s` since its start (0: no limit)."""
        is_late = threading.Event()

        def end():
            is_late.set()
            self.process.kill()

        # At least a second, to read the answer of a first step that was done in time while another system was waited for.
        timer = threading.Timer(max(self._began + limit_s - time.time(), 1.0), end)
        if limit_s:
            timer.start()
        try:
            answer = self._read()
        finally:
            timer.cancel()
        if is_late.is_set():
            self.failed = f"no step within {limit_s:g} s"
        elif answer:
            self.platform, self.note = answer["platform"], answer["note"]
            self.started_s = answer["ready"] - self._began

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.failed = f"ended with status {self.process.wait()}"
        return {}

    def run(self, num_steps: int) -> None:
        """Times a number of steps and appends the answer to `answers`; does nothing if the system has failed."""
        if self.failed:
            return
        with contextlib.suppress(BrokenPipeError):  # the process has ended since its last turn; `_read` finds out why
            self.process.stdin.write(f"{num_steps}\n")
            self.process.stdin.flush()
        answer = self._read()
        self.answers += [answer] if answer else []

    def stop(self) -> None:
        """Ends the process; its answers are kept."""
        if not self.failed:
            self.process.stdin.close()
            self.process.wait()

    def cut_off(self) -> None:
        """Ends the process at once; it has failed if it has not answered yet."""
        self.process.kill()
        if not self.answers:
            self.failed = self.failed or "cut off"

    @property
    def seconds(self) -> float:
        """Median over rounds of the seconds per step, NaN if there was none."""
        return float(np.median([answer["seconds"] for answer in self.answers])) if self.answers else float("nan")

    @property
    def memory_gib(self) -> str:
        """Peak memory in GiB as text, on a CPU named as resident; a dash if it isn't measured."""
        most = max((answer["bytes"] for answer in self.answers), default=0)
        return f"{most / 2**30:.1f}{' resident' * (self.platform == 'cpu')}" if most else "–"
