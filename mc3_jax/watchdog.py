"""Ends a job in which a process hangs, and reports which process, what it was doing and where in its code.

The processes of a job pass the same places of the program in the same order. Each counts the places it has passed and tells
the others its count through the job's coordination service. A thread does so, and thus even while the process hangs. The
process with the lowest count is the one that all others wait for. It hangs if that count has been the lowest for too long;
the time for which a process itself has waited for a slower one is not held against it.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from mc3_jax import job as job_lib

_DONE = 1 << 62  # count of a process that is no longer watched: no other has to wait for it
LONG = 6  # times the limit: for places that may take long, such as compiling
_LAST_WORDS_S = 60  # the two barriers at the end take at most 40 s
_PLACES, _VERDICT = "mc3_jax/watchdog/places", "mc3_jax/watchdog/verdict"


class Judge:
    """Decides whether a job hangs, from what its processes report every few seconds."""

    def __init__(self, limit_s: float):
        """Starts without any observation.

        Args:
          limit_s: Time for which the lowest count may stay the same.
        """
        self._limit_s = limit_s
        self._least = (-1, 0.0)  # the lowest count, and when it was first seen

    def hangs(self, found: dict[int, dict], now_s: float) -> bool:
        """Returns whether the processes that are behind have exceeded their time.

        Args:
          found: Process → {"count": number of places passed, "factor": how many times the limit its place may take}.
          now_s: Current time of any clock that only goes forward.
        """
        behind = _behind(found)
        least = next(iter(behind.values()))["count"]
        if least != self._least[0]:
            self._least = least, now_s
        return now_s - self._least[1] > self._limit_s * max(message["factor"] for message in behind.values())


class Watchdog:
    """Tracks where this process is, and ends it if the job hangs. Use as a context."""

    def __init__(self, limit_s: float):
        """Prepares the watchdog; entering its context starts it.

        Args:
          limit_s: Time at one place after which a process counts as hanging; 0 disables the watchdog.
        """
        self._limit_s = limit_s
        self._process, self._num_processes = jax.process_index(), jax.process_count()
        self._count, self._place = 0, ("between two tasks", LONG, time.monotonic())
        self._main, self._end = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit_s:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
            self._count = _DONE
            self._exchange()  # else the others would believe it to be where it was reported last

    @contextlib.contextmanager
    def at(self, place: str, *, long: bool = False) -> Iterator[None]:
        """Records that the process is at a place during the block; places don't nest.

        Args:
          place: Completes the sentence "process 1 has been ... for 60 s".
          long: Whether the block may take `LONG` times the limit.
        """
        self._count += 1
        self._place = (place, LONG if long else 1, time.monotonic())
        try:
            yield
        finally:
            self._count += 1
            self._place = ("between two tasks", LONG, time.monotonic())

    def _watch(self) -> None:
        judge, pause_s, looked = Judge(self._limit_s), min(self._limit_s / 10, 10), time.monotonic()
        try:
            while not self._end.wait(pause_s):
                if time.monotonic() - looked > 2 * pause_s + 5:
                    judge = Judge(self._limit_s)  # this process was suspended: don't count that time
                looked = time.monotonic()
                found = self._exchange()
                if judge.hangs(found, time.monotonic()):
                    if self._num_processes > 1:
                        job_lib.publish(f"{_VERDICT}/{self._process}", json.dumps(verdict(found)))
                    self._bite(verdict(found))
                elif self._num_processes > 1 and job_lib.published(_VERDICT):
                    self._bite([])
        except Exception as error:  # else the watching would end unnoticed
            line = f"warning: the watchdog of this process has failed, hangs will go unnoticed: {error!r}"
            print(line, file=sys.stderr, flush=True)

    def _exchange(self) -> dict[int, dict]:
        """Publishes where this process is, and returns where all processes are."""
        place, factor, since = self._place
        own = {"count": self._count, "place": place, "factor": factor, "for_s": round(time.monotonic() - since)}
        if self._num_processes == 1:
            return {self._process: own}
        job_lib.publish(f"{_PLACES}/{self._process}", json.dumps(own))
        told = {int(key.rpartition("/")[2]): json.loads(value) for key, value in job_lib.published(_PLACES)}
        return told | {self._process: own}

    def _bite(self, lines: list[str]) -> None:
        """Prints what hangs and ends the process; all processes print the published verdict that comes first."""
        last = threading.Timer(_LAST_WORDS_S, os._exit, [job_lib.LOST])  # in case writing to the log blocks for ever
        last.daemon = True
        last.start()
        told = job_lib.published(_VERDICT) if self._num_processes > 1 else []
        lines = json.loads(min(told)[1]) if told else lines
        try:
            for line in lines:
                print(f"error: {line}", file=sys.stderr)
            if any(line.startswith(f"process {self._process} ") for line in lines):
                stack = traceback.format_stack(sys._current_frames()[self._main])
                print(f"process {self._process} is here:\n{''.join(stack)}", file=sys.stderr)
            print(
                "error: nothing was saved; start again to resume from the last checkpoint; if this was not a hang, raise "
                f"config.hang_timeout_s, now {self._limit_s:g}", file=sys.stderr, flush=True,
            )  # fmt: skip
        finally:  # even if the log can't be written any more
            if self._num_processes > 1:
                job_lib.wait_for_others("mc3_jax/watchdog has told", 30)  # every process checks every ten seconds
            job_lib.end_together(job_lib.LOST)


def _behind(found: dict[int, dict]) -> dict[int, dict]:
    """Returns those processes that have passed the fewest places."""
    least = min(message["count"] for message in found.values())
    return {process: message for process, message in sorted(found.items()) if message["count"] == least}


def verdict(found: dict[int, dict]) -> list[str]:
    """Returns lines that say which processes hang, and where.

    Args:
      found: Process → {"count": number of places passed, "place": where it is, "for_s": for how long, in seconds}.
    """
    behind = _behind(found)
    shown = list(behind.items())[:10]
    lines = [f"process {process} hangs: it has been {m['place']} for {m['for_s']} s" for process, m in shown]
    if len(behind) > 10:
        lines.append(f"{len(behind) - 10} more processes hang as well")
    if len(behind) == len(found) > 1:
        lines.append("no process is behind the others: the cause is the devices or the network between them")
    return lines
