"""The page of a suite: Tables 2 and 3, Fig. 5 and MC3's lead over every other row, with links to the pages of all runs."""

import pathlib
from collections.abc import Sequence

from mc3_jax.evals import figures, page, paper

DIRECTION_TITLES = {"v2a": "V→A", "a2v": "A→V", "l2a": "L→A", "a2l": "A→L"}
PAIR_TITLES = {"av": "audio and video", "al": "audio and text"}
_AXES = ("temperature", "consensus_weight", "learning_rate")


def _mean(value: Sequence[float | None] | None) -> page.Cell:
    """Returns a cell for [mean, standard deviation]; the latter is None for a single seed."""
    if value is None:
        return page.Cell("–")
    mean, std = value
    return page.number(mean, note="" if std is None else f" ± {std:.3f}")


def _discovery_table(rows: dict[str, dict]) -> page.Table:
    table, columns = [], ["row"]
    for pair in PAIR_TITLES:
        columns += [f"{pair.upper()} {name}" for name in ("ROC", "ROC, paper's", "AP", "AP, paper's", "within verbs")]
    for title, row in rows.items():
        cells = [page.text(title)]
        for pair in PAIR_TITLES:
            theirs = paper.DISCOVERY.get(title, {}).get(pair, (None, None))
            cells += [_mean(row.get(f"{pair}_roc_auc")), page.number(theirs[0])]
            cells += [_mean(row.get(f"{pair}_average_precision")), page.number(theirs[1])]
            cells.append(_mean(row.get(f"{pair}_within_verb_roc_auc")))
        seconds = page.number(row["seconds"][0] if "seconds" in row else None, ".0f")
        table.append([*cells, page.number(len(row["seeds"]), "d"), seconds])
    return page.Table("Table 2: discovery", (*columns, "seeds", "s per run"), table, _ours(rows))


def _retrieval_table(rows: dict[str, dict]) -> page.Table:
    table, columns, chance = [], ["row"], [page.text("chance")]
    for shown in DIRECTION_TITLES.values():
        columns += [
            f"{shown} {name}" for name in ("hit@5", "mean hits@5", "@5, paper's", "mean hits@10", "@10, paper's")
        ]
    for title, row in rows.items():
        cells = [page.text(title)]
        for direction in DIRECTION_TITLES:
            theirs = [value / 100 for value in paper.RETRIEVAL.get(title, {}).get(direction, ())] or (None, None)
            cells.append(_mean(row.get(f"{direction}_hit@5")))
            for k, their in zip((5, 10), theirs, strict=True):
                cells += [_mean(row.get(f"{direction}_mean_hits@{k}")), page.number(their)]
        table.append(cells)
    for direction in DIRECTION_TITLES:
        for measure in ("hit@5", "mean_hits@5", "mean_hits@10"):
            name = f"{direction}_{measure}_chance"
            chance.append(page.number(next((row[name][0] for row in rows.values() if name in row), None)))
            chance += [page.Cell("–")] * (measure != "hit@5")
    return page.Table("Table 3: retrieval", columns, [*table, chance], _ours(rows))


def _ours(rows: dict[str, dict]) -> frozenset[int]:
    return frozenset(i for i, title in enumerate(rows) if title == "MC3")


def _leads_table(pair: str, leads: dict[str, dict], interval_over: str) -> page.Table:
    measures = list(next(iter(leads.values()), {}))
    rows = []
    for title, found in leads.items():
        cells = []
        for measure in measures:
            low, high = found[measure]["interval"]
            cells.append(page.number(found[measure]["lead"], "+.3f", f" [{low:+.3f}, {high:+.3f}]"))
        rows.append([page.text(title), *cells])
    columns = ("lead over", *(figures.measure_name(measure) for measure in measures))
    return page.Table(f"MC3's lead, {pair.upper()}; in brackets: 95 % interval over {interval_over}", columns, rows)


def _sweep_table(sweep: dict[str, dict], titles: dict[str, str]) -> page.Table:
    rows = []
    for file, found in sweep.items():
        best = max((trial["score"] for trial in found["trials"]), default=None)
        chosen = [page.number(found["chosen"].get(axis), "g") for axis in _AXES]
        like = found.get("like")
        tried = page.Cell(f"same as {titles.get(like, like)}") if like else page.number(len(found["trials"]), "d")
        rows.append([page.text(titles.get(file, file)), *chosen, page.number(best), tried])
    columns = ("row", "temperature", "consensus weight", "learning rate, relative to the suite's", "validation", "trials")
    return page.Table("Hyperparameters chosen on validation", columns, rows)


def tables(content: dict) -> dict[str, page.Table]:
    """Returns name → table of a suite: discovery, retrieval and, if there is anything to show, leads_PAIR and sweep.

    Args:
      content: As `benchmarks.table_pages.collect` returns it.
    """
    rows = content["rows"]
    found = {"discovery": _discovery_table(rows), "retrieval": _retrieval_table(rows)}
    found |= {
        f"leads_{pair}": _leads_table(pair, leads, content["interval_over"])
        for pair, leads in content["leads"].items() if leads
    }  # fmt: skip
    if content["sweep"]:
        found["sweep"] = _sweep_table(content["sweep"], {row["file"]: title for title, row in rows.items()})
    return found


def describe(content: dict) -> str:
    """Returns a line about the test clips of a suite, with the ROC-AUC of each control (loudness and the like) alone."""
    test = content["test"]
    controls = ", ".join(f"{name.replace('_', ' ')} {area:.3f}" for name, area in test["controls"].items()) or "none"
    return (
        f"{content['data']}, {content['split']} split: {test['clips']} clips, {test['positive']:.1%} positive; "
        f"controls alone, ROC-AUC: {controls}"
    )


def _runs(folder: pathlib.Path, rows: dict[str, dict]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Returns row's title → (seed, link) of each of its runs whose page exists."""
    found = []
    for title, row in rows.items():
        links = [(seed, f"runs/{row['file']}/seed-{seed}/report/index.html") for seed in row["seeds"]]
        found.append((title, [(seed, link) for seed, link in links if (folder / link).is_file()]))
    return [(title, links) for title, links in found if links]


def write(folder: pathlib.Path, content: dict) -> pathlib.Path:
    """Writes `folder/index.html` and returns its path.

    Args:
      folder: Folder of the suite, which holds its runs under `runs/`.
      content: As `benchmarks.table_pages.collect` returns it.
    """
    rows, leads, shown = content["rows"], content["leads"], tables(content)
    plots = []
    for pair, methods in content["pr_curves"].items():
        alt = f"Precision-recall curves of {len(methods)} rows; their areas are in Table 2"
        plots.append(
            page.Plot(f"pr-{pair}", f"Fig. 5: {PAIR_TITLES[pair]}, mean over seeds", alt, figures.pr_of_methods(methods))
        )
    for pair, methods in leads.items():
        alt = "A dot with its interval for each row and measure; the numbers are in the table under it"
        if methods:
            plots.append(page.Plot(f"leads-{pair}", f"MC3's lead: {PAIR_TITLES[pair]}", alt, figures.leads(methods)))
    return page.write(
        folder, "suite.html.j2", title=f"mc3_jax: the tables on {content['data']}", facts=describe(content), plots=plots,
        discovery=shown["discovery"], retrieval=shown["retrieval"],
        leads=[(pair, PAIR_TITLES[pair], shown[f"leads_{pair}"]) for pair, found in leads.items() if found],
        curves=[plot.name for plot in plots if plot.name.startswith("pr-")], regions=content["regions"],
        interval_over=content["interval_over"],
        sweep=shown.get("sweep"), runs=_runs(folder, rows),
    )  # fmt: skip
