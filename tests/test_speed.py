"""Every benchmark of speed writes its table, even if a part of it fails."""

import argparse
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import contrastive, record, train_step
from mc3_jax import compile as compile_lib, provenance
from tests import world


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # it asks for eight devices
    return subprocess.run(
        command, cwd=world.ROOT, env=inherited | environment, capture_output=True, text=True, check=False
    )


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
def test_a_benchmark_can_measure_one_part_alone(tmp_path, benchmark, flags, row):
    results = tmp_path / "results.md"
    done = run(sys.executable, "-m", f"benchmarks.{benchmark}", "--batch", "2", *flags, "--results", str(results))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(row, results.read_text())


def write_command(path: pathlib.Path, text: str) -> str:
    """Writes an executable Bash script with these commands and returns its path."""
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


# Stand-ins for the systems: one ends after its first step, one never gets to it, ours answers.
SYSTEMS = """
case "$*" in
  *serve=eager*) echo '{"platform": "cpu", "ready": 0, "note": ""}'; exit 0;;
  *serve=compiled*) exec sleep 60;;
  *serve=matmul*) MATMUL;;
esac
echo '{"platform": "cpu", "ready": 0, "note": ""}'
while read -r _; do echo '{"seconds": 0.5, "bytes": 1, "rates": [2.5e11]}'; done
"""


@pytest.mark.parametrize(
    ("matmul", "product", "share"),
    [
        (":", "gives 0.25 TFLOP/s (2,048 x 2,048 x 2,048 by PyTorch)", "1600.0"),
        ("exit 1", "was not measured (JAX: ended with status 1; PyTorch: ended with status 1)", "–"),
    ],
)
def test_a_system_that_is_late_or_ends_leaves_the_others_their_rows(matmul, product, share, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_lib, "model_flops", lambda config, phase: 1e12)
    args = argparse.Namespace(
        batch=2, depth=1, dtype="float32", remat="none", chunk_size=0, scan=False, backward_only=False, together=True,
        alone=False, systems="ours,eager,compiled", first_step_s=1.0, rounds=2, steps=1, begin_after=None,
        results=tmp_path / "r.md",
    )  # fmt: skip
    command = write_command(tmp_path / "python", SYSTEMS.replace("MATMUL", matmul))
    monkeypatch.setattr(train_step.sys, "executable", command)
    with pytest.raises(SystemExit, match="1"):
        train_step.report(args, train_step.measure(args))
    text = args.results.read_text()
    assert f"| mc3_jax, whole step | 500 | 4.0 | 1000.0 | {share} | – |" in text
    assert "| PyTorch eager | ended with status 0 |" in text
    assert "| PyTorch compiled | no step within 1 s |" in text
    assert f"a matrix product {product};" in text


def test_a_form_that_fails_leaves_the_others_their_rows(tmp_path, monkeypatch):
    answer = '{"seconds": 2, "compile_s": 1, "beyond_gib": 0.5}'
    answers = f"case $* in *--one=2048,0,*) exit 7;; *) echo '{answer}';; esac"
    monkeypatch.setattr(contrastive.sys, "executable", write_command(tmp_path / "python", answers))
    monkeypatch.setattr(sys, "argv", ["contrastive.py", "--batches", "1024,2048", "--results", str(tmp_path / "r.md")])
    with pytest.raises(SystemExit, match="1"):
        contrastive.main()
    text = (tmp_path / "r.md").read_text()
    assert "| 2,048 | the whole matrix | ended with status 7 |" in text
    assert "Missed: the whole matrix at 2,048 ended with status 7." in text
    assert "| 1,024 | the whole matrix | 2 |" in text
    assert "| 2,048 | 1024 rows at a time | 2 |" in text


def test_infonce_in_blocks_is_judged_at_the_largest_batch_that_was_run_whole(tmp_path, monkeypatch):
    answer = '{"seconds": %s, "compile_s": 1, "beyond_gib": 3}'
    answers = f"case $* in *--one=4096,1024,*) echo '{answer % 1.6}';; *) echo '{answer % 1}';; esac"
    command = write_command(tmp_path / "python", answers)
    monkeypatch.setattr(contrastive.sys, "executable", command)
    words = ["--batches", "65536,4096,2048", "--dense_up_to", "4096", "--results", str(tmp_path / "r.md")]
    monkeypatch.setattr(sys, "argv", ["contrastive.py", *words])
    with pytest.raises(SystemExit, match="1"):
        contrastive.main()
    text = (tmp_path / "r.md").read_text()
    assert "| 4,096 | blocks / whole | 1.60 |" in text
    assert "Missed: 1.60 times the whole matrix's time, wanted 1.5; 3.00 GiB at 65,536, wanted 2.0." in text


@pytest.mark.parametrize(("revision", "commit"), [("0123456789-dirty", ", commit 0123456-dirty"), ("", "")])
def test_a_table_names_the_command_and_the_commit_that_made_it(monkeypatch, revision, commit):
    monkeypatch.setattr(provenance, "_revision", lambda root: revision)
    for name in record._TOLD:
        monkeypatch.delenv(name, raising=False)
    for words in (["--results", "/a b/r.md"], ["--results="], []):
        monkeypatch.setattr(sys, "argv", ["/x/benchmarks/scaling.py", "--batches", "", *words])
        assert record.made_by() == f"`python -m benchmarks.scaling --batches ''`{commit}"
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/home/somebody --xla_b=2")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/home/somebody")
    settings = "XLA_FLAGS='--xla_a=1 --xla_dump_to=... --xla_b=2' XLA_PYTHON_CLIENT_MEM_FRACTION=0.94"
    assert record.made_by() == f"`{settings} python -m benchmarks.scaling --batches ''`{commit}"
