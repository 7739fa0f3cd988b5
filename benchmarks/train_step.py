"""The train step beside PyTorch's at the same shapes, in one run: `python -m benchmarks.train_step`.

  * ours: the step that training runs, from decoded clips (uint8 frames, int16 sound) to updated parameters;
  * ours, loss and gradient: the same model from prepared inputs, without optimizer;
  * PyTorch eager: Hugging Face's AST and DistilBERT, EgoVLP's video blocks as in EgoVLP's code, Adam;
  * PyTorch compiled: torch.compile, scaled_dot_product_attention except over time, fused Adam;
  * with `--systems ours,again`, ours once more in a new process: what a warm JAX_COMPILATION_CACHE_DIR saves.
Each system is a process of its own (`benchmarks.timed_process`). They take turns, so that what slows the machine slows all of
them; every turn begins with a step that is not timed. PyTorch starts from prepared inputs. With `--backward_only` it does not
update parameters, and is compared with "ours, loss and gradient". `--dtype bfloat16` (PyTorch: autocast) is meant for
accelerators, float32 for CPUs.

Prints milliseconds, clips per second, FLOPs of a clip, MFU, memory and seconds until the first step. FLOPs are those of the
matrix products of the forward pass, and twice that for the backward pass: 5.6 % fewer for ours (`mfu.model_flops`), which
computes the class tokens alone in the last blocks, than for PyTorch's towers (`torch_peers.clip_flops`), which compute them
whole. MFU is each system's own FLOPs per second, relative to the fastest matrix product of `benchmarks.matmul` in the same
run, and, in bfloat16 on a card that `mc3_jax.topology` knows by its exact name, to the data sheet. The goal for MFU is
judged by the larger of that product and `matmul.REACHED`. In float32 on a GPU both sides use TensorFloat-32. Memory is the
most that a system has held on the device; on a CPU it is the most that was resident in its process, compiler included.

A system that fails, for example for lack of memory, or whose first step takes longer than `--first_step_s`, is reported, and
the others go on. If SIGTERM or Ctrl-C cuts the benchmark off, it writes what it has measured. It ends with status 1 if a
system failed or one of the `GOALS` for this machine is missed. They hold for the model's full depth, in bfloat16 on a GPU and
in float32 on a CPU; a goal whose systems were not run is not judged.
"""

import argparse
import importlib.util
import math
import os
import pathlib
import signal
import sys
import time

import numpy as np

from benchmarks import matmul, paper_step
from benchmarks.timed_process import TimedProcess, peak_resident_bytes, serve, settings

SYSTEMS = {
    "ours": "mc3_jax, whole step", "ours_gradient": "mc3_jax, loss and gradient", "eager": "PyTorch eager",
    "compiled": "PyTorch compiled", "again": "mc3_jax, whole step, started again",
}  # fmt: skip
DEPTH, DTYPES = 12, {"gpu": "bfloat16", "cpu": "float32"}  # at which goals are judged
MFU_BATCH = 128  # from which MFU is judged: its goal is for 256 clips, of which a card of 80 GB holds half
# Goals by platform: what is measured → on which side of its limits it has to be, and the limits.
GOALS = {
    "gpu": {
        "times the clips/s of PyTorch eager": ("at least", 2.0),
        "times the clips/s of PyTorch compiled": ("at least", 1.15),
        "% of what matrix products reach": ("at least", 45.0, 60.0),
        "s to the first step, nothing cached": ("at most", 120.0),
        "s to the first step, started again": ("at most", 20.0),
    },
    "cpu": {
        "times the time of PyTorch eager": ("at most", 1.0),
        "times the time of PyTorch compiled": ("at most", 1.05),
    },
}
SIZES = ("batch", "depth", "dtype", "remat", "scan", "chunk_size")  # options that `paper_step.make_config` takes


def _sizes(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in SIZES}


def start(system: str, *, backward_only: bool = False, **sizes) -> TimedProcess:
    """Starts a system in a process of its own.

    Args:
      system: Of `SYSTEMS` or `matmul.LIBRARIES`.
      backward_only: Whether PyTorch does without its optimizer.
      **sizes: Of `paper_step.make_config`.
    """
    options = sizes | {"backward_only": backward_only}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value is not False]
    return TimedProcess(["benchmarks.train_step", f"--serve={system}", *words])


def _peak_bytes() -> int:
    """Returns the most memory that JAX has held on its first device; on a CPU, the most that was resident in the process."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return peak_resident_bytes()
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def serve_ours(args: argparse.Namespace) -> None:
    """Serves the step that training runs."""
    import jax

    from mc3_jax import mesh as mesh_lib

    with jax.set_mesh(mesh_lib.make_mesh()):
        _, run = paper_step.make_step(paper_step.make_config(**_sizes(args)))
        serve(lambda: jax.block_until_ready(run()), _peak_bytes, jax.devices()[0].platform)


def serve_gradient(args: argparse.Namespace) -> None:
    """Serves our loss and its gradient, from prepared inputs and without an optimizer."""
    import jax
    import jax.numpy as jnp

    from mc3_jax import mesh as mesh_lib, model as model_lib, objective, train_step as step_lib

    config, mesh, device = paper_step.make_config(**_sizes(args)), mesh_lib.make_mesh(), jax.devices()[0]
    model = model_lib.make_model(config.model)
    with jax.set_mesh(mesh):
        params = paper_step.draw_state(model, config).params
        inputs = mesh_lib.put_batch(mesh, paper_step.make_inputs(config))
        row, key = jnp.arange(args.batch), jax.random.key(0)

        def loss(params, inputs):
            embeddings = model.apply({"params": params}, **inputs, row=row, train=True, rngs={"dropout": key})
            return objective.phase_loss(embeddings, config.phases[0])[0]

        gradient = jax.jit(jax.value_and_grad(loss), compiler_options=step_lib.compiler_options(device))
        serve(lambda: jax.block_until_ready(gradient(params, inputs)), _peak_bytes, device.platform)


def serve_torch(args: argparse.Namespace, *, compiled: bool) -> None:
    """Serves steps of PyTorch, eager or compiled."""
    import torch
    import torch._inductor.config

    from benchmarks import torch_peers

    config = paper_step.make_config(**_sizes(args))
    device = matmul.set_up_torch()
    torch.manual_seed(0)
    model = torch_peers.ThreeTowers(config.model, fused=compiled).to(device).train()
    inputs = {name: torch.from_numpy(value).to(device) for name, value in paper_step.make_inputs(config).items()}
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

    def peak_bytes() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes()

    serve(step, peak_bytes, device.replace("cuda", "gpu"), is_first_done=True, note=note)


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
    parser.add_argument("--begin_after", type=pathlib.Path, help="file to wait for before rounds: other work is done")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve = {
            "ours": lambda: serve_ours(args), "again": lambda: serve_ours(args),
            "ours_gradient": lambda: serve_gradient(args),
            "eager": lambda: serve_torch(args, compiled=False), "compiled": lambda: serve_torch(args, compiled=True),
            "matmul": lambda: matmul.serve_jax(args.dtype), "matmul_torch": lambda: matmul.serve_torch(args.dtype),
        }  # fmt: skip
        serve[args.serve]()
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cold = is_cache_empty()
    report(args, measure(args), cold=cold)


def is_cache_empty() -> bool:
    """Returns whether JAX has no compiled programs to find."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return not folder or not any(pathlib.Path(folder).glob("*"))


def measure(args: argparse.Namespace) -> dict[str, TimedProcess]:
    """Returns each system by name, timed in every round, and those of `matmul.LIBRARIES` as the last.

    If SIGTERM or Ctrl-C cuts it off, the systems that have not answered yet have failed; the others keep their answers.

    Raises:
      SystemExit: Some run on a CPU and others on an accelerator.
    """
    systems: dict[str, TimedProcess] = {}
    try:
        _take_turns(args, systems)
    except KeyboardInterrupt:
        for system in systems.values():
            system.cut_off()
    platforms = {system.platform for name, system in systems.items() if system.platform and name not in matmul.LIBRARIES}
    if len(platforms) > 1:
        told = ", ".join(f"{name} on {system.platform}" for name, system in systems.items())
        raise SystemExit(f"error: no comparison, {told}: install a PyTorch and a JAX that both see the accelerator")
    return systems


def _take_turns(args: argparse.Namespace, systems: dict[str, TimedProcess]) -> None:
    """Starts every system, puts it into `systems` and times it in every round."""
    products = [name for name in matmul.LIBRARIES if name == "matmul" or importlib.util.find_spec("torch")]
    names = [*args.systems.split(","), *products]

    def begin(name: str) -> None:
        systems[name] = start(name, backward_only=args.backward_only, **_sizes(args))

    for name in names if args.together else products if args.alone else ():  # products need little memory until their turn
        begin(name)
    for name in names:
        if name not in systems:
            begin(name)
        system = systems[name]
        system.wait(args.first_step_s)
        told = system.failed or f"on {system.platform}, first step after {system.started_s:.0f} s"
        if args.alone:
            for _ in range(args.rounds):
                system.run(args.steps)
            system.stop()
            told += "" if system.failed else f", {1000 * system.seconds:.0f} ms a step"
        print(f"{name}: {told}", file=sys.stderr, flush=True)
    while args.begin_after and not args.begin_after.exists():
        time.sleep(0.1)
    if not args.alone:
        for _ in range(args.rounds):
            for system in systems.values():
                system.run(args.steps)
        for system in systems.values():
            system.stop()


def judge(platform: str, numbers: dict[str, float]) -> tuple[list[str], list[str]]:
    """Returns the goals that are met and those that are missed, as text.

    Args:
      platform: "cpu", "gpu" or "tpu".
      numbers: What was measured, by its name in `GOALS`. A goal whose number is not there is not judged.
    """
    met, missed = [], []
    for name, (side, *limits) in GOALS.get(platform, {}).items():
        for limit in limits if name in numbers else ():
            is_met = numbers[name] >= limit if side == "at least" else numbers[name] <= limit
            (met if is_met else missed).append(f"{numbers[name]:.3g} {name}, wanted {side} {limit:g}")
    return met, missed


def numbers_of(args: argparse.Namespace, systems: dict[str, TimedProcess], share: float, *, cold: bool) -> dict:
    """Returns what the goals for this machine are about, by its name in `GOALS`; {} at other sizes than the goals are for.

    Args:
      args: Of `main`.
      systems: Systems that have answered.
      share: FLOP/s of "ours" in percent of what matrix products reach; NaN if it was not measured.
      cold: Whether JAX had no compiled programs to find when the first system started.
    """
    own = systems.get("ours_gradient" if args.backward_only else "ours")
    if own is None or args.depth != DEPTH or args.dtype != DTYPES.get(own.platform):
        return {}
    others = {name: systems[name] for name in ("eager", "compiled") if name in systems}
    if args.backward_only:
        return {f"times the time of {SYSTEMS[name]}": own.seconds / other.seconds for name, other in others.items()}
    numbers = {f"times the clips/s of {SYSTEMS[name]}": other.seconds / own.seconds for name, other in others.items()}
    if args.batch >= MFU_BATCH and not math.isnan(share):
        numbers["% of what matrix products reach"] = share
    if not args.together:  # started beside others a first step takes longer, and "again" finds nothing in the cache yet
        if cold:
            numbers["s to the first step, nothing cached"] = own.started_s
        if "again" in systems and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            numbers["s to the first step, started again"] = systems["again"].started_s
    return numbers


def report(args: argparse.Namespace, systems: dict[str, TimedProcess], *, cold: bool = False) -> None:
    """Prints the table and appends it to the results; ends the process, with status 1 if a system failed or a goal is missed.

    Args:
      args: Of `main`.
      systems: What `measure` returned.
      cold: Whether JAX had no compiled programs to find when the first system started.
    """
    import jax

    from benchmarks import record
    from mc3_jax import compile as compile_lib, topology

    config = paper_step.make_config(**_sizes(args))
    clip_flops = dict.fromkeys(systems, compile_lib.model_flops(config, config.phases[1]))
    if peers := systems.keys() & {"eager", "compiled"}:
        clip_flops |= dict.fromkeys(peers, _peers_flops(config))
    products = {name: systems.pop(name) for name in matmul.LIBRARIES if name in systems}
    good = {name: system for name, system in systems.items() if not system.failed}
    platform = next((system.platform for system in good.values()), "")
    peak, product = matmul.fastest(products, platform)
    flops_per_s = {name: args.batch * clip_flops[name] / system.seconds for name, system in good.items()}
    shares = {} if math.isnan(peak) else {name: 100 * rate / peak for name, rate in flops_per_s.items()}
    card = jax.devices()[0].device_kind if args.dtype == "bfloat16" else ""
    chip = topology.chip_of(card)
    reached = np.fmax(peak, matmul.REACHED.get(card, math.nan))  # whichever is no NaN, if one is
    share = 100 * flops_per_s.get("ours", math.nan) / float(reached)
    rows = []
    for name, system in systems.items():
        if system.failed:
            rows.append([SYSTEMS[name], system.failed, *[""] * 6])
            continue
        rows.append([
            ", ".join(filter(None, (SYSTEMS[name], system.note))), f"{1000 * system.seconds:.0f}",
            f"{args.batch / system.seconds:.1f}", f"{clip_flops[name] / 1e9:.1f}",
            f"{shares[name]:.1f}" if shares else "–",
            f"{100 * flops_per_s[name] / chip.flops_per_s:.1f}" if chip else "–", system.memory_gib,
            f"{system.started_s:.0f}",
        ])  # fmt: skip
    # Compared are steps with an optimizer on both sides, or on neither.
    own = "ours_gradient" if args.backward_only else "ours"
    for other in ("eager", "compiled"):
        if own in good and other in good:
            ratio = good[own].seconds / good[other].seconds
            rows.append([f"{SYSTEMS[own]} / {SYSTEMS[other]}", f"{ratio:.2f}", *[""] * 6])
    header = [
        "", "ms a step", "clips/s", "GFLOP a clip", "MFU, % of measured", "% of data sheet", "GiB at its peak",
        "s to the first step",
    ]  # fmt: skip
    measured = f"gives {peak / 1e12:.2f} TFLOP/s ({product})" if shares else f"was not measured ({product})"
    text = _circumstances(args, measured)
    text += "\n\n" + record.markdown(header, rows)
    met, missed = judge(platform, numbers_of(args, good, share, cold=cold))
    timed = [system for system in [*systems.values(), *products.values()] if not system.failed]
    is_cut = not systems.keys() >= set(args.systems.split(",")) or any(len(system.answers) < args.rounds for system in timed)
    text += "\n\nCut off before its end." if is_cut else ""
    text += "".join(f"\n\n{told}: {'; '.join(goals)}." for told, goals in (("Met", met), ("Missed", missed)) if goals)
    record.append("Train step", text, "jaxlib", "flax", "torch", "transformers", path=args.results)
    has_failed = len(timed) < len(systems) + len(products)
    sys.exit(1 if has_failed or is_cut or missed else 0)


def _peers_flops(config) -> float:
    """Returns the FLOPs of a clip in a step of PyTorch; NaN without a PyTorch, whose systems have failed then."""
    if not importlib.util.find_spec("torch"):
        return math.nan
    from benchmarks import torch_peers

    return torch_peers.clip_flops(config.model)


def _circumstances(args: argparse.Namespace, measured: str) -> str:
    """Returns how the systems were timed, in a sentence; `measured`: what a matrix product gave."""
    layers = "in a loop" if args.scan else "one after the other"
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return (
        f"Batch {args.batch}, depth {args.depth}, ours with blocks {layers}, remat {args.remat}, {args.dtype}; PyTorch "
        f"{'without' if args.backward_only else 'with'} its optimizer; a matrix product {measured}; "
        f"medians of {args.rounds} rounds of {args.steps} behind one more, "
        f"{'one system after the other' if args.alone else 'in turn'}{', started together' * args.together}; "
        f"{'malloc keeps memory; ' * ('GLIBC_TUNABLES' in settings())}"
        f"{'compilation cache of JAX in use' if cache else 'no compilation cache'}."
    )


if __name__ == "__main__":
    main()
