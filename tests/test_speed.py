"""Every benchmark of speed runs and leaves its table."""

import os
import re
import subprocess
import sys

import pytest

from tests import world

SECTIONS = (
    "The accelerator against the CPU", "Train step", "Train step", "Input pipeline", "Six-pair InfoNCE, 256-d",
    "Real data against one batch", "Scaling",
)  # fmt: skip


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # which asks for eight devices
    return subprocess.run(
        command, cwd=world.ROOT, env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.large
@pytest.mark.timeout(1800)
def test_what_is_run_on_a_gpu_runs_at_the_sizes_of_a_cpu(tmp_path):
    results = tmp_path / "results.md"
    done = run("bash", "benchmarks/run_gpu.sh", str(results), SMALL="1", PYTHON=sys.executable)
    told = [line.removeprefix("## ") for line in results.read_text().splitlines() if line.startswith("## ")]
    assert tuple(told) == SECTIONS, done.stderr
    assert "ended with status" not in done.stdout + results.read_text()
    assert "took more than" not in done.stdout
    # Speed may be missed beside other work; what is computed may not.
    assert "devices_agree: " not in done.stdout


@pytest.mark.large
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("benchmark", "flags", "row"),
    [
        ("kernels", ["--steps", "1", "--depth", "1"], r"\| video time_attention, back \| [\d.]+ \|"),
        (
            "train_step", ["--rounds", "1", "--depth", "2", "--systems", "ours_gradient", "--backward_only"],
            r"\| mc3_jax, loss and gradient \| \d+ \|",
        ),
    ],
)
def test_one_question_alone(tmp_path, benchmark, flags, row):
    results = tmp_path / "results.md"
    done = run(sys.executable, "-m", f"benchmarks.{benchmark}", "--batch", "2", *flags, "--results", str(results))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(row, results.read_text())
