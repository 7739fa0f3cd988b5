"""How much reading data slows a training step: `python -m benchmarks.end_to_end`.

Runs the training command's own loop in turn on clips read from ArrayRecord and on one batch that stays on the device, and
compares the seconds per step and how long each step waited for input. Clips are those of `benchmarks.input_pipeline`, of the
paper's sizes. No checkpoint is saved. Ends with status 1 if a step on real data takes more than 1.02 times as long.

If reading takes longer than the step, the ratio of the two is what is printed, with any number of readers, up to the noise of
the times. If it takes less, the ratio is 1, or less by up to one step of those timed. For this to hold,
  * batches that were made while the step compiled are thrown away: the steps would use them up before they waited;
  * steps are timed from one row of metrics to another, both written after the batch two steps ahead was read; the rows of the
    last two steps are not;
  * their number is a multiple of the readers', since these may all finish at once.
"""

import argparse
import contextlib
import itertools
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np

from benchmarks import input_pipeline, paper_step, record
from data_prep import vocabulary
from mc3_jax import (
    checkpoint,
    compile as compile_lib,
    config as config_lib,
    mesh as mesh_lib,
    metric_writer,
    run as run_lib,
    train,
)
from mc3_jax.data import loader

WANTED = 1.02
LAST = 2  # steps whose rows are written without a batch being read before; see `mc3_jax.train`, Order 1 and 2
# Batches that Grain makes ahead: each thread makes one, each worker has one more than its own queue, and both again in the
# thread of this process that empties the queue.
AHEAD_OF_THREAD, AHEAD_OF_WORKER = 1, 4


def make_config(args: argparse.Namespace, clips: pathlib.Path, tokenizer: pathlib.Path) -> config_lib.Config:
    """Returns the paper's run in the sizes of `args`: one phase, with as many steps as are timed and are not."""
    config = paper_step.make_config(
        batch=args.batch, depth=args.depth, dtype=args.dtype, remat=args.remat, scan=args.scan
    )
    config.data.dir, config.data.tokenizer = str(clips), str(tokenizer)
    config.data.num_threads, config.data.num_workers = args.num_threads, args.num_workers
    config.data.prefetch = num_readers(config)
    config.init = config_lib.InitConfig()
    config.phases = config.phases[1:]
    config.phases[0].epochs = (left_out(config) + num_steps(args, config) + LAST) * args.batch / args.clips
    config.save.every_steps, config.log.every_steps, config.log.tensorboard = 1_000_000, 1, False
    return config


def num_readers(config: config_lib.Config) -> int:
    """Returns the number of threads or processes that read; each makes whole batches."""
    return config.data.num_workers or config.data.num_threads


def left_out(config: config_lib.Config) -> int:
    """Returns how many steps at the start are not timed: one for each reader, and the two that the loop runs ahead."""
    return num_readers(config) + 2


def num_steps(args: argparse.Namespace, config: config_lib.Config) -> int:
    """Returns the number of steps that are timed: `--steps`, rounded up to a multiple of the number of readers."""
    readers = num_readers(config)
    return -(-args.steps // readers) * readers


def run(config: config_lib.Config, workdir: str, *, synthetic: bool) -> tuple[float, float]:
    """Returns (seconds per step, seconds of it that a step waited for input), means over the steps that are timed.

    Args:
      config: Run to train, made by `make_config`.
      workdir: Folder of the run.
      synthetic: Whether every step gets the first batch, which stays on the device.
    """
    held: dict = {}

    def put_once(mesh, batch):
        if not held:
            held.update(put(mesh, batch))
        return dict(held)

    def batches(*args, **kwargs):
        with contextlib.closing(read(*args, **kwargs)) as made:
            first = next(made)
            yield dict(first)
            while synthetic:
                yield dict(first)
            ahead = config.data.num_workers * AHEAD_OF_WORKER or config.data.num_threads * AHEAD_OF_THREAD
            yield from itertools.islice(made, ahead, None)

    put, read = mesh_lib.put_batch, loader.train_batches
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loader, "train_batches", batches))
        if synthetic:
            stack.enter_context(mock.patch.object(mesh_lib, "put_batch", put_once))
        # The end of a phase is always saved, which takes as long as many steps.
        nothing = mock.patch.multiple(checkpoint.Checkpoints, prepare=lambda *_: None, save=lambda *_: None)
        stack.enter_context(nothing)
        train.train(run_lib.set_up(config, workdir))
    rows = metric_writer.read_metrics(workdir)[left_out(config) - 1 : -LAST]
    before, after = rows[0], rows[-1]
    seconds = (after["elapsed_s"] - before["elapsed_s"]) / (after["step"] - before["step"])
    return seconds, float(np.mean([row["input_wait_s"] for row in rows[1:]]))


def judge(real_s: float, synthetic_s: float) -> list[str]:
    """Returns the goal, in words, if it is missed.

    Args:
      real_s, synthetic_s: Seconds per step on clips that are read, and on one batch.
    """
    ratio = real_s / synthetic_s
    return [] if ratio <= WANTED else [f"{ratio:.3f}, wanted {WANTED}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2, help="blocks of audio and video; text has half")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan", action="store_true", help="run the blocks as one loop (model.scan_layers)")
    parser.add_argument("--steps", type=int, default=32, help="steps to time, rounded up to a multiple of the readers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--num_threads", type=int, default=2, help="threads that read, and number of batches read ahead")
    parser.add_argument("--num_workers", type=int, default=0, help="worker processes that read instead; 0 uses threads")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}, must be at least 1")
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
                found[synthetic].append(run(config, workdir, synthetic=synthetic))
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
        f"{num_steps(args, config)} steps, medians of {args.rounds} rounds.\n\n"
        + record.markdown(["", "ms a step", "of which waiting for input", "clips/s"], rows)
    )
    missed = judge(real_s, synthetic_s)
    text += f"\n\nMissed: {'; '.join(missed)}." if missed else ""
    record.append("Real data against one batch", text, "jaxlib", "grain", path=args.results)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
