"""Accuracy of a trained audio tower on ESC-10 or ESC-50: `python -m benchmarks.sounds --root ESC-50 --esc10 --init RUN`.

RUN is a workdir, whose model sizes are used, or a checkpoint with the sizes of `configs/esc.py`. Its audio tower is probed
and fine-tuned; for comparison, a tower of the same sizes is probed untrained and trained from scratch. Each of the four takes
five runs of `configs/esc.py`, which hold out one fold each; its learning rates were chosen on folds 1 to 4 of ESC-10. Writes
`sounds.json` and `sounds.md` with the last and the best epoch of every fold. The best epoch is chosen on the fold that it is
reported for, as is usual in the field, so rely on the last.

Published for ESC-10 (Piczak, ACM MM 2015): random forest on MFCC 72.7 %, people 95.7 %.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import runs
from mc3_jax import weights

# Name of a mode → (word for `configs/esc.py`, whether the run starts from the tower of RUN).
MODES = {
    "untrained": ("probe", False), "probe": ("probe", True), "scratch": ("scratch", False), "finetune": ("finetune", True)
}  # fmt: skip
SHOWN = {"untrained": "probe, untrained tower", "scratch": "from scratch", "finetune": "fine-tuned"}
FOLDS = (1, 2, 3, 4, 5)
SIZES = ("num_mel", "num_time_frames", "patch_px", "stride_px", "width", "depth", "num_heads")  # of an audio tower
PUBLISHED = {"random forest on MFCC": 72.7, "people": 95.7}


def fold_flags(fold: int) -> list[str]:
    """Returns the overrides that train on all folds but one and evaluate on that one."""
    rest = ",".join(str(other) for other in FOLDS if other != fold)
    return [f"--config.data.folds=({rest})", f"--config.eval.folds=({fold},)"]


def tower_flags(init: str) -> list[str]:
    """Returns the overrides that give the audio tower the sizes of a run or a folder of ours; none for other files."""
    if not (weights.is_run(init) or weights.is_own_folder(init)):
        return []
    audio = weights.read_model_config(init).audio
    return [f"--config.model.audio.{name}={getattr(audio, name)}" for name in SIZES]


def run_folds(
    out: pathlib.Path, clips: pathlib.Path, init: str, num_classes: int, seed: int, say: Callable[[str], None],
    more: Sequence[str] = (),
) -> dict[str, list[dict]]:  # fmt: skip
    """Returns mode → results of each fold; runs that are not done yet are made.

    Args:
      out: Folder of all runs.
      clips: Folder of the converted clips.
      init: Workdir or file that holds the audio tower.
      num_classes: Number of classes of the clips.
      seed: Seed of every run.
      say: Called with a line of text after each run.
      more: More overrides for every run.
    """
    data = (f"--config.data.dir={clips}", f"--config.model.num_classes={num_classes}", f"--config.seed={seed}", *more)
    found: dict[str, list[dict]] = {}
    for mode, (word, takes_tower) in MODES.items():
        suite = runs.Suite(word, out, data)
        for fold in FOLDS:
            flags = fold_flags(fold) + ([f"--config.init.audio={init}"] if takes_tower else [])
            results = runs.run(suite, "configs/esc.py", out / f"seed-{seed}" / mode / f"fold-{fold}", flags)
            found.setdefault(mode, []).append(results)
            say(f"{mode}, fold {fold}: last {results['last']['top1']:.1f} %, best {results['best']['top1']:.1f} %")
    return found


def render(found: dict[str, list[dict]], num_classes: int) -> str:
    """Returns a Markdown table of accuracy by mode, epoch and fold, and lines that compare modes and published results."""
    lines = ["| | epoch | " + " | ".join(f"fold {fold}" for fold in FOLDS) + " | mean ± std | mAP | s a run |"]
    lines.append("|" + "---|" * (len(FOLDS) + 5))
    for mode, results in found.items():
        for epoch in ("last", "best"):
            top1 = np.array([result[epoch]["top1"] for result in results])
            cells = [*(f"{x:.1f}" for x in top1), f"{top1.mean():.1f} ± {top1.std(ddof=1):.1f}"]
            cells.append(f"{np.mean([result[epoch]['mAP'] for result in results]):.3f}")
            cells.append(f"{np.mean([result['seconds'] for result in results]):.0f}")
            lines.append(f"| {SHOWN.get(mode, mode)} | {epoch} | " + " | ".join(cells) + " |")
    lines.append("")
    pairs = (("finetune", "scratch", "Fine-tuned over scratch"), ("probe", "untrained", "Probe over untrained"))
    for mode, other, words in pairs:
        gain = [a["last"]["top1"] - b["last"]["top1"] for a, b in zip(found[mode], found[other], strict=True)]
        by_fold = ", ".join(f"{x:+.1f}" for x in gain)
        lines.append(f"{words}, last epoch: {np.mean(gain):+.1f} points ({by_fold}).")
    if num_classes == 10:
        lines.append("Published, ESC-10: " + ", ".join(f"{name} {value} %" for name, value in PUBLISHED.items()) + ".")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Makes the runs that are not done yet and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sounds", description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, type=pathlib.Path, help="folder of ESC-50 or ESC-10")
    parser.add_argument("--esc10", action="store_true", help="take only the ESC-10 rows of ESC-50")
    parser.add_argument("--init", required=True, help="workdir or file that holds the audio tower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/sounds"))
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    clips = out / ("clips-esc10" if args.esc10 else "clips")
    with runs.ending_in_one_line():
        root, made_of = str(args.root.resolve()), clips.with_suffix(".root")
        if made_of.exists() and made_of.read_text() != root:
            raise ValueError(f"{clips} was made from {made_of.read_text()}: remove it, or name another --out")
        if not (clips / "clips.json").exists():
            made_of.write_text(root)
            words = ["--root", root, "--out", str(clips), *(["--esc10"] if args.esc10 else [])]
            with (out / "clips.log").open("a") as log:
                runs.call([sys.executable, "-m", "data_prep.esc50", *words], log)
        init = str(pathlib.Path(args.init).resolve())
        num_classes = len(json.loads((clips / "clips.json").read_text())["classes"])
        found = run_folds(
            out, clips, init, num_classes, args.seed, lambda line: print(line, flush=True), tower_flags(init)
        )
        (out / "sounds.json").write_text(json.dumps(found, indent=1) + "\n")
        text = render(found, num_classes)
        (out / "sounds.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
