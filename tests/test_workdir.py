"""One run in one workdir: locks, read-only folders."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from configs import demo
from mc3_jax import workdir as workdir_lib
from tests import world

HOLD = """
import sys, time
from mc3_jax import workdir
with workdir.lock_workdir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def claim(folder: pathlib.Path) -> None:
    with workdir_lib.lock_workdir(str(folder)):
        workdir_lib.claim_workdir(str(folder), demo.get_config())


def test_a_second_run_is_kept_out_until_the_first_has_ended_or_was_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=world.ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(workdir_lib.WorkdirError, match=f"is in use by process {holder.pid} on .*: wait until"):
            claim(tmp_path)
        assert os.listdir(tmp_path) == [workdir_lib.LOCK_FILE]
        holder.send_signal(signal.SIGKILL)
    claim(tmp_path)
    claim(tmp_path)  # freed at a normal end too


def test_a_read_only_folder_is_one_line(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    root = os.geteuid() == 0  # writes whatever the mode says
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
    assert "can't be locked (Function not implemented): see that no other run" in capsys.readouterr().err
