"""EPIC-Sounds from public annotations to the metrics of Table 4: conversion, training by the recipe, evaluation."""

import collections
import csv
import functools
import json
import pathlib

import h5py
import jax
import numpy as np
import pytest

from configs import epic_sounds
from data_prep import epic_sounds as convert
from mc3_jax import checkpoint, evaluate_sounds, model as model_lib, run as run_lib, train, validation
from mc3_jax.config import CLASSIFIER
from mc3_jax.evals import classification

PUBLIC = pathlib.Path(__file__).parents[1].parent / "shared" / "data" / "epic_sounds" / "EPIC_Sounds_validation.csv"
RATE_HZ = 24_000
TRAINING = ("P01_13", "P02_13", "P03_21", "P03_25", "P07_18", "P15_05", "P18_08", "P26_34", "P28_15", "P32_07")
VALIDATION = ("P28_22", "P31_12", "P04_27")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips converted from the public annotations of thirteen short videos, with made-up sound: one tone for each class."""
    if not PUBLIC.is_file():
        pytest.skip("needs ../shared/data/epic_sounds")
    folder, rng = tmp_path_factory.mktemp("epic"), np.random.default_rng(0)
    with PUBLIC.open() as file:
        reader = csv.DictReader(file)
        header, rows = reader.fieldnames, list(reader)
    for name, videos in (("train", TRAINING), ("validation", VALIDATION)):
        with (folder / f"EPIC_Sounds_{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, header)
            writer.writeheader()
            writer.writerows(row for row in rows if row["video_id"] in videos)
    with h5py.File(folder / "EPIC_audio.hdf5", "w") as file:
        for video in TRAINING + VALIDATION:
            own = [row for row in rows if row["video_id"] == video]
            samples = rng.standard_normal(max(int(row["stop_sample"]) for row in own) + RATE_HZ) / 1000
            for row in own:
                first, last = int(row["start_sample"]), int(row["stop_sample"])
                hertz = 150 * 1.1 ** int(row["class_id"])
                samples[first:last] += 0.1 * np.sin(2 * np.pi * hertz * np.arange(last - first) / RATE_HZ)
            file[video] = samples.astype(np.float32)
    out = folder / "clips"
    convert.main(
        ["--annotations", str(folder), "--audio", str(folder / "EPIC_audio.hdf5"), "--out", str(out),
         "--num_workers", "1", "--num_shards", "2"]
    )  # fmt: skip
    return out


def small_config(clips, mode: str):
    """Returns the recipe with small towers, twice the epochs, and a learning rate and warm-up that suit them."""
    config = epic_sounds.get_config(mode)
    config.data.dir, config.data.batch_size, config.eval.batch_size, config.init.audio = str(clips), 16, 16, ""
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.width, tower.depth, tower.num_heads = 32, 1, 2
    config.model.text.mlp_width, config.model.embed_dim = 32, 8
    for phase in config.phases:
        phase.epochs, phase.optimizer.warmup_steps = phase.epochs * 2, min(phase.optimizer.warmup_steps, 10)
        phase.optimizer.learning_rate *= 50
    config.save.every_steps = 120
    validation.validate(config)
    return config


@pytest.mark.large  # a minute: three phases of the recipe
def test_public_rows_are_trained_on_by_the_recipe_and_measured_as_the_data_set_does(clips, tmp_path):
    config, workdir = small_config(clips, "finetune"), str(tmp_path / "finetune")
    state = train.train(run_lib.set_up(config, workdir))
    results = evaluate_sounds.evaluate(config, workdir)
    with PUBLIC.open() as file:
        rows = list(csv.DictReader(file))
    wanted = collections.Counter(int(row["class_id"]) for row in rows if row["video_id"] in VALIDATION)
    trained = collections.Counter(int(row["class_id"]) for row in rows if row["video_id"] in TRAINING)
    assert (results["num_clips"], results["num_trained_on"]) == (wanted.total(), trained.total())
    with np.load(f"{workdir}/scores.npz") as scores:
        probabilities, classes = scores["probabilities"], scores["class_id"]
    assert probabilities.shape == (wanted.total(), 44)
    assert collections.Counter(classes.tolist()) == wanted
    again = classification.classify(probabilities.astype(np.float64), classes)
    assert {name: results["last"][name] for name in again} == pytest.approx(again, abs=1e-4)
    steps = checkpoint.steps_of(workdir)
    assert [epoch["step"] for epoch in results["epochs"]] == steps
    assert steps[-1] == int(state.step)
    assert [epoch["phase"] for epoch in results["epochs"]][-1] == "third"
    assert results["best"]["top1"] == max(epoch["top1"] for epoch in results["epochs"])
    # Clearly better than always predicting the commonest class of training, so the model has heard the sounds.
    common = trained.most_common(1)[0][0]
    assert results["last"]["top1"] > 100 * wanted[common] / wanted.total() + 15
    assert json.loads((tmp_path / "finetune" / "results.json").read_text()) == results
    assert (tmp_path / "finetune" / "report" / "index.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_probe_of_the_recipe_moves_the_classifier_alone(clips, tmp_path):
    config = small_config(clips, "probe")
    for phase in config.phases:
        phase.epochs = 1
    run = run_lib.set_up(config, str(tmp_path / "probe"))
    init = functools.partial(model_lib.init_params, run.model, config.model, config.seed)
    before = checkpoint.flatten(jax.device_get(jax.jit(init)()))
    after = checkpoint.flatten(jax.device_get(train.train(run).params))
    changed = {name.split("/")[0] for name, value in before.items() if not np.array_equal(value, after[name])}
    assert changed == {CLASSIFIER}
