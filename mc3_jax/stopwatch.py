"""Where the time of a run goes: into steps on the devices, waits for the next batch, compilation, saves, interruptions."""

import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator

import jax


class Stopwatch:
    """Measures how long the devices worked and what they waited for. Use as a context.

    A step begins once it has been called and the step before it is done. It ends when its results are there, for which a
    separate thread waits. The time between two steps is lost, and is attributed to what the host did meanwhile (`during`).
    Whatever the host does while the devices work is not lost, however long it takes. With several processes, each measures
    its own waits; waiting for another process counts as work.

    Attributes:
      lost_s: Activity of the host → time that the devices lost to it.
    """

    def __init__(self, *, since_s: float = 0.0, worked_s: float = 0.0, clock: Callable[[], float] = time.monotonic):
        """Starts the stopwatch.

        Args:
          since_s: Time since the run was first started, including interruptions.
          worked_s: Time of the run's steps before this start, without those that must be repeated.
          clock: Returns the time in seconds.
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
        """Records that the host does `what` in the block."""
        begin = self._clock()
        try:
            yield
        finally:
            self._spans.append((what, begin, self._clock()))

    def call(self, step: Callable, *args):
        """Calls a jitted step and returns (its result, the argument for `done`)."""
        begin = self._clock()
        out = step(*args)
        watched = jax.tree.leaves(out)[-1]  # no leaf of the state, which is donated to the next step
        return out, (begin, self._waiter.submit(lambda: (jax.block_until_ready(watched), self._clock())[1]))

    def done(self, called: tuple[float, concurrent.futures.Future]) -> None:
        """Waits until a step is done and counts it; steps must be counted in the order of their calls."""
        begin, end = called[0], called[1].result()
        begin = max(begin, self._free)
        self._lose(begin)
        self._worked_s += end - begin
        self._free = end

    def settle(self) -> None:
        """Counts the waits since the last step; to be called when no further step will follow."""
        self._lose(self._clock())
        self._free = self._clock()

    def _lose(self, until: float) -> None:
        for what, first, last in self._spans:
            self.lost_s[what] += max(min(last, until) - max(first, self._free), 0.0)
        self._spans = [span for span in self._spans if span[2] > until]

    @property
    def worked_s(self) -> float:
        """Time that all steps of the run took."""
        return self._worked_s

    @property
    def elapsed_s(self) -> float:
        """Time since the run was first started."""
        return self._since_s + self._clock() - self._begin

    @property
    def goodput(self) -> float:
        """Share of the elapsed time that went into steps that count."""
        return self._worked_s / max(self.elapsed_s, 1e-9)
