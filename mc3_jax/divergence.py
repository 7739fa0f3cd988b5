"""Signs that training goes wrong: a step that is not finite, with facts to find the cause, and a collapsed consensus."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mc3_jax import whole_file

COLLAPSED_SCORE = -0.95  # mean of c; at -1 the anchor's embedding is opposite to the others' in every clip


class DivergedError(Exception):
    """A step's loss, gradient or update is not finite, and training has stopped before that step counted."""


def warn_of_collapse(step: int, phase: str, metrics: Mapping[str, float]) -> str:
    """Returns a warning if the consensus has collapsed, "" if not.

    With stopped gradient the consensus loss mostly lowers scores, towards that of the bottleneck. If each modality is the
    bottleneck of some clips and the contrastive loss is too weak to raise the scores again, all of them fall to -1, where the
    loss is 0.

    Args:
      step: Number of steps done.
      phase: Name of the phase.
      metrics: Metrics of the step.
    """
    score = metrics.get("consensus_score", 0.0)
    if score > COLLAPSED_SCORE:
        return ""
    return (
        f"warning: the consensus has collapsed: at step {step} its mean is {score:.3f}, and at -1 all clips score alike; "
        f"lower the consensus weight or the temperature of phase {phase!r} in a new run (docs/method.md)"
    )


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
