"""`benchmarks/run_gpu.sh` runs what matters most first, and every part, even if others fail."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import world

SECTIONS = (
    "The accelerator against the CPU", "Train step", "Train step", "Real data against one batch",
    "Real data against one batch", "Six-pair InfoNCE, 256-d", "Input pipeline", "Scaling",
)  # fmt: skip
NOTHING_MISSED = ["no benchmark failed or missed a goal"]
H200_MIB, H100_MIB = 143_771, 81_559


def run(results: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # it asks for eight devices
    command = ["bash", "benchmarks/run_gpu.sh", str(results)]
    return subprocess.run(
        command, cwd=world.ROOT, env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.large
@pytest.mark.timeout(1800)
def test_the_benchmarks_for_a_gpu_run_at_sizes_for_a_cpu(tmp_path):
    results = tmp_path / "results.md"
    done = run(results, SMALL="1", PYTHON=sys.executable)
    told = [line.removeprefix("## ") for line in results.read_text().splitlines() if line.startswith("## ")]
    assert tuple(told) == SECTIONS, done.stderr
    assert "ended with status" not in done.stdout + results.read_text()
    assert "was ended" not in done.stdout
    assert "was killed" not in done.stdout
    # A busy machine may miss a goal of speed, but what is computed must agree.
    assert "devices_agree: " not in done.stdout


def write_command(path: pathlib.Path, text: str) -> str:
    """Writes an executable Bash script with these commands and returns its path."""
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def parts_for_a_gpu(
    tmp_path: pathlib.Path, *, memory_mib: int = H200_MIB, status: str = "exit 0", **environment: str
) -> tuple[list[str], list[str]]:
    """Runs `run_gpu.sh` and returns (limit in seconds and words of each benchmark that it started; lines told at the end).

    Those that run beside the first `train_step` come first.

    Args:
      tmp_path: Folder for stand-ins and results.
      memory_mib: Memory of the GPU.
      status: Bash commands that stand for every benchmark, whose module is $2.
      **environment: Environment variables of the script.
    """
    write_command(tmp_path / "nvidia-smi", f"echo {memory_mib}")
    # timeout --kill-after=S LIMIT PYTHON -m benchmarks.NAME ...
    record = f'module=${{5#benchmarks.}}\necho "$2 $module ${{*:6}}" >> {tmp_path}/parts'
    write_command(tmp_path / "timeout", f'{record}\nshift 2\nexec "$@"')
    python = write_command(tmp_path / "python", status)
    path = f"{tmp_path}:{os.environ['PATH']}"
    (tmp_path / "parts").write_text("")
    done = run(tmp_path / "r.md", PYTHON=python, PATH=path, **environment)
    told = [line for line in done.stdout.splitlines() if not line.startswith(("==", "the GPU has"))]
    assert (done.returncode == 0) == (told[-1:] == NOTHING_MISSED), done.stderr
    parts = (tmp_path / "parts").read_text().splitlines()
    beside = [part for part in parts if part.split()[1] in ("devices_agree", "contrastive")]
    return [*beside, *(part for part in parts if part not in beside)], told


@pytest.mark.parametrize(
    ("memory_mib", "beside_torch", "alone", "between"), [(H200_MIB, 64, 256, 128), (H100_MIB, 24, 128, 64)]
)
def test_on_a_gpu_what_matters_most_comes_first_and_batches_are_those_its_memory_holds(
    memory_mib, beside_torch, alone, between, tmp_path
):
    parts, told = parts_for_a_gpu(tmp_path, memory_mib=memory_mib)
    assert told == NOTHING_MISSED
    wanted = [
        ("devices_agree", ""),
        ("contrastive", "--batches 16384,65536 "),
        ("train_step", f"--batch {beside_torch} .*ours,eager,compiled --together"),
        ("train_step", f"--batch {alone} .*ours,again --alone"),
        ("end_to_end", f"--batch {alone} .*--num_threads 4 "),
        ("end_to_end", f"--batch {alone} .*--num_workers 4 "),
        ("input_pipeline", ""),
        ("scaling", f"--batches {between} "),
    ]
    assert [part.split()[1] for part in parts] == [name for name, _ in wanted]
    for part, (_, words) in zip(parts, wanted, strict=True):
        assert re.search(words, part)


def test_each_benchmark_is_started_before_nine_minutes_are_over_if_each_needs_what_is_asked_for_it(tmp_path):
    parts, _ = parts_for_a_gpu(tmp_path)
    limits = [int(part.split()[0]) for part in parts]
    beside, others = limits[:2], limits[2:-1]  # the last is run only if there is time left
    assert 0.75 * sum(others) < 530 - 15
    assert sum(beside) < 190  # in which PyTorch's first step must be done


def test_a_benchmark_that_fails_keeps_no_other_from_running(tmp_path):
    fails = "case $2 in *train_step) exit 3;; *devices_agree) exit 137;; *end_to_end) exit 1;; *contrastive) exit 124;; esac"
    parts, told = parts_for_a_gpu(tmp_path, status=fails)
    assert len(parts) == 8
    assert told == [
        "train_step: ended with status 3", "devices_agree: was killed: it did not end in time, or memory ran out",
        "contrastive: took too long and was ended", "train_step: ended with status 3",
        "end_to_end: a goal is missed, or it failed: see above", "end_to_end: a goal is missed, or it failed: see above",
    ]  # fmt: skip


def test_a_benchmark_without_time_is_left_out_and_only_scaling_may_be(tmp_path):
    parts, told = parts_for_a_gpu(tmp_path, LIMIT_S="75")  # 15 s of them are for what is ended
    assert [part.split()[1] for part in parts] == ["contrastive", "input_pipeline"]
    assert [line.split(",")[0] for line in told] == [
        "scaling: left out", "train_step: left out", "devices_agree: left out", "train_step: left out",
        *["end_to_end: left out"] * 2,
    ]  # fmt: skip
    parts, told = parts_for_a_gpu(tmp_path, status="case $2 in *scaling) exit 1;; *input_pipeline) exit 0;; esac")
    assert told == ["scaling: a goal is missed, or it failed: see above"]
