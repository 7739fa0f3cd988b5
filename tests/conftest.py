"""Tests run on the CPU, as eight devices, with every annotated shape checked."""

import os
import subprocess

os.environ["JAX_PLATFORMS"] = "cpu"
# Machine code is made in half the time without LLVM's optimisations; XLA's own, which decide what is computed, stay.
_FLAGS = ("force_host_platform_device_count=8", "backend_optimization_level=0", "llvm_disable_expensive_passes=true")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *(f"--xla_{flag}" for flag in _FLAGS)]).strip()

import jaxtyping

# An int is a float where a float is asked for (PEP 484).
jaxtyping.install_import_hook(
    ["mc3_jax", "data_prep"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

import pytest

from mc3_jax import train
from tests import world


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="seeded mutations, injuries and kills at full length")


def pytest_collection_modifyitems(items):
    """Files that train come first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: item.path.parent != world.ROOT / "tests")


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


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A little SoundWorld's folder: clips and vocabulary."""
    return world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """A run that was never interrupted: (config, workdir, final state)."""
    config, workdir = world.small_config(data), str(tmp_path_factory.mktemp("run") / "full")
    return config, workdir, train.train(train.set_up(config, workdir))
