"""How much reading data slows a training step: `python -m benchmarks.end_to_end`.

Runs the training command's own loop in turn on clips read from ArrayRecord and on one batch that stays on the device, and
compares the seconds per step and how long each step waited for input. Clips are those of `benchmarks.input_pipeline`, of the
paper's sizes. The queue of batches is full when the first step begins. So as many steps as it holds are not timed, and at
least eight times as many are: then a loader slower than 0.86 of the step's rate is noticed. Ends with status 1 if a step on
real data takes more than 1.02 times as long.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np

from benchmarks import input_pipeline, paper_step, record
from data_prep import vocabulary
from mc3_jax import compile as compile_lib, config as config_lib, mesh as mesh_lib, metric_writer, run as run_lib, train
from mc3_jax.data import loader

WANTED, QUEUES = 1.02, 8


def make_config(args: argparse.Namespace, clips: pathlib.Path, tokenizer: pathlib.Path) -> config_lib.Config:
    """Returns the paper's run in the sizes of `args`: one phase, with as many steps as are skipped and timed."""
    config = paper_step.make_config(
        batch=args.batch, depth=args.depth, dtype=args.dtype, remat=args.remat, scan=args.scan
    )
    config.data.dir, config.data.tokenizer = str(clips), str(tokenizer)
    config.data.num_threads, config.data.num_workers = args.num_threads, args.num_workers
    config.data.prefetch = num_readers(args)
    config.init = config_lib.InitConfig()
    config.phases = config.phases[1:]
    config.phases[0].epochs = (left_out(args) + num_steps(args)) * args.batch / args.clips
    config.save.every_steps, config.log.every_steps, config.log.tensorboard = 1_000_000, 1, False
    return config


def num_readers(args: argparse.Namespace) -> int:
    """Returns the number of threads or processes that read; each makes whole batches."""
    return args.num_workers or args.num_threads


def left_out(args: argparse.Namespace) -> int:
    """Returns how many steps are not timed: one for each batch in the queue, the one being read, and the first."""
    return num_readers(args) + 2


def num_steps(args: argparse.Namespace) -> int:
    """Returns the number of steps that are timed."""
    return max(args.steps, QUEUES * num_readers(args))


def run(config: config_lib.Config, workdir: str, skipped: int, *, synthetic: bool) -> tuple[float, float]:
    """Returns (seconds per step, seconds of it that a step waited for input), means over the steps after `skipped`.

    Args:
      config: Run to train.
      workdir: Folder of the run.
      skipped: Number of steps at the start that are not timed.
      synthetic: Whether every step gets the first batch, which stays on the device.
    """
    held: dict = {}

    def put_once(mesh, batch):
        if not held:
            held.update(real(mesh, batch))
        return dict(held)

    def read_once(batches):
        first = next(batches)
        while True:
            yield dict(first)

    real, read = mesh_lib.put_batch, loader.train_batches
    with contextlib.ExitStack() as stack:
        if synthetic:
            stack.enter_context(mock.patch.object(mesh_lib, "put_batch", put_once))
            stack.enter_context(mock.patch.object(loader, "train_batches", lambda *a, **k: read_once(read(*a, **k))))
        train.train(run_lib.set_up(config, workdir))
    rows = metric_writer.read_metrics(workdir)
    before, after = rows[skipped - 1], rows[-1]
    seconds = (after["elapsed_s"] - before["elapsed_s"]) / (after["step"] - before["step"])
    return seconds, float(np.mean([row["input_wait_s"] for row in rows[skipped:]]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2, help="blocks of audio and video; text has half")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan", action="store_true", help="run the blocks as one loop (model.scan_layers)")
    parser.add_argument("--steps", type=int, default=0, help="steps to time; at least eight per reading thread or worker")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--num_threads", type=int, default=2, help="threads that read, and number of batches read ahead")
    parser.add_argument("--num_workers", type=int, default=0, help="worker processes that read instead; 0 uses threads")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args()
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        clips, tokenizer = folder / "clips", folder / "vocabulary"
        clips.mkdir()
        narrations = [clip.narration for clip in input_pipeline.make_clips(clips, args.clips)]
        vocabulary.train_vocabulary(narrations, 600).save_pretrained(tokenizer)
        config = make_config(args, clips, tokenizer)
        for i in range(args.rounds):
            for synthetic in (True, False):
                workdir = str(folder / f"run-{i}-{synthetic}")
                found[synthetic].append(run(config, workdir, left_out(args), synthetic=synthetic))
    (real_s, waited_s), (synthetic_s, none_s) = (np.median(found[key], axis=0) for key in (False, True))
    readers = f"{args.num_workers} workers" if args.num_workers else f"{args.num_threads} threads"
    flops = args.batch * compile_lib.model_flops(config, config.phases[0])
    rows = [
        ["real data", f"{1000 * real_s:.1f}", f"{1000 * waited_s:.2f}", f"{args.batch / real_s:.1f}"],
        ["one batch", f"{1000 * synthetic_s:.1f}", f"{1000 * none_s:.2f}", f"{args.batch / synthetic_s:.1f}"],
        ["real / one batch", f"{real_s / synthetic_s:.3f}", "", ""],
    ]
    text = (
        f"Batch {args.batch}, depth {args.depth}, {args.dtype}, {flops / 1e12:.2f} TFLOP a step; {readers}; "
        f"{num_steps(args)} steps, medians of {args.rounds} rounds.\n\n"
        + record.markdown(["", "ms a step", "of which waiting for input", "clips/s"], rows)
    )
    missed = real_s > WANTED * synthetic_s
    text += f"\n\nMissed: {real_s / synthetic_s:.3f}, wanted {WANTED}." if missed else ""
    record.append("Real data against one batch", text, "jaxlib", "grain", path=args.results)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
