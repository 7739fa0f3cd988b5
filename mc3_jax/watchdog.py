"""Ends a job in which a process hangs, and names that process, what it was at and where in its code.

The processes of a job pass the same places in the same order. Each counts those it has passed and tells the others, through
the job's coordination service and by a thread, so that it does so while it hangs as well. The one with the lowest count is
what all others wait for, and it alone is judged: by how long it may be where it is.
"""

import contextlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from mc3_jax import mesh as mesh_lib

LONG = 6  # times the limit: what is rightly long, such as compiling
_PLACES, _VERDICT = "mc3_jax/watchdog/places", "mc3_jax/watchdog/verdict"


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
        self._heard: dict[int, tuple[int, float]] = {}  # of each process the count, and when it was first heard of

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
            self._place = ("between two places", LONG, time.monotonic())

    def _watch(self) -> None:
        while not self._end.wait(min(self._limit_s / 10, 10)):
            found = {self._process: self._own()}
            if self._num_processes > 1:
                mesh_lib.publish(f"{_PLACES}/{self._process}", json.dumps(found[self._process]))
                found |= {int(key.rpartition("/")[2]): json.loads(value) for key, value in mesh_lib.published(_PLACES)}
                self._count_silence(found)
            if hanging(found):
                if self._num_processes > 1:
                    mesh_lib.publish(f"{_VERDICT}/{self._process}", json.dumps(verdict(found)))
                self._bite(verdict(found))
            elif self._num_processes > 1 and mesh_lib.published(_VERDICT):
                self._bite([])

    def _own(self) -> dict:
        place, factor, since = self._place
        for_s = time.monotonic() - since
        return {"count": self._count, "place": place, "for_s": round(for_s), "late": for_s > factor * self._limit_s}

    def _count_silence(self, found: dict[int, dict]) -> None:
        """Makes late whoever has told the same count for `LONG` limits, for its thread may hang as well."""
        for process, message in found.items():
            if self._heard.get(process, (-1, 0.0))[0] != message["count"]:
                self._heard[process] = message["count"], time.monotonic()
            message["late"] |= time.monotonic() - self._heard[process][1] > LONG * self._limit_s

    def _bite(self, lines: list[str]) -> None:
        """Says what hangs, in the words of the first process that has told all of it, and ends the process."""
        told = mesh_lib.published(_VERDICT) if self._num_processes > 1 else []
        lines = json.loads(min(told)[1]) if told else lines
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        if any(line.startswith(f"process {self._process} ") for line in lines):
            stack = traceback.format_stack(sys._current_frames()[self._main])
            print(f"process {self._process} is here:\n{''.join(stack)}", file=sys.stderr)
        print("error: nothing was saved; start again to go on from the last checkpoint", file=sys.stderr, flush=True)
        if self._num_processes > 1:
            mesh_lib.wait_for_others("mc3_jax/watchdog has told", 30)  # all look every ten seconds
        mesh_lib.end_together(mesh_lib.LOST)


def _behind(found: dict[int, dict]) -> dict[int, dict]:
    """Returns the processes that have passed the fewest places."""
    least = min(message["count"] for message in found.values())
    return {process: message for process, message in sorted(found.items()) if message["count"] == least}


def hanging(found: dict[int, dict]) -> bool:
    """Returns whether a process that all others wait for has been too long where it is; see `verdict`."""
    return any(message["late"] for message in _behind(found).values())


def verdict(found: dict[int, dict]) -> list[str]:
    """Returns what hangs, in lines.

    Args:
      found: By process, how many places it had passed (`count`), where it is (`place`), for how long (`for_s`) and whether
        that is too long (`late`).
    """
    behind = _behind(found)
    shown = list(behind.items())[:10]
    lines = [f"process {process} hangs: it has been {m['place']} for {m['for_s']} s" for process, m in shown]
    if len(behind) > 10:
        lines.append(f"so do {len(behind) - 10} more")
    if len(behind) == len(found) > 1:
        lines.append("no process is behind the others: it is the devices, or the network between them")
    return lines
