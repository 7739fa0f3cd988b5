"""Trains a run: `python -m mc3_jax.train --config=configs/demo.py --workdir=DIR`. Starting it again resumes it.

Parameters come from the workdir's newest intact checkpoint. Without one, each tower starts from the file that `config.init`
names for it, or at random. `docs/training.md` says what a run survives, `mc3_jax/cli.py` lists the exit statuses.

`mc3_jax.run` prepares a run. This file decides the order of events: when a phase begins, when the state is saved, when
metrics are read. The order matters in four places, marked "Order 1" to "Order 4" below.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax
import numpy as np
import optax
from absl import flags

from mc3_jax import (
    checkpoint,
    cli,
    config as config_lib,
    divergence,
    interrupt as interrupt_lib,
    job as job_lib,
    mesh as mesh_lib,
    metric_writer,
    mfu,
    phases as phases_lib,
    profiler,
    progress,
    provenance,
    run as run_lib,
    step_compiler,
    train_step as step_lib,
    weights,
    workdir as workdir_lib,
)
from mc3_jax.data import damage, loader
from mc3_jax.stopwatch import Stopwatch
from mc3_jax.watchdog import Watchdog


@dataclasses.dataclass
class _Loop:
    """What all steps of one start share; a run may be started several times."""

    run: run_lib.Run
    compiler: step_compiler.StepCompiler
    batches: Iterator
    checkpoints: checkpoint.Checkpoints
    writer: metric_writer.MetricWriter
    clips: metric_writer.ClipWriter
    stopwatch: Stopwatch
    watchdog: Watchdog
    profiler: profiler.Profiler
    share_of_peak: float | None = None  # share of the devices' peak FLOP/s that one clip per second takes
    last_row: tuple = ()  # at the last row of metrics: steps done, time worked, time waited for input
    has_collapsed: bool = False  # whether this start has warned of a collapsed consensus

    @contextlib.contextmanager
    def during(self, what: str, place: str, *, long: bool = False) -> Iterator[None]:
        with self.stopwatch.during(what), self.watchdog.at(place, long=long):
            yield

    def times(self, step: int) -> dict[str, float]:
        """Returns the timing values of a row of metrics, means since the row before.

        Time spent compiling and saving counts in `goodput` alone.
        """
        watch, before = self.stopwatch, self.last_row
        self.last_row = step, watch.worked_s, watch.lost_s["input"]
        steps, worked, waited = (now - then for now, then in zip(self.last_row, before, strict=True))
        clips_per_s = steps * self.run.config.data.batch_size / max(worked + waited, 1e-9)
        return {
            "clips_per_s": clips_per_s, "step_s": worked / steps, "input_wait_s": waited / steps,
            **({"mfu": clips_per_s * self.share_of_peak} if self.share_of_peak else {}),
            "goodput": watch.goodput, "elapsed_s": watch.elapsed_s,
        }  # fmt: skip


def train(
    run: run_lib.Run, *, watchdog: Watchdog | None = None, profile: range = range(0), began: float | None = None
) -> step_lib.TrainState:
    """Runs or resumes the phases that are not done yet; returns the final state, or the state at a preemption.

    Args:
      run: A run prepared by `run.set_up`.
      watchdog: Watchdog that this process reports its progress to; None is no watchdog.
      profile: Steps traced to `WORKDIR/profile`, each given as the number of steps done before it.
      began: When this start began, by `time.monotonic`; None is now.

    Raises:
      WorkdirError: Another run is using the workdir.
      CheckpointError: A checkpoint can't be written, or the one there doesn't fit this model.
      DivergedError: A loss, a gradient or an update is not finite.
      DataError: A clip can't be read.
    """
    config, watchdog, began = run.config, watchdog or Watchdog(0), began or time.monotonic()
    stops = [phase.stop for phase in run.phases]
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.lock_workdir(run.workdir))
        stack.enter_context(jax.set_mesh(run.mesh))
        save = config.save
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(
                run.workdir, every_steps=save.every_steps, keep=save.keep, keep_steps=stops, tell=progress.say
            )
        )
        compiler = stack.enter_context(step_compiler.StepCompiler(functools.partial(_lower, run)))
        _compile_ahead(run, compiler, watchdog)
        with watchdog.at("restoring or initialising the state", long=True):
            step, state = _first_state(run)
        if step >= stops[-1]:
            progress.notice(f"all {step} steps are done")
            return state
        if profile and not range(max(step, profile.start), min(stops[-1], profile.stop)):
            progress.notice(
                f"warning: --profile has no effect: this start runs steps {step} to {stops[-1]} only", sys.stderr
            )
        batches = loader.train_batches(
            run.source, run.tokenize, batch_size=config.data.batch_size, seed=config.seed, start_step=step,
            clips_per_video=config.data.clips_per_video, num_samples=config.data.num_samples or None,
            silence_db=config.data.silence_db, process_index=jax.process_index(), process_count=jax.process_count(),
            num_threads=config.data.num_threads, num_workers=config.data.num_workers, prefetch=config.data.prefetch,
        )  # fmt: skip
        stack.enter_context(contextlib.closing(batches))
        stopwatch = stack.enter_context(_start_stopwatch(run, step, began))
        writer = stack.enter_context(
            metric_writer.MetricWriter(
                run.workdir, total_steps=stops[-1], start_step=step, batch_size=config.data.batch_size,
                tensorboard=config.log.tensorboard, num_clips=len(run.source), wandb=run.wandb,
            )
        )  # fmt: skip
        clips = stack.enter_context(metric_writer.ClipWriter(run.workdir, start_step=step, active=config.log.clips))
        tracer = stack.enter_context(profiler.Profiler(f"{run.workdir}/profile/process-{jax.process_index()}", profile))
        batches = _place(run, batches, step, clips)
        loop = _Loop(run, compiler, batches, checkpoints, writer, clips, stopwatch, watchdog, tracer)
        first = step
        for phase, following in zip(run.phases, [*run.phases[1:], None], strict=True):
            if step < phase.stop:
                step, state = _run_phase(loop, phase, following, state, step)
            if checkpoints.preempted and step < stops[-1]:
                break
        with loop.during("save", "waiting until the last checkpoint is written", long=True):
            checkpoints.wait()
        stopwatch.settle()
        if step < stops[-1]:
            progress.notice(f"stopped after step {step}, its state is saved; start again to resume")
        lost = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in sorted(stopwatch.lost_s.items()))
        progress.notice(
            f"{step - first} steps; the devices waited for {lost}; goodput since the first start {stopwatch.goodput:.1%}"
        )
    return state


def _compile_ahead(run: run_lib.Run, compiler: step_compiler.StepCompiler, watchdog: Watchdog) -> None:
    """Begins to compile the step of the newest checkpoint's phase; if that is damaged, it may be in vain."""
    expected = checkpoint.newest_step(run.workdir)
    if expected < run.phases[-1].stop:
        phase = phases_lib.phase_at(run.phases, expected)
        with watchdog.at(f"tracing the step of phase {phase.config.name!r}", long=True):
            compiler.begin(phase)


def _start_stopwatch(run: run_lib.Run, step: int, began: float) -> Stopwatch:
    """Returns the stopwatch of a run that goes on after `step` steps, and records this start in the workdir.

    Args:
      run: The run.
      step: Steps done.
      began: When this start began, by `time.monotonic`.
    """
    device = run.mesh.devices.flat[0]
    facts = {"processes": jax.process_count(), "devices": run.mesh.size, "device": device.device_kind}
    facts |= {**provenance.facts(), "config": config_lib.to_dict(run.config)}
    since_s = metric_writer.note_start(run.workdir, step, facts, time.monotonic() - began)
    rows = [row for row in metric_writer.read_metrics(run.workdir) if row["step"] <= step and "goodput" in row]
    return Stopwatch(since_s=since_s, worked_s=rows[-1]["goodput"] * rows[-1]["elapsed_s"] if rows else 0.0)


def _place(run: run_lib.Run, batches: Iterator[loader.Batch], step: int, clips) -> Iterator:
    """Yields the batches that follow after `step` steps, each put on the devices, and writes down the clips of each."""
    for following, batch in enumerate(batches, step + 1):
        clips.write(following, batch["index"])
        yield mesh_lib.put_batch(run.mesh, {name: batch[name] for name in run.batch})


def _first_state(run: run_lib.Run) -> tuple[int, step_lib.TrainState]:
    """Returns (step, state) to begin with: the newest intact checkpoint, or step 0 with the initial parameters.

    Initial parameters are fresh, except those of towers that start from files.
    """
    saved, initial = checkpoint.newest_step(run.workdir), run.initial
    step, tree = checkpoint.restore_newest(run.workdir, lambda step: step_lib.to_tree(_plan_state(run, step)[1]))
    if tree is not None:
        progress.notice(f"resuming after step {step}")
        return step, step_lib.TrainState(**tree)
    if saved:
        progress.notice("warning: no checkpoint is intact, starting at step 0", sys.stderr)
        with cli.user_errors():
            initial, _ = weights.read_initial(run.config)  # whose init is the one that the run began with
    init, abstract = _plan_state(run, 0)
    state = step_lib.draw_state(init, abstract)
    params = mesh_lib.replace_leaves(state.params, checkpoint.unflatten(initial))
    # The memory's encoders start as copies of the towers, so it is made after the files have been read.
    memory = step_lib.begin_memory(run.config, phases_lib.phase_at(run.phases, 0), params, abstract)
    return 0, state.replace(params=params, memory=memory)


def _plan_state(run: run_lib.Run, step: int) -> tuple[Callable[[], step_lib.TrainState], step_lib.TrainState]:
    """Returns a function that makes a fresh state for the phase of a step, and that state's shapes with their shardings."""
    init = functools.partial(step_lib.init_state, run.model, run.config, phases_lib.phase_at(run.phases, step))
    return init, mesh_lib.abstract_state(run.mesh, jax.eval_shape(init))


def _lower(run: run_lib.Run, phase: phases_lib.Phase) -> jax.stages.Lowered:
    """Returns the train step of a phase, lowered for the run's state and batches."""
    _, state = _plan_state(run, phase.start)
    return step_lib.jit_train_step(run.model, run.config, phase, state).lower(state, run.batch, np.int32(0))


def _run_phase(
    loop: _Loop, phase: phases_lib.Phase, following: phases_lib.Phase | None, state: step_lib.TrainState, step: int
) -> tuple[int, step_lib.TrainState]:
    """Runs a phase from `step` to its end, or until a preemption; returns (step, state)."""
    run, checkpoints = loop.run, loop.checkpoints
    with loop.during("input", f"reading the batch of step {step + 1}"):
        batch = next(loop.batches)
    with loop.during("compilation", f"compiling the step of phase {phase.config.name!r}", long=True):
        train_step = loop.compiler.finish(phase, step)
        checkpoints.prepare(step_lib.to_tree(state))
    watch = loop.stopwatch
    loop.last_row = loop.last_row or (step, watch.worked_s, watch.lost_s["input"])
    unread, is_counted = None, jax.process_index() != 0
    while step < phase.stop:
        with loop.profiler.step(step):
            (state, *numbers), called = loop.stopwatch.call(train_step, state, batch, np.int32(step))
        if not is_counted:  # takes seconds of tracing on the host, while the devices do the first step
            loop.share_of_peak, is_counted = mfu.share_of_peak(run.config, phase.config, run.mesh), True
        step += 1
        # Order 1: the next batch is read while the step runs. At the end of a phase, the next phase reads it.
        if step < phase.stop:
            with loop.during("input", f"reading the batch of step {step + 1}"):
                batch = next(loop.batches)
        # Order 2: metrics are read one step late, so that the devices already have the next step when the host waits. If the
        # earlier step turns out not to count, the train step leaves the state unchanged in the later one as well.
        if unread is not None:
            _finish_step(loop, phase, state, *unread)
        unread = (step, numbers, called)
        loop.writer.advance(step, phase.config.name)
        # Order 3: a step's metrics are written before its checkpoint, else a kill between the two would lose them.
        is_due = checkpoints.is_due(step)
        # A preempted machine may leave no time to both measure and save, so it only saves, except after the run's last step:
        # no later start would measure that one.
        in_haste = checkpoints.preempted and (step < phase.stop or following is not None)
        is_measured = run.validation is not None and run.validation.is_due(step, phase.stop) and not in_haste
        if is_due or is_measured or loop.profiler.ends(step):
            measured = {}
            if is_measured:
                with loop.during("validation", f"measuring the validation loss after step {step}", long=True):
                    measured = run.validation.measure(phase, state.params)
            _finish_step(loop, phase, state, *unread, measured)
            unread = None
        if loop.profiler.ends(step):
            with loop.during("trace", "writing the trace", long=True):
                loop.profiler.stop()
        # Order 4: at the end of a phase the state enters the next phase before it is saved, so that a checkpoint always
        # holds the optimizer state of the phase that the next step belongs to.
        if step == phase.stop and following is not None:
            state = step_lib.enter_phase(run.config, following, state, _plan_state(run, step)[1])
        if is_due:
            with loop.during("save", f"saving the state after step {step}", long=True):
                loop.writer.sync()
                loop.clips.sync()
                checkpoints.save(step, step_lib.to_tree(state))
        if checkpoints.preempted:
            break
    return step, state


def _finish_step(
    loop: _Loop, phase: phases_lib.Phase, state: step_lib.TrainState, step: int, numbers, called,
    measured: Mapping[str, float] = types.MappingProxyType({}),
) -> None:  # fmt: skip
    """Waits until a step is done, writes its metrics if they are due, and stops training if the step did not count.

    Args:
      loop, phase: Loop and phase of the step.
      state: The newest state; it may be that of a later step.
      step: Number of steps done, including this one.
      numbers: Metrics and health of the step.
      called: The stopwatch's record of the step.
      measured: Validation losses after the step; if there are any, they are written with the metrics.

    Raises:
      DivergedError: The step did not count.
    """
    metrics, health = numbers
    with loop.watchdog.at(f"waiting for the devices to do step {step}"):
        taken = bool(health.taken)
        loop.stopwatch.done(called)
    if not taken:
        _stop_diverged(loop, phase, state, step, metrics, health)
    if step % loop.run.config.log.every_steps == 0 or step == phase.stop or measured:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        loop.writer.write(step, phase.config.name, values | measured | loop.times(step))
        warning = "" if loop.has_collapsed else divergence.warn_of_collapse(step, phase.config.name, values)
        if warning:
            loop.has_collapsed = True
            progress.notice(warning, sys.stderr)


def _stop_diverged(
    loop: _Loop, phase: phases_lib.Phase, state: step_lib.TrainState, step: int, metrics, health
) -> NoReturn:
    """Writes what is known of a step that did not count to a file, saves the state before it and raises DivergedError."""
    run = loop.run
    params = checkpoint.flatten(state.params)
    param_norms = jax.jit(lambda leaves: [optax.tree.norm(leaf) for leaf in leaves])(list(params.values()))
    metrics, health, param_norms = jax.device_get((metrics, health, param_norms))
    norms = dict(zip(params, zip(health.grad_norms.tolist(), map(float, param_norms), strict=True), strict=True))
    path = pathlib.Path(run.workdir) / f"diverged-{step}.json"
    data = run.config.data

    def describe():
        places = loader.step_clips(
            run.source, step - 1, batch_size=data.batch_size, seed=run.config.seed, clips_per_video=data.clips_per_video
        )
        clips = [{"index": int(i), "clip_id": run.source[int(i)].clip_id} for i in places]
        values = {name: float(value) for name, value in metrics.items()}
        found = divergence.describe(step, phase.config.name, values, norms, health.finite_rows, clips)
        # Printed first: writing the file may fail on a full disk.
        progress.notice(f"step {step} does not count: {divergence.summarize(found)}", sys.stderr)
        divergence.write(path, found)

    with loop.during("save", f"saving the state before step {step}, which does not count", long=True):
        job_lib.on_process_0(describe)
        loop.checkpoints.wait()  # the checkpoint being written may be of that very state
        if job_lib.from_process_0(step - 1 not in (0, *checkpoint.steps_of(run.workdir))):
            loop.checkpoints.save(step - 1, step_lib.to_tree(state))
            loop.checkpoints.wait()
    saved = "The state before it is saved, the" if step > 1 else "The"
    raise divergence.DivergedError(
        f"step {step} of phase {phase.config.name!r}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}. {saved} "
        f"details are in {path}. Lower the learning rate, lengthen its warm-up or set clip_norm, in a new run"
    )


def main(config: config_lib.Config, workdir: str) -> None:
    """Trains the run of the command line."""
    began = time.monotonic()
    with cli.user_errors():
        profile = profiler.parse_range(flags.FLAGS.profile)
        job_lib.initialize(config.heartbeat_timeout_s, preemptible=True)
    interrupt = interrupt_lib.Interrupt()
    with job_lib.ending_together(config.heartbeat_timeout_s), Watchdog(config.hang_timeout_s) as watchdog:
        with cli.user_errors(), watchdog.at("setting up the run", long=True):
            run = run_lib.set_up(config, workdir)
        kinds = (
            checkpoint.CheckpointError, workdir_lib.WorkdirError, divergence.DivergedError, job_lib.Process0Error,
            damage.DataError, OSError,
        )  # fmt: skip
        with cli.user_errors(kinds):
            state = train(run, watchdog=watchdog, profile=profile, began=began)
    if int(state.step) < run.phases[-1].stop:
        sys.exit(cli.INTERRUPTED if interrupt.came else cli.PREEMPTED)


if __name__ == "__main__":
    flags.DEFINE_string(
        "profile", "", "START:STOP, e.g. 100:110: trace the steps after START, up to STOP, into WORKDIR/profile."
    )
    cli.run(main)
