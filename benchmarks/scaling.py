"""What a step costs as its work grows and as devices are added: `python -m benchmarks.scaling`.

The step is that of the paper's run, in the sizes of the options. Work: time and memory of the step are measured at growing
batches, each in a process of its own, on this machine's accelerator or CPU. Devices: `mc3_jax.compile` compiles the step for
more and more devices, with the batch growing in proportion. FLOPs, memory traffic and bytes sent are counted in the compiled
program; times are lower bounds from the data sheet, not measured.

Each of the two parts is written when it ends. A batch that fails or a topology whose memory does not hold the step leaves the
other rows as they are, and the benchmark then ends with status 1.
"""

import argparse
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

import jax

from benchmarks import paper_step, record, train_step
from mc3_jax import compile as compile_lib, topology as topology_lib

MEASURED = ["batch", "ms a step", "ms a clip", "of the first", "model TFLOP/s", "GiB at its peak", "s to the first step"]
COUNTED = [
    "devices", "batch", "TFLOP per device", "of the model's", "GB of memory traffic", "MB sent", "GiB", "ms computing",
    "ms memory", "ms interconnect", "MFU at most, %", "s compiling",
]  # fmt: skip


def _sizes(args: argparse.Namespace, batch: int) -> dict:
    """Returns what `paper_step.make_config` takes."""
    return {"batch": batch, "depth": args.depth, "dtype": args.dtype, "remat": args.remat, "scan": args.scan}


def measure_work(args: argparse.Namespace) -> Iterator[tuple[list[str], bool]]:
    """Yields the rows of `MEASURED`, a step's cost by batch, and whether each could be measured.

    Time per clip is also relative to that of the first batch.
    """
    first_s = 0.0
    for batch in map(int, args.batches.split(",")):
        sizes = _sizes(args, batch)
        ours = train_step.start("ours", **sizes)
        ours.wait()
        for _ in range(args.rounds):
            ours.run(args.steps)
        ours.stop()
        if ours.failed:
            yield [f"{batch:,}", ours.failed], False
            continue
        config = paper_step.make_config(**sizes)
        flops = batch * compile_lib.model_flops(config, config.phases[1])
        per_clip = ours.seconds / batch
        first_s = first_s or per_clip
        yield [
            f"{batch:,}", f"{1000 * ours.seconds:.0f}", f"{1000 * per_clip:.1f}", f"{per_clip / first_s:.2f}",
            f"{flops / ours.seconds / 1e12:.2f}", ours.memory_gib, f"{ours.started_s:.0f}",
        ], True  # fmt: skip


def count_devices(args: argparse.Namespace) -> Iterator[tuple[list[str], bool]]:
    """Yields the rows of `COUNTED`, what the compiled step needs on each topology, and whether it fits."""
    for topology in args.topologies.split(","):
        batch = args.batch_per_device * len(topology_lib.find_devices(topology))
        try:
            report = compile_lib.compile_step(paper_step.make_config(**_sizes(args, batch)), topology)
        except MemoryError as error:
            yield [topology, f"{batch:,}", str(error)], False
            continue
        wire = sum(exchange.wire_bytes for exchange in report.counts.exchanges)
        excess = report.counts.flops * report.num_chips / report.model_flops
        bounds = [f"{1000 * seconds:.0f}" for seconds in report.bounds_s.values()] or ["–"] * 3
        yield [
            topology, f"{batch:,}", f"{report.counts.flops / 1e12:.2f}", f"{excess:.3f}",
            f"{report.counts.memory_bytes / 1e9:.1f}", f"{wire / 1e6:.0f}", f"{report.peak_bytes / 2**30:.1f}", *bounds,
            f"{100 * report.mfu_bound:.0f}" if report.chip else "–", f"{report.trace_s + report.compile_s:.0f}",
        ], True  # fmt: skip


def write(told: str, header: list[str], rows: Iterator[tuple[list[str], bool]], path: pathlib.Path | None) -> bool:
    """Appends a table and returns whether no row failed; if an error, SIGTERM or Ctrl-C ends it, appends the rows so far.

    Args:
      told: Text above the table.
      header: Its header.
      rows: Its rows, of which those that failed may be short, and whether each is good.
      path: As for `record.append`.
    """
    lines, is_good, end = [], True, " Cut off before its end."
    try:
        for row, is_row_good in rows:
            lines.append(row + [""] * (len(header) - len(row)))
            is_good = is_good and is_row_good
            print(row, file=sys.stderr, flush=True)
        end = ""
    finally:
        record.append("Scaling", f"{told}{end}\n\n{record.markdown(header, lines)}", "jaxlib", "libtpu", path=path)
    return is_good


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,2,4,8", help="batch sizes to measure; '' skips this part")
    parser.add_argument("--topologies", default="cpu:1,cpu:2,cpu:4,cpu:8", help="to compile for; '' skips this part")
    parser.add_argument("--batch_per_device", type=int, default=4)
    parser.add_argument("--depth", type=int, default=12, help="blocks of audio and video; text has half")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan", action="store_true", help="run the blocks as one loop (model.scan_layers)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args()
    # This process counts FLOPs after the first batch: it must leave the GPU's memory to the processes that it times.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    cpus = [int(topology.partition(":")[2]) for topology in args.topologies.split(",") if topology.startswith("cpu:")]
    jax.config.update("jax_num_cpu_devices", max(cpus, default=1))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    layers = "in a loop" if args.scan else "one after the other"
    sizes = f"Depth {args.depth}, {args.dtype}, remat {args.remat}; blocks {layers}."
    is_good = True
    if args.batches:
        told = f"{sizes} Measured, medians of {args.rounds} rounds of {args.steps}."
        is_good = write(told, MEASURED, measure_work(args), args.results)
    if args.topologies:
        told = f"{sizes} Compiled, {args.batch_per_device} clips a device."
        is_good = write(told, COUNTED, count_devices(args), args.results) and is_good
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
