"""The page of a run that classifies sounds: metrics (for EPIC-Sounds beside the paper's Table 4), classes, clips to hear."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mc3_jax.evals import figures, media, metrics, page, paper

NUM_CLIPS = 8  # correctly classified ones, and as many wrongly classified ones
_METHODS = {"L": "linear probe", "F": "fine-tuned"}


def _metrics_table(content: dict, beside_paper: bool) -> page.Table:
    rows, forms = [], (".2f", ".2f", ".2f", ".3f", ".3f")
    for name in ("last", "best"):
        found = content[name]
        values = (found["top1"], found["top5"], 100 * found["mean_class_accuracy"], found["mAP"], found["mAUC"])
        named = (page.text(f"ours, {name}: epoch {found['epoch']:g}"), page.text(found["phase"]))
        rows.append([*named, *map(page.number, values, forms)])
    for (method, how), values in paper.CLASSIFICATION.items() if beside_paper else ():
        named = (page.text(f"paper: {method}"), page.text(_METHODS.get(how, "")))
        rows.append([*named, *map(page.number, values, forms)])
    columns = ("method", "how", "top-1 %", "top-5 %", "mean class accuracy %", "mAP", "mAUC")
    title = "Ours and the paper's (Table 4), on EPIC-Sounds" if beside_paper else "Results at the last and the best epoch"
    return page.Table(title, columns, rows, frozenset((0, 1)))


def _classes_table(probabilities: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> page.Table:
    """Returns a table of the classes that occur: number of clips, accuracy and average precision of each."""
    taken, rows = probabilities.argmax(1), []
    for c in np.unique(classes):
        own = classes == c
        precision = metrics.average_precision(own.astype(np.int64), probabilities[:, c])
        numbers = (int(own.sum()), float((taken[own] == c).mean()), precision)
        rows.append([page.text(names[c]), *map(page.number, numbers, ("d", ".1%", ".3f"))])
    return page.Table("Classes of these clips, at the last checkpoint", ("class", "clips", "accuracy", "AP"), rows)


def are_of_epic_sounds(names: Sequence[str]) -> bool:
    """Returns whether these are the classes of EPIC-Sounds, on which the paper reports its results."""
    first = paper.FIRST_SOUND_CLASSES
    return len(names) == paper.NUM_SOUND_CLASSES and tuple(names[: len(first)]) == first


def surest(
    probabilities: Float[np.ndarray, "n c"], classes: Int[np.ndarray, " n"], count: int
) -> tuple[Int[np.ndarray, " r"], Int[np.ndarray, " w"]]:
    """Returns the rows of (correctly, wrongly) classified clips, most confident first, at most `count` of each."""
    order = np.argsort(-probabilities.max(1), kind="stable")
    right = probabilities.argmax(1)[order] == classes[order]
    return order[right][:count], order[~right][:count]


def write(
    folder: pathlib.Path,
    content: dict,
    probabilities: Float[np.ndarray, "n c"],
    classes: Int[np.ndarray, " n"],
    names: Sequence[str],
    *,
    source,
    indices: Int[np.ndarray, " n"],
) -> pathlib.Path:
    """Writes `folder/index.html` and returns its path.

    Args:
      folder: Created if missing.
      content: Content of `results.json`, from `evaluate_sounds`.
      probabilities: Class probabilities at the last checkpoint, of the clips whose class is known.
      classes: True class of each of those clips.
      names: Names of the classes.
      source: `loader.ClipSource` of the evaluated split.
      indices: Index of each of those clips in `source`.
    """
    counts = np.zeros((len(names), len(names)), np.int64)
    taken = probabilities.argmax(1)
    np.add.at(counts, (classes, taken), 1)
    right, wrong = surest(probabilities, classes, NUM_CLIPS)
    clips = media.gather(source, indices[np.concatenate([right, wrong])].tolist())
    percent = {"top1": 1.0, "top5": 1.0, "mean_class_accuracy": 100.0}
    told = "the numbers of the last and the best epoch are in the first table"
    plots = [
        page.Plot("percent", "Accuracy over epochs", f"Curves of top-1, top-5 and mean class accuracy; {told}",
                  figures.epochs(content["epochs"], percent, "%")),
        page.Plot("areas", "mAP and mAUC over epochs", f"Curves of mAP and mAUC; {told}",
                  figures.epochs(content["epochs"], {"mAP": 1.0, "mAUC": 1.0}, "mean over classes")),
        page.Plot("confusion", "Confusion matrix",
                  "Heat map of true against predicted classes; accuracies are in the table of classes",
                  figures.confusion(counts, names)),
    ]  # fmt: skip
    folds = f", folds {', '.join(map(str, content['folds']))}" if content["folds"] else ""
    facts = (
        f"{content['data']}, {content['split']} split{folds}: {content['num_clips']} clips, trained on "
        f"{content['num_trained_on']}; seed {content['seed']}"
    )
    if content["num_seen"]:
        facts += f". {content['num_seen']} of them were trained on, so these results don't show how it generalises"
    beside_paper = are_of_epic_sounds(names)
    groups = (("Correctly classified", right), ("Wrongly classified", wrong))
    return page.write(
        folder, "sounds.html.j2", title=f"mc3_jax: {content['config']}", facts=facts, plots=plots, clips=clips,
        metrics=_metrics_table(content, beside_paper), beside_paper=beside_paper,
        classes=_classes_table(probabilities, classes, names),
        groups=[(title, rows.tolist()) for title, rows in groups if len(rows)],
        clip_of=lambda row: clips[int(indices[row])], true_of=lambda row: names[classes[row]],
        taken_of=lambda row: names[taken[row]], surety_of=lambda row: f"{probabilities[row].max():.0%}",
    )  # fmt: skip
