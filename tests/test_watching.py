"""A run watches itself: steps that are not finite don't count, time is accounted for, hangs are reported, steps traced."""

import contextlib
import copy
import fcntl
import functools
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mc3_jax import (
    checkpoint,
    divergence,
    job as job_lib,
    mesh as mesh_lib,
    metric_writer,
    model as model_lib,
    phases as phases_lib,
    profiler,
    run as run_lib,
    train,
    train_step as step_lib,
    watchdog,
)
from mc3_jax.data import loader, tokenizer
from mc3_jax.stopwatch import Stopwatch
from tests import test_fits, world
from tests.test_train import assert_equal_bits


@pytest.fixture(scope="module")
def stepping():
    """A refine step on a mesh of 2 x 4: (function that makes a new state, as the step donates it; compiled step; batch)."""
    config = test_fits.small_config()
    mesh, model = mesh_lib.make_mesh(fsdp=4), model_lib.make_model(config.model)
    phase = phases_lib.Phase(config.phases[1], 0, 100)
    abstract = mesh_lib.abstract_state(mesh, jax.eval_shape(lambda: step_lib.init_state(model, config, phase)))
    fresh = jax.device_get(step_lib.init_state(model, config, phase))
    with jax.set_mesh(mesh):
        batch = mesh_lib.put_batch(mesh, test_fits.batch())
        step = step_lib.jit_train_step(model, config, phase, abstract).lower(abstract, batch, np.int32(0)).compile()

    def state(spoil=lambda state: None):
        made = jax.tree.map(np.array, fresh)
        spoil(made)
        return jax.device_put(made, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    return state, step, batch


@pytest.mark.parametrize("fsdp", [1, 4])
def test_norms_of_leaves_are_those_of_each_alone(fsdp):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"a": (8,), "b": (200, 128), "c": (4, 2), "d": (8,), "e": (16,)}  # three of one size, one that is large
    tree = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    wanted = [np.linalg.norm(leaf) for leaf in tree.values()]
    mesh = mesh_lib.make_mesh(fsdp=fsdp)
    tree = jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, mesh_lib.abstract_state(mesh, tree)))
    with jax.set_mesh(mesh):
        norms = jax.jit(step_lib._leaf_norms).lower(tree).compile()
    assert "all-gather" not in norms.as_text()
    np.testing.assert_allclose(norms(tree), wanted, rtol=1e-6)


@pytest.mark.slow  # compiles a step for a mesh
def test_a_state_is_drawn_with_its_shardings_and_the_same_on_any_mesh(stepping):
    config = test_fits.small_config()
    model, phase = model_lib.make_model(config.model), phases_lib.Phase(config.phases[1], 0, 100)
    init = functools.partial(step_lib.init_state, model, config, phase)
    abstract = mesh_lib.abstract_state(mesh_lib.make_mesh(fsdp=4), jax.eval_shape(init))
    before = jax.config.jax_threefry_gpu_kernel_lowering
    drawn = step_lib.draw_state(init, abstract)
    assert jax.config.jax_threefry_gpu_kernel_lowering == before
    assert jax.tree.map(lambda leaf: leaf.sharding, drawn) == jax.tree.map(lambda leaf: leaf.sharding, abstract)
    assert_equal_bits(jax.device_get(drawn), jax.device_get(stepping[0]()))


def test_xla_knows_the_options_that_a_gpu_is_given():
    assert step_lib.compiler_options(jax.devices()[0]) is None
    assert jax.jit(jnp.sin, compiler_options=step_lib.GPU_OPTIONS)(0.0) == 0
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(jnp.sin, compiler_options={"xla_gpu_no_such_option": 1})(0.0)


def test_the_step_on_a_gpu_gets_these_options(monkeypatch):
    for platform in ("gpu", "cuda", "rocm"):
        assert step_lib.compiler_options(mock.Mock(spec=jax.Device, platform=platform)) == step_lib.GPU_OPTIONS
    given, jit = [], jax.jit
    monkeypatch.setattr(step_lib, "compiler_options", lambda device: {"of": device})
    monkeypatch.setattr(jax, "jit", lambda function, **options: given.append(options) or jit(function))
    config = test_fits.small_config()
    model, phase = model_lib.make_model(config.model), phases_lib.Phase(config.phases[1], 0, 100)
    abstract = mesh_lib.abstract_state(
        mesh_lib.make_mesh(), jax.eval_shape(functools.partial(step_lib.init_state, model, config, phase))
    )
    given.clear()
    step_lib.jit_train_step(model, config, phase, abstract)
    assert given[-1]["compiler_options"] == {"of": jax.devices()[0]}


def test_updates_are_computed_again_behind_a_barrier_instead_of_being_kept():
    config = test_fits.small_config()
    model, phase = model_lib.make_model(config.model), phases_lib.Phase(config.phases[1], 0, 100)
    state = jax.eval_shape(functools.partial(step_lib.init_state, model, config, phase))
    step = step_lib.make_train_step(model, config, phase, phases_lib.make_optimizer(phase.config, state.params))
    program = jax.make_jaxpr(step)(state, test_fits.batch(), np.int32(0)).jaxpr
    num_made = len(jax.tree.leaves((state.params, state.opt_state)))  # by an update
    kept, again = [part for part in program.eqns if "jaxpr" in part.params and len(part.outvars) == num_made]
    num = len(jax.tree.leaves((state.params, state)))  # gradients have the shapes of the parameters
    barriers = [part for part in program.eqns if part.primitive.name == "optimization_barrier"]
    [barrier] = [part for part in barriers if len(part.invars) == num]
    assert set(kept.invars) <= set(barrier.invars)
    assert set(again.invars) <= set(barrier.outvars)


@pytest.mark.slow  # compiles a step for a mesh
def test_a_finite_step_counts_and_says_by_how_much_each_tower_changed(stepping):
    make_state, step, batch = stepping
    before = jax.device_get(make_state())
    after, metrics, health = jax.device_get(step(make_state(), batch, np.int32(0)))
    assert health.taken
    assert health.finite_rows.all()
    assert after.step == 1
    for tower in before.params:
        old, new = (jax.tree.leaves(state.params[tower]) for state in (before, after))
        change = np.sqrt(sum(np.sum((np.float64(b) - a) ** 2) for a, b in zip(old, new, strict=True)))
        assert change > 0
        size = np.sqrt(sum(np.sum(np.float64(a) ** 2) for a in old))
        np.testing.assert_allclose(metrics[f"update_ratio_{tower}"], change / size, rtol=1e-3)
    np.testing.assert_allclose(np.sqrt(np.sum(health.grad_norms**2)), metrics["grad_norm"], rtol=1e-6)


def _spoil_text(state):
    state.params["text"]["projection"]["kernel"][0, 0] = np.nan


def _spoil_moment(state):
    optax.tree.get(state.opt_state, "mu")["video"]["projection"]["kernel"][0, 0] = np.nan



@pytest.mark.slow  # compiles a step for a mesh
@pytest.mark.parametrize(
    ("spoil", "count", "finite"),
    [
        (_spoil_text, 0, [True, True, False]), (_spoil_moment, 0, [True, True, True]),
        (lambda state: None, 1, [True, True, True]),
    ],
    ids=["not finite", "an update that is not finite", "after one that did not count"],
)
def test_a_step_that_does_not_count_leaves_every_bit_of_the_state(stepping, spoil, count, finite):
    make_state, step, batch = stepping
    before = jax.device_get(make_state(spoil))
    after, metrics, health = jax.device_get(step(make_state(spoil), batch, np.int32(count)))
    assert not health.taken
    assert_equal_bits(after, before)
    assert health.finite_rows.all(axis=1).tolist() == finite
    assert np.isfinite(metrics["loss"]) == all(finite)
    found = divergence.describe(1, "refine", {n: float(v) for n, v in metrics.items()}, {}, health.finite_rows, [{}] * 16)
    told = "the optimizer's update of video is not finite"
    assert (told in divergence.summarize(found)) == (spoil is _spoil_moment)


def test_a_collapsed_consensus_is_warned_of_once(capsys):
    loop = mock.MagicMock(spec=train._Loop, has_collapsed=False, run=mock.MagicMock(), stopwatch=mock.MagicMock())
    loop.run.config.log.every_steps, loop.times.return_value = 1, {}
    loop.watchdog, loop.writer = mock.MagicMock(), mock.MagicMock()
    phase = phases_lib.Phase(test_fits.small_config().phases[1], 0, 100)
    health = step_lib.Health(np.array(True), np.ones(1), np.ones((3, 2), bool))
    state = mock.MagicMock(spec=step_lib.TrainState)
    for step, score in enumerate([-0.5, -0.99, -0.999], 1):
        train._finish_step(loop, phase, state, step, ({"consensus_score": np.float32(score)}, health), None)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "at step 2 its mean is -0.990" in warnings[0]
    assert f"of phase {phase.config.name!r}" in warnings[0]
    assert divergence.warn_of_collapse(1, "align", {"contrastive": 1.0}) == ""


@pytest.mark.slow
def test_a_run_that_diverges_stops_before_the_update_and_says_all_about_it(finished, tmp_path):
    config, workdir = copy.deepcopy(finished[0]), str(tmp_path / "run")
    config.phases[0].optimizer.learning_rate, config.phases[0].optimizer.warmup_steps = 1e20, 0
    config.save.every_steps = 1  # the state before the step is still being written when it diverges
    for _ in range(2):  # started again, it diverges at the same step
        with pytest.raises(divergence.DivergedError, match="step 2 of phase 'align': loss nan, gradient norm nan. .*-2.json"):
            train.train(run_lib.set_up(config, workdir), profile=range(1))
    assert [row["step"] for row in metric_writer.read_metrics(workdir)] == [1]
    assert [row["step"] for row in metric_writer._read_rows(tmp_path / "run" / "starts.jsonl")] == [0, 1]
    run = run_lib.set_up(config, workdir)
    step, state = checkpoint.restore_newest(workdir, lambda step: step_lib.to_tree(train._plan_state(run, step)[1]))
    assert step == int(state["step"]) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    found = json.loads((tmp_path / "run" / "diverged-2.json").read_text())
    assert found["metrics"]["loss"] == "nan"
    assert found["norms"].keys() == checkpoint.flatten(state["params"]).keys()
    rows = {row["step"]: row["clips"] for row in metric_writer.read_clips(workdir)}
    assert [clip["index"] for clip in found["clips"]] == rows[2]
    assert all(clip["clip_id"] == run.source[clip["index"]].clip_id for clip in found["clips"])
    assert any(clip["not_finite"] for clip in found["clips"])
    assert list((tmp_path / "run" / "profile" / "process-0").rglob("*.xplane.pb"))


@pytest.mark.parametrize("clips_per_video", [1, 3])
def test_the_clips_of_a_step_are_known_without_reading_them(data, clips_per_video):
    config = world.small_config(data)
    source = loader.open_split(config.data.dir, "train", 4)
    tokenize = tokenizer.load_tokenizer(config.data.tokenizer, 16, 600)
    options = {"batch_size": 16, "seed": 3, "clips_per_video": clips_per_video}
    batches = loader.train_batches(source, tokenize, num_threads=1, **options)
    for step in range(len(source) // 16 + 2):  # from one epoch into the next
        assert next(batches)["index"].tolist() == loader.step_clips(source, step, **options).tolist()


def test_rows_say_what_a_run_does(finished):
    config, workdir, _ = finished
    rows = metric_writer.read_metrics(workdir)
    towers = {f"update_ratio_{tower}" for tower in ("audio", "video", "text")}
    for row in rows:
        times = {*metric_writer.TIMES} - {"mfu"}  # a CPU's peak is not known
        assert {"loss", "grad_norm", "temperature", "learning_rate", *towers, *times} <= row.keys()
        assert row["temperature"] == np.float32(config.phases[0].temperature)
        assert all(row[name] > 0 for name in (*towers, "grad_norm", "clips_per_s", "step_s"))
        assert 0 < row["goodput"] < 1
        assert row["input_wait_s"] >= 0
    times = [row["elapsed_s"] for row in rows]
    assert times == sorted(times)
    # The times of the steps are without compilation and saves, so their sum is at most the time of the run.
    assert sum(row["step_s"] for row in rows) <= times[-1]


class Result:
    """Stands for the result of a step, which the devices have computed once `is_there` is set."""

    def __init__(self):
        self.is_there = threading.Event()

    def block_until_ready(self):
        assert self.is_there.wait(10)
        return self


def test_the_stopwatch_counts_as_lost_only_what_the_devices_waited_for():
    now, results = [100.0], []
    watch = Stopwatch(since_s=50.0, worked_s=20.0, clock=lambda: now[0])

    def call(at):
        now[0] = at
        results.append(Result())
        return watch.call(lambda: results[-1])[1]

    def finish(i, at):
        now[0] = at
        results[i].is_there.set()
        called[i][1].result(10)

    def wait_for_input(begin, end):
        now[0] = begin
        with watch.during("input"):
            now[0] = end

    called = [call(100)]
    wait_for_input(100, 104)  # while the first step runs
    called.append(call(104))
    finish(0, 110)
    watch.done(called[0])
    finish(1, 120)
    wait_for_input(112, 125)  # five seconds longer than the second step takes
    watch.done(called[1])
    called.append(call(125))
    finish(2, 130)
    watch.done(called[2])
    assert watch.lost_s == {"input": 5.0}
    assert watch.worked_s == 20 + 10 + 10 + 5
    assert watch.elapsed_s == 50 + 30
    assert watch.goodput == 45 / 80
    now[0] = 131
    with watch.during("save"):
        now[0] = 134
    watch.settle()
    assert watch.lost_s == {"input": 5.0, "save": 3.0}


def test_the_process_that_is_behind_is_said_to_hang_or_the_devices_if_none_is():
    at = {i: {"count": 7, "place": "waiting for the devices to do step 3", "for_s": 300} for i in range(4)}
    lines = watchdog.verdict(at)
    assert len(lines) == 5
    assert "no process is behind" in lines[-1]
    at[2] = {"count": 6, "place": "reading the batch of step 4", "for_s": 312}
    assert watchdog.verdict(at) == ["process 2 hangs: it has been reading the batch of step 4 for 312 s"]


def test_a_process_that_may_take_long_is_waited_for_and_those_that_waited_are_not_blamed():
    judge = watchdog.Judge(10)
    at = lambda count, factor: {"count": count, "factor": factor}  # noqa: E731
    waits, compiles = at(7, 1), at(6, watchdog.LONG)
    assert not any(judge.hangs({0: waits, 1: compiles}, now) for now in range(0, 60, 5))
    # Process 1 has arrived and both do the step; process 0 waited a minute, and has ten seconds of its own from now.
    assert not judge.hangs({0: waits, 1: at(7, 1)}, 61)
    assert not judge.hangs({0: waits, 1: at(8, 6)}, 70)  # the last report of process 0 is old
    assert not judge.hangs({0: at(8, 1), 1: at(9, 1)}, 72)
    assert judge.hangs({0: at(8, 1), 1: at(9, 1)}, 83)
    assert watchdog.Judge(10).hangs({0: waits}, 11) is False  # seen for the first time
    judge = watchdog.Judge(10)
    assert [judge.hangs({0: waits, 1: compiles}, now) for now in (0, 59, 61)] == [False, False, True]


HANG = """
import time
from mc3_jax.watchdog import Watchdog
with Watchdog(2) as dog:
    for _ in range(8):
        with dog.at("reading a batch"):
            time.sleep(0.5)
    with dog.at("compiling", long=True):
        time.sleep(3)
    print("so far so good", flush=True)
    with dog.at("reading the batch of step 9"):
        time.sleep(3600)
"""


@pytest.mark.slow  # waits
def test_a_process_that_hangs_ends_and_says_where():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=120, cwd=world.ROOT)
    assert done.returncode == job_lib.LOST, done.stderr
    assert done.stdout == "so far so good\n"
    assert re.search("error: process 0 hangs: it has been reading the batch of step 9 for [0-9]+ s\n", done.stderr)
    assert 'File "<string>", line 12, in <module>' in done.stderr
    assert "the last checkpoint; if this was not a hang, raise config.hang_timeout_s, now 2\n" in done.stderr


def test_a_trace_holds_the_steps_that_were_asked_for_and_no_others(tmp_path):
    work = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((64, 64))
    with profiler.Profiler(str(tmp_path), profiler.parse_range("3:5")) as tracer:
        for step in range(8):
            with tracer.step(step):
                x = work(x)
            if tracer.ends(step + 1):
                x.block_until_ready()
                tracer.stop()
    (path,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"4", "5"}


@pytest.mark.parametrize("text", ["100", "5:5", "7:3", "a:b", "-1:4", "1:2:3", "1:99999999999"])
def test_an_invalid_range_of_steps_is_refused(text):
    with pytest.raises(ValueError, match="--profile=.* is not a range of steps: write START:STOP, e.g. 100:110"):
        profiler.parse_range(text)


@pytest.mark.large  # waits
def test_a_process_that_hangs_ends_even_if_nobody_reads_its_log_any_more():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", HANG], stdout=subprocess.DEVNULL, stderr=writer, timeout=120, cwd=world.ROOT)
    os.close(writer)
    assert done.returncode == job_lib.LOST


@pytest.mark.slow  # waits
def test_a_process_that_hangs_ends_even_if_its_log_is_full_and_nobody_reads_it():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    fcntl.fcntl(writer, fcntl.F_SETFL, 0)
    code = HANG.replace("import time", "import time; from mc3_jax import watchdog; watchdog._LAST_WORDS_S = 5")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=writer, timeout=120, cwd=world.ROOT)
    os.close(writer)
    os.close(reader)
    assert done.returncode == job_lib.LOST


ALONE = """
import time
from mc3_jax import job
job.initialize(5, preemptible=True)
print("here", flush=True)
end = time.monotonic() + 16
while time.monotonic() < end:
    time.sleep(0.2)
"""


def status_after_a_stop(code: str, stop_s: float) -> int:
    """Runs Python code, stops it for `stop_s` a second after it has printed "here", and returns its exit status."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=world.ROOT)
    with process:
        assert process.stdout.readline() == "here\n"
        time.sleep(1)  # so that it has been checked once
        process.send_signal(signal.SIGSTOP)
        time.sleep(stop_s)
        process.send_signal(signal.SIGCONT)
        return process.wait(60)


@pytest.mark.slow  # waits
def test_a_process_that_is_alone_may_be_stopped_for_longer_than_a_heartbeat():
    assert status_after_a_stop(ALONE, 12) == 0


PAUSED = """
import time
from mc3_jax.watchdog import Watchdog
with Watchdog(1) as dog:
    with dog.at("compiling", long=True):
        print("here", flush=True)
        end = time.monotonic() + 12
        while time.monotonic() < end:
            time.sleep(0.2)
"""


@pytest.mark.slow  # waits
def test_a_process_that_was_stopped_and_continues_does_not_count_as_hanging():
    assert status_after_a_stop(PAUSED, 7) == 0
