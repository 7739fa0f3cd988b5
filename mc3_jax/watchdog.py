"""Ends a job in which a process hangs, and names that process, what it was at and where in its code.

The processes of a job pass the same places in the same order. Each counts those it has passed and tells the others, through
the job's coordination service and by a thread, so that it does so while it hangs as well. Where one has been too long at one
place, the one with the lowest count is what all others wait for.
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
_KEY = "mc3_jax/watchdog"


class Watchdog:
    """Knows where this process is. Use as a context."""

    def __init__(self, limit_s: float):
        """Starts to watch.

        Args:
          limit_s: Time at one place after which the job is taken to hang; 0 is never.
        """
        self._limit_s = limit_s
        self._process, self._num_processes = jax.process_index(), jax.process_count()
        self._count, self._place = 0, ("between two places", 1, time.monotonic())
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
            self._place = ("between two places", 1, time.monotonic())

    def _watch(self) -> None:
        while not self._end.wait(min(self._limit_s / 10, 10)):
            _, factor, since = self._place
            self._tell()
            if time.monotonic() - since > factor * self._limit_s:
                self._bite()

    def _tell(self) -> dict:
        """Returns what it has told the others."""
        place, _, since = self._place
        message = {"count": self._count, "place": place, "for_s": round(time.monotonic() - since)}
        if self._num_processes > 1:
            mesh_lib.publish(f"{_KEY}/{self._process}", json.dumps(message))
        return message

    def _bite(self) -> None:
        """Says what hangs and ends the process."""
        own = self._tell()
        found = {self._process: own}
        if self._num_processes > 1:
            # All that hang find out within a step's time; none may end before all have said where they are.
            mesh_lib.wait_for_others("mc3_jax/watchdog sees it", 30)
            found |= {int(key.rpartition("/")[2]): json.loads(value) for key, value in mesh_lib.published(_KEY)}
        for line in verdict(found):
            print(f"error: {line}", file=sys.stderr)
        if own["count"] == min(message["count"] for message in found.values()):
            stack = traceback.format_stack(sys._current_frames()[self._main])
            print(f"process {self._process} is here:\n{''.join(stack)}", file=sys.stderr)
        print("error: nothing was saved; start again to go on from the last checkpoint", file=sys.stderr, flush=True)
        mesh_lib.end_together(mesh_lib.LOST)


def verdict(found: dict[int, dict]) -> list[str]:
    """Returns what hangs, in lines.

    Args:
      found: By process, how many places it had passed (`count`), where it is (`place`) and for how long (`for_s`).
    """
    behind = min(message["count"] for message in found.values())
    slow = {process: message for process, message in found.items() if message["count"] == behind}
    shown = sorted(slow.items())[:10]
    lines = [f"process {process} hangs: it has been {m['place']} for {m['for_s']} s" for process, m in shown]
    if len(slow) > 10:
        lines.append(f"so are {len(slow) - 10} more")
    if len(slow) == len(found) > 1:
        lines.append("no process is behind the others: it is the devices, or the network between them")
    return lines
