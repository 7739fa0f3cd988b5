"""What is known of a step whose loss, gradient or update is not finite, for whoever has to find out why."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mc3_jax import whole_file


class DivergedError(Exception):
    """A step's loss, gradient or update is not finite, and training has stopped before it counted."""


def describe(
    step: int,
    phase: str,
    metrics: Mapping[str, float],
    norms: Mapping[str, tuple[float, float]],
    finite_rows: np.ndarray,
    clips: list[dict],
) -> dict[str, Any]:
    """Returns what is known, as JSON values; numbers that are not finite are "nan", "inf" and "-inf".

    Args:
      step: Steps there would be if it counted.
      phase: Name.
      metrics: Of the step.
      norms: Of each parameter, (of its gradient, of itself).
      finite_rows: Whether a clip's embedding is finite, bool [3, b]: audio, video, text.
      clips: Of each row of the batch, what tells it.
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
    """Returns the most telling of it in one line."""
    metrics, norms, rows = found["metrics"], found["norms"], found["clips"]
    parts = [f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"]
    bad = [name for name, norm in norms.items() if isinstance(norm["parameter"], str)]
    if bad:
        parts.append(f"{len(bad)} of {len(norms)} parameters have a norm that is not finite, {bad[0]} first")
    count = sum(bool(row["not_finite"]) for row in rows)
    if count:
        parts.append(f"the embeddings of {count} of {len(rows)} clips are not finite")
    bad = [name for name, norm in norms.items() if isinstance(norm["gradient"], str)]
    if bad and not count:
        parts.append(f"the gradients of {len(bad)} of {len(norms)} parameters have a norm that is not finite, {bad[0]} first")
    if len(parts) == 1:
        prefix = "update_ratio_"
        bad = [name for name, value in metrics.items() if name.startswith(prefix) and isinstance(value, str)]
        towers = [name.removeprefix(prefix) for name in bad]
        parts += [f"the optimizer's update of {', '.join(towers)} is not finite"] if towers else []
    return "; ".join(parts)


def write(path: pathlib.Path, found: dict) -> None:
    """Writes it as JSON, whole or not at all."""
    with whole_file.writing(path) as aside:
        aside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
