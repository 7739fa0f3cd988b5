"""Six-pair InfoNCE at growing batches, with the whole matrix and in blocks: `python -m benchmarks.contrastive`.

Measures the time of the loss and its gradient, and the peak memory beyond the embeddings and their gradient. Each form and
batch runs in a process of its own. Above `--dense_up_to` the whole matrix is skipped. Ends with status 1 if a process fails
or a goal is missed: blocks take at most 2 GiB at 65,536 rows, and at most 1.5 times as long as the whole matrix at the
largest batch that both were run at.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time

import jax
import numpy as np

from benchmarks import record
from mc3_jax.losses import contrastive

DIM, LARGEST = 256, 65_536
WANTED_GIB, WANTED_RATIO = 2.0, 1.5


def measure(batch: int, block_rows: int, repeats: int) -> dict[str, float]:
    """Returns {"seconds", the median; "compile_s"; "beyond_gib", memory beyond the inputs and the gradient}.

    On a CPU this memory is the process's peak minus what it held before the first run. On an accelerator it is the temporary
    memory that the compiled program states. One more run, not timed, comes first, unless `repeats` is 1.
    """
    rng = np.random.default_rng(0)
    embeddings = {}
    for name in ("audio", "video", "text"):
        x = rng.standard_normal((batch, DIM), np.float32)
        embeddings[name] = jax.device_put(x / np.linalg.norm(x, axis=1, keepdims=True))
    del x
    loss = jax.value_and_grad(lambda x: contrastive.contrastive_loss(x, 0.05, block_rows=block_rows)[0])
    begin = time.perf_counter()
    compiled = jax.jit(loss).lower(embeddings).compile()
    compile_s = time.perf_counter() - begin
    before = _resident_bytes()
    seconds = []
    for _ in range(repeats + (repeats > 1)):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(embeddings))
        seconds.append(time.perf_counter() - begin)
    if jax.devices()[0].platform == "cpu":
        beyond = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - 3 * batch * DIM * 4
    else:
        beyond = compiled.memory_analysis().temp_size_in_bytes
    seconds = seconds[1:] if repeats > 1 else seconds
    return {"seconds": float(np.median(seconds)), "compile_s": compile_s, "beyond_gib": beyond / 2**30}


def _resident_bytes() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def count_flops(batch: int, form: str) -> int:
    """Returns the FLOPs of the matrix products in the loss and its gradient.

    The similarities of a pair are a product [b, d] @ [d, b]: b² sums of d terms, 2 b² d FLOPs. The gradient takes two
    products of as many FLOPs, [b, b] @ [b, d] for each side of the pair, and in blocks the similarities once more. So each of
    the three pairs takes three products with the whole matrix and four in blocks.

    Args:
      batch: b, rows of each modality; d is `DIM`.
      form: "whole" or "blocks".
    """
    num_pairs, num_products = 3, {"whole": 3, "blocks": 4}[form]
    return num_pairs * num_products * 2 * batch**2 * DIM


def judge(ratio: float | None, beyond_gib: float | None) -> list[str]:
    """Returns, in words, the goals that are missed; None is a number that was not measured, whose goal is not judged.

    Args:
      ratio: Time in blocks relative to that of the whole matrix.
      beyond_gib: Memory that blocks take at `LARGEST` rows.
    """
    missed = []
    if ratio is not None and not ratio <= WANTED_RATIO:
        missed.append(f"{ratio:.2f} times the whole matrix's time, wanted {WANTED_RATIO}")
    if beyond_gib is not None and not beyond_gib <= WANTED_GIB:
        missed.append(f"{beyond_gib:.2f} GiB at {LARGEST:,}, wanted {WANTED_GIB}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contrastive", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1024,4096,8192,16384,65536")
    parser.add_argument("--dense_up_to", type=int, default=16_384)
    parser.add_argument("--block_rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of batches up to --dense_up_to; larger run once")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # "batch,block_rows,repeats", in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*map(int, args.one.split(",")))))
        return
    found: dict[tuple[int, str], dict] = {}
    failed: dict[tuple[int, str], str] = {}
    for batch in map(int, args.batches.split(",")):
        for form, block_rows in (("whole", 0), ("blocks", args.block_rows)):
            if (form == "whole" and batch > args.dense_up_to) or (form == "blocks" and batch <= args.block_rows):
                continue
            repeats = args.repeats if batch <= args.dense_up_to else 1
            command = [sys.executable, "-m", "benchmarks.contrastive", f"--one={batch},{block_rows},{repeats}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                failed[batch, form] = f"ended with status {done.returncode}"
                continue
            found[batch, form] = json.loads(done.stdout.splitlines()[-1])
            print(batch, form, found[batch, form], file=sys.stderr, flush=True)
    rows, forms = [], {"whole": "the whole matrix", "blocks": f"{args.block_rows} rows at a time"}
    for (batch, form), numbers in found.items():
        rate = f"{count_flops(batch, form) / numbers['seconds'] / 1e9:.0f}"
        rows.append([f"{batch:,}", forms[form], f"{numbers['seconds']:.3g}", rate, f"{numbers['beyond_gib']:.2f}",
                     f"{numbers['compile_s']:.1f}"])  # fmt: skip
    rows += [[f"{batch:,}", forms[form], how, "", "", ""] for (batch, form), how in failed.items()]
    missed = [f"{forms[form]} at {batch:,} {how}" for (batch, form), how in failed.items()]
    both = [batch for batch, form in found if form == "whole" and (batch, "blocks") in found]
    ratio = found[max(both), "blocks"]["seconds"] / found[max(both), "whole"]["seconds"] if both else None
    if both:
        rows.append([f"{max(both):,}", "blocks / whole", f"{ratio:.2f}", "", "", ""])
    missed += judge(ratio, found.get((LARGEST, "blocks"), {}).get("beyond_gib"))
    header = ["batch", "similarities", "s, value and gradient", "GFLOP/s", "GiB beyond inputs and gradient", "s compiling"]
    text = record.markdown(header, rows) + (f"\n\nMissed: {'; '.join(missed)}." if missed else "")
    record.append("Six-pair InfoNCE, 256-d", text, path=args.results)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
