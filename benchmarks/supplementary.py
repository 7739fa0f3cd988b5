"""The supplementary's ablations, one axis at a time: `python -m benchmarks.supplementary --suite=soundworld --seed=0`.

The axes are clip duration, anchor, exponents of K, temperature, consensus weight, inverse of K, gradient through the
consensus, optimizer state across the switch of phases, and, not in the paper, the share of epochs that refine takes. Each
value is a run of the suite's MC3 with this value changed, at the setting that `benchmarks.tables` has chosen in the same
folder, or else at the first values of its sweep. Runs are evaluated on validation, since only the tables read the test split.
Writes `supplementary.json` and `supplementary.md`. Runs that are done are skipped when it is started again. Options after
`--` go to every run: `-- --config.data.num_workers=16`.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable

from benchmarks import runs, tables
from mc3_jax import config as config_lib

# Axis → value → overrides, the suite's own value first. Phase 1, counted from 0, is MC3's refine phase.
REFINE = "--config.phases[1]."
AXES: dict[str, dict[str, list[str]]] = {
    "anchor": {name: [f"{REFINE}consensus.anchor={name}"] for name in ("audio", "video", "text")},
    "alpha_video": {f"{a:g}": [f"{REFINE}consensus.alpha_video={a:g}"] for a in (0.5, 0.25, 1, 2)},
    "alpha_text": {f"{a:g}": [f"{REFINE}consensus.alpha_text={a:g}"] for a in (1, 0.5, 2)},
    "inverse": {name: [f"{REFINE}consensus.inverse={name}"] for name in ("argmin", "linear", "per_modality")},
    "stop_gradient": {name: [f"{REFINE}consensus.stop_gradient={name}"] for name in ("True", "False")},
    "reset_optimizer": {name: [f"{REFINE}reset_optimizer={name}"] for name in ("False", "True")},
    "temperature": {
        f"{t:g}": [f"--config.phases[{i}].temperature={t:g}" for i in (0, 1)] for t in tables.AXES["temperature"]
    },
    "consensus_weight": {f"{w:g}": [f"{REFINE}consensus_weight={w:g}"] for w in tables.AXES["consensus_weight"]},
    "duration_s": {"1.5": [], "0.75": [], "3": []},
    "refine_share": {"suite's": [], "0.5": [], "0.67": [], "0.9": []},
}
WINDOWS_S = {"1.5": (0.5, 1.0), "0.75": (0.25, 0.5), "3": (1.0, 2.0)}  # seconds before and after the narrated moment


def duration_flags(suite: runs.Suite, value: str) -> list[str]:
    """Returns the overrides for a clip duration; makes SoundWorld's clips of this length first, unless they exist."""
    before_s, after_s = WINDOWS_S[value]
    if value == "1.5":
        return []
    clips = suite.out / f"clips-{value}s"
    if not (clips / "clips.json").exists():
        words = ["--root", suite.out / "world", "--out", clips, "--name", "soundworld", "--short_side", "72",
                 "--window", before_s, after_s]  # fmt: skip
        with (suite.out / "world.log").open("a") as log:
            runs.call([sys.executable, "-m", "data_prep.ego4d", *map(str, words)], log)
    samples = round((before_s + after_s) * 16_000)
    frames = 1 + (samples - 400) // 160  # frames of 25 ms, one every 10 ms
    return [f"--config.data.dir={clips}", f"--config.model.audio.num_time_frames={frames + 1}"]


def share_flags(config: config_lib.Config, share: float) -> list[str]:
    """Returns the overrides that give refine a share of all epochs, with the learning rate of every step unchanged.

    Args:
      config: Config of the suite's MC3.
      share: Refine's share of the epochs, at least the suite's own and below 1.

    Raises:
      ValueError: The share is smaller than the suite's: the learning rate would have to fall within align already.
    """
    align, refine = config.phases
    epochs = align.epochs + refine.epochs
    own = share * epochs
    flags = [f"--config.phases[0].epochs={epochs - own:g}", f"{REFINE}epochs={own:g}"]
    if refine.optimizer.schedule == "constant":
        return flags
    held = own - refine.epochs  # epochs of refine before the rate begins to fall, which it does where the suite's does
    if held < 0:
        raise ValueError(f"refine_share {share}: the suite's is {refine.epochs / epochs:.2f}, and it can't be less")
    return [*flags, f"{REFINE}optimizer.hold_share={held / own:.6f}"]


def run_axes(suite: runs.Suite, axes: list[str], seed: int, say: Callable[[str], None]) -> dict[str, dict[str, dict]]:
    """Returns axis → value → {"av_roc_auc", "av_average_precision", ...}; runs that are not done yet are made."""
    row = next(row for row in tables.ROWS if row.file == "mc3")
    path = suite.out / "sweep.json"
    swept = json.loads(path.read_text()) if path.exists() else {}
    chosen = swept.get("mc3", {}).get("chosen") or {axis: values[0] for axis, values in tables.AXES.items()}
    config = tables.base_config(suite.name, row)
    flags = [*tables.overrides(config, row, chosen), f"--config.seed={seed}"]
    flags.append("--config.eval.split=validation")
    found: dict[str, dict[str, dict]] = {}
    for axis in axes:
        for value, changes in AXES[axis].items():
            changes = duration_flags(suite, value) if axis == "duration_s" else changes
            if axis == "refine_share" and value != "suite's":
                changes = share_flags(config, float(value))
            # Values that change nothing share one run, "base".
            own = [change for change in changes if change not in flags]
            same = not own or (value == next(iter(AXES[axis])) and axis not in chosen)
            name = "base" if same else f"{axis}-{value}"
            workdir = suite.out / "supplementary" / name / f"seed-{seed}"
            results = runs.run(suite, "configs/tables/mc3.py", workdir, flags if same else [*flags, *own])
            scores = {
                f"{pair}_{measure}": results["discovery"][pair][measure]
                for pair in ("av", "al")
                for measure in ("roc_auc", "average_precision")
            }
            found.setdefault(axis, {})[value] = scores
            say(f"{axis} {value}: AV {scores['av_roc_auc']:.4f}  AL {scores['al_roc_auc']:.4f}")
    return found


def render(found: dict[str, dict[str, dict]]) -> str:
    """Returns the axes as one Markdown table."""
    lines = ["| axis | value | AV ROC | AV AP | AL ROC | AL AP |", "|---|---|---|---|---|---|"]
    for axis, values in found.items():
        for value, scores in values.items():
            lines.append(f"| {axis} | {value} | " + " | ".join(f"{score:.3f}" for score in scores.values()) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Makes the runs that are not done yet and writes the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.supplementary", description=__doc__.split("\n")[0], epilog=runs.EPILOG
    )
    parser.add_argument("--suite", choices=("soundworld", "ego4d"), default="soundworld")
    parser.add_argument("--axes", default=",".join(AXES), help="axes to vary, joined by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="folder; default runs/tables/SUITE, that of the tables")
    parser.add_argument("--clips", help="folder of clips instead of the suite's")
    parser.add_argument("--tokenizer", help="tokenizer instead of the suite's")
    own, reading = runs.split_words(argv)
    args = parser.parse_args(own)
    unknown = [axis for axis in args.axes.split(",") if axis not in AXES]
    if unknown:
        parser.error(f"--axes: {unknown[0]!r} is none of {', '.join(AXES)}")
    axes = args.axes.split(",")
    if "duration_s" in axes and (args.suite != "soundworld" or args.clips):
        parser.error("--axes: duration_s cuts SoundWorld's videos anew: leave it out where clips are given")
    out = (args.out or pathlib.Path("runs/tables") / args.suite).resolve()
    with runs.ending_in_one_line():
        suite = runs.make_suite(args.suite, out, args.clips, args.tokenizer, reading, ("validation",))
        found = run_axes(suite, axes, args.seed, lambda line: print(line, flush=True))
        (out / "supplementary.json").write_text(json.dumps({"seed": args.seed, "axes": found}, indent=1) + "\n")
        (out / "supplementary.md").write_text(render(found))
        print(render(found))


if __name__ == "__main__":
    main()
