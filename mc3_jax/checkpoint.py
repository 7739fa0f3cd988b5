"""Checkpoints by Orbax, and the guard that a workdir belongs to one run."""

import json
import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from mc3_jax import config as config_lib

CONFIG_FILE = "config.json"
# What may differ between two starts of the same run: how it is read, watched and evaluated, not what is computed.
_FREE = (
    "fsdp", "model.scan_layers", "model.remat", "data.chunk_size",
    "data.dir", "data.tokenizer", "data.num_threads", "data.prefetch", "save", "eval", "log",
)  # fmt: skip


def _flatten_config(value, prefix: str = "") -> dict:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    flat = {prefix: len(value)} if isinstance(value, list) else {}
    for key, child in items:
        name = f"{prefix}[{key}]" if isinstance(value, list) else f"{prefix}.{key}" if prefix else key
        flat |= _flatten_config(child, name)
    return flat


def check_workdir(workdir: str, config: config_lib.Config, *, must_exist: bool = False) -> None:
    """Checks that a workdir is empty of runs or holds this one. Fields newer than the run count as their defaults.

    Args:
      workdir: Folder of the run.
      config: Of the run.
      must_exist: A run must be there already.

    Raises:
      ValueError: It holds a run with another config (the message names the first field that differs), none where one
        must be, or checkpoints of nobody knows which.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.is_file():
        if must_exist:
            raise ValueError(
                f"{workdir} holds no run: train it first with `python -m mc3_jax.train --workdir={workdir}`"
            )
        if checkpoint_dir(workdir).is_dir():
            raise ValueError(f"{workdir} holds checkpoints but no {CONFIG_FILE}: choose another workdir")
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): choose another workdir") from error
    there = _flatten_config(config_lib.to_dict(config_lib.from_dict(config_lib.Config, saved, str(path))))
    here = _flatten_config(config_lib.to_dict(config))
    # What the towers started from is read no more once something is trained.
    free = (*_FREE, "init") if steps_of(workdir) else _FREE
    for name in dict.fromkeys([*here, *there]):
        if name.startswith(free) or there.get(name) == here.get(name):
            continue
        raise ValueError(
            f"{workdir} holds a different run: config.{name} is {there.get(name)!r} there and {here.get(name)!r} here; "
            "choose another workdir, or delete that run"
        )


def claim_workdir(workdir: str, config: config_lib.Config) -> None:
    """Writes the config into a workdir that has none, by one process."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    if jax.process_index() == 0 and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(config_lib.to_dict(config), indent=1) + "\n")
        aside.rename(path)


def checkpoint_dir(workdir: str) -> pathlib.Path:
    """Returns where a run's checkpoints lie, absolute."""
    return pathlib.Path(workdir).absolute() / "checkpoints"


def open_checkpoints(workdir: str, *, every_steps: int, keep: int, keep_steps: list[int]) -> ocp.training.Checkpointer:
    """Returns the run's checkpoints; offer it the state after every step, it decides.

    It writes in the background at every `every_steps`-th step, at `keep_steps`, and when the machine is about to go.

    Args:
      workdir: Folder of the run.
      every_steps: Interval.
      keep: Newest checkpoints kept.
      keep_steps: Steps written and kept for good: the ends of phases.
    """
    saves, keeps = ocp.training.save_decision_policies, ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        checkpoint_dir(workdir),
        save_decision_policy=saves.AnySavePolicy(
            [
                saves.FixedIntervalPolicy(every_steps),
                saves.SpecificStepsPolicy(keep_steps),
                saves.PreemptionCheckpointingPolicy(),
            ]
        ),
        preservation_policy=keeps.AnyPreservationPolicy([keeps.LatestN(keep), keeps.CustomSteps(keep_steps)]),
        cleanup_tmp_directories=True,
    )


def restore(checkpoints: ocp.training.Checkpointer, step: int, abstract_state):
    """Returns the state written after `step` steps, laid out as `abstract_state` says.

    Args:
      checkpoints: Of the run.
      step: Of an existing checkpoint.
      abstract_state: `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      ValueError: The checkpoint holds other names or shapes; or it is damaged.
    """
    try:
        return checkpoints.load(step, abstract_state)
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:600]
        raise ValueError(f"checkpoint {checkpoints.directory}/{step} can't be restored: {reason}") from error


def restore_params(workdir: str, step: int, abstract_params):
    """Returns the parameters alone of the state written after `step` steps; no optimizer is read.

    Args:
      workdir: Folder of the run.
      step: Of an existing checkpoint.
      abstract_params: `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      ValueError: There is none of that step, it holds other names or shapes, or it is damaged.
    """
    path = checkpoint_dir(workdir) / str(step)
    if not path.is_dir():
        raise ValueError(f"{workdir} has no checkpoint of step {step}, only of {steps_of(workdir)}")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        there = ocp.metadata(path).metadata["params"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:600]
        raise ValueError(f"checkpoint {path} is damaged: {reason}") from error
    # A partial load passes over what the checkpoint lacks without a word: names and shapes are compared first.
    check_shapes(flatten(there), flatten(abstract_params), f"checkpoint {path}")
    try:
        with context, ocp.training.Checkpointer(checkpoint_dir(workdir)) as checkpoints:
            return checkpoints.load(step, {"params": abstract_params})["params"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:600]
        raise ValueError(f"checkpoint {path} can't be restored: {reason}") from error


def flatten(tree) -> dict:
    """Returns nested dictionaries as {"audio/encoder/norm/scale": leaf}."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict) -> dict:
    """Returns the nested dictionaries that `flatten` took apart."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def check_shapes(found: dict, expected: dict, where: str) -> None:
    """Checks that two flat trees have the same names and shapes.

    Raises:
      ValueError: They don't; a list of - missing, + unexpected and ! of another shape.
    """
    missing = [f"- {name} {list(leaf.shape)}" for name, leaf in expected.items() if name not in found]
    unexpected = [f"+ {name} {list(leaf.shape)}" for name, leaf in found.items() if name not in expected]
    other = [
        f"! {name} {list(found[name].shape)}, the model's is {list(leaf.shape)}"
        for name, leaf in expected.items()
        if name in found and tuple(found[name].shape) != tuple(leaf.shape)
    ]
    shown = []
    for kind in (missing, unexpected, other):
        shown += kind[:10] + ([f"{kind[0][0]} {len(kind) - 10} more"] if len(kind) > 10 else [])
    if shown:
        raise ValueError(f"{where} doesn't fit the model (- missing, + unexpected, ! other shape): {'; '.join(shown)}")


def steps_of(workdir: str) -> list[int]:
    """Returns the steps a run has checkpoints of, in order; [] where there is no run."""
    folder = checkpoint_dir(workdir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())
