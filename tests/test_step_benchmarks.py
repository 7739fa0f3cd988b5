"""The benchmarks of the step: what MFU is relative to, which goals are judged, and what is kept if they are cut off."""

import argparse
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import pytest

from benchmarks import matmul, scaling, timed_process, torch_peers, train_step
from mc3_jax import compile as compile_lib, hlo
from tests import world


class Answers:
    """A process that has answered: `timed_process.TimedProcess` without the process."""

    def __init__(self, seconds: float = 1.0, *, platform: str = "gpu", started_s: float = 10.0, failed: str = "", rates=()):
        self.answers = [] if failed else [{"seconds": seconds, "bytes": 2**31, "rates": each} for each in rates or [[]]]
        self.seconds, self.platform, self.started_s, self.failed = seconds, platform, started_s, failed
        self.note, self.memory_gib = "", "2.0"


def options(**values) -> argparse.Namespace:
    """Returns the options of `benchmarks.train_step` at the sizes its goals are for."""
    return argparse.Namespace(**{
        "batch": 256, "depth": 12, "dtype": "bfloat16", "remat": "none", "chunk_size": 0, "scan": False,
        "backward_only": False, "together": False, "alone": False, "systems": "ours", "first_step_s": 0, "rounds": 1,
        "steps": 1, "begin_after": None, "results": pathlib.Path(),
    } | values)  # fmt: skip


@pytest.mark.parametrize(
    ("platform", "name", "met", "missed"),
    [
        ("gpu", "times the clips/s of PyTorch eager", 2.0, 1.99),
        ("gpu", "times the clips/s of PyTorch compiled", 1.15, 1.14),
        ("gpu", "s to the first step, nothing cached", 120.0, 121.0),
        ("gpu", "s to the first step, started again", 20.0, 20.1),
        ("cpu", "times the time of PyTorch eager", 1.0, 1.01),
        ("cpu", "times the time of PyTorch compiled", 1.05, 1.06),
    ],
)
def test_a_goal_is_met_at_its_limit_and_missed_beyond(platform, name, met, missed):
    assert train_step.judge(platform, {name: met})[1] == train_step.judge(platform, {name: missed})[0] == []
    (told,) = train_step.judge(platform, {name: missed})[1]
    assert told.startswith(f"{missed:g} {name}, wanted at ")
    assert train_step.judge(platform, {name: math.nan})[0] == []
    assert train_step.judge(platform, {}) == train_step.judge("tpu", {name: met}) == ([], [])


def test_of_two_limits_one_may_be_met_and_the_other_missed():
    name = "% of what matrix products reach"
    told = {goal: f"{{}} {name}, wanted at least {goal}" for goal in (45, 60)}
    assert train_step.judge("gpu", {name: 44.9}) == ([], [told[45].format(44.9), told[60].format(44.9)])
    assert train_step.judge("gpu", {name: 45.0}) == ([told[45].format(45)], [told[60].format(45)])
    assert train_step.judge("gpu", {name: 60.0}) == ([told[45].format(60), told[60].format(60)], [])


def numbers(systems: dict[str, Answers], *, share: float = 50.0, cold: bool = True, **values) -> dict[str, float]:
    return train_step.numbers_of(options(**values), systems, share, cold=cold)


def test_goals_are_judged_on_the_systems_that_were_run_at_the_sizes_they_are_for(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    ours, again = Answers(0.4, started_s=80), Answers(0.4, started_s=15)
    peers = {"eager": Answers(1.0), "compiled": Answers(0.5)}
    ratios = {"times the clips/s of PyTorch eager": 2.5, "times the clips/s of PyTorch compiled": 1.25}
    first = {"s to the first step, nothing cached": 80, "s to the first step, started again": 15}
    mfu = {"% of what matrix products reach": 50.0}
    systems = {"ours": ours, "again": again, **peers}
    assert numbers(systems) == ratios | mfu | first
    assert set(numbers(systems)) == set(train_step.GOALS["gpu"])
    assert numbers(systems, batch=64) == ratios | first
    assert numbers(systems, together=True) == ratios | mfu
    assert numbers(systems, cold=False) == ratios | mfu | {"s to the first step, started again": 15}
    assert numbers({"ours": ours}) == mfu | {"s to the first step, nothing cached": 80}
    assert numbers({"ours": ours}, share=math.nan, cold=False) == {}
    assert numbers(peers) == numbers(systems, depth=2) == numbers(systems, dtype="float32") == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert "s to the first step, started again" not in numbers(systems)


def test_a_first_step_is_cold_without_a_cache_and_with_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert train_step.is_cache_empty()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert train_step.is_cache_empty()
    (tmp_path / "jit_step-0123-cache").touch()
    assert not train_step.is_cache_empty()


def test_on_a_cpu_loss_and_gradient_are_compared_with_pytorch_without_its_optimizer():
    systems = {name: Answers(seconds, platform="cpu") for name, seconds in (("ours_gradient", 2.0), ("eager", 2.5))}
    found = numbers(systems, backward_only=True, dtype="float32", batch=2)
    assert found == {"times the time of PyTorch eager": 0.8}
    assert train_step.judge("cpu", found)[0]
    assert train_step.judge("cpu", numbers(systems | {"ours": systems["eager"]}, dtype="float32", batch=2)) == ([], [])


@pytest.mark.parametrize(
    ("seconds", "failed", "status", "told"),
    [
        (2.5, "", 0, "Met: 2.5 times the clips/s of PyTorch eager, wanted at least 2."),
        (1.5, "", 1, "Missed: 1.5 times the clips/s of PyTorch eager, wanted at least 2."),
        (2.5, "ended with status 1", 1, "| PyTorch eager | ended with status 1 |"),
    ],
)
def test_the_table_says_what_was_met_and_the_status_whether_all_was(seconds, failed, status, told, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_lib, "model_flops", lambda config, phase: 1e12)
    systems = {"ours": Answers(1.0), "eager": Answers(seconds, failed=failed), "matmul": Answers(rates=[[3e14, 4e14, 2e14]])}
    args = options(batch=64, systems="ours,eager", together=True, results=tmp_path / "r.md")
    with pytest.raises(SystemExit) as end:
        train_step.report(args, systems)
    assert end.value.code == status
    text = args.results.read_text()
    assert told in text
    assert "a matrix product gives 400.00 TFLOP/s (16,384 x 8,192 x 8,192 by JAX);" in text
    assert "| mc3_jax, whole step | 1000 | 64.0 | 1000.0 | 16.0 | – | 2.0 | 10 |" in text


@pytest.mark.parametrize(("card", "told"), [("NVIDIA H200", "32.4 %"), ("an H200's cousin", "64 %")])
def test_each_system_is_told_by_its_own_flops_and_the_goal_by_the_fastest_products_known(card, told, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_lib, "model_flops", lambda config, phase: 1e12)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=card, platform="gpu")])
    systems = {"ours": Answers(1.0), "eager": Answers(1.0), "matmul": Answers(rates=[[3e14, 4e14, 2e14]])}
    monkeypatch.setattr(torch_peers, "clip_flops", lambda config: 1.1e12)
    args = options(systems="ours,eager", results=tmp_path / "r.md", together=True)
    with pytest.raises(SystemExit, match="1"):
        train_step.report(args, systems)
    text = args.results.read_text()
    sheet = [f"{100 * flops * 256e12 / 989.4e12:.1f}" if card == "NVIDIA H200" else "–" for flops in (1.0, 1.1)]
    assert f"| mc3_jax, whole step | 1000 | 256.0 | 1000.0 | 64.0 | {sheet[0]} | 2.0 | 10 |" in text
    assert f"| PyTorch eager | 1000 | 256.0 | 1100.0 | 70.4 | {sheet[1]} | 2.0 | 10 |" in text
    assert f"{told} of what matrix products reach, wanted at least 45" in text


def test_mfu_is_relative_to_the_fastest_product_of_either_library_on_the_systems_machine():
    jax, torch = Answers(rates=[[1.0, 5.0, 3.0], [1.0, 7.0, 3.0], [1.0, 6.0, 3.0]]), Answers(rates=[[2.0, 4.0, 8.0]])
    both = {"matmul": jax, "matmul_torch": torch}
    assert matmul.fastest(both, "gpu") == (8.0, "16,384 x 16,384 x 16,384 by PyTorch")
    assert matmul.fastest({"matmul": jax}, "gpu") == (6.0, "16,384 x 8,192 x 8,192 by JAX")  # the median of its rounds
    torch.platform = "cpu"  # a PyTorch that does not see the GPU
    assert matmul.fastest(both, "gpu")[1].endswith("by JAX")
    assert math.isnan(matmul.fastest({"matmul": Answers(failed="ended with status 1"), "matmul_torch": torch}, "gpu")[0])
    assert matmul.fastest({"matmul_torch": torch}, "gpu")[1] == "PyTorch: on cpu"


def test_products_are_timed_for_long_enough_and_the_first_is_not_counted(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(matmul.time, "perf_counter", lambda: clock[0])
    ran = []

    def run(num: int) -> None:
        ran.append(num)
        clock[0] += 3.0 if len(ran) == 1 else 0.001 * num

    assert matmul.rate(run, 7e9, 0.25) == pytest.approx(7e12)
    assert ran[:2] == [1, 1]
    assert 0.25 <= 0.001 * ran[-1] <= 0.35
    shapes, least_s = matmul.ON_ACCELERATOR
    assert len(shapes) * least_s >= 0.5  # seconds of a round


@pytest.mark.parametrize("name", list(matmul.LIBRARIES))
def test_both_libraries_time_products(name, monkeypatch, capsys):
    monkeypatch.setattr(matmul, "ON_CPU", (((64, 32), (32, 32)), 0.001))
    monkeypatch.setattr(matmul.sys, "stdin", ["1\n", "1\n"])
    {"matmul": matmul.serve_jax, "matmul_torch": matmul.serve_torch}[name]("float32")
    ready, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["platform"] == "cpu"
    assert len(answers) == 2
    assert all(rate > 0 for answer in answers for rate in answer["rates"])
    assert [len(answer["rates"]) for answer in answers] == [2, 2]


def write_command(path: pathlib.Path, text: str) -> str:
    """Writes an executable Bash script with these commands and returns its path."""
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def sigterm():
    """SIGTERM does nothing unless the test changes that, and afterwards what it did before."""
    before = signal.signal(signal.SIGTERM, lambda *what: None)
    yield
    signal.signal(signal.SIGTERM, before)


# Stand-ins for the systems: all answer but PyTorch's, which answers once and then hangs.
SYSTEMS = """
echo '{"platform": "cpu", "ready": 0, "note": ""}'
while read -r _; do
  echo '{"seconds": 0.5, "bytes": 3221225472, "rates": [1e12]}'
  case "$*" in *serve=eager*) sleep 60;; esac
done
"""


def test_a_benchmark_that_is_cut_off_writes_what_it_has_measured(tmp_path, monkeypatch, sigterm):
    monkeypatch.setattr(compile_lib, "model_flops", lambda config, phase: 1e12)
    monkeypatch.setattr(torch_peers, "clip_flops", lambda config: 1e12)
    monkeypatch.setattr(timed_process.sys, "executable", write_command(tmp_path / "python", SYSTEMS))
    words = ["--systems=ours,eager", "--rounds=2", "--together", f"--results={tmp_path}/r.md"]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *words])
    run = timed_process.TimedProcess.run

    def cut(process, num_steps):
        if len(process.answers) == 1 and "--serve=eager" in process.process.args:
            os.kill(os.getpid(), signal.SIGTERM)
        run(process, num_steps)

    monkeypatch.setattr(timed_process.TimedProcess, "run", cut)
    with pytest.raises(SystemExit, match="1"):
        train_step.main()
    text = (tmp_path / "r.md").read_text()
    for name in ("mc3_jax, whole step", "PyTorch eager"):
        assert f"| {name} | 500 | 4.0 | 1000.0 | 400.0 | – | 3.0 resident |" in text
    assert "Cut off before its end." in text


def test_rounds_begin_when_other_work_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(timed_process.sys, "executable", write_command(tmp_path / "python", SYSTEMS))
    quiet, ran, run = tmp_path / "quiet", [], timed_process.TimedProcess.run
    monkeypatch.setattr(train_step.time, "sleep", lambda seconds: quiet.touch())
    monkeypatch.setattr(
        timed_process.TimedProcess, "run", lambda process, steps: ran.append(quiet.exists()) or run(process, steps)
    )
    systems = train_step.measure(options(together=True, begin_after=quiet))
    assert not any(system.failed for system in systems.values())
    assert ran == [True] * 3  # ours, and the products of JAX and of PyTorch


def test_a_system_that_is_cut_off_has_failed_only_if_it_never_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(timed_process.sys, "executable", write_command(tmp_path / "python", SYSTEMS))
    quiet, answered = (timed_process.TimedProcess(["--serve=eager"]) for _ in range(2))
    answered.wait()
    answered.run(1)
    for process in (quiet, answered):
        process.cut_off()
        assert process.process.wait(10) < 0
    assert (quiet.failed, answered.failed) == ("cut off", "")


def test_the_memory_of_a_process_on_a_cpu_is_its_own(tmp_path):
    block = bytearray(2**29)
    block[::4096] = bytes([1]) * len(block[::4096])  # resident
    assert timed_process.peak_resident_bytes() > 2**29
    child = "from benchmarks import timed_process; print(timed_process.peak_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", child], cwd=world.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert 2**23 < int(done.stdout) < 2**28


def test_between_its_processes_scaling_leaves_them_the_gpus_memory(tmp_path, monkeypatch):
    """A process that uses JAX, as this one does to count FLOPs, takes three quarters of it unless it is told not to."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    seen = []

    def measure_work(args):
        seen.append(os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"])
        yield ["1"] * 7, True

    monkeypatch.setattr(scaling, "measure_work", measure_work)
    scale(tmp_path, monkeypatch, "--batches=4,8", "--topologies=")
    assert seen == ["false"]


def scale(tmp_path: pathlib.Path, monkeypatch, *words: str) -> tuple[BaseException, list[str]]:
    """Runs `benchmarks.scaling` and returns (what ended it, the sections in its results)."""
    monkeypatch.setattr(scaling.jax.config, "update", lambda *setting: None)  # the number of devices is fixed by now
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words, f"--results={tmp_path}/r.md"])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        scaling.main()
    return end.value, (tmp_path / "r.md").read_text().split("## Scaling")[1:]


def test_a_step_that_does_not_fit_a_topology_is_a_row_and_status_1(tmp_path, monkeypatch, sigterm):
    def compile_step(config, topology):
        if topology == "v5e:1x1":
            raise MemoryError("does not fit v5e:1x1: needs 99.00 GiB per chip")
        counts = hlo.Counts(flops=10**12, memory_bytes=2 * 10**9)
        return compile_lib.Report(topology, 1, (1, 1), 4, "refine", 0, 0, 0, 0, 0, counts, 1e12, 1.0, 2.0)

    monkeypatch.setattr(compile_lib, "compile_step", compile_step)
    monkeypatch.setattr(scaling.topology_lib, "find_devices", lambda topology: [0])
    monkeypatch.setattr(scaling, "measure_work", lambda args: iter([(["1"] * 7, True)]))
    end, (measured, compiled) = scale(tmp_path, monkeypatch, "--batches=4", "--topologies=v5e:1x1,cpu:1")
    assert end.code == 1
    assert "| 1 | 1 | 1 | 1 | 1 | 1 | 1 |" in measured
    assert "| v5e:1x1 | 4 | does not fit v5e:1x1: needs 99.00 GiB per chip |  |" in compiled
    assert "| cpu:1 | 4 | 1.00 | 1.000 | 2.0 | 0 |" in compiled
    end, _ = scale(tmp_path, monkeypatch, "--batches=4", "--topologies=cpu:1")
    assert end.code == 0


def test_scaling_keeps_the_batches_it_has_measured_when_it_is_cut_off(tmp_path, monkeypatch, sigterm):
    def measure_work(args):
        yield ["1"] * 7, True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(scaling, "measure_work", measure_work)
    end, (measured,) = scale(tmp_path, monkeypatch, "--batches=4,8", "--topologies=cpu:1")
    assert isinstance(end, KeyboardInterrupt)
    assert "| 1 | 1 | 1 | 1 | 1 | 1 | 1 |" in measured
    assert "Cut off before its end." in measured


def test_a_batch_that_fails_is_a_row_and_status_1(tmp_path, monkeypatch, sigterm):
    monkeypatch.setattr(compile_lib, "model_flops", lambda config, phase: 1e12)
    fails = SYSTEMS.replace("*serve=eager*) sleep 60", "*batch=8*) exit 3")
    monkeypatch.setattr(timed_process.sys, "executable", write_command(tmp_path / "python", fails))
    end, (measured,) = scale(tmp_path, monkeypatch, "--batches=4,8", "--topologies=")
    assert end.code == 1
    assert "| 4 | 500 | 125.0 | 1.00 | 8.00 | 3.0 resident |" in measured
    assert "| 8 | ended with status 3 |  |" in measured
