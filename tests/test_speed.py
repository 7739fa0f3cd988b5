"""Every benchmark of speed runs and leaves its table, whatever becomes of the others."""

import argparse
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import train_step
from mc3_jax import compile as compile_lib
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


def write_command(path: pathlib.Path, text: str) -> str:
    """Writes a command of bash's and returns its path."""
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


# What stands for the systems: one ends after its first step, one never comes to it, ours answers.
SYSTEMS = """
case "$*" in
  *serve=eager*) echo '{"platform": "cpu", "ready": 0, "note": ""}'; exit 0;;
  *serve=compiled*) exec sleep 60;;
  *serve=matmul*) MATMUL;;
esac
echo '{"platform": "cpu", "ready": 0, "note": ""}'
while read -r _; do echo '{"seconds": 0.5, "bytes": 1}'; done
"""


@pytest.mark.parametrize(
    ("matmul", "product", "share"),
    [(":", "gives 0.27 TFLOP/s", "1455.2"), ("exit 1", "was not measured: ended with status 1", "–")],
)
def test_a_system_that_is_late_or_ends_leaves_the_others_their_rows(matmul, product, share, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_lib, "model_flops", lambda config, phase: 1e12)
    args = argparse.Namespace(
        batch=2, depth=1, dtype="float32", remat="none", chunk_size=0, scan=False, backward_only=False, together=True,
        alone=False, systems="ours,eager,compiled", first_step_s=1.0, rounds=2, steps=1, results=tmp_path / "r.md",
    )  # fmt: skip
    command = write_command(tmp_path / "python", SYSTEMS.replace("MATMUL", matmul))
    monkeypatch.setattr(train_step.sys, "executable", command)
    with pytest.raises(SystemExit, match="1"):
        train_step.report(args, train_step.measure(args))
    text = args.results.read_text()
    assert f"| mc3_jax, whole step | 500 | 4.0 | {share} | – |" in text
    assert "| PyTorch eager | ended with status 0 |" in text
    assert "| PyTorch compiled | no step within 1 s |" in text
    assert f"a matrix product {product};" in text
