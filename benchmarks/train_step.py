"""The train step beside PyTorch's at the same shapes, in one run: `python -m benchmarks.train_step`.

  * ours: the step that training runs, from decoded clips (uint8 frames, int16 sound) to updated parameters;
  * ours, loss and gradient: the same model from prepared inputs, without optimizer;
  * PyTorch eager: Hugging Face's AST and DistilBERT, EgoVLP's video blocks as in EgoVLP's code, Adam;
  * PyTorch compiled: torch.compile, scaled_dot_product_attention, fused Adam;
  * with `--systems ours,again`, ours once more in a new process: what a warm JAX_COMPILATION_CACHE_DIR saves.
Each system is a process of its own. They take turns, so that what slows the machine slows all of them; every turn begins with
a step that is not timed. PyTorch starts from prepared inputs. With `--backward_only` it does not update parameters, and is
compared with "ours, loss and gradient". `--dtype bfloat16` (PyTorch: autocast) is meant for accelerators, float32 for CPUs.

Prints milliseconds, clips per second, MFU, memory and seconds until the first step. MFU is the model's own FLOPs
(`mc3_jax.compile.model_flops`, forward and twice that backward) per second, relative to a matrix product measured in the same
run, and, in bfloat16 on a card that `mc3_jax.topology` knows by its exact name, to the data sheet. Those FLOPs count only the
class tokens in the last block, as ours computes it; PyTorch's towers compute all of it. In float32 on a GPU both sides use
TensorFloat-32. A system that fails, for example for lack of memory, or whose first step takes longer than `--first_step_s`,
is reported, and the others go on.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np

SYSTEMS = {
    "ours": "mc3_jax, whole step", "ours_gradient": "mc3_jax, loss and gradient", "eager": "PyTorch eager",
    "compiled": "PyTorch compiled", "again": "mc3_jax, whole step, started again",
}  # fmt: skip
# Set for every process. XLA and PyTorch allocate a step's memory by malloc, which would otherwise return it to the kernel, to
# be cleared again for the next step. The Makefile sets the same for training on a CPU.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:"
    "glibc.malloc.top_pad=67108864"
}
NUM_PRODUCTS = 8  # matrix products in one measurement of their rate
# Options that are passed on to a system's process.
WORDS, SWITCHES = ("batch", "depth", "dtype", "remat", "chunk_size"), ("scan", "backward_only")


def make_config(args: argparse.Namespace):
    """Returns the config of the paper's run with the sizes in `args`."""
    from configs import mc3_ego4d

    config = mc3_ego4d.get_config()
    config.data.batch_size, config.model.dtype = args.batch, args.dtype
    config.model.remat, config.model.scan_layers, config.data.chunk_size = args.remat, args.scan, args.chunk_size
    for tower, depth in (("audio", args.depth), ("video", args.depth), ("text", max(args.depth // 2, 1))):
        getattr(config.model, tower).depth = depth
    return config


def _inputs(config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns random inputs as the encoders take them, frames as [b, t, y, x, 3]."""
    b, audio, video, text = config.data.batch_size, config.model.audio, config.model.video, config.model.text
    size = video.image_size_px
    return {
        "audio": rng.standard_normal((b, audio.num_time_frames, audio.num_mel), np.float32),
        "video": rng.standard_normal((b, video.num_frames, size, size, 3), np.float32),
        "text_ids": rng.integers(1000, 2000, (b, text.num_tokens)).astype(np.int32),
        "text_mask": np.ones((b, text.num_tokens), np.int32),
    }


def make_batch(config) -> dict[str, np.ndarray]:
    """Returns a batch of decoded clips as the loader yields it: noise of the paper's sizes, each clip with its own text."""
    from mc3_jax import train_step as step_lib

    rng, canvas_px = np.random.default_rng(0), (256, 344)
    shapes = step_lib.batch_shapes(config, 24_000, canvas_px)
    batch = {name: np.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}
    batch["video"] = rng.integers(0, 256, shapes["video"].shape, np.uint8)
    batch["audio"] = rng.integers(-3000, 3000, shapes["audio"].shape).astype(np.int16)
    batch["text_ids"] = rng.integers(1000, 2000, shapes["text_ids"].shape).astype(np.int32)
    batch["video_size"] = np.tile(np.int32(canvas_px), (config.data.batch_size, 1))
    batch["row"] = np.arange(config.data.batch_size, dtype=np.int32)
    return batch


def _phase(config):
    from mc3_jax import phases as phases_lib

    return phases_lib.Phase(config.phases[1], 0, 1_000_000)


def _draw(model, config, phase):
    """Returns a new training state on the current mesh."""
    import jax

    from mc3_jax import mesh as mesh_lib, train_step as step_lib

    init = functools.partial(step_lib.init_state, model, config, phase)
    return step_lib.draw_state(init, mesh_lib.abstract_state(mesh_lib.make_mesh(), jax.eval_shape(init)))


def make_step(config) -> tuple:
    """Returns (compiled, run): training's own step of the refine phase, and a function that does one step of a new state.

    `run` returns the metrics of its step, and uses the same batch every time. The current mesh must be that of
    `mc3_jax.mesh.make_mesh`. The step is called as in training, so that both share an entry of a compilation cache.
    """
    from mc3_jax import mesh as mesh_lib, model as model_lib, train_step as step_lib

    model, phase = model_lib.make_model(config.model), _phase(config)
    state = _draw(model, config, phase)
    batch, step = mesh_lib.put_batch(mesh_lib.make_mesh(), make_batch(config)), 0
    compiled = step_lib.jit_train_step(model, config, phase, state).lower(state, batch, np.int32(0)).compile()

    def run():
        nonlocal state, step
        state, metrics, _ = compiled(state, batch, np.int32(step))
        step += 1
        return metrics

    return compiled, run


def _serve(step, memory, platform: str, *, is_first_done: bool = False, note: str = "") -> None:
    """Does the first step, then as many steps as each line of stdin says, and answers each line with seconds and bytes.

    One step that is not timed comes before those of a line: while the other systems had their turn, caches have gone cold,
    and a hypervisor may have reclaimed idle memory.
    """
    if not is_first_done:
        step()
    print(json.dumps({"platform": platform, "ready": time.time(), "note": note}), flush=True)
    for line in sys.stdin:
        step()
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps({"seconds": (time.perf_counter() - begin) / int(line), "bytes": memory()}), flush=True)


def serve_ours(args: argparse.Namespace, *, whole: bool) -> None:
    """Serves steps of ours, from clips to updated parameters if `whole`, else the loss and its gradient alone."""
    import jax
    import jax.numpy as jnp

    from mc3_jax import mesh as mesh_lib, model as model_lib, objective, train_step as step_lib

    config = make_config(args)
    mesh = mesh_lib.make_mesh()
    stats = jax.devices()[0].memory_stats() or {}

    def memory() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) if stats else 0

    with jax.set_mesh(mesh):
        if whole:
            _, run = make_step(config)

            def step():
                jax.block_until_ready(run())

        else:
            model = model_lib.make_model(config.model)
            params = _draw(model, config, _phase(config)).params
            inputs = mesh_lib.put_batch(mesh, _inputs(config, np.random.default_rng(0)))
            row = jnp.arange(args.batch)
            key = jax.random.key(0)

            def loss(params, inputs):
                embeddings = model.apply({"params": params}, **inputs, row=row, train=True, rngs={"dropout": key})
                return objective.phase_loss(embeddings, config.phases[0])[0]

            gradient = jax.jit(jax.value_and_grad(loss), compiler_options=step_lib.compiler_options(jax.devices()[0]))

            def step():
                jax.block_until_ready(gradient(params, inputs))

        _serve(step, memory, jax.devices()[0].platform)


def serve_torch(args: argparse.Namespace, *, compiled: bool) -> None:
    """Serves steps of PyTorch, eager or compiled."""
    import torch
    import torch._inductor.config

    from benchmarks import torch_peers

    config = make_config(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 on a GPU, as by default in JAX
    model = torch_peers.ThreeTowers(config.model, fused=compiled).to(device).train()
    inputs = {name: torch.from_numpy(value).to(device) for name, value in _inputs(config, np.random.default_rng(0)).items()}
    inputs["video"] = inputs["video"].permute(0, 1, 4, 2, 3).contiguous()
    inputs = {name: value.long() if value.dtype == torch.int32 else value for name, value in inputs.items()}
    optimizer = torch.optim.Adam(model.parameters(), 3e-5, **({"fused": True} if compiled else {}))
    forward = torch.compile(model) if compiled else model
    narrow = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def step():
        with narrow:
            loss = forward(**inputs)
        loss.backward()
        if not args.backward_only:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    note = ""
    if compiled and torch.__version__.startswith("2.11."):
        note = "without coalesce_tiling_analysis"  # this part of Inductor fails an internal assertion on the video blocks
        torch._inductor.config.triton.coalesce_tiling_analysis = False
    step()

    def memory() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else 0

    _serve(step, memory, device.replace("cuda", "gpu"), is_first_done=True, note=note)


def serve_matmul(args: argparse.Namespace) -> None:
    """Serves matrix products, whose rate is taken as the most that the machine can do."""
    import jax

    platform = jax.devices()[0].platform
    size = _product_size(platform)
    x = (jax.random.normal(jax.random.key(0), (size, size)) * size**-0.5).astype(args.dtype)  # products stay as large as x

    @jax.jit
    def products(x):  # several, so that the cost of starting them does not count
        y = x
        for _ in range(NUM_PRODUCTS):
            y = x @ y
        return y

    _serve(lambda: jax.block_until_ready(products(x)), lambda: 0, platform)


def _product_size(platform: str) -> int:
    """Returns the number of rows, and of columns, of the matrices whose products are timed."""
    return 2048 if platform == "cpu" else 8192


class Child:
    """A system in a process of its own.

    Attributes:
      answers: Seconds per step and bytes of memory in each round.
      platform: "cpu", "gpu" or "tpu".
      started_s: Seconds from the start of the process to the end of its first step.
      failed: Why the system has failed, "" if it has not.
      note: Remark that follows its name in the table.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        """Starts the process with the options of `args`; call `wait` before anything else."""
        words = [f"--{word}={getattr(args, word)}" for word in WORDS]
        words += [f"--{switch}" for switch in SWITCHES if getattr(args, switch)]
        environment = os.environ | KEEP_MEMORY | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", f"--serve={name}", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.answers, self.failed, self.note, self.platform, self.started_s = [], "", "", "", float("nan")
        self._began = time.time()

    def wait(self, limit_s: float = 0.0) -> None:
        """Waits for the first step; ends the process if that takes longer than `limit_s` since its start (0: no limit)."""
        is_late = threading.Event()

        def end():
            is_late.set()
            self.process.kill()

        # At least a second, to read the answer of a first step that was done in time while another system was waited for.
        timer = threading.Timer(max(self._began + limit_s - time.time(), 1.0), end)
        if limit_s:
            timer.start()
        answer = self._read()
        timer.cancel()
        if is_late.is_set():
            self.failed = f"no step within {limit_s:g} s"
        elif answer:
            self.platform, self.note = answer["platform"], answer["note"]
            self.started_s = answer["ready"] - self._began

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.failed = f"ended with status {self.process.wait()}"
        return {}

    def run(self, num_steps: int) -> None:
        """Times a number of steps and appends the answer to `answers`; does nothing if the system has failed."""
        if self.failed:
            return
        with contextlib.suppress(BrokenPipeError):  # the process has ended since its last turn; `_read` finds out why
            self.process.stdin.write(f"{num_steps}\n")
            self.process.stdin.flush()
        answer = self._read()
        self.answers += [answer] if answer else []

    def stop(self) -> None:
        """Ends the process; its answers are kept."""
        if not self.failed:
            self.process.stdin.close()
            self.process.wait()

    @property
    def seconds(self) -> float:
        """Median over rounds of the seconds per step, NaN if there was none."""
        return float(np.median([answer["seconds"] for answer in self.answers])) if self.answers else float("nan")

    @property
    def memory_gib(self) -> str:
        """Peak memory in GiB as text, a dash if it isn't measured."""
        most = max((answer["bytes"] for answer in self.answers), default=0)
        return f"{most / 2**30:.1f}" if most else "–"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--depth", type=int, default=12, help="blocks of audio and video; text has half")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan", action="store_true", help="run the blocks as one loop (model.scan_layers)")
    parser.add_argument("--chunk_size", type=int, default=0, help="data.chunk_size of mc3_jax's step")
    parser.add_argument("--systems", default="ours,ours_gradient,eager,compiled", help=f"what to time: {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--first_step_s", type=float, default=0, help="most seconds until a system's first step; 0: no limit")
    parser.add_argument("--backward_only", action="store_true", help="PyTorch without its optimizer")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--alone", action="store_true", help="one system after the other, if memory can't hold them together")
    order.add_argument("--together", action="store_true", help="start all at once: sooner done, but first steps take longer")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve = {
            "ours": lambda: serve_ours(args, whole=True), "again": lambda: serve_ours(args, whole=True),
            "ours_gradient": lambda: serve_ours(args, whole=False),
            "eager": lambda: serve_torch(args, compiled=False), "compiled": lambda: serve_torch(args, compiled=True),
            "matmul": lambda: serve_matmul(args),
        }  # fmt: skip
        serve[args.serve]()
        return
    children = measure(args)
    report(args, children)


def measure(args: argparse.Namespace) -> dict[str, Child]:
    """Returns name → system, after all rounds; ends the process if systems ran on different platforms."""
    names = [*args.systems.split(","), "matmul"]
    children = {name: Child(name, args) for name in names} if args.together else {}
    for name in names:
        child = children[name] = children.get(name) or Child(name, args)
        child.wait(args.first_step_s)
        told = child.failed or f"on {child.platform}, first step after {child.started_s:.0f} s"
        if args.alone:
            for _ in range(args.rounds):
                child.run(args.steps)
            child.stop()
            told += "" if child.failed else f", {1000 * child.seconds:.0f} ms a step"
        print(f"{name}: {told}", file=sys.stderr, flush=True)
    if not args.alone:
        for _ in range(args.rounds):
            for child in children.values():
                child.run(args.steps)
        for child in children.values():
            child.stop()
    platforms = {child.platform for child in children.values() if child.platform}
    if len(platforms) > 1:
        told = ", ".join(f"{name} on {child.platform}" for name, child in children.items())
        raise SystemExit(f"error: no comparison, {told}: install a PyTorch and a JAX that both see the accelerator")
    return children


def report(args: argparse.Namespace, children: dict[str, Child]) -> None:
    """Prints the table and appends it to the results; ends the process, with status 1 if a system failed."""
    import jax

    from benchmarks import record
    from mc3_jax import compile as compile_lib, topology

    config = make_config(args)
    flops = args.batch * compile_lib.model_flops(config, config.phases[1])
    has_failed = any(child.failed for child in children.values())
    matmul = children.pop("matmul")
    peak = NUM_PRODUCTS * 2 * _product_size(matmul.platform) ** 3 / matmul.seconds
    measured = f"gives {peak / 1e12:.2f} TFLOP/s" if matmul.answers else f"was not measured: {matmul.failed}"
    chip = topology.chip_of(jax.devices()[0].device_kind) if args.dtype == "bfloat16" else None
    rows = []
    for name, child in children.items():
        if child.failed:
            rows.append([SYSTEMS[name], child.failed, *[""] * 5])
            continue
        rate, label = flops / child.seconds, ", ".join(filter(None, (SYSTEMS[name], child.note)))
        rows.append([
            label, f"{1000 * child.seconds:.0f}", f"{args.batch / child.seconds:.1f}",
            f"{100 * rate / peak:.1f}" if matmul.answers else "–",
            f"{100 * rate / chip.flops_per_s:.1f}" if chip else "–", child.memory_gib, f"{child.started_s:.0f}",
        ])  # fmt: skip
    # Compared are steps with an optimizer on both sides, or on neither.
    own = "ours_gradient" if args.backward_only else "ours"
    for other in ("eager", "compiled"):
        if own in children and other in children and not (children[own].failed or children[other].failed):
            ratio = children[own].seconds / children[other].seconds
            rows.append([f"{SYSTEMS[own]} / {SYSTEMS[other]}", f"{ratio:.2f}", *[""] * 5])
    header = ["", "ms a step", "clips/s", "MFU, % of measured", "% of data sheet", "GiB at its peak", "s to the first step"]
    layers = "in a loop" if args.scan else "one after the other"
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    text = (
        f"Batch {args.batch}, depth {args.depth}, ours with blocks {layers}, remat {args.remat}, {args.dtype}; PyTorch "
        f"{'without' if args.backward_only else 'with'} its optimizer; {flops / 1e12:.2f} TFLOP a step; a matrix product "
        f"{measured}; medians of {args.rounds} rounds of {args.steps} behind one more, "
        f"{'one system after the other' if args.alone else 'in turn'}{', started together' * args.together}; malloc keeps "
        "memory; "
        f"{'compilation cache of JAX in use' if cache else 'no compilation cache'}.\n\n" + record.markdown(header, rows)
    )
    record.append("Train step", text, "jaxlib", "flax", "torch", "transformers", path=args.results)
    sys.exit(1 if has_failed else 0)


if __name__ == "__main__":
    main()
