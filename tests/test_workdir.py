"""A workdir holds one run: locks, read-only folders, other data, evaluation as it was trained."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import demo
from mc3_jax import config as config_lib, workdir as workdir_lib
from tests import world

DIGESTS = {"data.dir": "0123", "data.tokenizer": "4567"}
HOLD = """
import sys, time
from mc3_jax import workdir
with workdir.lock_workdir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def claim(folder: pathlib.Path) -> None:
    with workdir_lib.lock_workdir(str(folder)):
        workdir_lib.claim_workdir(str(folder), demo.get_config(), DIGESTS)


def test_a_second_run_is_kept_out_until_the_first_has_ended_or_was_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=world.ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(workdir_lib.WorkdirError, match=f"is in use by process {holder.pid} on .*: wait until"):
            claim(tmp_path)
        assert os.listdir(tmp_path) == [workdir_lib.LOCK_FILE]
        holder.send_signal(signal.SIGKILL)
    claim(tmp_path)
    claim(tmp_path)  # the lock is released at a normal end too


def test_a_read_only_folder_is_one_line(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    root = os.geteuid() == 0  # whom no mode keeps from writing
    if root and subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        pytest.skip("root without the right to mount")
    subprocess.run(["mount", "-o", "remount,bind,ro", folder] if root else ["chmod", "500", folder], check=True)
    try:
        with pytest.raises(workdir_lib.WorkdirError, match=r"run can't be written to \(.+\): name another --workdir"):
            claim(folder)
    finally:
        subprocess.run(["umount", "-l", folder] if root else ["chmod", "700", folder], check=True)
    assert os.listdir(folder) == ["kept"]


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(workdir_lib.fcntl, "flock", no_locks)
    claim(tmp_path)
    assert (tmp_path / workdir_lib.CONFIG_FILE).is_file()
    assert "can't be locked (Function not implemented): make sure that no other run" in capsys.readouterr().err


def test_other_data_than_the_runs_are_refused_and_the_field_is_named(tmp_path):
    claim(tmp_path)
    workdir_lib.check_data(str(tmp_path), DIGESTS)
    (tmp_path / workdir_lib.DATA_FILE).unlink()  # as in a run of an earlier version
    claim(tmp_path)
    workdir_lib.check_data(str(tmp_path), DIGESTS)
    with pytest.raises(workdir_lib.WorkdirError, match="data.tokenizer names other data than the run in .* is trained on"):
        workdir_lib.check_data(str(tmp_path), DIGESTS | {"data.tokenizer": "89"})
    (tmp_path / workdir_lib.DATA_FILE).write_text("[]")
    with pytest.raises(workdir_lib.WorkdirError, match="data.json is damaged"):
        workdir_lib.check_data(str(tmp_path), DIGESTS)


def test_a_start_that_died_before_its_run_began_leaves_the_folder_free(tmp_path, monkeypatch):
    claim(tmp_path)
    (tmp_path / workdir_lib.CONFIG_FILE).unlink()  # it died between writing the two files
    (tmp_path / workdir_lib.DATA_FILE).write_text('{"data.dir": "beef", "data.tokenizer": "89"}')
    claim(tmp_path)
    workdir_lib.check_data(str(tmp_path), DIGESTS)
    (tmp_path / workdir_lib.DATA_FILE).unlink()
    with pytest.raises(workdir_lib.WorkdirError, match="process 0 on .* can't read .*data.json .*No such file"):
        workdir_lib.check_data(str(tmp_path), DIGESTS)
    monkeypatch.setattr(workdir_lib.job_lib, "from_process_0", lambda value: value + 1)
    with pytest.raises(workdir_lib.WorkdirError, match="config.data.dir names other data for process 0 on"):
        claim(tmp_path)


def test_a_process_waits_until_its_file_server_shows_what_process_0_has_written(tmp_path, monkeypatch):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        claim(tmp_path)

    monkeypatch.setattr(workdir_lib.time, "sleep", sleep)
    monkeypatch.setattr(workdir_lib.jax, "process_index", lambda: int(len(slept) == 0))
    workdir_lib.check_data(str(tmp_path), DIGESTS)
    assert slept == [1]
    (tmp_path / workdir_lib.CONFIG_FILE).unlink()
    slept.clear()
    config = demo.get_config()
    workdir_lib.check_workdir(str(tmp_path), config, must_exist=False)  # process 0 sees none either
    assert not slept
    monkeypatch.setattr(workdir_lib.job_lib, "from_process_0", lambda value: value or 5)  # it sees the config and step 5
    config.init.audio = "gone by now"  # so it is read no more
    workdir_lib.check_workdir(str(tmp_path), config)
    assert slept == [1]
    monkeypatch.setattr(workdir_lib.job_lib, "first_message", lambda message: message or "process 1 has another config")
    with pytest.raises(workdir_lib.WorkdirError, match="^process 1 has another config$"):
        workdir_lib.check_workdir(str(tmp_path), config, must_exist=True)
    (tmp_path / workdir_lib.CONFIG_FILE).unlink()
    monkeypatch.setattr(workdir_lib, "_UNSEEN_S", 0)
    slept.clear()
    with pytest.raises(workdir_lib.WorkdirError, match=r"process 1 on .* can't read .*config.json \(No such file"):
        workdir_lib.check_workdir(str(tmp_path), config, must_exist=True)


MACHINE = workdir_lib._machine()
HOLDERS = {
    "this boot": (os.getpid(), MACHINE, False),
    "a process of this boot that has ended": (2**22 + 1, MACHINE, True),  # beyond pid_max
    "another boot of a machine of that name": (os.getpid(), "boot 6f3b pod", True),
    "another pod of this boot": (os.getpid(), f"{MACHINE} 9c21", True),
    "an earlier version": (os.getpid(), "", False),
    "an earlier version's that has ended": (2**22 + 1, "", True),
}


@pytest.mark.parametrize("case", HOLDERS)
def test_a_machine_is_known_by_its_boot_and_its_pod_and_not_by_its_name_alone(tmp_path, monkeypatch, case):
    """Pods of a job have the same names and process ids when restarted: the lock of one that is gone would seem held here."""
    pid, machine, waits = HOLDERS[case]
    (tmp_path / workdir_lib.LOCK_FILE).write_text(f"process {pid} on {socket.gethostname()}\n{machine}".strip())
    slept = []

    def lock(*_):
        if not slept:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workdir_lib.time, "sleep", slept.append)
    monkeypatch.setattr(workdir_lib.fcntl, "flock", lock)
    if waits:
        claim(tmp_path)
    else:
        with pytest.raises(workdir_lib.WorkdirError, match=f"in use by process {pid} on [^ ]+: wait until .* --workdir$"):
            claim(tmp_path)
    assert slept == ([5] if waits else [])
    monkeypatch.setenv("POD_UID", "9c20")  # as launch/gke_jobset.yaml sets it
    assert workdir_lib._machine() == f"{MACHINE} 9c20"


def test_the_lock_of_another_machine_is_waited_for(tmp_path, monkeypatch):
    slept, taken = [], []
    monkeypatch.setattr(workdir_lib.time, "sleep", slept.append)
    (tmp_path / workdir_lib.LOCK_FILE).write_text("process 7 on elsewhere\n")

    def lock(*_):
        if len(slept) < 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        taken.append(True)

    monkeypatch.setattr(workdir_lib.fcntl, "flock", lock)
    claim(tmp_path)
    assert (slept, taken) == ([5, 5, 5], [True])
    monkeypatch.setattr(workdir_lib, "_WAIT_S", 0)
    (tmp_path / workdir_lib.LOCK_FILE).write_text("process 7 on elsewhere\n")
    slept.clear()
    with pytest.raises(workdir_lib.WorkdirError, match="in use by process 7 on elsewhere.*; if that machine is gone, delete"):
        claim(tmp_path)


def test_a_run_is_evaluated_as_it_was_trained_without_its_overrides_and_never_otherwise(tmp_path):
    trained, config = demo.get_config(), demo.get_config()
    trained.phases[0].epochs, trained.phases[1].trainable, trained.data.folds = 2.5, ("audio",), (1, 4)
    trained.eval.split = "validation"
    workdir_lib.claim_workdir(str(tmp_path), trained, DIGESTS)
    config.eval.num_clusters, config.data.num_threads = 3, 2  # which evaluation may choose
    made, own = workdir_lib.as_trained(str(tmp_path), config, ["eval.num_clusters"])
    workdir_lib.check_workdir(str(tmp_path), made, must_exist=True)
    assert (made.eval, made.data.num_threads, made.phases) == (config.eval, 2, trained.phases)
    options = ["--config.data.folds='(1,4)'", "--config.phases[0].epochs=2.5", "--config.phases[1].trainable='(\"audio\",)'"]
    assert own == options
    config.phases[0].epochs = 7.0
    made, own = workdir_lib.as_trained(str(tmp_path), config, ["phases[0].epochs"])  # as if given on the command line
    assert own == [options[0], options[2]]
    for given, told in ((made, [options[1]]), (config, options)):
        with pytest.raises(workdir_lib.WorkdirError, match="different run: ") as raised:
            workdir_lib.check_workdir(str(tmp_path), given, must_exist=True)
        assert str(raised.value).endswith(f"it was trained with {' '.join(told)}: give the same options")
    with pytest.raises(workdir_lib.WorkdirError, match="give the same options; choose another workdir for another run$"):
        workdir_lib.check_workdir(str(tmp_path), config)
    for change, advice in (
        (lambda c: setattr(c, "name", "other"), "'demo' there and 'other' here; if .*, add --config.name=demo, otherwise"),
        (lambda c: c.phases.pop(), "; name the --config that it was trained with, see .*config.json$"),
    ):
        other = demo.get_config()
        change(other)
        assert workdir_lib.as_trained(str(tmp_path), other, []) == (other, [])
        with pytest.raises(workdir_lib.WorkdirError, match=advice):
            workdir_lib.check_workdir(str(tmp_path), other, must_exist=True)
    assert workdir_lib.as_trained(str(tmp_path / "absent"), config, []) == (config, [])
    last = demo.get_config()
    last.phases[-1].trainable = ("text",)
    made, own = workdir_lib.as_trained(str(tmp_path), last, ["phases[-1].trainable"])  # counted from the end
    assert (made.phases[1].trainable, own) == (("text",), options[:2])


def test_a_run_with_a_checkpoint_keeps_the_init_it_began_with(tmp_path):
    trained, config = demo.get_config(), demo.get_config()
    trained.init.audio, config.init.audio, config.init.temporal = "first.pth", "other.pth", "linear"
    workdir_lib.claim_workdir(str(tmp_path), trained, DIGESTS)
    with pytest.raises(workdir_lib.WorkdirError, match="config.init.audio is 'first.pth' there and 'other.pth' here"):
        workdir_lib.check_workdir(str(tmp_path), config)  # which would start from these files
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    workdir_lib.check_workdir(str(tmp_path), config)
    options = ["--config.init.audio=first.pth", "--config.init.temporal=zeros"]
    assert workdir_lib.as_begun(str(tmp_path), config) == (trained, options)
    assert workdir_lib.as_trained(str(tmp_path), config, []) == (trained, options)
    made, _ = workdir_lib.as_trained(str(tmp_path), config, ["init.audio"])  # as if given on the command line
    with pytest.raises(workdir_lib.WorkdirError, match="config.init.audio is 'first.pth' there and 'other.pth' here"):
        workdir_lib.check_workdir(str(tmp_path), made, must_exist=True)


def test_options_of_a_run_are_read_by_the_command_line_as_they_were(monkeypatch):
    values = {"data.folds": (1, 4), "phases[1].trainable": ("audio",), "phases[0].epochs": 2.5, "model.dtype": "float32"}
    values["phases[0].reset_optimizer"] = True
    plain = json.loads(json.dumps(values))  # as a run stores them
    options = [f"--config.{name}={workdir_lib._literal(value)}" for name, value in plain.items()]
    monkeypatch.setattr(sys, "argv", ["train", f"--config={world.ROOT}/configs/demo.py", *options])
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=parsed)
    parsed(sys.argv)
    found = workdir_lib._flatten_config(config_lib.to_dict(parsed.config))
    assert {name: found[name] for name in plain} == plain
    assert set(config_flags.get_override_values(parsed["config"])) == set(plain)
