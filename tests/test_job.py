"""Processes started by Slurm: which devices each takes, and that a wait for the others is reported."""

import json
import os
import subprocess
import sys

import pytest

from tests import world

# Joins a job with the environment of each line of standard input, all at once. Forking for each saves the imports.
JOIN = """
import json, os, sys, time, jax
from jax._src import distributed
from mc3_jax import job
job._SILENT_S = 0.2
for line in sys.stdin:
    if os.fork() == 0:
        variables = json.loads(line)
        os.environ.update(variables)
        if variables["SLURM_NTASKS"] == "8":
            job._ARRIVAL_S = 2
        job.initialize(10)
        devices, found = jax.config.read("jax_cuda_visible_devices"), distributed.global_state
        os.write(1, f"{variables['CASE']}: {devices} of {found.num_processes}\\n".encode())
        job.wait_for_others("the end", 20)
        time.sleep(0 if found.process_id else 0.5)
        os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""
STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "",
}  # fmt: skip


@pytest.mark.slow
def test_a_process_that_slurm_starts_alone_on_its_node_takes_all_devices_and_waits_for_nobody():
    """Of several processes on one node each takes one device. A process that waits for others says so, and where."""
    two = {"SLURM_NTASKS": "2"}
    cases = [
        {"CASE": "an interactive session"},
        {"CASE": "one task of a job's eight", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
        *({"CASE": f"node {i}", "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": i} | two for i in "01"),
        *({"CASE": f"task {i}", "SLURM_JOB_ID": "2", "SLURM_LOCALID": i, "SLURM_PROCID": i} | two for i in "01"),
        {"CASE": "the others never come", "SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"},
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], input="".join(f"{json.dumps(STEP | case)}\n" for case in cases), env=env,
        cwd=world.ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert sorted(done.stdout.splitlines()) == [
        "an interactive session: all of 1", "node 0: all of 2", "node 1: all of 2", "one task of a job's eight: all of 1",
        "task 0: 0 of 2", "task 1: 1 of 2",
    ], done.stderr  # fmt: skip
    assert "process 0 of 8 waits for the others at localhost:61443, for at most 2 s\n" in done.stderr
