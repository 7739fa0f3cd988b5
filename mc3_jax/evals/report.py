"""The page of a run's results: tables beside the paper's, curves, a map, clusters, and clips to look at and listen to."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped

from mc3_jax.evals import clustering, discovery, figures, media, page, paper, projection, retrieval, taxonomy

MAX_MAPPED = 600  # clips: each takes 15 ms of t-SNE and MP3, and 15 KB of the page
NUM_QUERIES = 4  # in each direction
_RETRIEVAL_COLUMNS = ("hit@1", "hit@5", "hit@10", "recall@5", "mean_hits@5")
_INSTANCE_COLUMNS = {"recall@1": ".3f", "recall@5": ".3f", "recall@10": ".3f", "median_rank": ".1f"}  # and their format
_SHOWN_DIRECTION_TITLES = {"v2a": "Video to audio", "a2l": "Audio to text"}  # Fig. 7

EXPLANATIONS = {
    "Found": "Positive clips with the highest audio-video similarity.",
    "Missed": "Positive clips with the lowest audio-video similarity.",
    "False alarms": "Negative clips with the highest audio-video similarity.",
    "Correctly rejected": "Negative clips with the lowest audio-video similarity.",
    "Highest": "Clips with the highest audio-video similarity.",
    "Lowest": "Clips with the lowest audio-video similarity.",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much a page shows.

    Attributes:
      num_examples: Number of clips of each kind of `EXPLANATIONS`.
      num_clusters: Number of clusters of the video embeddings.
      num_cluster_examples: Number of clips shown of each cluster.
      seed: Seed of everything that is drawn at random.
    """

    num_examples: int
    num_clusters: int
    num_cluster_examples: int
    seed: int


def best_and_worst(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], count: int
) -> dict[str, Int[np.ndarray, " _"]]:
    """Returns kind of `EXPLANATIONS` → rows of its most extreme clips: four kinds, or two where no clip is labelled.

    Args:
      scores: Audio-video similarity of each clip.
      labels: 0 or 1, or all -1 where no clip is labelled.
      count: Maximum number of rows of each kind.
    """
    order = np.argsort(-scores, kind="stable")
    if labels.max() < 0:
        return {"Highest": order[:count], "Lowest": order[::-1][:count]}
    positive, negative = order[labels[order] == 1], order[labels[order] == 0]
    return {
        "Found": positive[:count], "Missed": positive[::-1][:count],
        "False alarms": negative[:count], "Correctly rejected": negative[::-1][:count],
    }  # fmt: skip


def _discovery_table(results: dict[str, dict]) -> page.Table | None:
    rows = []
    for name, result in results.items():
        for pair, r in result["discovery"].items():
            low, high = r["roc_auc_interval"]
            rows.append(
                [page.text(name), page.text(pair.upper()), page.number(r["roc_auc"], note=f" [{low:.3f}, {high:.3f}]"),
                 page.number(r["average_precision"]), page.number(r["pr_auc_trapezoid"]),
                 page.number(r["within_verb_roc_auc"]), page.number(r["chance"]["average_precision"]),
                 page.number(r["num_clips"], "d"), page.number(r["num_positive"], "d")]
            )  # fmt: skip
    columns = ("after", "pair", "ROC-AUC", "average precision", "PR-AUC, trapezoid", "within verbs", "chance (AP)", "clips",
               "positive")  # fmt: skip
    last = frozenset(range(len(rows) - 3, len(rows)))
    return page.Table("Discovery; in brackets: 95 % bootstrap interval", columns, rows, last) if rows else None


def _controls_table(controls: Mapping[str, float | None]) -> page.Table:
    rows = [[page.text(name.replace("_", " ")), page.number(value)] for name, value in controls.items()]
    return page.Table("Control scores alone", ("score", "ROC-AUC"), rows)


def _paper_table() -> page.Table:
    rows = []
    for title, pairs in paper.DISCOVERY.items():
        values = [value for pair in ("av", "al") for value in pairs.get(pair, (None, None))]
        rows.append([page.text(title), *(page.number(value) for value in values)])
    return page.Table("The paper's results on Ego4D (Table 2)", ("method", "AV ROC", "AV PR", "AL ROC", "AL PR"), rows)


def _retrieval_table(results: dict[str, dict]) -> page.Table | None:
    rows, last = [], frozenset()
    for name, result in results.items():
        start = len(rows)
        for direction, r in result["retrieval"].items():
            cells = [page.number(r[c], note=f" ({r['chance'][c]:.3f})") for c in _RETRIEVAL_COLUMNS]
            counts = [page.number(r["num_queries"], "d"), page.number(r["pool_size"], "d")]
            rows.append([page.text(name), page.text(direction.upper().replace("2", "→")), *cells, *counts])
        last = frozenset(range(start, len(rows)))
    columns = ("after", "direction", *(c.replace("_", " ") for c in _RETRIEVAL_COLUMNS), "queries", "pool")
    return page.Table("Retrieval; in brackets: chance level", columns, rows, last) if rows else None


def _instance_table(results: dict[str, dict]) -> page.Table:
    rows, start = [], 0
    for name, result in results.items():
        start = len(rows)
        for direction, r in result["instance_retrieval"].items():
            cells = [page.number(r[c], form, f" ({r['chance'][c]:{form}})") for c, form in _INSTANCE_COLUMNS.items()]
            title = direction.upper().replace("2", "→")
            rows.append([page.text(name), page.text(title), *cells, page.number(r["pool_size"], "d")])
    columns = ("after", "direction", *(c.replace("_", " ") for c in _INSTANCE_COLUMNS), "pool")
    return page.Table("Instance retrieval; in brackets: chance level", columns, rows,
                      frozenset(range(start, len(rows))))  # fmt: skip


def _verbs_table(found: discovery.Verbs, names: list[str]) -> page.Table:
    rows = [
        [page.text(name), page.number(int(n), "d"), page.number(float(rate), ".1%"), page.number(float(score))]
        for name, n, rate, score in zip(names, found.counts, found.rates, found.scores, strict=True)
    ]
    return page.Table("Verbs with at least 5 labelled clips", ("verb", "clips", "sound", "mean AV score"), rows)


def _curve_plots(scores: dict, labels: np.ndarray, metric_rows: list[dict]) -> list[page.Plot]:
    losses = [
        page.Plot(f"loss-{i}", title, f"{title} over the steps of training", figure)
        for i, (title, figure) in enumerate(figures.losses(metric_rows).items())
    ]
    if 0 not in labels:
        return losses
    last = list(scores)[-1]
    drawn = figures.curves(scores, labels)
    plots = [
        page.Plot("roc", "ROC curves", "ROC curves of AV and AL at each checkpoint; the areas are in the table Discovery",
                  drawn["roc"]),
        page.Plot("pr", "Precision-recall curves",
                  "Precision-recall curves of AV and AL at each checkpoint; the areas are in the table Discovery",
                  drawn["pr"]),
    ]  # fmt: skip
    for pair, title in (("av", "audio and video"), ("al", "audio and text")):
        alt = f"Histograms of the cosine of {title}, of clips that sound and of clips that don't"
        figure = figures.histogram(scores[last][pair], labels)
        plots.append(page.Plot(f"histogram-{pair}", f"Similarity of {title}, {last}", alt, figure))
    return plots + losses


def _queries(embeddings: dict, known: dict, seed: int) -> dict[str, list[retrieval.Query]]:
    """Returns direction → queries, whose indices are rows of `known`."""
    rows, groups = retrieval.named_groups(known["label"], known["verb_id"], known["noun_id"])
    sounding = {tower: value[rows] for tower, value in embeddings.items()}
    found = {}
    for direction in _SHOWN_DIRECTION_TITLES:
        drawn = retrieval.draw_queries(sounding, groups, direction, seed, num_queries=NUM_QUERIES)
        found[direction] = [
            dataclasses.replace(query, query=int(rows[query.query]), retrieved=rows[query.retrieved].tolist())
            for query in drawn
        ]
    return found


def _map(embeddings, known, labels, scores, clusters, clips, verb_of, seed) -> tuple[page.Plot, str]:
    """Returns the map and JSON for its script: the clips by falling AV score, and their coordinates for each tower."""
    rows = projection.sample(len(labels), MAX_MAPPED, seed)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    places = {tower: projection.project(embeddings[tower][rows], seed) for tower in ("video", "audio")}
    shown, texts = [], []
    for row in rows:
        clip = clips[int(known["index"][row])]
        verb = verb_of(int(known["verb_id"][row]))
        facts = f"{verb}; AV score {scores[row]:.3f}; {figures.LABELS[labels[row]]}; cluster {clusters[row] + 1}"
        texts.append(f"{figures.plain(clip.narration)}<br>{figures.plain(facts, 64)}")
        shown.append({"index": clip.index, "clip_id": clip.clip_id, "narration": clip.narration, "middle": clip.middle,
                      "facts": facts, "has_sound": bool(clip.audio)})  # fmt: skip
    alt = "Map of the clips: neighbours in the embedding space are close together; buttons beside it go through the clips"
    plot = page.Plot("map", "Map of the clips", alt, figures.scatter_map(places["video"], labels[rows], texts))
    rounded = {tower: value.round(2).tolist() for tower, value in places.items()}
    return plot, page.embed(json.dumps({"clips": shown, "places": rounded}))


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What the page of a run shows. Rows are indices into the labelled clips, or into all clips if none is labelled.

    Attributes:
      scores: Checkpoint → pair → cosine of each clip.
      clusters: Cluster of each clip, 0 the largest.
      described: Contents of each cluster.
      queries: Direction → queries.
      best: Kind of `EXPLANATIONS` → rows.
      verbs: Mean score of each verb beside its sounding rate.
      verb_names: Names of `verbs`.
      clips: Index in the split → clip with its frames and sound.
    """

    scores: dict[str, dict[str, np.ndarray]]
    clusters: np.ndarray
    described: list[clustering.Cluster]
    queries: dict[str, list[retrieval.Query]]
    best: dict[str, np.ndarray]
    verbs: discovery.Verbs
    verb_names: list[str]
    clips: dict[int, media.Shown]


def _choose(embeddings: dict, known: dict, source, sizes: Sizes) -> _Shown:
    """Returns what the page shows, chosen by the newest checkpoint's embeddings; reads the clips' media."""
    last = list(embeddings)[-1]
    labels, verb_ids, newest = known["label"].astype(np.int64), known["verb_id"].astype(np.int64), embeddings[last]
    scores = {name: discovery.similarities(value) for name, value in embeddings.items()}
    av = scores[last]["av"]
    clusters = clustering.cluster(newest["video"], sizes.num_clusters, sizes.seed)
    described = clustering.describe(
        clusters, newest["video"], labels, verb_ids, num_examples=sizes.num_cluster_examples
    )
    queries = _queries(newest, known, sizes.seed)
    best = best_and_worst(av, labels, sizes.num_examples)
    verbs = discovery.by_verb(av, labels, np.where(labels >= 0, verb_ids, -1))
    rows = [int(row) for cluster in described for row in cluster.examples]
    rows += [row for found in queries.values() for query in found for row in (query.query, *query.retrieved)]
    rows += projection.sample(len(labels), MAX_MAPPED, sizes.seed).tolist()
    whole = [int(known["index"][row]) for chosen in best.values() for row in chosen]
    clips = media.gather(source, known["index"][rows].tolist(), whole)
    verb_names = [source.info.verbs[verb] for verb in verbs.verb_ids]
    return _Shown(scores, clusters, described, queries, best, verbs, verb_names, clips)


def _verb_plots(shown: _Shown, actions: dict) -> list[page.Plot]:
    """Returns the plot of verbs and that of verb-noun pairs; either is skipped if there is nothing to show."""
    plots = []
    if shown.verb_names:
        figure = figures.verbs(shown.verb_names, shown.verbs.counts, shown.verbs.rates, shown.verbs.scores)
        alt = "A point for each verb; the numbers are in the table of verbs"
        plots.append(page.Plot("verbs", "Verbs: mean AV score against how often they sound", alt, figure))
    if actions["groups"]:
        alt = "Bars: the number of sounding clips of each verb-noun pair, the most frequent first"
        figure = figures.long_tail(actions["groups"])
        plots.append(page.Plot("tail", f"{len(actions['groups'])} verb-noun pairs that sound", alt, figure))
    return plots


def write(
    folder: pathlib.Path,
    *,
    title: str,
    facts: str,
    results: dict[str, dict],
    embeddings: dict[str, dict[str, Float[np.ndarray, "n d"]]],
    known: dict[str, Shaped[np.ndarray, " n"]],
    metric_rows: list[dict],
    source,
    sizes: Sizes,
) -> pathlib.Path:
    """Writes `folder/index.html` and returns its path.

    Args:
      folder: Created if missing.
      title: Title of the page.
      facts: Line below it: data, split, number of clips, seed, checkpoint.
      results: Checkpoint name → what `evaluate.measure` returns; the last is the run's result.
      embeddings: Checkpoint name → {"audio", "video", "text"} of the labelled clips, or of all if none is labelled.
      known: Labels and controls of those clips, as from `evaluate.embed_split`.
      metric_rows: What `metric_writer.read_metrics` returns; [] shows no loss curves.
      source: `loader.ClipSource` of the evaluated split.
      sizes: How much the page shows.
    """
    last, labels = list(results)[-1], known["label"].astype(np.int64)
    shown = _choose(embeddings, known, source, sizes)
    clips, av = shown.clips, shown.scores[last]["av"]

    def verb_of(verb: int) -> str:
        return source.info.verbs[verb] if verb >= 0 else "unknown verb"

    mapped, map_clips = _map(embeddings[last], known, labels, av, shown.clusters, clips, verb_of, sizes.seed)
    curves = _curve_plots(shown.scores, labels, metric_rows)
    actions = taxonomy.statistics(
        labels, known["verb_id"].astype(np.int64), known["noun_id"], source.info.verbs, source.info.nouns
    )
    return page.write(
        folder, "report.html.j2", title=title, facts=facts, plots=[*curves, mapped, *_verb_plots(shown, actions)],
        clips=clips, discovery=_discovery_table(results), controls=_controls_table(results[last]["controls"]),
        paper=_paper_table(),
        margin=discovery.describe_margin(results[last]["margin"]) if results[last]["margin"] else "",
        has_labels=labels.max() >= 0, retrieval=_retrieval_table(results), instances=_instance_table(results),
        queries=[(_SHOWN_DIRECTION_TITLES[direction], found) for direction, found in shown.queries.items() if found],
        curves=[plot.name for plot in curves], map_clips=map_clips, num_mapped=min(MAX_MAPPED, len(labels)),
        has_tail=bool(actions["groups"]), num_clips=len(labels), spearman=page.number(shown.verbs.spearman, "+.2f").text,
        clusters=shown.described, clusters_sampled=len(labels) > clustering.MAX_MERGED, verb_of=verb_of,
        verbs=_verbs_table(shown.verbs, shown.verb_names) if shown.verb_names else None,
        examples=[(kind, EXPLANATIONS[kind], rows.tolist()) for kind, rows in shown.best.items() if len(rows)],
        clip_of=lambda row: clips[int(known["index"][row])], score_of=lambda row: f"{av[row]:.3f}",
        label_of=lambda row: figures.LABELS[labels[row]],
    )  # fmt: skip
