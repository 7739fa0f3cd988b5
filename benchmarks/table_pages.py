"""Writes the tables of `benchmarks.tables` from the runs that are done.

`tables.json` holds every number; `tables.md` and `index.html` are for readers.
"""

import collections
import json
import pathlib

import numpy as np

from benchmarks import runs as runs_lib
from mc3_jax.data import loader
from mc3_jax.evals import comparison, discovery, embeddings as embeddings_lib, metrics, page, suite_report

OURS = "MC3"
NUM_BOOTSTRAP = 2000
_RETRIEVAL = ("hit@5", "hit@10", "mean_hits@5", "mean_hits@10")

Row = tuple[str, str, tuple[str, ...]]  # file, title, pairs that the row is reported for


def write(out: pathlib.Path, rows: list[Row], seeds: list[int]) -> str:
    """Writes the tables of the runs that are done, and returns them as Markdown.

    Args:
      out: Folder of the suite.
      rows: Rows of the tables, in order.
      seeds: Seeds to include.

    Raises:
      ValueError: No run is done, results are damaged, or runs were evaluated on different clips.
    """
    content = collect(out, rows, seeds)
    (out / "tables.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    text = render(content)
    (out / "tables.md").write_text(text)
    suite_report.write(out, content)
    return text


def collect(out: pathlib.Path, rows: list[Row], seeds: list[int]) -> dict:
    """Returns {"data", "split", "test", "regions", "rows", "leads", "interval_over", "pr_curves", "sweep"}, all numbers of a
    suite; arguments and errors are those of `write`.
    """
    done: dict[str, dict] = {}
    scores: dict[str, dict[str, list]] = collections.defaultdict(dict)
    known, info, own_world, videos = None, None, False, None
    for file, title, pairs in rows:
        runs = {}
        for seed in seeds:
            workdir = out / "runs" / file / f"seed-{seed}"
            if not (workdir / "results.json").exists():
                continue
            runs[seed], own_world = _read(workdir)
            of_pairs, here = _scores(workdir, runs[seed])
            known = here if known is None else known
            videos = here.get("video_uid", videos)  # missing in runs of earlier versions
            if not np.array_equal(known["index"], here["index"]) or not np.array_equal(known["label"], here["label"]):
                raise ValueError(f"{workdir} was evaluated on other clips than the rows before: remove it and run again")
            info = runs[seed]
            for pair in pairs:
                scores[pair].setdefault(title, []).append(of_pairs[pair])
        if runs:
            done[title] = {"file": file, "seeds": sorted(runs), "pairs": pairs} | _mean_and_std(runs, pairs)
    if known is None:
        raise ValueError(f"{out} holds no run that is done")
    labels = known["label"].astype(np.int64)
    regions = _regions(out if own_world else None, info, known)
    drawn = videos if videos is not None else np.arange(len(labels))
    leads, curves = {}, {}
    for pair, of_row in scores.items():
        stacked = {title: np.stack(values) for title, values in of_row.items()}
        curves[pair] = {title: _mean_pr_curve(labels, values) for title, values in stacked.items()}
        if OURS in stacked:
            leads[pair] = comparison.leads(
                stacked, OURS, labels, known["verb_id"], drawn, regions, num_bootstrap=NUM_BOOTSTRAP, seed=0
            )
    controls = {name: metrics.roc_auc(labels, known[name]) for name in ("loudness", "onset_strength") if name in known}
    sweep = out / "sweep.json"
    return {
        "data": info["data"], "split": info["split"],
        "test": {"clips": len(labels), "positive": float(labels.mean()), "controls": controls},
        "regions": {name: int((inside & (labels == 0)).sum()) for name, inside in regions.items()},
        "rows": done, "leads": leads, "interval_over": "clips" if videos is None else "videos", "pr_curves": curves,
        "sweep": json.loads(sweep.read_text()) if sweep.exists() else {},
    }  # fmt: skip


def _read(workdir: pathlib.Path) -> tuple[dict, bool]:
    """Returns (results of a run with the seconds it took, whether it was evaluated on the clips of the suite's own world).

    Raises:
      ValueError: A file of the results is damaged.
    """
    path, noted = workdir / "results.json", workdir / runs_lib.TOOK
    try:
        results = json.loads(path.read_text())
        took = json.loads(noted.read_text()) if noted.exists() else {"words": []}
    except ValueError as error:
        raise ValueError(f"{workdir}: results are damaged ({error}): remove it and run again") from error
    seconds = {"seconds": took["seconds"]} if "seconds" in took else {}
    return results | seconds, runs_lib.OWN_CLIPS in took["words"]


def _scores(workdir: pathlib.Path, results: dict) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns (pair → score of each clip, name → annotation of each clip) of a run, from its embeddings or its results."""
    if "clips" in results:  # results of `benchmarks.tables_in_memory`, which keep scores instead of embeddings
        clips = {name: np.array(values) for name, values in results["clips"].items()}
        return clips, clips | {"index": np.arange(len(clips["label"]))}
    embeddings, known = embeddings_lib.load(workdir / embeddings_lib.FILE)
    return discovery.similarities(embeddings), known


def _mean_and_std(runs: dict[int, dict], pairs: tuple[str, ...]) -> dict:
    """Returns measure → [mean, standard deviation] over seeds, for the pairs and directions that a row is reported for.

    With a single seed the deviation of a measure is None.
    """
    seconds = [run["seconds"] for run in runs.values() if "seconds" in run]
    found = {"seconds": [float(np.mean(seconds)), float(np.std(seconds))]} if seconds else {}

    def summary(values: list[float]) -> list[float | None]:
        return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]

    for pair in pairs:
        for measure in ("roc_auc", "average_precision", "pr_auc_trapezoid", "within_verb_roc_auc"):
            of_runs = [run["discovery"][pair][measure] for run in runs.values()]
            if None not in of_runs:
                found[f"{pair}_{measure}"] = summary(of_runs)
    for direction in suite_report.DIRECTION_TITLES:
        pair = "av" if "v" in direction else "al"
        of_runs = [run["retrieval"].get(direction) for run in runs.values()]
        if pair in pairs and all(of_runs):
            for measure in _RETRIEVAL:
                found[f"{direction}_{measure}"] = summary([run[measure] for run in of_runs])
                found[f"{direction}_{measure}_chance"] = summary([run["chance"][measure] for run in of_runs])
    return found


def _mean_pr_curve(labels: np.ndarray, scores: np.ndarray) -> dict[str, list[float]]:
    """Returns {"recall", from 0.01 to 1; "precision", the best at this recall or a higher one, as a mean over seeds}."""
    recalls = np.linspace(0.01, 1, 100)
    curves = []
    for row in scores:
        recall, precision = metrics.pr_curve(labels, row)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        curves.append(best[np.searchsorted(recall, recalls - 1e-9)])
    return {"recall": recalls.tolist(), "precision": np.mean(curves, axis=0).tolist()}


def _regions(out: pathlib.Path | None, info: dict, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns region of the paper's Fig. 2 → which clips lie in it [n], by SoundWorld's truth; {} for other data.

    Args:
      out: Folder of the suite to whose world the clips belong, None if they belong to none.
      info: Results of a run.
      known: Name → annotation of each clip, [n].
    """
    if "region" in known:
        return {name: known["region"] == name for name in sorted(set(known["region"]) - {"I"})}
    if out is None:
        return {}
    videos = json.loads((out / "world" / "truth.json").read_text())
    source = loader.ClipSource(out / "clips", info["split"], pictures=False)
    places = []
    for index in known["index"]:
        clip = source[int(index)]
        video = videos[clip.video_uid]
        uid = clip.clip_id.removeprefix(f"{clip.video_uid}_").split("_")[0]
        segment = video["segments"][video["narrations"][uid]]
        places.append("III, drowned" if segment["drowned"] else segment["region"])
    return {name: np.array(places) == name for name in sorted(set(places) - {"I"})}


def render(content: dict) -> str:
    """Returns the tables as Markdown."""
    described = suite_report.describe(content).replace("<", "&lt;")
    parts = [f"{described}. Mean ± standard deviation over seeds; the paper's numbers are of Ego4D."]
    for name, table in suite_report.tables(content).items():
        parts += [f"## {table.caption}", page.markdown(table)]
        if name.startswith("leads") and content["regions"]:
            counts = ", ".join(f"{region} {count}" for region, count in content["regions"].items())
            parts.append(f"Regions of Fig. 2: positives against the region's negatives alone ({counts}).")
    return "\n\n".join(parts) + "\n"
