"""Compiles a run's train step for a machine that need not be at hand, and reports the memory and time that the step needs.

    python -m mc3_jax.compile --config=configs/mc3_ego4d.py --topology=v5e:4x4 --config.model.scan_layers=True

A topology is the NVIDIA GPUs of one node (`h200:8`, `h100:8`, `a100:1`; `pip install '.[compile_gpu]'`), a kind of TPU and
its slice (`v5e:2x4`, `v5e:16x16`, `v5p:2x2x2`, `v6e:4x4`; `pip install '.[compile]'`), or `cpu:8`. Fields of the config are
overridden as in training. The step is the one that `mc3_jax.train` runs, on the same mesh. Numbers are counted from the
compiled program, with loop bodies counted once per iteration (`mc3_jax.hlo`). Bounds on time assume that computing, memory
and interconnect each run at their peak and all at the same time. Programs for GPUs are compiled without autotuning, which
needs a GPU; with it, kernels differ a little.

Exit status 1 means that the step does not fit the chip, 2 that something in the command has to be mended.
"""

import dataclasses
import functools
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
from absl import flags

from mc3_jax import (
    cli,
    config as config_lib,
    hlo,
    mesh as mesh_lib,
    model as model_lib,
    phases as phases_lib,
    terminal,
    topology as topology_lib,
    train_step as step_lib,
)
from mc3_jax.data import loader
from mc3_jax.mfu import model_flops

DOES_NOT_FIT = 1
# Clips as `python -m data_prep.ego4d` makes them (1.5 s at 16 kHz, 16:9 video of 256 px), and the paper's number of clips.
NUM_SAMPLES, CANVAS_PX, NUM_CLIPS = 24_000, (256, 456), 250_000


@dataclasses.dataclass(frozen=True)
class Report:
    """Memory and work of a compiled step; bytes and FLOPs are per chip unless stated.

    Attributes:
      topology, num_chips, mesh_shape, batch_size, phase: What was compiled.
      arguments, temporaries, output, aliased, code: Bytes of memory; aliased bytes are both arguments and output.
      counts: FLOPs, memory traffic and collectives of the program.
      model_flops: Model FLOPs of the whole batch on all chips: the forward pass, and twice that for the backward pass of the
        towers that are trained.
      trace_s, compile_s: Time that JAX took to trace and lower the step, and XLA to compile it.
    """

    topology: str
    num_chips: int
    mesh_shape: tuple[int, int]
    batch_size: int
    phase: str
    arguments: int
    temporaries: int
    output: int
    aliased: int
    code: int
    counts: hlo.Counts
    model_flops: float
    trace_s: float
    compile_s: float

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory that the step needs."""
        return self.arguments + self.output - self.aliased + self.temporaries + self.code

    @property
    def chip(self) -> topology_lib.Chip | None:
        """Peak performance of the topology's chips; None for CPUs."""
        return topology_lib.find_chip(self.topology)

    @property
    def bounds_s(self) -> dict[str, float]:
        """Minimum time for matrix products, for memory and for the interconnect; {} if the chip's peaks are unknown."""
        if self.chip is None:
            return {}
        wire = sum(exchange.wire_bytes for exchange in self.counts.exchanges)
        return {
            "matrix products": self.counts.flops / self.chip.flops_per_s,
            "memory": self.counts.memory_bytes / self.chip.memory_bytes_per_s,
            "interconnect": wire / self.chip.link_bytes_per_s,
        }

    @property
    def mfu_bound(self) -> float:
        """Upper bound of the model FLOPs utilisation (MFU), given `bounds_s`."""
        return self.model_flops / (self.num_chips * self.chip.flops_per_s * max(self.bounds_s.values()))

    def lines(self) -> list[str]:
        """Returns the report as lines of text."""
        counts, chip = self.counts, self.chip
        capacity = f" of {chip.memory_gib} GiB" if chip else ""
        capacity += f", of which JAX uses {chip.usable_gib:.2f}" if chip and chip.gpu else ""
        lines = [
            f"{self.topology}: {self.num_chips} chips, mesh data {self.mesh_shape[0]} x fsdp {self.mesh_shape[1]}, batch "
            f"{self.batch_size}, phase {self.phase!r}, traced in {self.trace_s:.1f} s and compiled in {self.compile_s:.0f} s",
            f"memory per chip  {_gib(self.peak_bytes)}{capacity}: arguments {_gib(self.arguments)}, temporaries "
            f"{_gib(self.temporaries)}, output {_gib(self.output)} of which {_gib(self.aliased)} in place of arguments, "
            f"code {_gib(self.code)}",
            f"FLOPs            {counts.flops / 1e12:.3f} T per chip in matrix products; the model's, all chips: "
            f"{self.model_flops / 1e12:.1f} T",
            f"memory traffic   {counts.memory_bytes / 1e9:.2f} GB per chip",
        ]
        for kind in hlo.COLLECTIVES:
            for dtype in sorted({e.dtype for e in counts.exchanges if e.kind == kind}):
                same = [e for e in counts.exchanges if (e.kind, e.dtype) == (kind, dtype)]
                times, wire = sum(e.times for e in same), sum(e.wire_bytes for e in same)
                lines.append(
                    f"{kind:<17}{counts.payload(kind, dtype) / 1e6:.3f} MB of {dtype} per chip in {times}, "
                    f"{wire / 1e6:.3f} MB sent"
                )
        if self.bounds_s:
            each = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in self.bounds_s.items())
            lines.append(f"step time        at least {max(self.bounds_s.values()) * 1e3:.1f} ms: {each}")
            lines.append(f"MFU              at most {self.mfu_bound:.1%}")
        if counts.unknown_loops:
            lines.append(f"loops counted once, as their number of iterations is unknown: {', '.join(counts.unknown_loops)}")
        return lines


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / topology_lib.GIB:.2f} GiB"


def compile_step(
    config: config_lib.Config, topology: str, *, phase: str = "", num_samples: int = NUM_SAMPLES,
    canvas_px: tuple[int, int] = CANVAS_PX, num_clips: int = NUM_CLIPS,
) -> Report:  # fmt: skip
    """Returns the memory and work of a phase's train step on a topology.

    Args:
      config: A validated config.
      topology: See the module's docstring.
      phase: Name of one of the config's phases; "" takes the last.
      num_samples: Audio samples of a clip.
      canvas_px: (height, width) of the video's canvas.
      num_clips: Number of clips in the training split; only the learning rate schedule depends on it.

    Raises:
      ValueError: The topology is unknown or can't be compiled for, the config has no phases, or the phase or the data's
        shapes don't fit it.
      MemoryError: The step doesn't fit the chip; the message says by how much.
    """
    if not config.phases:
        raise ValueError("config.phases is empty: there is no train step to compile, name a --config that trains")
    names = [p.name for p in config.phases]
    if phase and phase not in names:
        raise ValueError(f"--phase={phase} is not a phase of this config: choose one of {', '.join(names)}")
    devices = topology_lib.find_devices(topology)
    with topology_lib.cudnn_of(topology_lib.find_chip(topology)):
        return _compile(config, topology, devices, phase or names[-1], num_samples, canvas_px, num_clips)


def _compile(
    config: config_lib.Config, topology: str, devices: list, phase: str, num_samples: int, canvas_px: tuple[int, int],
    num_clips: int,
) -> Report:  # fmt: skip
    chip = topology_lib.find_chip(topology)
    mesh = mesh_lib.make_mesh(config.fsdp, devices)
    mesh_lib.check_batch_size(mesh, config.data.batch_size, "data.batch_size")
    mesh_lib.check_batch_size(mesh, config.data.chunk_size, "data.chunk_size")
    device = mesh.devices.flat[0]
    model_lib.check_attention(config.model, device)
    model = model_lib.make_model(config.model, device)
    placed = phases_lib.plan_phases(config.phases, num_clips, config.data.batch_size)
    batch = mesh_lib.abstract_batch(mesh, step_lib.batch_shapes(config, num_samples, canvas_px))
    step_lib.check_shapes(model, config, placed, batch)
    chosen = next(p for p in placed if p.config.name == phase)
    init = functools.partial(step_lib.init_state, model, config, chosen)
    state = mesh_lib.abstract_state(mesh, jax.eval_shape(init))
    begin = time.monotonic()
    options = {"xla_gpu_autotune_level": 0} if chip and chip.gpu else None
    try:
        with jax.set_mesh(mesh):
            step = jax.ShapeDtypeStruct((), jnp.int32)
            lowered = step_lib.jit_train_step(model, config, chosen, state).lower(state, batch, step)
            traced = time.monotonic()
            compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        raise _too_large(error, topology) from error
    compile_s, memory = time.monotonic() - traced, compiled.memory_analysis()
    report = Report(
        topology, mesh.size, mesh.devices.shape, config.data.batch_size, chosen.config.name,
        memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes,
        memory.alias_size_in_bytes, memory.generated_code_size_in_bytes, hlo.count(compiled.as_text()),
        config.data.batch_size * model_flops(config, chosen.config), traced - begin, compile_s,
    )  # fmt: skip
    if report.chip and report.peak_bytes > report.chip.usable_gib * topology_lib.GIB:
        raise MemoryError(_advice(topology, report.peak_bytes / topology_lib.GIB, report.chip.usable_gib))
    return report


def _too_large(error: Exception, topology: str) -> Exception:
    """Returns the error to raise if XLA fails: a MemoryError if the program is too large, otherwise XLA's own error."""
    text = " ".join(str(error).split())
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = [float(n) * units[u] / topology_lib.GIB for n, u in re.findall(r"([\d.]+)([KMGT])i?B?\b", text)]
    if "RESOURCE_EXHAUSTED" not in text or len(sizes) < 2:
        return error
    return MemoryError(_advice(topology, sizes[0], sizes[1]))


def _advice(topology: str, needed_gib: float, there_gib: float) -> str:
    chip = topology_lib.find_chip(topology)
    gpu = "; JAX uses three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION is set" if chip and chip.gpu else ""
    return (
        f"does not fit {topology}: needs {needed_gib:.2f} GiB per chip, {there_gib:.2f} GiB are available, "
        f"{needed_gib - there_gib:.2f} GiB are missing; try --config.model.remat=dots or full, --config.data.chunk_size, "
        f"--config.fsdp, or more chips{gpu}"
    )


def _define_flags() -> None:
    flags.DEFINE_string("topology", None, f"Machine to compile for: {topology_lib.TOPOLOGIES}.")
    flags.DEFINE_string("phase", "", "Phase of the config whose step is compiled; by default the last.")
    flags.DEFINE_integer("num_samples", NUM_SAMPLES, "Audio samples of a clip; used if folder config.data.dir is missing.")
    flags.DEFINE_string("canvas_px", "x".join(map(str, CANVAS_PX)), "Video canvas, HEIGHTxWIDTH; used in the same case.")


def _data_shapes(config: config_lib.Config) -> dict:
    """Returns num_samples, canvas_px and num_clips of the config's data; without its folder, the flags' first two."""
    own = config.data.num_samples
    if config.data.dir and pathlib.Path(config.data.dir).is_dir():
        num_frames = config.model.video.num_frames if "video" in phases_lib.all_modalities(config.phases) else 0
        source = loader.open_split(config.data.dir, config.data.split, num_frames, config.data.folds)
        info = source.info
        return {"num_samples": own or info.num_samples, "canvas_px": info.canvas_px, "num_clips": len(source)}
    canvas = re.fullmatch(r"(\d+)x(\d+)", flags.FLAGS.canvas_px)
    if not canvas:
        raise ValueError(f"--canvas_px={flags.FLAGS.canvas_px}: must be HEIGHTxWIDTH, e.g. 256x456")
    return {"num_samples": own or flags.FLAGS.num_samples, "canvas_px": (int(canvas[1]), int(canvas[2]))}


def main(config: config_lib.Config, _workdir: str) -> None:
    """Prints the report on the step that the command line names."""
    terminal.interrupt_at_once()  # also while XLA compiles
    with cli.user_errors():
        topology = flags.FLAGS.topology
        if not topology:
            raise ValueError("--topology is missing: name the machine, e.g. --topology=h200:8 or v5e:4x4")
        jax.config.update("jax_platforms", "cpu")  # nothing is run, whatever accelerator is here
        if re.fullmatch(r"cpu:\d{1,3}", topology):
            jax.config.update("jax_num_cpu_devices", int(topology.partition(":")[2]))
        try:
            report = compile_step(config, topology, phase=flags.FLAGS.phase, **_data_shapes(config))
        except MemoryError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(DOES_NOT_FIT)
    print("\n".join(report.lines()))


if __name__ == "__main__":
    _define_flags()
    cli.run(main, needs_workdir=False)
