"""Compiles a train step in another thread, while the caller reads a checkpoint or draws parameters."""

import concurrent.futures
import time
from collections.abc import Callable

import jax

from mc3_jax import phases as phases_lib, progress


class StepCompiler:
    """Compiles the train steps of a run, one at a time. Use as a context.

    XLA compiles a program, or loads it from the compilation cache, without holding Python's lock; at the paper's sizes this
    takes seconds even from the cache. It can't be stopped: a process that ends with an error ends after the compilation.
    """

    def __init__(self, lower: Callable[[phases_lib.Phase], jax.stages.Lowered]):
        """Compiles nothing yet.

        Args:
          lower: Traces and lowers the step of a phase; called in the thread of `begin` and `finish`.
        """
        self._lower = lower
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "step_compiler")
        self._begun: tuple[phases_lib.Phase, float, concurrent.futures.Future] | None = None

    def __enter__(self) -> "StepCompiler":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(wait=False)

    def begin(self, phase: phases_lib.Phase, step: int) -> None:
        """Lowers the step of a phase, which is to run from `step` on, and begins to compile it."""
        begin = time.monotonic()
        progress.say(f"{phase.config.name}  compiling, to run from step {step} to {phase.stop}")
        self._begun = phase, begin, self._thread.submit(self._lower(phase).compile)

    def finish(self, phase: phases_lib.Phase, step: int) -> Callable:
        """Returns the compiled step of a phase; if another phase was begun last, or none, compiles it only now."""
        if self._begun is None or self._begun[0] is not phase:
            self.begin(phase, step)
        (_, begin, compiling), self._begun = self._begun, None
        compiled = compiling.result()
        progress.say(f"{phase.config.name}  compiled in {time.monotonic() - begin:.1f} s")
        return compiled
