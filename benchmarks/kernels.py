"""Where the time of a training step goes: `python -m benchmarks.kernels`.

Compiles training's own step, traces some steps with JAX's profiler, and looks up each kernel in the compiled program. Matrix
products and cuDNN's attention are listed by themselves, all else that XLA compiled by the part of the model it belongs to.
Milliseconds are sums over kernels, which on a CPU may overlap; bytes are those read and written by `mc3_jax.hlo`'s count.
"""

import argparse
import collections
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

from benchmarks import paper_step, record
from mc3_jax import compile as compile_lib, config as config_lib, hlo, hlo_text, mesh as mesh_lib
from mc3_jax.models import layers

PRODUCTS, ATTENTION, COPIES = "matrix products by cuBLAS", "attention by cuDNN", "copies"
XLA_PRODUCTS = "matrix products by XLA"
# Patterns of the names of kernels that come from libraries, not from XLA.
LIBRARIES = {PRODUCTS: r"nvjet|gemm|cutlass|splitK", ATTENTION: r"cudnn|sdpa", COPIES: r"(?i)^mem(cpy|set)"}
REST = "front end, loss, optimizer"
# Names in an operation's path that tell no part apart: JAX's own, and modules that all towers have.
_NO_MODULES = r"encoder|block_\d+|while|body|cond|branch_\d+_fun|checkpoint|rematted_computation|closed_call|shard_map"
_CALLERS = ("while", "conditional", "call", "async-start")  # not counted: their bodies' instructions are events, too


def find_events(folder: str) -> Iterator[tuple[str, float]]:
    """Yields (name, milliseconds) for each kernel in a trace, or on a CPU for each instruction of the program."""
    path = max(pathlib.Path(folder).rglob("*.xplane.pb"))
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        is_gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if is_gpu and not line.name.startswith("Stream"):
                continue  # repeats the same time by module and by step
            for event in line.events:
                name = event.name if is_gpu else dict(event.stats).get("hlo_op")
                if name:
                    yield name, event.duration_ns / 1e6


def part_of(op_name: str) -> str:
    """Returns an operation's part of the model, with ", back" if in the backward pass, or ", again" if recomputed for it."""
    *path, _ = op_name.split("/")
    start = next((i for i, name in enumerate(path) if name in config_lib.MODALITIES), None)
    if start is None:
        return REST
    modules = [name for name in path[start:] if re.fullmatch(r"[a-z]\w*", name) and not re.fullmatch(_NO_MODULES, name)]
    again = ", again" if "rematted_computation" in path else ", back" if "transpose(" in op_name else ""
    return " ".join(dict.fromkeys(modules)) + again


def sort_events(events: Iterator[tuple[str, float]], text: str) -> dict[str, list[float]]:
    """Returns part → [milliseconds, launches, bytes], summed over a program's events, the longest first.

    A kernel that XLA uses for several equal instructions counts for the one that it is named after. Kernels that are not in
    the program, such as those of libraries, count 0 bytes, since their traffic is not known.

    Args:
      events: (name, milliseconds) of each event.
      text: Text of the compiled program.
    """
    computations, _ = hlo_text.parse(text)
    # GPU kernels have the name of an instruction, with underscores instead of dots and hyphens.
    found = {
        re.sub(r"[.-]", "_", instruction.name): (computation, instruction)
        for computation in computations.values() for instruction in computation.instructions.values()
    }  # fmt: skip
    parts = collections.defaultdict(lambda: [0.0, 0, 0])
    for name, milliseconds in events:
        where = found.get(re.sub(r"[.-]", "_", name))
        if where is not None and where[1].opcode in _CALLERS:
            continue
        library = next((part for part, pattern in LIBRARIES.items() if re.search(pattern, name)), None)
        if where is None:
            part = library or "not in the program"
        elif hlo.count_instruction(computations, *where).flops:
            part = XLA_PRODUCTS
        else:
            op_name = re.search(r'op_name="([^"]*)"', where[1].attributes)
            part = part_of(op_name[1]) if op_name else COPIES if "copy" in name else REST
        parts[part][0] += milliseconds
        parts[part][1] += 1
        if where is not None:
            parts[part][2] += hlo.count_instruction(computations, *where).memory_bytes
    return dict(sorted(parts.items(), key=lambda item: -item[1][0]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--depth", type=int, default=12, help="blocks of audio and video; text has half")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none", choices=tuple(layers.REMAT_POLICIES))
    parser.add_argument("--scan", action="store_true", help="run the blocks as one loop (model.scan_layers)")
    parser.add_argument("--steps", type=int, default=2, help="number of steps to trace")
    parser.add_argument("--parts", type=int, default=30, help="number of parts to print, the longest first")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args()
    if min(args.batch, args.depth, args.steps) < 1:
        parser.error("--batch, --depth and --steps must be at least 1")
    config = paper_step.make_config(
        batch=args.batch, depth=args.depth, dtype=args.dtype, remat=args.remat, scan=args.scan
    )
    with jax.set_mesh(mesh_lib.make_mesh()):
        compiled, run = paper_step.make_step(config)
        jax.block_until_ready(run())
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - begin)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(args.steps):
                    jax.block_until_ready(run())
            parts = sort_events(find_events(folder), compiled.as_text())
    seconds, flops = statistics.median(times), args.batch * compile_lib.model_flops(config, config.phases[1])
    total = sum(milliseconds for milliseconds, _, _ in parts.values()) / args.steps
    rows = []
    for part, (milliseconds, launches, num_bytes) in list(parts.items())[: args.parts]:
        each = [milliseconds / args.steps, launches / args.steps, num_bytes / args.steps / 1e9]
        rate = f"{1000 * each[2] / each[0]:.0f}" if num_bytes and each[0] else ""
        rows.append([part, f"{each[0]:.2f}", f"{each[1]:.0f}", f"{each[2]:.1f}" if num_bytes else "", rate])
    blocks = "in a loop" if args.scan else "one after the other"
    told = (
        f"Batch {args.batch}, depth {args.depth}, {args.dtype}, blocks {blocks}, remat {args.remat}: {1000 * seconds:.1f} ms "
        f"a step that is not traced, {flops / seconds / 1e12:.2f} TFLOP/s of the model's FLOPs. Of {args.steps} that are, "
        f"kernels take {total:.1f} ms a step; the {len(rows)} longest of {len(parts)} parts:\n\n"
    )
    table = record.markdown(["part", "ms", "launches", "GB", "GB/s"], rows)
    record.append("Kernels of a step", told + table, "jaxlib", "flax", path=args.results)
    if not rows:
        sys.exit("the trace holds no kernel")


if __name__ == "__main__":
    main()
