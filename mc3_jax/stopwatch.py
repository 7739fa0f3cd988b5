"""Where the time of a run goes: on the devices, in waits for the next batch, in compilation, saves and interruptions."""

import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator

import jax


class Stopwatch:
    """Tells how long the devices worked and what they waited for. Use as a context.

    A step begins when it was called and the one before it was done, and ends when its numbers are there, which a thread
    of its own waits for. What lies between two steps is lost; it is put down to what the host did meanwhile (`during`).
    What the host does while the devices work is not lost, however long it takes. Of several processes, each sees its own
    waits; those for another process pass for work.
    """

    def __init__(self, *, since_s: float = 0.0, worked_s: float = 0.0, clock: Callable[[], float] = time.monotonic):
        """Starts.

        Args:
          since_s: How long ago the run was first started, interruptions included.
          worked_s: Time that its steps took before this start, of those that were not lost.
          clock: Seconds.
        """
        self._clock = clock
        self._begin = self._free = clock()
        self._since_s, self._worked_s = since_s, worked_s
        self._spans: list[tuple[str, float, float]] = []
        self._waiter = concurrent.futures.ThreadPoolExecutor(1, "stopwatch")
        self.lost_s: dict[str, float] = collections.defaultdict(float)

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *_) -> None:
        self._waiter.shutdown(wait=False)

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Notes that the host does `what` in the block."""
        begin = self._clock()
        try:
            yield
        finally:
            self._spans.append((what, begin, self._clock()))

    def call(self, step: Callable, *args):
        """Calls a jitted step and returns (what it returned, what `done` wants to know)."""
        begin = self._clock()
        out = step(*args)
        watched = jax.tree.leaves(out)[-1]  # not of the state, which the next step takes away
        return out, (begin, self._waiter.submit(lambda: (jax.block_until_ready(watched), self._clock())[1]))

    def done(self, called: tuple[float, concurrent.futures.Future]) -> None:
        """Counts a step, once it is done; steps are counted in their order."""
        begin, end = called[0], called[1].result()
        begin = max(begin, self._free)
        self._lose(begin)
        self._worked_s += end - begin
        self._free = end

    def settle(self) -> None:
        """Counts what the devices have waited for since the last step, behind which there will be no other."""
        self._lose(self._clock())
        self._free = self._clock()

    def _lose(self, until: float) -> None:
        for what, first, last in self._spans:
            self.lost_s[what] += max(min(last, until) - max(first, self._free), 0.0)
        self._spans = [span for span in self._spans if span[2] > until]

    @property
    def worked_s(self) -> float:
        """Time of all steps of the run."""
        return self._worked_s

    @property
    def elapsed_s(self) -> float:
        """Time since the run was first started."""
        return self._since_s + self._clock() - self._begin

    @property
    def goodput(self) -> float:
        """Share of the elapsed time that went into steps which count."""
        return self._worked_s / max(self.elapsed_s, 1e-9)
