"""Profiler traces of a range of steps, for TensorBoard's profile plug-in, XProf and https://ui.perfetto.dev."""

import contextlib
import re

import jax


def parse_range(text: str) -> range:
    """Returns the range of `--profile=START:STOP`: from START steps done to STOP; "" gives an empty range.

    Raises:
      ValueError: The text is no range, or an empty one.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--profile={text} is not a range of steps: write START:STOP, e.g. 100:110")
    return range(int(found[1]), int(found[2]))


class Profiler:
    """Writes the trace of some steps; every process writes its own. Use as a context."""

    def __init__(self, folder: str, steps: range):
        """Prepares the profiler; the trace begins with the first of the steps.

        Args:
          folder: Folder for traces; each start adds a folder of its own.
          steps: Number of steps done before each traced step.
        """
        self._folder, self._steps = folder, steps
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Returns the context in which to call the step after `step` steps; begins the trace at the first one traced."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step + 1)

    def ends(self, step: int) -> bool:
        """Returns whether the trace ends once `step` steps are done."""
        return self._running and step == self._steps.stop

    def stop(self) -> None:
        """Ends and writes the trace if one is running; the devices must be done with its steps."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
