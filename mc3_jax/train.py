"""Trains a run: `python -m mc3_jax.train --config=configs/demo.py --workdir=DIR`. Starting it again resumes it.

Parameters are, in this order: the workdir's newest intact checkpoint; else the files that `config.init` names, tower by
tower; else random. `docs/training.md` tells what a run survives, `mc3_jax/cli.py` the exit statuses.

This file owns the order of things: what is set up, when a phase begins, when the state is written, when numbers are read.
Order matters in four places, marked below.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mc3_jax import (
    checkpoint,
    cli,
    config as config_lib,
    mesh as mesh_lib,
    metric_writer,
    phases as phases_lib,
    train_step as step_lib,
    weights,
    workdir as workdir_lib,
)
from mc3_jax.data import loader, tokenizer as tokenizer_lib
from mc3_jax.models.mc3 import MC3


@dataclasses.dataclass
class Run:
    """A run made ready: everything a user can get wrong has been checked.

    Attributes:
      config, workdir: As given.
      mesh: Of all devices.
      model: The three towers.
      shapes: Of the parameters.
      phases: Placed in the run.
      source: Training clips.
      tokenize: Text to ids and mask.
      initial: Flat parameters of the towers that start from files, where nothing is trained yet.
    """

    config: config_lib.Config
    workdir: str
    mesh: jax.sharding.Mesh
    model: MC3
    shapes: Any
    phases: list[phases_lib.Phase]
    source: loader.ClipSource
    tokenize: Callable
    initial: weights.Flat


def set_up(config: config_lib.Config, workdir: str) -> Run:
    """Reads and checks all a run needs, and claims its workdir.

    Args:
      config: A validated config.
      workdir: Folder of the run.

    Raises:
      ValueError: The data, the workdir or the devices don't fit the config; one line says how.
    """
    if config.checkpoint:
        raise ValueError("config.checkpoint is evaluation's: name what the towers start from in config.init")
    workdir_lib.check_workdir(workdir, config)
    mesh = mesh_lib.make_mesh(fsdp=config.fsdp)
    mesh_lib.check_batch_size(mesh, config.data.batch_size, "data.batch_size")
    mesh_lib.check_batch_size(mesh, config.data.chunk_size, "data.chunk_size")
    source = loader.open_split(config.data.dir, "train", config.model.video.num_frames)
    text = config.model.text
    tokenize = tokenizer_lib.load_tokenizer(config.data.tokenizer, text.num_tokens, text.vocab_size)
    phases = phases_lib.plan_phases(config.phases, len(source), config.data.batch_size)
    model = step_lib.make_model(config.model)
    shapes = step_lib.check_shapes(model, config, phases, source.info.num_samples, source.info.canvas_px)
    initial, notes = ({}, []) if checkpoint.steps_of(workdir) else _read_initial(config)
    with workdir_lib.lock_workdir(workdir):
        workdir_lib.check_workdir(workdir, config)  # another run may have come between
        workdir_lib.claim_workdir(workdir, config)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    _say(f"{len(source)} clips, {num_parameters:,} parameters, {phases[-1].stop} steps, {mesh.size} device(s)")
    for note in notes:
        _say(note)
    return Run(config, workdir, mesh, model, shapes, phases, source, tokenize, initial)


def _read_initial(config: config_lib.Config) -> tuple[weights.Flat, list[str]]:
    """Returns parameters of the towers that start from files, and what was done to them."""
    starts = {tower: getattr(config.init, tower) for tower in config_lib.MODALITIES if getattr(config.init, tower)}
    return weights.read_towers(starts, config.model, temporal=config.init.temporal) if starts else ({}, [])


def _say(line: str, file=None) -> None:
    if jax.process_index() == 0:
        print(line, file=file, flush=True)


def train(run: Run) -> step_lib.TrainState:
    """Runs (or resumes) the phases that are not done yet and returns the final state, or that at a preemption.

    Raises:
      WorkdirError: Another run is at the workdir.
      CheckpointError: A checkpoint can't be written, or the one there isn't this model's.
    """
    config, phases = run.config, run.phases
    stops = [phase.stop for phase in phases]
    with (
        workdir_lib.lock_workdir(run.workdir),
        jax.set_mesh(run.mesh),
        checkpoint.Checkpoints(
            run.workdir, every_steps=config.save.every_steps, keep=config.save.keep, keep_steps=stops
        ) as checkpoints,
    ):
        step, state = _first_state(run)
        if step >= stops[-1]:
            _say(f"all {step} steps are done")
            return state
        batches = loader.train_batches(
            run.source, run.tokenize, batch_size=config.data.batch_size, seed=config.seed, start_step=step,
            clips_per_video=config.data.clips_per_video,
            process_index=jax.process_index(), process_count=jax.process_count(),
            num_threads=config.data.num_threads, prefetch=config.data.prefetch,
        )  # fmt: skip
        with (
            metric_writer.MetricWriter(
                run.workdir, total_steps=stops[-1], start_step=step, batch_size=config.data.batch_size,
                tensorboard=config.log.tensorboard, wandb_project=config.log.wandb_project,
            ) as writer,
            metric_writer.ClipWriter(run.workdir, start_step=step, active=config.log.clips) as clips,
        ):  # fmt: skip
            batches = _place(run.mesh, batches, step, clips)
            for phase, following in zip(phases, [*phases[1:], None], strict=True):
                if step < phase.stop:
                    step, state = _run_phase(run, phase, following, state, step, batches, checkpoints, writer)
                if checkpoints.preempted and step < stops[-1]:
                    checkpoints.wait()
                    _say(f"stopped after step {step}, its state is saved; start again to go on")
                    break
    return state


def _place(mesh: jax.sharding.Mesh, batches: Iterator[loader.Batch], step: int, clips) -> Iterator:
    """Yields the batches of steps `step`, `step + 1`, ... on the devices, noting the clips of each."""
    for following, batch in enumerate(batches, step + 1):
        clips.write(following, batch.pop("index"))
        yield mesh_lib.put_batch(mesh, batch)


def _first_state(run: Run) -> tuple[int, step_lib.TrainState]:
    """Returns (step, state) to go on from: the newest intact checkpoint, or fresh parameters under those read from files."""
    saved, initial = checkpoint.steps_of(run.workdir), run.initial
    step, state = checkpoint.restore_newest(run.workdir, lambda step: _plan_state(run, step)[1])
    if state is not None:
        _say(f"resuming after step {step}")
        return step, state
    if saved:
        _say("warning: no checkpoint is intact, beginning at step 0", sys.stderr)
        with cli.user_errors():
            workdir_lib.check_workdir(run.workdir, run.config)  # what the towers start from counts again
            initial, _ = _read_initial(run.config)
    init, abstract = _plan_state(run, 0)
    state = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
    return 0, state.replace(params=mesh_lib.replace_leaves(state.params, checkpoint.unflatten(initial)))


def _plan_state(run: Run, step: int) -> tuple[Callable[[], step_lib.TrainState], step_lib.TrainState]:
    """Returns the function that makes the state of a step's phase afresh, and its shapes with their places."""
    init = functools.partial(step_lib.init_state, run.model, run.config, phases_lib.phase_at(run.phases, step))
    return init, mesh_lib.abstract_state(run.mesh, jax.eval_shape(init))


def _run_phase(
    run: Run, phase: phases_lib.Phase, following: phases_lib.Phase | None, state: step_lib.TrainState, step: int,
    batches, checkpoints, writer: metric_writer.MetricWriter,
) -> tuple[int, step_lib.TrainState]:  # fmt: skip
    """Runs a phase from `step` to its end, or until the machine is about to go; returns (step, state)."""
    config = run.config
    train_step = step_lib.jit_train_step(run.model, config, phase, state)
    every, batch_size = config.log.every_steps, config.data.batch_size
    due, clock = None, (step, time.monotonic())
    batch = next(batches)
    while step < phase.stop:
        state, metrics = train_step(state, batch)
        step += 1
        # Order 1: the next batch is on its way while the step runs; at a phase's end it is left to the next phase.
        if step < phase.stop:
            batch = next(batches)
        # Order 2: numbers are read one step late, so that the host waits for a step that is done.
        if due is not None:
            clock = _write(writer, phase, due, clock, batch_size)
            due = None
        if step % every == 0 or step == phase.stop:
            due = (step, metrics)
        writer.advance(step, phase.config.name)
        # Order 3: at a phase's end the state passes to the next phase first, so that what is saved at a step always
        # has the optimizer of the phase the next step belongs to.
        if step == phase.stop and following is not None:
            next_tx = phases_lib.make_optimizer(following.config, run.shapes)
            opt_state = phases_lib.carry_optimizer(following.config, next_tx, state.params, state.opt_state)
            state = state.replace(opt_state=opt_state)
        # Order 4: a checkpoint's own numbers are written before it, else a kill between the two would lose them.
        if checkpoints.is_due(step):
            if due is not None:
                clock, due = _write(writer, phase, due, clock, batch_size), None
            checkpoints.save(step, state)
        if checkpoints.preempted:
            break
    if due is not None:
        _write(writer, phase, due, clock, batch_size)
    return step, state


def _write(writer, phase, due, clock, batch_size: int):
    """Writes the numbers that are due, waiting for their step; returns the new (step, time)."""
    step, metrics = due
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.monotonic()
    values["clips_per_s"] = (step - clock[0]) * batch_size / max(now - clock[1], 1e-9)
    writer.write(step, phase.config.name, values)
    return step, now


def main(config: config_lib.Config, workdir: str) -> None:
    """Trains the run of the command line."""
    with cli.user_errors():
        mesh_lib.initialize(config.heartbeat_timeout_s, preemptible=True)
    with mesh_lib.ending_together(config.heartbeat_timeout_s):
        with cli.user_errors():
            run = set_up(config, workdir)
        with cli.user_errors((checkpoint.CheckpointError, workdir_lib.WorkdirError, OSError)):
            state = train(run)
    if int(state.step) < run.phases[-1].stop:
        sys.exit(cli.PREEMPTED)


if __name__ == "__main__":
    cli.run(main)
