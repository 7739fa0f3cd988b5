"""Ends a job in which a process hangs, and names that process, what it was at and where in its code.

The processes of a job pass the same places in the same order. Each counts those it has passed and tells the others, through
the job's coordination service and by a thread, so that it does so while it hangs as well. The one with the lowest count is
what all others wait for. How long that count has been the lowest is what counts: who has waited for a slow one and now has to
go on himself is not to blame for it.
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

LONG = 6  # times the limit: what is rightly long, such as compiling
_LAST_WORDS_S = 60  # the two barriers of an end take 40 at most
_PLACES, _VERDICT = "mc3_jax/watchdog/places", "mc3_jax/watchdog/verdict"


class Judge:
    """Tells whether a job hangs, from what its processes tell every few seconds."""

    def __init__(self, limit_s: float):
        """Begins to look.

        Args:
          limit_s: Time that the lowest count may stay the same.
        """
        self._limit_s = limit_s
        self._least = (-1, 0.0)  # the lowest count, and when it was first seen

    def hangs(self, found: dict[int, dict], now_s: float) -> bool:
        """Returns whether the processes that are behind are late.

        Args:
          found: By process, `count` of places passed and `factor` of the limit that its place may take.
          now_s: Time, by any clock.
        """
        behind = _behind(found)
        least = next(iter(behind.values()))["count"]
        if least != self._least[0]:
            self._least = least, now_s
        return now_s - self._least[1] > self._limit_s * max(message["factor"] for message in behind.values())


class Watchdog:
    """Knows where this process is. Use as a context."""

    def __init__(self, limit_s: float):
        """Prepares.

        Args:
          limit_s: Time at one place after which a process is taken to hang; 0 is never.
        """
        self._limit_s = limit_s
        self._process, self._num_processes = jax.process_index(), jax.process_count()
        self._count, self._place = 0, ("between two places", LONG, time.monotonic())
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

    @contextlib.contextmanager
    def at(self, place: str, *, long: bool = False) -> Iterator[None]:
        """Notes where the block is; places don't nest.

        Args:
          place: Ends the sentence "process 1 is ...".
          long: It may take `LONG` times the limit.
        """
        self._count += 1
        self._place = (place, LONG if long else 1, time.monotonic())
        try:
            yield
        finally:
            self._count += 1
            self._place = ("between two places", LONG, time.monotonic())

    def _watch(self) -> None:
        judge, pause_s, looked = Judge(self._limit_s), min(self._limit_s / 10, 10), time.monotonic()
        try:
            while not self._end.wait(pause_s):
                if time.monotonic() - looked > 2 * pause_s + 5:
                    judge = Judge(self._limit_s)  # this process was stopped meanwhile: the time is nobody's
                looked = time.monotonic()
                found = self._exchange()
                if judge.hangs(found, time.monotonic()):
                    if self._num_processes > 1:
                        job_lib.publish(f"{_VERDICT}/{self._process}", json.dumps(verdict(found)))
                    self._bite(verdict(found))
                elif self._num_processes > 1 and job_lib.published(_VERDICT):
                    self._bite([])
        except Exception as error:  # else nobody would know that nobody watches
            print(f"warning: this process is no longer watched: {error!r}", file=sys.stderr, flush=True)

    def _exchange(self) -> dict[int, dict]:
        """Tells the other processes where this one is, and returns where all are."""
        place, factor, since = self._place
        own = {"count": self._count, "place": place, "factor": factor, "for_s": round(time.monotonic() - since)}
        if self._num_processes == 1:
            return {self._process: own}
        job_lib.publish(f"{_PLACES}/{self._process}", json.dumps(own))
        told = {int(key.rpartition("/")[2]): json.loads(value) for key, value in job_lib.published(_PLACES)}
        return told | {self._process: own}

    def _bite(self, lines: list[str]) -> None:
        """Says what hangs, in the words of the first process that has told all of it, and ends the process."""
        last = threading.Timer(_LAST_WORDS_S, os._exit, [job_lib.LOST])  # where writing to the log blocks for ever
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
                "error: nothing was saved; start again to go on from the last checkpoint; if this was no hang, raise "
                f"config.hang_timeout_s, now {self._limit_s:g}", file=sys.stderr, flush=True,
            )  # fmt: skip
        finally:  # also where the log can't be written to any more
            if self._num_processes > 1:
                job_lib.wait_for_others("mc3_jax/watchdog has told", 30)  # all look every ten seconds
            job_lib.end_together(job_lib.LOST)


def _behind(found: dict[int, dict]) -> dict[int, dict]:
    """Returns the processes that have passed the fewest places."""
    least = min(message["count"] for message in found.values())
    return {process: message for process, message in sorted(found.items()) if message["count"] == least}


def verdict(found: dict[int, dict]) -> list[str]:
    """Returns what hangs, in lines.

    Args:
      found: By process, how many places it had passed (`count`), where it is (`place`) and for how long (`for_s`).
    """
    behind = _behind(found)
    shown = list(behind.items())[:10]
    lines = [f"process {process} hangs: it has been {m['place']} for {m['for_s']} s" for process, m in shown]
    if len(behind) > 10:
        lines.append(f"so do {len(behind) - 10} more")
    if len(behind) == len(found) > 1:
        lines.append("no process is behind the others: it is the devices, or the network between them")
    return lines
