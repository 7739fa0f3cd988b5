"""The rate of large matrix products by JAX and by PyTorch, each in a process of its own, for `benchmarks.train_step`.

MFU is relative to the fastest of them. A card's clock needs a while to settle, and libraries choose other kernels for other
shapes. So products of several shapes are timed, each for so long that a card computes for at least half a second in a round.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.timed_process import TimedProcess

LIBRARIES = {"matmul": "JAX", "matmul_torch": "PyTorch"}
# Rows m and columns n of [m, n] @ [n, n], and the least seconds for which each shape is timed in a round.
ON_CPU = ((2048, 2048),), 0.1
ON_ACCELERATOR = ((8192, 8192), (16384, 8192), (16384, 16384)), 0.25
# FLOP/s of large bfloat16 products that the goal for MFU was set by, by the card's name in JAX. It was not measured here: in
# two runs of this module an H200 gave 695 and 698 TFLOP/s, while the train step's own products reached 733.
REACHED = {"NVIDIA H200": 790e12}


def set_up_torch() -> str:
    """Lets PyTorch use all cores and, on a GPU, TensorFloat-32, as JAX does by default; returns its device."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    return "cuda" if torch.cuda.is_available() else "cpu"


def rate(run: Callable[[int], None], flops: float, least_s: float) -> float:
    """Returns FLOP/s of products that are run for at least `least_s`.

    Args:
      run: Runs a number of products and returns when they are done.
      flops: Of one product.
      least_s: Seconds.
    """
    run(1)  # compiles
    num = 1
    while True:
        begin = time.perf_counter()
        run(num)
        seconds = time.perf_counter() - begin
        if seconds >= least_s:
            return num * flops / seconds
        num = max(2 * num, math.ceil(1.2 * num * least_s / seconds))


def serve(make: Callable[[int, int], Callable[[int], None]], platform: str) -> None:
    """Answers every line of stdin with the rates of all shapes; otherwise as `timed_process.serve`.

    Until the first line the process holds next to no memory, which other systems may need.

    Args:
      make: Returns, for m and n, a function that runs a number of products [m, n] @ [n, n], each of the last one's result.
      platform: "cpu", "gpu" or "tpu".
    """
    print(json.dumps({"platform": platform, "ready": time.time(), "note": ""}), flush=True)
    shapes, least_s = ON_CPU if platform == "cpu" else ON_ACCELERATOR
    for _ in sys.stdin:
        begin = time.perf_counter()
        rates = [rate(make(m, n), 2 * m * n**2, least_s) for m, n in shapes]
        print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": 0, "rates": rates}), flush=True)


def serve_jax(dtype: str) -> None:
    """Serves products by JAX."""
    import jax

    product = jax.jit(lambda x, y: x @ y)

    def make(m: int, n: int) -> Callable[[int], None]:
        first, x = (jax.random.normal(jax.random.key(i), (rows, n), dtype) for i, rows in enumerate((m, n)))
        x = x * n**-0.5  # products stay as large as the first factor

        def run(num: int) -> None:
            y = first
            for _ in range(num):
                y = product(y, x)
            y.block_until_ready()

        return run

    serve(make, jax.devices()[0].platform)


def serve_torch(dtype: str) -> None:
    """Serves products by PyTorch."""
    import torch

    device = set_up_torch()

    def make(m: int, n: int) -> Callable[[int], None]:
        first, x = (torch.randn(rows, n, device=device, dtype=getattr(torch, dtype)) for rows in (m, n))
        x *= n**-0.5

        def run(num: int) -> None:
            y = first
            for _ in range(num):
                y = y @ x
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    serve(make, device.replace("cuda", "gpu"))


def fastest(processes: dict[str, TimedProcess], platform: str) -> tuple[float, str]:
    """Returns (FLOP/s of the fastest product, its name), by medians over rounds; (NaN, why not) if none was measured.

    Args:
      processes: Processes by their name in `LIBRARIES`.
      platform: That of the systems that are compared with the products; a process that ran on another does not count.
    """
    shapes, _ = ON_CPU if platform == "cpu" else ON_ACCELERATOR
    found, others = [], []
    for name, process in processes.items():
        if process.answers and process.platform == platform:
            medians = np.median([answer["rates"] for answer in process.answers], axis=0).tolist()
            labels = [f"{m:,} x {n:,} x {n:,} by {LIBRARIES[name]}" for m, n in shapes]
            found += zip(medians, labels, strict=True)
        else:
            others.append(f"{LIBRARIES[name]}: {process.failed or f'on {process.platform}'}")
    return max(found, default=(math.nan, "; ".join(others)))
