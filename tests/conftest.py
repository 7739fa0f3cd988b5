"""Set-up of all tests: they run on the CPU as eight devices, with every annotated type and shape checked at run time."""

import contextlib
import copy
import fcntl
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes half the time without LLVM's optimisations and with XLA's older emitters. jaxlib 0.11 no longer has these,
# and an unknown flag ends the process. XLA's own optimisations, which decide what is computed, stay on.
_FLAGS = ["force_host_platform_device_count=8", "backend_optimization_level=0", "llvm_disable_expensive_passes=true"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS.append("cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *(f"--xla_{flag}" for flag in _FLAGS)]).strip()

import jaxtyping

# An int is accepted where a float is annotated (PEP 484).
jaxtyping.install_import_hook(
    ["mc3_jax", "data_prep"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

import jax
import numpy as np
import pytest

from mc3_jax import config as config_lib, run as run_lib, train
from tests import world


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="seeded mutations, injuries and kills at full length")


@pytest.hookimpl(trylast=True)  # after `-m` has deselected
def pytest_collection_modifyitems(items):
    """Sorts the tests: those in tests/ itself, which train, come first, and of these the longest, so that none is last alone.

    The longest makes the world and the run that other files share. Files that use these come after the files that don't,
    which need not wait for them.
    """
    tests = world.ROOT / "tests"
    sharing = {item.path for item in items if {"data", "finished"} & set(item.fixturenames)}
    longest = sharing & {tests / "test_survival.py"} or sharing & {tests / "test_train.py"}
    items.sort(key=lambda item: (item.path.parent != tests, item.path not in longest, item.path in sharing))


@pytest.fixture
def num_mutations(request) -> int:
    """Number of damaged files or rows that a test tries."""
    return 200 if request.config.getoption("--soak") else 20


@pytest.fixture
def num_injuries(request) -> int:
    """Number of damaged checkpoints that a test tries."""
    return 1000 if request.config.getoption("--soak") else 50


@pytest.fixture
def num_kills(request) -> int:
    """Number of times that a test kills a run."""
    return 20 if request.config.getoption("--soak") else 3


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own that holds only 200 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def made_once(tmp_path_factory, name: str):
    """Yields (folder, whether the caller has to fill it): the first of the test processes fills it for all of them.

    If `SHARED_TEST_DATA` names a folder, it is there, for several calls of pytest on the same code, as in `.ci/run`.
    """
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = pathlib.Path(os.environ.get("SHARED_TEST_DATA", common)) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that failed while filling it
            folder.mkdir()
        yield folder, not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    """Folder of a small SoundWorld, with clips and vocabulary; tests must only read it."""
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
        shutil.copytree(folder / "full", workdir)  # a copy for each process, since tests evaluate in it
    run = run_lib.set_up(config, str(workdir))
    with np.load(folder / "state.npz") as arrays:
        leaves = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    state = jax.tree.unflatten(jax.tree.structure(train._plan_state(run, run.phases[-1].stop)[1]), leaves)
    return config, str(workdir), state


@pytest.fixture
def without_video(finished, tmp_path) -> str:
    """Workdir of a run with the weights of `finished` whose config says that no phase uses video."""
    config, place = copy.deepcopy(finished[0]), shutil.copytree(finished[1], tmp_path / "without_video")
    for phase in config.phases:
        phase.pairs, phase.consensus_weight = ("al",), 0.0
    (place / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    return str(place)
