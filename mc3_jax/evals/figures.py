"""The plots of the pages, as Plotly figures. Plotly interprets some HTML in every text, so text from data is escaped here."""

import html
import itertools
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from mc3_jax.evals import metrics

# Okabe & Ito (2008): the colour-blind can tell these apart as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#7F7F7F", "#1D2430")
SOUNDING, SILENT = COLOURS[0], COLOURS[1]
LABELS = {1: "sounds", 0: "does not sound", -1: "no label"}
MAX_POINTS = 500  # of a curve; a screen can't show more


def plain(text: str, width: int = 48, lines: int = 3) -> str:
    """Returns untrusted text as Plotly can show it: tags escaped, wrapped at `width`, cut after `lines` lines."""
    wrapped = textwrap.wrap(text, width)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: width - 2] + " …"]
    return "<br>".join(html.escape(line, quote=False) for line in wrapped)


def _thin(*values: np.ndarray | Sequence[float]) -> list[np.ndarray]:
    """Returns each coordinate of a curve thinned to at most `MAX_POINTS`, first and last point kept."""
    kept = np.unique(np.linspace(0, len(values[0]) - 1, MAX_POINTS).round().astype(int))
    return [np.round(np.asarray(value, np.float64)[kept], 5) for value in values]


def _figure(traces, x: str, y: str, *, height: int = 380, **layout) -> go.Figure:
    """Returns a figure in the pages' style. Its axes are fixed, so that dragging a finger over it scrolls the page."""
    axis = {"fixedrange": True, "automargin": True, "gridcolor": "#e4e8ed", "zerolinecolor": "#c3cad3"}
    figure = go.Figure(list(traces))
    figure.update_layout(
        template="none", height=height, margin={"l": 50, "r": 12, "t": 12, "b": 40}, hovermode="closest", dragmode=False,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1d2430"}, colorway=COLOURS,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
    )  # fmt: skip
    figure.update_xaxes(**axis, title={"text": x, "standoff": 8})
    figure.update_yaxes(**axis, title={"text": y, "standoff": 8})
    return figure.update_layout(**layout)


def _line(x, y, name: str, colour: int = 0, **line) -> go.Scatter:
    style = {"color": COLOURS[colour % len(COLOURS)], "width": 2, **line}
    return go.Scatter(x=x, y=y, name=plain(name), mode="lines", line=style)


def curves(
    scores: Mapping[str, Mapping[str, Float[np.ndarray, " n"]]], labels: Int[np.ndarray, " n"]
) -> dict[str, go.Figure]:
    """Returns the ROC and the precision-recall curves of AV and AL, {"roc", "pr"}.

    Args:
      scores: Checkpoint → pair → score of each clip.
      labels: 0 or 1.
    """
    roc, pr = [], []
    shown = [(name, pair, values[pair]) for name, values in scores.items() for pair in ("av", "al")]
    for i, (name, pair, values) in enumerate(shown):
        dash = "solid" if pair == "av" else "dot"
        roc.append(_line(*_thin(*metrics.roc_curve(labels, values)), f"{pair.upper()}, {name}", i, dash=dash))
        pr.append(_line(*_thin(*metrics.pr_curve(labels, values)), f"{pair.upper()}, {name}", i, dash=dash))
    chance = {"width": 1, "dash": "dash"}
    roc.append(_line([0, 1], [0, 1], "chance", 7, **chance))
    pr.append(_line([0, 1], [float(labels.mean())] * 2, "chance", 7, **chance))
    unit = {"range": [0, 1.01]}
    return {
        "roc": _figure(roc, "false positive rate", "true positive rate", xaxis=unit, yaxis=unit),
        "pr": _figure(pr, "recall", "precision", xaxis=unit),
    }


def histogram(values: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> go.Figure:
    """Returns histograms, as densities, of a score among the clips that sound and among those that don't."""
    low = float(values.min())
    edges = np.linspace(low, max(float(values.max()), low + 1e-3), 41)  # as float32, close edges would coincide
    bars = [
        go.Bar(x=((edges[1:] + edges[:-1]) / 2).round(5), name=name, opacity=0.6, marker={"color": colour},
               y=np.histogram(values[labels == label], edges, density=True)[0].round(4), width=edges[1] - edges[0])
        for label, name, colour in ((1, "sounds", SOUNDING), (0, "does not sound", SILENT))
    ]  # fmt: skip
    return _figure(bars, "cosine", "density", barmode="overlay", bargap=0)


def losses(rows: list[dict]) -> dict[str, go.Figure]:
    """Returns title → figure of a run's loss curves, phase boundaries marked; {} without rows.

    Args:
      rows: Rows of `metrics.jsonl`.
    """
    named = {key: key.removeprefix("validation_") for row in rows for key in row}
    terms = sorted(key for key, name in named.items() if name.startswith(("loss", "contrastive", "consensus")))
    boundaries = [b["step"] for a, b in itertools.pairwise(rows) if a["phase"] != b["phase"]]
    groups = (
        ("Loss and its contrastive term", "nats", [t for t in terms if named[t] in ("loss", "contrastive")]),
        ("Contrastive loss of each pair", "nats", [t for t in terms if t.startswith("contrastive_")]),
        ("Consensus loss", "distance of cosines", [t for t in terms if named[t] == "consensus"]),
    )
    figures = {}
    for title, unit, names in groups:
        if not names:
            continue
        lines = []
        for i, name in enumerate(names):
            points = [(row["step"], row[name]) for row in rows if name in row]
            lines.append(_line(*_thin(*zip(*points, strict=True)), name.replace("_", " "), i))
        figures[title] = _figure(lines, "step", unit, showlegend=True)
        for step in boundaries:
            figures[title].add_vline(step, line={"width": 1, "dash": "dot", "color": "#7f7f7f"})
    return figures


def epochs(rows: list[dict], columns: Mapping[str, float], unit: str) -> go.Figure:
    """Returns the curves of metrics over epochs.

    Args:
      rows: One per checkpoint, each with "epoch" and the columns.
      columns: Metric to show → factor that converts it to `unit`.
      unit: Title of the y axis.
    """
    x = [row["epoch"] for row in rows]
    traces = [
        go.Scatter(x=x, y=[round(row[name] * factor, 5) for row in rows], name=name.replace("_", " "), mode="lines+markers",
                   marker={"size": 8, "color": COLOURS[i]})
        for i, (name, factor) in enumerate(columns.items())
    ]  # fmt: skip
    return _figure(traces, "epoch", unit)


def verbs(
    names: Sequence[str],
    counts: Int[np.ndarray, " v"],
    rates: Float[np.ndarray, " v"],
    scores: Float[np.ndarray, " v"],
) -> go.Figure:
    """Returns a plot of each verb's mean score against its true sounding rate; a point's area shows its number of clips."""
    texts = [f"{plain(name)}<br>{n} clips, {rate:.0%} sound<br>mean score {score:.3f}"
             for name, n, rate, score in zip(names, counts, rates, scores, strict=True)]  # fmt: skip
    size = {"size": counts, "sizemode": "area", "sizeref": 2 * counts.max() / 36**2, "sizemin": 5}
    points = go.Scatter(
        x=rates.round(4), y=scores.round(5), mode="markers", hovertext=texts, hoverinfo="text",
        marker={**size, "color": SOUNDING, "opacity": 0.65, "line": {"width": 1, "color": "white"}},
    )  # fmt: skip
    return _figure([points], "share of the verb's clips that sound", "mean AV score", xaxis={"tickformat": ".0%"})


def long_tail(groups: Sequence[Mapping]) -> go.Figure:
    """Returns a bar chart of the number of clips of each verb-noun pair, the most frequent first (Fig. 4).

    Args:
      groups: "verb", "noun" and "num_clips" of each pair, already sorted (`taxonomy.statistics`).
    """
    counts = [group["num_clips"] for group in groups]
    texts = [f"{plain(group['verb'])}, {plain(group['noun'])}: {group['num_clips']}" for group in groups]
    bars = go.Bar(
        x=list(range(1, len(counts) + 1)), y=counts, hovertext=texts, hoverinfo="text", marker={"color": SOUNDING},
        showlegend=False,
    )  # fmt: skip
    return _figure([bars], "verb-noun pair, by frequency", "clips that sound", bargap=0)


def scatter_map(places: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, " n"], texts: Sequence[str]) -> go.Figure:
    """Returns the map of the clips; a point's `customdata` is its row.

    Args:
      places: Coordinates of each clip on the map.
      labels: 0 or 1, or all -1 where no clip is labelled.
      texts: Text shown when pointing at a clip, made with `plain`.
    """
    traces = []
    drawn = ((1, SOUNDING, "circle"), (0, SILENT, "x"))
    for label, colour, symbol in drawn if labels.max() >= 0 else ((-1, SOUNDING, "circle"),):
        name, rows = LABELS[label], np.flatnonzero(labels == label)
        traces.append(
            go.Scatter(x=places[rows, 0].round(2), y=places[rows, 1].round(2), mode="markers", name=name, hoverinfo="text",
                       customdata=rows.tolist(), hovertext=[texts[i] for i in rows],
                       marker={"size": 8, "color": colour, "symbol": symbol, "opacity": 0.75})
        )  # fmt: skip
    ring = {"size": 20, "color": "rgba(0,0,0,0)", "line": {"width": 3, "color": COLOURS[-1]}}
    traces.append(go.Scatter(x=[None], y=[None], mode="markers", showlegend=False, hoverinfo="skip", marker=ring))
    free = {"fixedrange": False, "showticklabels": False, "zeroline": False, "title": {"text": ""}}
    return _figure(traces, "", "", height=520, xaxis=free, yaxis=free, dragmode="zoom",
                   margin={"l": 12, "b": 12})  # fmt: skip


def confusion(counts: Int[np.ndarray, "c c"], names: Sequence[str]) -> go.Figure:
    """Returns the confusion matrix as a heat map; each row is scaled to add up to 1.

    Args:
      counts: Number of clips of true class i (row) classified as j.
      names: Names of the classes.
    """
    of_row = np.maximum(counts.sum(1, keepdims=True), 1)
    share = counts / of_row
    shown = [plain(name, 24, 1) for name in names]
    texts = [[f"{shown[i]}<br>classified as {shown[j]}<br>{counts[i, j]} of {counts[i].sum()}" for j in range(len(names))]
             for i in range(len(names))]  # fmt: skip
    heat = go.Heatmap(z=share.round(3), text=texts, hoverinfo="text", colorscale="Blues", zmin=0, zmax=1,
                      colorbar={"thickness": 10, "title": {"text": "share"}})  # fmt: skip
    ticks = {"tickvals": list(range(len(names))), "ticktext": shown, "tickfont": {"size": 10}}
    return _figure([heat], "predicted class", "true class", height=max(420, 15 * len(names) + 160),
                   xaxis={**ticks, "tickangle": -60}, yaxis={**ticks, "autorange": "reversed"})  # fmt: skip


def pr_of_methods(methods: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    """Returns the precision-recall curves of all methods (Fig. 5).

    Args:
      methods: Title → {"recall", "precision"}.
    """
    lines = [
        _line(*_thin(curve["recall"], curve["precision"]), title, i) for i, (title, curve) in enumerate(methods.items())
    ]
    return _figure(lines, "recall", "precision", height=440, showlegend=True)


def leads(methods: Mapping[str, Mapping[str, Mapping]]) -> go.Figure:
    """Returns a plot of our lead over each method: for each measure a dot with its interval.

    Args:
      methods: Title → measure → {"lead", "interval"}.
    """
    titles, measures = list(methods), list(next(iter(methods.values()), {}))
    traces = []
    for i, measure in enumerate(measures):
        found = [methods[title][measure] for title in titles]
        x = np.array([value["lead"] for value in found])
        low, high = np.array([value["interval"] for value in found]).reshape(-1, 2).T
        whisker = {"type": "data", "symmetric": False, "array": (high - x).round(5), "arrayminus": (x - low).round(5)}
        name, colour = plain(measure_name(measure)), COLOURS[i % len(COLOURS)]
        texts = [f"MC3 over {plain(title)}<br>{name}<br>{value:+.3f} [{a:+.3f}, {b:+.3f}]"
                 for title, value, a, b in zip(titles, x, low, high, strict=True)]  # fmt: skip
        shift = 0.7 * ((i + 0.5) / len(measures) - 0.5)
        traces.append(
            go.Scatter(x=x.round(5), y=np.arange(len(titles)) + shift, error_x=whisker, mode="markers", hovertext=texts,
                       hoverinfo="text", name=name, marker={"size": 8, "color": colour})
        )  # fmt: skip
    ticks = {
        "tickvals": list(range(len(titles))),
        "ticktext": [plain(title, 18, 2) for title in titles],
        "autorange": "reversed",
    }
    height = 160 + len(titles) * max(36, 15 * len(measures))
    figure = _figure(
        traces, "lead, with 95 % interval", "", height=height, xaxis={"nticks": 6}, yaxis=ticks, showlegend=True
    )
    return figure.add_vline(0, line={"width": 1, "color": "#7f7f7f"})


def measure_name(measure: str) -> str:
    """Returns the name under which pages show a measure."""
    return measure.replace("_", " ").replace("roc auc", "ROC-AUC").replace("average precision", "AP")
