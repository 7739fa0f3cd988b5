"""Tables 2 and 3 of the paper on a suite: `python -m benchmarks.tables --suite=soundworld --seeds=0,1,2`.

Every row of `configs/tables` is trained and evaluated by the public commands. Tables 2 and 3 are written as mean and standard
deviation over seeds, beside the paper's numbers and with MC3's lead over every other row (`benchmarks.table_pages`).

First a sweep, the same for all rows, chooses each row's temperature, consensus weight and learning rate. It takes one axis
after the other, in half-length runs of one seed, by the mean validation ROC-AUC of the pairs that the row is reported for.
Two rows take the choice of another: "w/o contrastive" is MC3 without one term, and CMC is "w/o consensus" in one phase
instead of two. The test split is read once for each row and seed, at the setting that was chosen. When started again, it
skips runs that are done and resumes those that were interrupted; a run that diverged is reported and left out.

Suite "soundworld" makes its world first. "ego4d" takes the clips and the tokenizer of `configs/mc3_ego4d.py`, or those of
`--clips` and `--tokenizer`, which may be any data set in this format. Validation and test each need clips that are labelled
as sounding and clips that are labelled as not. Options after `--` go to every run, and may set how clips are read:
`-- --config.data.num_workers=16`.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable

from benchmarks import runs, table_pages
from benchmarks.runs import Suite
from mc3_jax import config as config_lib

SWEEP_SHARE = 0.5  # of the epochs, for runs of the sweep
AXES = {
    "temperature": (0.05, 0.1, 0.2),
    "consensus_weight": (1.0, 3.0, 10.0, 30.0),
    "learning_rate": (1.0, 0.5),  # factors of the suite's
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of Table 2.

    Attributes:
      file: Name of the file in `configs/tables`, without its ending.
      title: Name of the method in the paper.
      pairs: Pairs of modalities that it is reported for.
      temperature: Indices of the phases whose temperature is swept; none if it is learned or part of the method.
      consensus_weight: Indices of the phases whose consensus weight is swept.
      like: Row whose setting it takes, "" if none: the same method without one term, or divided into phases differently.
    """

    file: str
    title: str
    pairs: tuple[str, ...] = ("av", "al")
    temperature: tuple[int, ...] = ()
    consensus_weight: tuple[int, ...] = ()
    like: str = ""


ROWS = (
    Row("random", "Random"),
    Row("clap", "CLAP", ("al",)),
    Row("cm_acc", "CM-ACC", ("av",), temperature=(0,)),
    Row("cmc", "CMC", temperature=(0,), like="without_consensus"),
    Row("image_bind", "ImageBind", temperature=(0,)),
    Row("without_consensus", "w/o consensus", temperature=(0, 1)),
    Row("without_contrastive", "w/o contrastive", temperature=(0,), consensus_weight=(1,), like="mc3"),
    Row("without_align", "w/o align", temperature=(0,), consensus_weight=(0,)),
    Row("mc3", "MC3", temperature=(0, 1), consensus_weight=(1,)),
)


def base_config(suite: str, row: Row) -> config_lib.Config:
    """Returns a row's config before any setting is chosen."""
    return importlib.import_module(f"configs.tables.{row.file}").get_config(suite)


def fields(config: config_lib.Config, row: Row, setting: dict[str, float], share: float = 1.0) -> dict[str, float]:
    """Returns field of the config → value that gives a row its setting.

    Args:
      config: Config of the row.
      row: Row of Table 2.
      setting: Axis → value; axes that the row lacks are ignored.
      share: Factor for the epochs of each phase.
    """
    values = {}
    for axis in ("temperature", "consensus_weight"):
        values |= {f"phases[{i}].{axis}": setting[axis] for i in getattr(row, axis) if axis in setting}
    for i, phase in enumerate(config.phases):
        rate = phase.optimizer.learning_rate * setting.get("learning_rate", 1.0)
        values[f"phases[{i}].optimizer.learning_rate"] = rate
        if share != 1.0:
            values[f"phases[{i}].epochs"] = phase.epochs * share
    return values


def overrides(config: config_lib.Config, row: Row, setting: dict[str, float], share: float = 1.0) -> list[str]:
    """Returns `fields` as flags of a command."""
    return [f"--config.{name}={value:g}" for name, value in fields(config, row, setting, share).items()]


def validation_score(results: dict, row: Row) -> float:
    """Returns the score by which trials are chosen: the mean ROC-AUC of the pairs that the row is reported for."""
    return sum(results["discovery"][pair]["roc_auc"] for pair in row.pairs) / len(row.pairs)


def sweep_row(suite: Suite, row: Row, say: Callable[[str], None]) -> tuple[dict[str, float], list[dict]]:
    """Returns (chosen setting, trials) of a row, choosing the best value along one axis after the other.

    Ties go to the value that comes first. A trial that diverges scores 0.
    """
    config = base_config(suite.name, row)
    axes = {axis: values for axis, values in AXES.items() if axis == "learning_rate" or getattr(row, axis)}
    chosen = {axis: values[0] for axis, values in axes.items()}
    trials: dict[tuple, dict] = {}
    for axis, values in axes.items():
        for value in values:
            setting = chosen | {axis: value}
            key = tuple(setting.values())
            if key in trials:
                continue
            name = "_".join(f"{a}-{v:g}" for a, v in setting.items())
            workdir = suite.out / "sweep" / row.file / name
            flags = overrides(config, row, setting, SWEEP_SHARE) + ["--config.eval.split=validation", "--config.seed=0"]
            try:
                results = runs.run(suite, f"configs/tables/{row.file}.py", workdir, flags)
                score = validation_score(results, row)
            except runs.DivergedError:
                results, score = {}, 0.0
            shutil.rmtree(workdir / "checkpoints", ignore_errors=True)  # only the score of a trial is needed
            trials[key] = {"setting": setting, "score": score, "seconds": results.get("seconds")}
            say(f"{row.title}: {name.replace('_', ' ')}: validation {score:.4f}")
        best = max((trials[tuple((chosen | {axis: v}).values())] for v in values), key=lambda trial: trial["score"])
        chosen = best["setting"]
    return chosen, list(trials.values())


def sweep(suite: Suite, rows: list[Row], say: Callable[[str], None]) -> dict[str, dict]:
    """Returns row → {"chosen", "trials"}, and writes it to `sweep.json`, where entries of other rows are kept."""
    path = suite.out / "sweep.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for row in rows:
        if base_config(suite.name, row).phases and not row.like:
            chosen, trials = sweep_row(suite, row, say)
            found[row.file] = {"chosen": chosen, "trials": trials}
    for row in rows:
        if row.like:
            found[row.file] = {"chosen": found[row.like]["chosen"], "trials": [], "like": row.like}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__.split("\n")[0], epilog=runs.EPILOG
    )
    parser.add_argument("--suite", choices=("soundworld", "ego4d"), default="soundworld")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of initialisation, order and augmentation")
    parser.add_argument("--rows", default=",".join(row.file for row in ROWS), help="files of configs/tables")
    parser.add_argument("--out", type=pathlib.Path, help="folder; default runs/tables/SUITE")
    parser.add_argument("--clips", help="folder of clips instead of the suite's")
    parser.add_argument("--tokenizer", help="tokenizer instead of the suite's")
    parser.add_argument("--only_tables", action="store_true", help="run nothing; write tables of runs that are done")
    own, reading = runs.split_words(argv)
    args = parser.parse_args(own, argparse.Namespace(reading=reading))
    known = {row.file: row for row in ROWS}
    unknown = [name for name in args.rows.split(",") if name not in known]
    if unknown:
        parser.error(f"--rows: {unknown[0]!r} is none of {', '.join(known)}")
    args.rows = [row for row in ROWS if row.file in args.rows.split(",")]
    if not all(part.isdigit() for part in args.seeds.split(",")):
        parser.error(f"--seeds must be numbers joined by commas, got {args.seeds!r}")
    args.seeds = [int(part) for part in args.seeds.split(",")]
    for row in args.rows:
        if row.like and row.like not in [other.file for other in args.rows]:
            parser.error(f"--rows: {row.file} takes the settings of {row.like}, name it too")
    args.out = args.out or pathlib.Path("runs/tables") / args.suite
    return args


def main(argv: list[str] | None = None) -> None:
    """Makes the runs of a suite that are not done yet and writes its tables."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"[{(time.monotonic() - begin) / 60:5.1f} min] {line}", flush=True)

    with runs.ending_in_one_line():
        if not args.only_tables:
            _run_all(args, say)
        print(table_pages.write(args.out.resolve(), [(row.file, row.title, row.pairs) for row in ROWS], args.seeds))


def _run_all(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    out = args.out.resolve()
    suite = runs.make_suite(args.suite, out, args.clips, args.tokenizer, args.reading)
    found = sweep(suite, args.rows, say)
    for seed in args.seeds:
        for row in args.rows:
            config = base_config(suite.name, row)
            setting = found.get(row.file, {"chosen": {}})["chosen"]
            flags = [*overrides(config, row, setting), f"--config.seed={seed}"]
            workdir = out / "runs" / row.file / f"seed-{seed}"
            try:
                results = runs.run(suite, f"configs/tables/{row.file}.py", workdir, flags, trains=bool(config.phases))
            except runs.DivergedError as error:
                say(f"{row.title}, seed {seed}, diverged and is left out of the tables: {error}")
                continue
            scores = "  ".join(f"{pair.upper()} {results['discovery'][pair]['roc_auc']:.4f}" for pair in row.pairs)
            say(f"{row.title}, seed {seed}: {scores}  ({results.get('seconds', float('nan'))} s)")


if __name__ == "__main__":
    main()
