"""A run that is killed, preempted, damaged and started again ends with the same bits as an undisturbed one."""

import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mc3_jax import (
    checkpoint,
    cli,
    config as config_lib,
    integrity,
    job as job_lib,
    metric_writer,
    run as run_lib,
    terminal,
    train,
    train_step as step_lib,
)
from tests import test_fits, world
from tests.test_train import assert_equal_bits

pytestmark = pytest.mark.slow  # every start of a run compiles its steps
CONFIG = """
import json, pathlib
from mc3_jax import config
def get_config():
    return config.from_dict(config.Config, json.loads(pathlib.Path({path!r}).read_text()))
"""
LIMIT_S = 240  # for a process to end by itself, on a busy machine


def write_config(folder: pathlib.Path, config) -> pathlib.Path:
    """Writes a config file for the command line and returns its path."""
    values = folder / "values.json"
    values.write_text(json.dumps(config_lib.to_dict(config)))
    path = folder / "config.py"
    path.write_text(CONFIG.format(path=str(values)))
    return path


def start(config_file, workdir, *, process=None, cache=None) -> tuple[subprocess.Popen, pathlib.Path]:
    """Starts a training process with one device and returns (process, path of its log).

    Args:
      config_file: Config file of the run.
      workdir: Folder of the run.
      process: (index, count, port) of the process in a job of several; None for a single process.
      cache: Folder of compiled steps, for a single process only: jaxlib 0.10's collectives on CPUs abort or hang in
        programs that were read from a cache.
    """
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    arguments = ["-m", "mc3_jax.train", f"--config={config_file}", f"--workdir={workdir}"]
    job = job_of(*process) if process else {}
    # What compiles in less than a second is not cached: a process that is killed may leave a half-written entry.
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"} if cache else {}
    return launch(arguments, config_file.parent, {"XLA_FLAGS": flags} | job | kept)


def launch(arguments, folder, environment) -> tuple[subprocess.Popen, pathlib.Path]:
    """Starts Python and returns (process, path of its log), a new file in `folder`."""
    path = folder / f"log-{time.monotonic_ns()}"
    with path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=world.ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
    return process, path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def job_of(index: int, count: int, port: int) -> dict[str, str]:
    """Returns the environment variables of process `index` in a job of `count` processes on this machine."""
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
    return {name: str(value) for name, value in job.items()}


def run_together(arguments, folder, *, num_devices=1) -> list[tuple[int, str]]:
    """Runs Python in the two processes of a job and returns (status, log) of each."""
    port = free_port()
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={num_devices}")}
    job = [launch(arguments, folder, flags | job_of(i, 2, port)) for i in (0, 1)]
    try:
        return [(process.wait(LIMIT_S), log.read_text()) for process, log in job]
    finally:
        for process, _ in job:
            process.kill()
            process.wait()


def wait_for(condition, process, log) -> bool:
    """Waits until a condition holds; returns False if the process ends before that."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)
    return True


def num_rows(workdir) -> int:
    return len(metric_writer.read_metrics(str(workdir)))


def is_saving(workdir) -> bool:
    folder = checkpoint.checkpoint_dir(str(workdir))
    return folder.is_dir() and any(".saving" in path.name for path in folder.iterdir())


def rows_of(workdir, num_processes=1):
    """Returns (each step's metrics except those of time, the clips of each step by process)."""
    rows = metric_writer.read_metrics(str(workdir))
    rows = [{k: v for k, v in row.items() if k not in metric_writer.TIMES} for row in rows]
    return rows, [metric_writer.read_clips(str(workdir), i) for i in range(num_processes)]


def newest_state(config, workdir):
    """Returns (step, state) of the newest checkpoint."""
    run = run_lib.set_up(config, str(workdir))
    return checkpoint.restore_newest(str(workdir), lambda step: step_lib.to_tree(train._plan_state(run, step)[1]))


@pytest.mark.timeout(5400)  # a minute on an idle machine, ten times that on a busy one; with --soak ten minutes
def test_a_run_killed_preempted_and_injured_ends_with_the_bits_of_an_undisturbed_one(data, tmp_path, num_kills):
    config, undisturbed, cache = world.small_config(data), tmp_path / "undisturbed", tmp_path / "cache"
    config_file = write_config(tmp_path, config)
    process, log = start(config_file, undisturbed, cache=cache)
    assert process.wait(LIMIT_S) == 0, log.read_text()
    last, state = newest_state(config, undisturbed)
    rng = random.Random(0)
    told = {1: (signal.SIGTERM, cli.PREEMPTED), 2: (signal.SIGINT, cli.INTERRUPTED)}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in tests that run in the background
        told[2] = told[1]
    kills = rounds = 0
    while kills < num_kills:
        workdir, rounds = tmp_path / f"run{rounds}", rounds + 1
        for life in range(100):
            process, log = start(config_file, workdir, cache=cache)
            done = num_rows(workdir)
            # The first start of a round is killed inside a save, the next two get a signal while they compile, the others are
            # killed anywhere.
            goal = done + rng.randint(1, 3)
            compiles = {life: lambda: "device(s)" in log.read_text() for life in (1, 2)}  # noqa: B023
            moments = {0: lambda: is_saving(workdir)} | compiles  # noqa: B023
            alive = wait_for(moments.get(life, lambda: num_rows(workdir) >= goal), process, log)  # noqa: B023
            if life in compiles:
                before = checkpoint.steps_of(str(workdir))
                process.send_signal(told[life][0])
                wait_for(lambda: num_rows(workdir) > done, process, log)  # noqa: B023
                begin = time.monotonic()
                assert process.wait(LIMIT_S) == told[life][1], log.read_text()
                assert time.monotonic() - begin < 30
                step = checkpoint.steps_of(str(workdir))[-1]
                assert step == max(before, default=0) + 1  # it stops after its first step, also if resumed
                assert f"stopped after step {step}, " in log.read_text()
                assert num_rows(workdir) == step
                if life == 2:
                    _injure_newest(workdir, rng)
            elif alive and kills < num_kills:
                time.sleep(rng.uniform(0, 0.1))
                process.kill()
                killed = process.wait() == -signal.SIGKILL
                kills += killed
            elif process.wait(LIMIT_S) == 0:
                break
            else:
                pytest.fail(log.read_text()[-3000:])
            text = log.read_text()
            assert "Traceback" not in text, text
        assert rows_of(workdir) == rows_of(undisturbed)
        step, ended = newest_state(config, workdir)
        assert step == last
        assert_equal_bits(ended, state)
        assert any(path.name.endswith(".damaged") for path in checkpoint.checkpoint_dir(str(workdir)).iterdir())


def _injure_newest(workdir, rng) -> None:
    """Flips a bit in the largest file of the newest checkpoint, which Orbax alone would hardly notice."""
    folder = checkpoint.checkpoint_dir(str(workdir)) / str(checkpoint.steps_of(str(workdir))[-1])
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


TALK = """
import numpy as np
from jax.experimental import multihost_utils
from mc3_jax import job
job.initialize(10)
with job.ending_together(10):
    while True:
        multihost_utils.process_allgather(np.ones(3))
        print("talked", flush=True)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_loses_another_ends_in_time_with_a_line_and_its_own_status(tmp_path, victim):
    port = free_port()
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    job = [launch(["-c", TALK], tmp_path, flags | job_of(i, 2, port)) for i in (0, 1)]
    try:
        for process, log in job:
            assert wait_for(lambda: "talked" in log.read_text(), process, log), log.read_text()  # noqa: B023
        job[victim][0].kill()
        begin = time.monotonic()
        process, log = job[1 - victim]
        assert process.wait(LIMIT_S) == job_lib.LOST, log.read_text()
        assert time.monotonic() - begin < 2 * 10
    finally:
        for process, _ in job:
            process.kill()
            process.wait()
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"error: process {1 - victim} of 2 ends because another process ended or was silent for 10 s")
    assert "Traceback" not in log.read_text()


ENDS_FIRST = """
import sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from mc3_jax import cli, job, terminal
job.initialize(10)
with job.ending_together(10):
    multihost_utils.process_allgather(np.ones(3))
    if jax.process_index() == 0:
        time.sleep(3)
        terminal.fail("the checkpoint of step 7 can't be written")
sys.exit(cli.PREEMPTED)
"""


def test_a_process_that_is_done_while_another_fails_ends_as_lost_and_does_not_hang(tmp_path):
    (first, _), (second, log) = run_together(["-c", ENDS_FIRST], tmp_path)
    assert (first, second) == (terminal.USER_ERROR, job_lib.LOST), log
    assert log.splitlines()[-1].startswith("error: process 1 of 2 ends because another process ended"), log


EVALUATION = """
import pathlib, signal, sys, time, types
import jax, numpy as np
from jax.experimental import multihost_utils
from mc3_jax import evaluate
def busy(*_):
    pathlib.Path(sys.argv[1], str(jax.process_index())).touch()
    if jax.process_index() == 0:
        time.sleep(600)
    multihost_utils.process_allgather(np.ones(3))
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
evaluate._as_trained = busy
evaluate.main(types.SimpleNamespace(heartbeat_timeout_s=10), "run")
"""


def test_ctrl_c_ends_every_process_of_an_evaluation_at_once_though_one_waits_for_the_other(tmp_path):
    port, busy = free_port(), tmp_path / "busy"
    busy.mkdir()
    job = [launch(["-c", EVALUATION, str(busy)], tmp_path, job_of(i, 2, port)) for i in (0, 1)]
    try:
        for i, (process, log) in enumerate(job):
            assert wait_for((busy / str(i)).exists, process, log), log.read_text()
        time.sleep(1)  # until process 1 waits in C++
        for process, _ in job:
            process.send_signal(signal.SIGINT)
        for process, log in job:
            assert process.wait(5) == -signal.SIGINT, log.read_text()
            assert "Traceback" not in log.read_text()
    finally:
        for process, _ in job:
            process.kill()
            process.wait()


UNWRITTEN = """
import resource, sys
import jax, numpy as np
from mc3_jax import checkpoint, cli, job, mesh as mesh_lib
job.initialize(100)
with job.ending_together(100), cli.user_errors((checkpoint.CheckpointError,)):
    abstract = mesh_lib.abstract_state(mesh_lib.make_mesh(2), {"kernel": jax.ShapeDtypeStruct((512, 512), np.float32)})
    values = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    state = {"kernel": jax.make_array_from_callback(values.shape, abstract["kernel"].sharding, lambda index: values[index])}
    with checkpoint.Checkpoints(sys.argv[1], every_steps=1, keep=2, keep_steps=[]) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        if jax.process_index() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        checkpoints.save(2, state)
"""


def test_a_process_that_alone_cant_write_its_part_of_a_checkpoint_ends_all_of_them_with_one_line(tmp_path):
    job = run_together(["-c", UNWRITTEN, str(tmp_path / "run")], tmp_path)
    for status, log in job:
        assert status == terminal.USER_ERROR, log
        assert "error: the checkpoint of step 2 can't be written to " in log.splitlines()[-1]
    assert checkpoint.steps_of(str(tmp_path / "run")) == [1]


SLOW = """
import time
import jax, numpy as np
from jax.experimental import multihost_utils
from mc3_jax import job
from mc3_jax.watchdog import Watchdog
job.initialize(100)
multihost_utils.process_allgather(np.ones(3))
with job.ending_together(100), Watchdog(3) as dog:
    with dog.at("compiling", long=True):
        time.sleep(9 if jax.process_index() == 0 else 0)
    with dog.at("waiting for the devices to do step 1"):
        multihost_utils.process_allgather(np.ones(3))
        time.sleep(2)  # of its own, after a wait that was longer than the limit
    begin = time.monotonic()
    assert job.list_from_process_0([7, 9][jax.process_index() :]) == [7, 9]  # whose file server is late
    assert job.list_from_process_0([7][: jax.process_index()]) == []
    time.sleep(0 if jax.process_index() else 3)  # at the report
assert time.monotonic() - begin >= 3  # the other process, too: at five minutes JAX would end both
"""


def test_a_process_that_may_take_long_is_waited_for_by_the_others(tmp_path):
    for status, log in run_together(["-c", SLOW], tmp_path):
        assert status == 0, log


@pytest.mark.large
def test_two_processes_that_diverge_stop_together_and_save_the_state_before(data, tmp_path):
    config, workdir = world.small_config(data), tmp_path / "run"
    config.phases[0].optimizer.learning_rate, config.phases[0].optimizer.warmup_steps = 1e20, 0
    config.fsdp = 2
    config_file = write_config(tmp_path, config)
    job = run_together(["-m", "mc3_jax.train", f"--config={config_file}", f"--workdir={workdir}"], tmp_path)
    for status, log in job:
        assert status == terminal.USER_ERROR, log
        assert "error: step 2 of phase 'align': loss nan, gradient norm nan. The state before it is saved" in log
        assert "Traceback" not in log, log
    assert checkpoint.steps_of(str(workdir)) == [1]
    assert len(json.loads((workdir / "diverged-2.json").read_text())["clips"]) == 16


STUCK = """
import dataclasses, sys, time
from mc3_jax import cli, train
from mc3_jax.data import loader
from absl import flags

def stuck(*args, read=loader.train_batches, **options):
    for number, batch in enumerate(read(*args, **options)):
        if number == 3 and options["process_index"] == 1:
            time.sleep(3600)
        yield batch

loader.train_batches = stuck
flags.DEFINE_string("profile", "", "")
# Half of what a config may have: it is waited for.
cli.run(lambda config, workdir: train.main(dataclasses.replace(config, hang_timeout_s=15), workdir))
"""


def test_a_job_in_which_a_process_hangs_ends_and_names_it_with_its_place(data, tmp_path):
    config = dataclasses.replace(world.small_config(data), heartbeat_timeout_s=100)
    config_file = write_config(tmp_path, config)
    job = run_together(["-c", STUCK, f"--config={config_file}", f"--workdir={tmp_path / 'run'}"], tmp_path)
    for number, (status, text) in enumerate(job):
        assert status == job_lib.LOST, text
        assert text.count(" hangs: ") == 1, text
        assert re.search(r"error: process 1 hangs: it has been reading the batch of step 4 for [0-9]+ s", text)
        assert ("in stuck" in text) == (number == 1)
    assert num_rows(tmp_path / "run") >= 2


def run_job(config_file, workdir, seed=None) -> bool:
    """Runs a job of two processes, one of which is killed if there is a seed; returns whether the job was completed."""
    port = free_port()
    rng = random.Random(seed)
    job = [start(config_file, workdir, process=(i, 2, port)) for i in (0, 1)]
    try:
        if seed is not None:
            victim, goal = job[rng.randrange(2)][0], num_rows(workdir) + rng.randint(1, 3)
            if wait_for(lambda: num_rows(workdir) >= goal, *job[0]):
                time.sleep(rng.uniform(0, 0.1))
                victim.kill()
        statuses = [process.wait(LIMIT_S) for process, _ in job]
        logs = [log.read_text() for _, log in job]
        assert set(statuses) <= {0, job_lib.LOST, -signal.SIGKILL}, logs
        return set(statuses) == {0}
    finally:
        for process, _ in job:
            process.kill()
            process.wait()


EXACT = """
import sys
import jax, numpy as np
from mc3_jax import checkpoint, job as job_lib, mesh as mesh_lib
from tests import test_fits
job_lib.initialize(100)
rows = np.split(np.arange(16), jax.process_count())[jax.process_index()]
rows = {name: value[rows] for name, value in test_fits.batch().items()}
for fsdp in (1, 8):
    grads, loss = test_fits.gradients(test_fits.small_config(), mesh=mesh_lib.make_mesh(fsdp), rows=rows)
    if jax.process_index() == 0:
        np.savez(f"{sys.argv[1]}/{fsdp}.npz", loss=loss, **checkpoint.flatten(grads))
"""


def test_two_processes_with_four_devices_each_have_the_gradient_of_one_device_on_every_kind_of_mesh(tmp_path):
    job = run_together(["-c", EXACT, str(tmp_path)], tmp_path, num_devices=4)
    assert [status for status, _ in job] == [0, 0], job
    expected = test_fits.gradients(test_fits.small_config())
    for fsdp in (1, 8):  # each process has half of the data, or half of the parameters
        found = dict(np.load(tmp_path / f"{fsdp}.npz"))
        loss = float(found.pop("loss"))
        test_fits.assert_equal((checkpoint.unflatten(found), loss), expected)


def test_a_job_of_two_processes_one_of_them_killed_ends_with_the_bits_of_an_undisturbed_one(data, tmp_path, request):
    if not request.config.getoption("--soak"):
        pytest.skip("minutes: `make soak` runs it")
    config = dataclasses.replace(world.small_config(data), heartbeat_timeout_s=10)
    config_file = write_config(tmp_path, config)
    undisturbed = tmp_path / "undisturbed"
    assert run_job(config_file, undisturbed)
    for seed in range(5):
        killed = tmp_path / f"killed{seed}"
        lives = 0
        while not run_job(config_file, killed, seed if lives < 2 else None):
            lives += 1
        assert lives
        assert rows_of(killed, 2) == rows_of(undisturbed, 2)
        step = checkpoint.steps_of(str(killed))[-1]
        kept = [integrity.read_manifest(checkpoint.checkpoint_dir(str(d)) / str(step), step) for d in (killed, undisturbed)]
        assert kept[0]["arrays"] == kept[1]["arrays"]  # checksums of all parameters and moments
