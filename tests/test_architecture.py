"""Which module may import which; see CONTRIBUTING.md. A new module fails until it has a rule here."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = {"checkpoint", "config", "data", "mesh", "model", "models", "validation", "weights"}
LIBRARY |= {"terminal", "tower_tokenizer", "training_facts", "whole_file"}
ENTRY = LIBRARY | {"cli", "evals", "job", "metric_writer", "phases", "workdir"}
# Module or package of mc3_jax → the modules and packages of mc3_jax that it may import.
ALLOWED = {
    "train": {"checkpoint", "cli", "config", "data", "job", "mesh", "metric_writer", "phases", "weights", "workdir"}
    | {"divergence", "interrupt", "mfu", "profiler", "progress", "provenance", "run", "step_compiler", "stopwatch"}
    | {"train_step", "watchdog"},
    "run": (ENTRY - {"cli", "evals", "terminal"}) | {"progress", "train_step", "validation_loss"},
    "evaluate": ENTRY | {"evaluate_sounds", "training_clips"},
    "evaluate_sounds": ENTRY | {"training_clips"},
    "training_clips": {"config", "data"},
    "training_facts": {"config", "model", "models", "phases", "validation", "weights", "workdir"},
    "compile": {"terminal", "cli", "config", "data", "hlo", "mesh", "mfu", "model", "phases", "topology", "train_step"},
    "convert": LIBRARY,
    "embedder": LIBRARY,
    "search": LIBRARY | {"embedder", "evals"},
    "tower_tokenizer": {"data", "job", "models", "weights", "workdir"},
    "weights": {"checkpoint", "config", "mesh", "model", "models", "validation", "whole_file"},
    "train_step": {"config", "losses", "mesh", "model", "models", "objective", "phases"},
    "model": {"config", "mesh", "models"},
    "objective": {"config", "losses"},
    "phases": {"config"},
    "cli": {"config", "terminal", "validation"},
    "validation": {"config", "phases"},
    "hlo": {"hlo_loops", "hlo_text"},
    "hlo_loops": {"hlo_text"},
    "hlo_text": set(),
    "topology": set(),
    "config": set(),
    "job": set(),
    "mesh": set(),
    "workdir": {"checkpoint", "config", "job", "whole_file"},
    "checkpoint": {"integrity", "job"},
    "integrity": set(),
    "metric_writer": {"event_file", "progress", "whole_file"},
    "event_file": set(),
    "mfu": {"config", "hlo", "model", "phases", "topology"},
    "interrupt": {"terminal"},
    "progress": set(),
    "provenance": set(),
    "divergence": {"whole_file"},
    "profiler": set(),
    "step_compiler": {"phases", "progress"},
    "stopwatch": set(),
    "terminal": set(),
    "validation_loss": {"config", "data", "mesh", "models", "phases", "train_step"},
    "watchdog": {"job"},
    "losses": {"losses"},
    "models": {"models"},
    "data": {"data"},
    "evals": {"evals", "whole_file"},
    "whole_file": set(),
    "__init__": {"embedder"},
}
NEVER = {"tensorflow", "pickle", "cloudpickle", "dill", "torch"}
EXCEPT = {("mc3_jax/convert.py", "torch")}  # it writes PyTorch's own format


def imports(path: pathlib.Path) -> set[str]:
    """Returns every module that a file imports, `from a import b` as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(root: pathlib.Path) -> list[str]:
    """Returns a line for every forbidden import under `root`, and for every module without a rule."""
    wrong = []
    for path in sorted(root.glob("mc3_jax/**/*.py")):
        owner = path.relative_to(root / "mc3_jax").with_suffix("").parts[0]
        for name in imports(path):
            parts = name.split(".")
            if owner not in ALLOWED:
                wrong.append(f"{path.name}: no rule for {owner}; add one here and in CONTRIBUTING.md")
            elif parts[0] == "mc3_jax" and len(parts) > 1 and parts[1] not in ALLOWED[owner]:
                wrong.append(f"{path.name} imports {name}")
            never = {"data_prep", "configs", *NEVER} | ({"jax", "flax", "optax"} if owner == "data" else set())
            if parts[0] in never and (str(path.relative_to(root)), parts[0]) not in EXCEPT:
                wrong.append(f"{path.name} imports {name}")
    for path in sorted(root.glob("configs/**/*.py")):
        wrong += [f"{path.name} imports {n}" for n in imports(path) if n.startswith("mc3_jax.") and "config" not in n]
    for path in sorted(root.glob("data_prep/**/*.py")):
        for name in imports(path):
            allowed = ("mc3_jax", "mc3_jax.data", "mc3_jax.data.records", "mc3_jax.terminal")
            ours = name.startswith("mc3_jax") and not name.startswith("mc3_jax.data.records.") and name not in allowed
            if ours or name.split(".")[0] in NEVER | {"jax", "flax"}:
                wrong.append(f"{path.name} imports {name}")
    return wrong


def test_imports_go_one_way():
    assert violations(ROOT) == []


def test_train_and_evaluate_import_no_optional_package():
    """Importing tensorboardX would also import torch, if that is installed."""
    code = "import sys, mc3_jax.train, mc3_jax.evaluate; print(*{'torch', 'tensorboardX', 'wandb'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mc3_jax/losses/x.py", "from mc3_jax.models import layers"),
        ("mc3_jax/models/x.py", "from mc3_jax import config"),
        ("mc3_jax/data/x.py", "import jax.numpy as jnp"),
        ("mc3_jax/evals/x.py", "import mc3_jax.train_step"),
        ("mc3_jax/train.py", "import data_prep.media"),
        ("mc3_jax/utils.py", "import os"),
        ("mc3_jax/checkpoint.py", "import pickle"),
        ("mc3_jax/models/torch_pickles.py", "import torch"),
        ("mc3_jax/convert.py", "import pickle"),
        ("mc3_jax/weights.py", "import torch"),
        ("configs/x.py", "from mc3_jax.train import train"),
        ("data_prep/x.py", "from mc3_jax.data import loader"),
        ("data_prep/x.py", "import tensorflow"),
    ],
)
def test_the_check_sees_a_wrong_import(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path)


def test_no_shell_strings():
    for path in [*ROOT.glob("mc3_jax/**/*.py"), *ROOT.glob("data_prep/**/*.py")]:
        text = path.read_text()
        assert "shell=True" not in text, path
        assert "os.system" not in text, path
