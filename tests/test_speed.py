"""Every benchmark of speed runs and leaves its table."""

import os
import subprocess
import sys

import pytest

from tests import world

SECTIONS = (
    "The accelerator against the CPU", "Train step", "Train step", "Input pipeline", "Six-pair InfoNCE, 256-d",
    "Real data against one batch", "Scaling",
)  # fmt: skip


@pytest.mark.large
@pytest.mark.timeout(1800)
def test_what_is_run_on_a_gpu_runs_at_the_sizes_of_a_cpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # which asks for eight devices
    environment |= {"SMALL": "1", "PYTHON": sys.executable}
    results = tmp_path / "results.md"
    command = ["bash", "benchmarks/run_gpu.sh", str(results)]
    done = subprocess.run(command, cwd=world.ROOT, env=environment, capture_output=True, text=True, check=False)
    told = [line.removeprefix("## ") for line in results.read_text().splitlines() if line.startswith("## ")]
    assert tuple(told) == SECTIONS, done.stderr
    assert "ended with status" not in done.stdout + results.read_text()
    assert "took more than" not in done.stdout
    # Speed may be missed beside other work; what is computed may not.
    assert "devices_agree: " not in done.stdout
