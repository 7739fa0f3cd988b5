"""Facts about a step whose loss, gradient or update is not finite, for whoever has to find the cause."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mc3_jax import whole_file


class DivergedError(Exception):
    """A step's loss, gradient or update is not finite, and training has stopped before that step counted."""


def describe(
    step: int,
    phase: str,
    metrics: Mapping[str, float],
    norms: Mapping[str, tuple[float, float]],
    finite_rows: np.ndarray,
    clips: list[dict],
) -> dict[str, Any]:
    """Returns the facts as JSON values; numbers that are not finite become "nan", "inf" and "-inf".

    Args:
      step: Number of steps done if this step counted.
      phase: Name of the phase.
      metrics: Metrics of the step.
      norms: Parameter → (norm of its gradient, norm of the parameter).
      finite_rows: Whether each clip's audio, video and text embedding is finite, bool [3, b].
      clips: For each row of the batch, facts that identify its clip.
    """
    rows = []
    for row, (clip, finite) in enumerate(zip(clips, finite_rows.T.tolist(), strict=True)):
        bad = [name for name, fine in zip(("audio", "video", "text"), finite, strict=True) if not fine]
        rows.append({"row": row, **clip, "not_finite": bad})
    return {
        "step": step,
        "phase": phase,
        "metrics": {name: _plain(value) for name, value in metrics.items()},
        "norms": {name: {"gradient": _plain(g), "parameter": _plain(p)} for name, (g, p) in norms.items()},
        "clips": rows,
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def summarize(found: dict) -> str:
    """Returns a one-line summary of the most telling facts.

    Args:
      found: Result of `describe`.
    """
    metrics, norms, rows = found["metrics"], found["norms"], found["clips"]
    parts = [f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"]
    bad = [name for name, norm in norms.items() if isinstance(norm["parameter"], str)]
    if bad:
        parts.append(f"{len(bad)} of {len(norms)} parameters have a norm that is not finite (the first: {bad[0]})")
    count = sum(bool(row["not_finite"]) for row in rows)
    if count:
        parts.append(f"the embeddings of {count} of {len(rows)} clips are not finite")
    bad = [name for name, norm in norms.items() if isinstance(norm["gradient"], str)]
    if bad and not count:
        parts.append(f"{len(bad)} of {len(norms)} gradients have a norm that is not finite (the first: {bad[0]})")
    if len(parts) == 1:
        prefix = "update_ratio_"
        bad = [name for name, value in metrics.items() if name.startswith(prefix) and isinstance(value, str)]
        towers = [name.removeprefix(prefix) for name in bad]
        parts += [f"the optimizer's update of {', '.join(towers)} is not finite"] if towers else []
    return "; ".join(parts)


def write(path: pathlib.Path, found: dict) -> None:
    """Writes the result of `describe` as JSON, atomically."""
    with whole_file.writing(path) as aside:
        aside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
