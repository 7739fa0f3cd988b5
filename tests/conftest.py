"""Tests run on the CPU, as eight devices, with every annotated shape checked."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import subprocess

os.environ["JAX_PLATFORMS"] = "cpu"
# Machine code is made in half the time without LLVM's optimisations and by XLA's older emitters; XLA's own optimisations,
# which decide what is computed, stay.
_FLAGS = (
    "force_host_platform_device_count=8", "backend_optimization_level=0", "llvm_disable_expensive_passes=true",
    "cpu_use_fusion_emitters=false",
)  # fmt: skip
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *(f"--xla_{flag}" for flag in _FLAGS)]).strip()

import jaxtyping

# An int is a float where a float is asked for (PEP 484).
jaxtyping.install_import_hook(
    ["mc3_jax", "data_prep"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

import jax
import numpy as np
import pytest

from mc3_jax import run as run_lib, train
from tests import world


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="seeded mutations, injuries and kills at full length")


@pytest.hookimpl(trylast=True)  # of what `-m` leaves
def pytest_collection_modifyitems(items):
    """Files that train come first, the longest before all, so that no process is left alone with them at the end.

    The longest makes the world and the run that others share; theirs come behind those that would not wait for them.
    """
    tests = world.ROOT / "tests"
    sharing = {item.path for item in items if {"data", "finished"} & set(item.fixturenames)}
    longest = sharing & {tests / "test_survival.py"} or sharing & {tests / "test_train.py"}
    items.sort(key=lambda item: (item.path.parent != tests, item.path not in longest, item.path in sharing))


@pytest.fixture
def num_mutations(request) -> int:
    """How many damaged files or rows a test tries."""
    return 200 if request.config.getoption("--soak") else 20


@pytest.fixture
def num_injuries(request) -> int:
    """How many injured checkpoints a test tries."""
    return 1000 if request.config.getoption("--soak") else 50


@pytest.fixture
def num_kills(request) -> int:
    """How often a test kills a run."""
    return 20 if request.config.getoption("--soak") else 3


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, with 200 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def made_once(tmp_path_factory, name: str):
    """Yields a folder and whether it has to be filled: by one of the processes that share the tests, for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed at it
            folder.mkdir()
        yield folder, not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    """A little SoundWorld's folder, which tests only read: clips and vocabulary."""
    with made_once(tmp_path_factory, "shared_world") as (folder, is_empty):
        if is_empty:
            world.make(folder)
    return folder


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """A run that was never interrupted: (config, workdir, final state on the host)."""
    config, workdir = world.small_config(data), tmp_path_factory.mktemp("run") / "full"
    with made_once(tmp_path_factory, "shared_run") as (folder, is_empty):
        if is_empty:
            state = train.train(run_lib.set_up(config, str(folder / "full")))
            np.savez(folder / "state.npz", *jax.tree.leaves(jax.device_get(state)))
        shutil.copytree(folder / "full", workdir)  # each process has its own, since it evaluates in it
    run = run_lib.set_up(config, str(workdir))
    with np.load(folder / "state.npz") as arrays:
        leaves = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    state = jax.tree.unflatten(jax.tree.structure(train._plan_state(run, run.phases[-1].stop)[1]), leaves)
    return config, str(workdir), state
