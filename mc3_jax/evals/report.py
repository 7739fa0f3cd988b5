"""The page a run ends with: tables beside the paper's, curves, and clips to look at and listen to. One file, no network."""

import base64
import dataclasses
import io
import itertools
import pathlib
import wave

import jinja2
import numpy as np
from matplotlib.figure import Figure

from mc3_jax.evals import metrics

# Table 2 of the paper: AV ROC, AV PR, AL ROC, AL PR.
PAPER_DISCOVERY = (
    ("Random", ".500", ".559", ".500", ".559"),
    ("CLAP", "–", "–", ".637", ".695"),
    ("CM-ACC", ".540", ".590", "–", "–"),
    ("CMC", ".550", ".601", ".635", ".693"),
    ("ImageBind", ".554", ".605", ".642", ".685"),
    ("MC3 without consensus", ".563", ".615", ".635", ".694"),
    ("MC3 without contrastive", ".436", ".493", ".584", ".620"),
    ("MC3 without align", ".448", ".507", ".464", ".521"),
    ("MC3", ".598", ".666", ".658", ".715"),
)
_RETRIEVAL_COLUMNS = ("hit@1", "hit@5", "hit@10", "recall@5", "mean_hits@5")


@dataclasses.dataclass
class Example:
    """A clip to show.

    Attributes:
      kind: Heading it stands under.
      clip_id, narration: Of the clip; untrusted text.
      label: Whether it sounds.
      score: Its audio-video similarity.
      frames: JPEG files.
      audio: int16 [samples].
      sample_rate_hz: Of the audio.
    """

    kind: str
    clip_id: str
    narration: str
    label: bool
    score: float
    frames: list[bytes]
    audio: np.ndarray
    sample_rate_hz: int


EXPLANATIONS = {
    "Found": "Positive clips with the highest audio-video similarity.",
    "Missed": "Positive clips with the lowest.",
    "False alarms": "Negative clips with the highest.",
    "Rightly left": "Negative clips with the lowest.",
}


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _wav(audio: np.ndarray, sample_rate_hz: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(sample_rate_hz)
        f.writeframes(audio.astype("<i2").tobytes())
    return buffer.getvalue()


def _plot(draw, alt: str, x: str, y: str) -> dict[str, str]:
    """Returns a plot as an SVG data URI."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set(xlabel=x, ylabel=y, title=alt)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return {"uri": _uri("image/svg+xml", buffer.getvalue()), "alt": alt}


def _discovery_plots(scores: dict[str, dict[str, np.ndarray]], labels: np.ndarray) -> list[dict]:
    """Returns ROC and PR curves and histograms. `scores` is {checkpoint: {"av", "al"}}."""

    def roc(axes):
        for name, pairs in scores.items():
            for pair in ("av", "al"):
                axes.plot(*metrics.roc_curve(labels, pairs[pair]), label=f"{pair.upper()}, {name}", lw=1.2)
        axes.plot([0, 1], [0, 1], color="#999", lw=0.8, ls="--", label="chance")

    def pr(axes):
        for name, pairs in scores.items():
            for pair in ("av", "al"):
                axes.plot(*metrics.pr_curve(labels, pairs[pair]), label=f"{pair.upper()}, {name}", lw=1.2)
        axes.axhline(labels.mean(), color="#999", lw=0.8, ls="--", label="chance")
        axes.set_ylim(0.3, 1.02)

    plots = [_plot(roc, "ROC curves", "false positive rate", "true positive rate"),
             _plot(pr, "Precision-recall curves", "recall", "precision")]  # fmt: skip
    last = list(scores)[-1]
    for pair, title in (("av", "audio and video"), ("al", "audio and text")):

        def histogram(axes, values=scores[last][pair]):
            bins = np.linspace(values.min(), values.max(), 40)
            for label, name in ((1, "sounds"), (0, "does not sound")):
                axes.hist(values[labels == label], bins, density=True, alpha=0.55, label=name)

        plots.append(_plot(histogram, f"Similarity of {title}, {last}", "cosine", "density"))
    return plots


def _loss_plots(rows: list[dict]) -> list[dict]:
    """Returns loss curves, phase boundaries marked."""
    terms = sorted({key for row in rows for key in row if key.startswith(("loss", "contrastive", "consensus"))})
    boundaries = [b["step"] for a, b in itertools.pairwise(rows) if a["phase"] != b["phase"]]
    groups = (
        ("Loss and its contrastive part", "nats", [t for t in terms if t in ("loss", "contrastive")]),
        ("Contrastive loss of each pair", "nats", [t for t in terms if t.startswith("contrastive_")]),
        ("Consensus loss", "distance of cosines", [t for t in terms if t == "consensus"]),
    )
    plots = []
    for title, unit, names in groups:

        def curves(axes, names=names):
            for name in names:
                points = [(row["step"], row[name]) for row in rows if name in row]
                axes.plot(*zip(*points, strict=True), label=name, lw=1.2)
            for step in boundaries:
                axes.axvline(step, color="#999", lw=0.8, ls=":")

        if names:
            plots.append(_plot(curves, title, "step", unit))
    return plots


def _discovery_rows(results: dict, name: str, ours: bool) -> list[dict]:
    rows = []
    for pair in ("av", "al", "vl"):
        r = results["discovery"][pair]
        low, high = r["roc_auc_interval"]
        rows.append(
            {"name": name, "ours": ours, "pair": pair.upper(), "roc": f"{r['roc_auc']:.3f} [{low:.3f}, {high:.3f}]",
             "ap": f"{r['average_precision']:.3f}", "trapezoid": f"{r['pr_auc_trapezoid']:.3f}",
             "within": f"{r['within_verb_roc_auc']:.3f}", "chance": f"{r['chance']['average_precision']:.3f}",
             "clips": r["num_clips"], "positive": r["num_positive"]}
        )  # fmt: skip
    return rows


def _retrieval_rows(results: dict, name: str, ours: bool) -> list[dict]:
    rows = []
    for direction, r in results["retrieval"].items():
        cells = [f"{r[column]:.3f} ({r['chance'][column]:.3f})" for column in _RETRIEVAL_COLUMNS]
        shown = direction.upper().replace("2", "→")
        counts = {"queries": r["num_queries"], "pool": r["pool_size"]}
        rows.append({"name": name, "ours": ours, "direction": shown, "cells": cells, **counts})
    return rows


def write_report(
    folder: pathlib.Path,
    *,
    title: str,
    facts: str,
    results: dict[str, dict],
    scores: dict[str, dict[str, np.ndarray]],
    labels: np.ndarray,
    metric_rows: list[dict],
    examples: list[Example],
) -> pathlib.Path:
    """Writes `folder/index.html` and returns its path.

    Args:
      folder: Made where missing.
      title: Of the page.
      facts: One line: config, data, seed, steps.
      results: Checkpoint name → {"discovery", "retrieval", "controls", "margin"}; the last is the run's result.
      scores: Checkpoint name → pair → similarity of each labelled clip.
      labels: Of those clips.
      metric_rows: `metric_writer.read_metrics`.
      examples: Clips to show.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mc3_jax.evals", "."), autoescape=True)
    last = list(results)[-1]
    final = results[last]
    margin = final["margin"]
    low, high = margin["margin_interval"]
    shown = [
        (kind, text, [
            {"clip_id": e.clip_id, "narration": e.narration, "label": e.label, "score": f"{e.score:.3f}",
             "frames": [_uri("image/jpeg", f) for f in e.frames], "audio": _uri("audio/wav", _wav(e.audio, e.sample_rate_hz))}
            for e in examples if e.kind == kind
        ])
        for kind, text in EXPLANATIONS.items()
    ]  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        discovery=[row for name, r in results.items() for row in _discovery_rows(r, name, name == last)],
        controls=[(name.replace("_", " "), f"{value:.3f}") for name, value in final["controls"].items()],
        margin=f"AV beats the better of {' and '.join(margin['controls'])} ({margin['best_control_roc_auc']:.3f}) by "
        f"{margin['margin']:+.3f} [{low:+.3f}, {high:+.3f}].".replace("_", " "),
        paper=PAPER_DISCOVERY,
        retrieval=[row for name, r in results.items() for row in _retrieval_rows(r, name, name == last)],
        retrieval_columns=[f"{column} (chance)" for column in _RETRIEVAL_COLUMNS],
        plots=_discovery_plots(scores, labels) + _loss_plots(metric_rows),
        examples=[entry for entry in shown if entry[2]],
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path
