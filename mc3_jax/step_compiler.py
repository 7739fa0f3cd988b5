"""Compiles a train step in another thread, while the caller reads a checkpoint or draws parameters."""

import concurrent.futures
import functools
import sys
import time
from collections.abc import Callable

import jax

from mc3_jax import phases as phases_lib, progress


class StepCompiler:
    """Compiles the train steps of a run, one after the other. Use as a context.

    XLA compiles a program, or loads it from the compilation cache, without holding Python's lock; at the paper's sizes this
    takes seconds even from the cache. It can't be stopped: after an error a process that is alone waits for its end.
    """

    def __init__(self, lower: Callable[[phases_lib.Phase], jax.stages.Lowered]):
        """Compiles nothing yet.

        Args:
          lower: Traces and lowers the step of a phase; called in the thread of `begin` and `finish`.
        """
        self._lower = lower
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "step_compiler")
        self._begun: tuple[phases_lib.Phase, concurrent.futures.Future] | None = None

    def __enter__(self) -> "StepCompiler":
        return self

    def __exit__(self, error, *_) -> None:
        self._thread.shutdown(wait=False)
        is_compiling = self._begun is not None and not self._begun[1].done()
        if error is not None and is_compiling and jax.process_count() == 1:  # several end together, see `mc3_jax.job`
            progress.notice("this process ends when XLA, which can't be stopped, has compiled the step", sys.stderr)

    def begin(self, phase: phases_lib.Phase) -> None:
        """Lowers the step of a phase and begins to compile it."""
        progress.say(f"{phase.config.name}  compiling")
        lowered, lowering_s = _timed(functools.partial(self._lower, phase))
        self._begun = phase, self._thread.submit(_timed, lowered.compile, lowering_s)

    def finish(self, phase: phases_lib.Phase, step: int) -> Callable:
        """Returns the compiled step of a phase, which is to run from `step` on; raises what lowering or compiling raises.

        If another phase was begun last, or none, the step is lowered and compiled only now, after the one begun.
        """
        if self._begun is None or self._begun[0] is not phase:
            self.begin(phase)
        compiled, took_s = self._begun[1].result()
        self._begun = None
        progress.say(f"{phase.config.name}  compiled in {took_s:.1f} s, to run from step {step} to {phase.stop}")
        return compiled


def _timed(function: Callable, before_s: float = 0.0) -> tuple:
    """Returns (the function's result, `before_s` and the seconds it took)."""
    begin = time.monotonic()
    return function(), before_s + time.monotonic() - begin
