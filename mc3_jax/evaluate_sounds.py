"""Evaluates a run that classifies sounds (Table 4); `python -m mc3_jax.evaluate` calls it if the model has classes.

Every checkpoint that the run has kept is measured, to report the last epoch and the best. The data set's own baseline
reports the best, which it chooses by top-1 on the very clips it reports.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from mc3_jax import (
    checkpoint,
    config as config_lib,
    mesh as mesh_lib,
    model as model_lib,
    phases as phases_lib,
    training_clips,
    weights,
    whole_file,
    workdir as workdir_lib,
)
from mc3_jax.data import loader, records, tokenizer as tokenizer_lib
from mc3_jax.evals import classification, sound_report

METRICS = ("top1", "top5", "mean_class_accuracy", "mAP", "mAUC")


def class_scores(
    classify: Callable, params, batches: Iterable[loader.Batch], num_clips: int, num_classes: int, mesh
) -> tuple[Float[np.ndarray, "n c"], Int[np.ndarray, " n"]]:
    """Returns each clip's probabilities, averaged over its windows, and its true class, the same on every process.

    Args:
      classify: Function of (params, batch) that returns probabilities [b, c], jitted.
      params: Parameters on the mesh.
      batches: From `loader.eval_batches`: this process's rows of each batch.
      num_clips: Number of clips in the split.
      num_classes: Number of classes of the classifier.
      mesh: Mesh of the devices.

    Returns:
      (probabilities, class); the class is -1 where unknown.
    """
    total, windows = np.zeros((num_clips, num_classes)), np.zeros(num_clips, np.int64)
    classes = np.full(num_clips, -1, np.int64)
    for batch in batches:
        own = {name: np.asarray(batch.pop(name)) for name in ("index", "class_id", "valid")}
        known = multihost_utils.process_allgather(own, tiled=True)
        probabilities = multihost_utils.process_allgather(classify(params, mesh_lib.put_batch(mesh, batch)), tiled=True)
        valid = np.asarray(known["valid"], bool)
        index = np.asarray(known["index"])[valid]
        np.add.at(total, index, np.asarray(probabilities, np.float64)[valid])
        np.add.at(windows, index, 1)
        classes[index] = np.asarray(known["class_id"])[valid]
    return total / windows[:, None], classes


def _check_classes(config: config_lib.Config, workdir: str, source: loader.ClipSource, facts: dict) -> None:
    """Raises a ValueError unless the data has the classes that the run was trained on, in the same order.

    The name of a class of which the annotations had no example is not known, and then fits any other.
    """
    classes = list(source.info.classes)
    learned = list(facts.get("classes", classes))
    if not len(classes) == len(learned) == config.model.num_classes:
        raise ValueError(
            f"{config.data.dir} has {len(classes)} classes, but the run in {workdir} was trained on data with {len(learned)} "
            f"and a classifier of {config.model.num_classes}: evaluate it on data with the classes that it was trained on"
        )
    for i, (own, other) in enumerate(zip(learned, classes, strict=True)):
        if own != other and records.unnamed_class(i) not in (own, other):
            raise ValueError(
                f"class {i} of {config.data.dir} is {other!r}, but that of the run in {workdir} is {own!r}: evaluate it on "
                "data with the classes that it was trained on"
            )


def _scores(
    config: config_lib.Config, workdir: str, source: loader.ClipSource, mesh
) -> Iterator[tuple[int, Float[np.ndarray, "n c"], Int[np.ndarray, " n"]]]:
    """Yields (step, probabilities, class) of all clips for every checkpoint of the run, as `class_scores` returns them."""
    data, model = config.data, model_lib.make_model(config.model)
    embed = model_lib.make_embed_fn(model, config.model)
    classify = jax.jit(lambda params, batch: jax.nn.softmax(embed(params, batch)["logits"]))
    abstract = mesh_lib.abstract_state(mesh, checkpoint.unflatten(weights.param_shapes(config.model)))
    steps = checkpoint.agreed_steps(workdir)
    if not steps:
        raise ValueError(f"{workdir} holds no checkpoint yet: train it first")
    for step in steps:
        try:
            params = checkpoint.restore_params(workdir, step, abstract)
        except checkpoint.PrunedError:  # a training that still runs has deleted it
            if step < steps[-1]:
                continue
            step, params = checkpoint.restore_newest_params(workdir, abstract)
        batches = loader.eval_batches(
            source, tokenizer_lib.blank(config.model.text.num_tokens), batch_size=config.eval.batch_size,
            num_samples=data.num_samples or None, hop_samples=config.eval.hop_samples or None,
            silence_db=data.silence_db, process_index=jax.process_index(), process_count=jax.process_count(),
            num_threads=data.num_threads, num_workers=data.num_workers, prefetch=data.prefetch,
        )  # fmt: skip
        with contextlib.closing(batches), jax.set_mesh(mesh):
            found = class_scores(classify, params, batches, len(source), config.model.num_classes, mesh)
        yield step, *found


def evaluate(config: config_lib.Config, workdir: str) -> dict:
    """Measures every checkpoint of a run, writes `results.json`, `scores.npz` and the report, and returns the results.

    Raises:
      ValueError: No run or checkpoint in the workdir, data that doesn't fit or has no clip with a class, or
        `config.checkpoint` is set.
    """
    if config.checkpoint:
        raise ValueError(
            f"config.checkpoint = {config.checkpoint!r}: a model with {config.model.num_classes} classes is evaluated from "
            "its run: name --workdir instead; to evaluate only the towers name a --config without classes"
        )
    workdir_lib.check_workdir(workdir, config, must_exist=True)
    mesh = mesh_lib.make_mesh(fsdp=config.fsdp)
    mesh_lib.check_batch_size(mesh, config.eval.batch_size, "eval.batch_size")
    data = config.data
    source = loader.open_split(data.dir, config.eval.split, 0, config.eval.folds, option="--config.eval.split")
    facts = workdir_lib.trained_on(workdir)
    _check_classes(config, workdir, source, facts)
    num_trained_on = training_clips.count(config, facts)
    phases = phases_lib.plan_phases(config.phases, num_trained_on, data.batch_size)
    epochs = []
    for step, probabilities, classes in _scores(config, workdir, source, mesh):
        known = classes >= 0
        if not known.any():
            raise ValueError(f"split {config.eval.split!r} of {data.dir} has no clip with a class: nothing to measure")
        epochs.append(
            {"step": step, "epoch": round(step * data.batch_size / num_trained_on, 3),
             "phase": phases_lib.phase_at(phases, step - 1).config.name,
             **classification.classify(probabilities[known], classes[known])}
        )  # fmt: skip
    content = {
        "config": config.name, "seed": config.seed, "split": config.eval.split, "folds": list(config.eval.folds),
        "data": source.info.name, "num_clips": int(known.sum()), "num_trained_on": num_trained_on,
        "num_seen": training_clips.count_seen(config, source, np.flatnonzero(known), data, facts), "last": epochs[-1],
        "best": max(epochs, key=lambda epoch: epoch["top1"]), "epochs": epochs,
    }  # fmt: skip
    if jax.process_index() == 0:
        _write(pathlib.Path(workdir), content, probabilities, classes, source)
    return content


def _write(
    path: pathlib.Path, content: dict, probabilities: np.ndarray, classes: np.ndarray, source: loader.ClipSource
) -> None:
    """Writes and prints the results; `probabilities` are of the last checkpoint, and both arrays are of all clips."""
    if content["num_seen"]:
        print(
            f"warning: the run was trained on {content['num_seen']} of these {content['num_clips']} clips, so the "
            "results don't show how it generalises"
        )
    clip_ids = np.array([source[i].clip_id for i in range(len(source))])
    with whole_file.writing(path / "scores.npz") as aside, aside.open("wb") as f:
        np.savez(f, probabilities=probabilities.astype(np.float32), class_id=classes, clip_id=clip_ids)
    with whole_file.writing(path / "results.json") as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")
    known = classes >= 0
    page = sound_report.write(
        path / "report", content, probabilities[known].astype(np.float32), classes[known], source.info.classes,
        source=source, indices=np.flatnonzero(known),
    )  # fmt: skip
    for name in ("last", "best"):
        found = "  ".join(f"{metric} {content[name][metric]:.3f}" for metric in METRICS)
        print(f"{name} of {len(content['epochs'])} checkpoints (epoch {content[name]['epoch']:g}): {found}")
    print(f"{path / 'results.json'}\n{page}")
