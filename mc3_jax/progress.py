"""What a log says of a run on its way: a line a row, and one where it compiles or saves. A terminal has a bar instead."""

import sys
import time
from collections.abc import Mapping

import jax
from tqdm import tqdm

# Of a row, as (its name, how the line calls and writes it), in order.
_SHOWN = (
    ("loss", "loss {:.3f}"),
    ("contrastive", "contrastive {:.3f}"),
    ("consensus", "consensus {:.3f}"),
    ("validation_loss", "validation_loss {:.3f}"),
    ("learning_rate", "lr {:.3g}"),
    ("grad_norm", "grad_norm {:.3g}"),
    ("clips_per_s", "{:.0f} clips/s"),
    ("mfu", "MFU {:.1%}"),
)


def say(line: str) -> None:
    """Prints a line under the day and the time, on process 0 and where standard error is no terminal."""
    if jax.process_index() == 0 and not sys.stderr.isatty():
        print(f"{time.strftime('%m-%d %H:%M:%S')}  {line}", flush=True)


def notice(line: str, file=None) -> None:
    """Prints a line as it is, on process 0; `file` is standard output unless it is said."""
    if jax.process_index() == 0:
        print(line, file=file, flush=True)


def row(
    step: int, total_steps: int, phase: str, scalars: Mapping[str, float], *, batch_size: int, num_clips: int = 0
) -> str:
    """Returns a row as a line, what is not known left out.

    Args:
      step: Steps done.
      total_steps: Of the whole run.
      phase: Name of the step's.
      scalars: Of the row; the time left is that of the steps at its `clips_per_s`, without compilation and saves.
      batch_size: Clips a step.
      num_clips: Of the training split, for the epoch; 0 is unknown.
    """
    parts = [phase, f"step {step}/{total_steps}"]
    if num_clips:
        parts.append(f"epoch {step * batch_size / num_clips:.2f}")
    parts += [form.format(scalars[name]) for name, form in _SHOWN if name in scalars]
    if scalars.get("clips_per_s", 0) > 0:
        left_s = (total_steps - step) * batch_size / scalars["clips_per_s"]
        parts.append(f"{tqdm.format_interval(left_s)} left")
    return "  ".join(parts)
