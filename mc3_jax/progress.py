"""Log lines of a running training: one for each row of metrics, compilation and save. A terminal shows a bar instead."""

import sys
import time
from collections.abc import Mapping

import jax
from tqdm import tqdm

# Metrics of a row that its line shows, in this order: (name, how it is shown).
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
    """Prints a line with date and time, on process 0 and only if standard error is no terminal."""
    if jax.process_index() == 0 and not sys.stderr.isatty():
        print(f"{time.strftime('%m-%d %H:%M:%S')}  {line}", flush=True)


def notice(line: str, file=None) -> None:
    """Prints a line as it is, on process 0; `file` defaults to standard output."""
    if jax.process_index() == 0:
        print(line, file=file, flush=True)


def row(
    step: int, total_steps: int, phase: str, scalars: Mapping[str, float], *, batch_size: int, num_clips: int = 0
) -> str:
    """Returns the log line of a row of metrics; unknown values are skipped.

    Args:
      step: Number of steps done.
      total_steps: Number of steps in the whole run.
      phase: Name of the step's phase.
      scalars: Metrics of the row. The time left is estimated from `clips_per_s`, without compilation and saves.
      batch_size: Clips per step.
      num_clips: Number of clips in the training split, for the epoch; 0 if unknown.
    """
    parts = [phase, f"step {step}/{total_steps}"]
    if num_clips:
        parts.append(f"epoch {step * batch_size / num_clips:.2f}")
    parts += [form.format(scalars[name]) for name, form in _SHOWN if name in scalars]
    if scalars.get("clips_per_s", 0) > 0:
        left_s = (total_steps - step) * batch_size / scalars["clips_per_s"]
        parts.append(f"{tqdm.format_interval(left_s)} left")
    return "  ".join(parts)
