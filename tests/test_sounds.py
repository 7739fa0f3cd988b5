"""Sounds with classes: phases that train a classifier, folds, windows, mixup, and evaluation of every kept checkpoint."""

import csv
import dataclasses
import functools
import json
import shutil
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mc3_jax
from benchmarks import sounds
from configs import epic_sounds, esc
from data_prep import esc50
from mc3_jax import (
    checkpoint,
    config as config_lib,
    convert,
    evaluate_sounds,
    mesh as mesh_lib,
    metric_writer,
    model as model_lib,
    phases as phases_lib,
    run as run_lib,
    train,
    train_step as step_lib,
    validation,
    weights,
)
from mc3_jax.config import CLASSIFIER, AudioConfig, MemoryConfig, ModelConfig, PhaseConfig
from mc3_jax.data import loader, tokenizer
from mc3_jax.evals import classification
from mc3_jax.losses import classification as classification_loss
from mc3_jax.models import frontend
from tests import world

RATE_HZ = 16_000
CLASSES = ("tone", "noise", "clicks")


def sound(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns two seconds of a random sound of a class, int16."""
    n = 2 * RATE_HZ
    if kind == "tone":
        wave_ = np.sin(2 * np.pi * rng.uniform(300, 3000) * np.arange(n) / RATE_HZ)
    elif kind == "noise":
        wave_ = rng.standard_normal(n) / 4
    else:
        wave_ = np.zeros(n)
        wave_[:: int(rng.integers(1500, 4000))] = 1
    return (wave_ * rng.uniform(0.2, 0.9) * 32767).clip(-32767, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Converted clips from made-up sounds in ESC's layout: three folds with eight sounds of each of three classes."""
    root, rng = tmp_path_factory.mktemp("esc"), np.random.default_rng(0)
    (root / "audio").mkdir()
    (root / "meta").mkdir()
    with (root / "meta" / "esc10.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "fold", "target", "category", "src_file"])
        for fold in (1, 2, 3):
            for target, kind in enumerate(CLASSES):
                for i in range(8):
                    name = f"{fold}-{target}-{i}.wav"
                    with wave.open(str(root / "audio" / name), "wb") as f:
                        f.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
                        f.writeframes(sound(kind, rng).tobytes())
                    writer.writerow([name, fold, target, kind, f"{fold}{target}{i}"])
    out = root / "clips"
    words = ["--root", str(root), "--out", str(out), "--num_workers", "1", "--test_fold", "3", "--validation_fold", "2"]
    esc50.main(words)
    return out


def small_config(clips, mode: str):
    config = esc.get_config(mode)
    config.data.dir, config.data.batch_size, config.eval.batch_size = str(clips), 16, 16
    config.data.folds, config.eval.folds = (1, 2), (3,)
    config.model.num_classes = 3
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.width, tower.depth, tower.num_heads = 16, 1, 2
    # With a smaller audio tower the three classes are learned with some seeds and not with others.
    config.model.audio.width, config.model.audio.num_heads = 48, 4
    config.model.text.mlp_width, config.model.embed_dim = 32, 8
    config.model.audio.max_time_mask = config.model.audio.max_mel_mask = 0
    (phase,) = config.phases
    phase.epochs, phase.optimizer.learning_rate, phase.optimizer.warmup_steps = 24, 5e-3, 3
    config.save.every_steps, config.log.every_steps = 24, 1
    validation.validate(config)
    return config


@pytest.fixture(scope="module")
def scratch(clips, tmp_path_factory):
    """A run of the mode "scratch": (config, workdir, state, results)."""
    config, workdir = small_config(clips, "scratch"), str(tmp_path_factory.mktemp("run") / "scratch")
    state = train.train(run_lib.set_up(config, workdir))
    return config, workdir, state, evaluate_sounds.evaluate(config, workdir)


def test_three_easy_classes_are_learned_and_every_checkpoint_is_measured(scratch):
    _, workdir, _, results = scratch
    assert results["num_clips"] == 24
    assert results["num_trained_on"] == 48
    assert [epoch["step"] for epoch in results["epochs"]] == [24, 48, 72] == checkpoint.steps_of(workdir)
    assert results["last"] == results["epochs"][-1]
    assert results["best"]["top1"] == max(epoch["top1"] for epoch in results["epochs"])
    assert results["last"]["mAP"] >= 0.95
    with open(f"{workdir}/results.json") as file:
        assert json.load(file) == results
    rows = metric_writer.read_metrics(workdir)
    assert all(row["loss"] == pytest.approx(row["cross_entropy"]) for row in rows)
    assert np.mean([row["accuracy"] for row in rows[-3:]]) > np.mean([row["accuracy"] for row in rows[:3]])


def test_scores_are_the_mean_over_all_windows_on_any_number_of_devices(scratch):
    config, workdir, state, results = scratch
    source = loader.open_split(config.data.dir, config.eval.split, 0, config.eval.folds)
    model, size = model_lib.make_model(config.model), source.info.num_samples
    params = jax.device_get(state.params)
    means, classes = [], []
    for i in range(len(source)):
        clip = source[i]
        starts = [*range(0, len(clip.audio) - size, config.eval.hop_samples), len(clip.audio) - size]
        windows = np.stack([clip.audio[start : start + size] for start in starts])
        inputs = frontend.log_mel(jnp.asarray(windows), num_mel=64, num_time_frames=149)
        logits = model.apply({"params": params}, audio=inputs)["logits"]
        means.append(np.asarray(jax.nn.softmax(logits)).mean(0))
        classes.append(clip.class_id)
    scores = np.load(f"{workdir}/scores.npz")
    assert scores["clip_id"].tolist() == [source[i].clip_id for i in range(len(source))]
    assert world.undocumented([*scores.files, *world.keys_of(results)]) == []
    np.testing.assert_allclose(scores["probabilities"], means, atol=1e-5)
    np.testing.assert_array_equal(scores["class_id"], classes)
    again = classification.classify(np.array(means), np.array(classes))
    assert {name: results["last"][name] for name in again} == pytest.approx(again, abs=1e-4)
    mesh, embed = mesh_lib.make_mesh(devices=jax.devices()[:1]), model_lib.make_embed_fn(model, config.model)
    batches = loader.eval_batches(
        source, tokenizer.blank(config.model.text.num_tokens), batch_size=7, hop_samples=config.eval.hop_samples
    )
    classify = jax.jit(lambda params, batch: jax.nn.softmax(embed(params, batch)["logits"]))
    with jax.set_mesh(mesh):
        alone, _ = evaluate_sounds.class_scores(classify, params, batches, len(source), 3, mesh)
    np.testing.assert_allclose(alone, scores["probabilities"], atol=1e-5)


@pytest.mark.large
def test_a_probe_starts_from_a_runs_tower_and_leaves_its_bits(clips, scratch, tmp_path):
    config = small_config(clips, "probe")
    config.init.audio = scratch[1]
    state = train.train(run_lib.set_up(config, str(tmp_path / "probe")))
    flat = checkpoint.flatten(jax.device_get(state.params))
    _, began = weights.read_run(scratch[1])
    tower = [name for name in flat if name.startswith("audio/encoder/")]
    assert len(tower) > 10
    assert all(np.array_equal(flat[name], began[name]) for name in tower)
    assert not np.array_equal(flat["classifier/head/kernel"], began["classifier/head/kernel"])
    assert evaluate_sounds.evaluate(config, str(tmp_path / "probe"))["last"]["top1"] >= 60


@pytest.mark.large
def test_a_stretched_grid_hears_the_whole_sound(clips, scratch, tmp_path):
    config = small_config(clips, "finetune")
    config.init.audio, config.data.num_samples, config.eval.hop_samples = scratch[1], 32_000, 0
    config.model.audio.num_time_frames = 198
    config.phases[0].epochs = 1
    state = train.train(run_lib.set_up(config, str(tmp_path / "stretched")))
    assert state.params["audio"]["encoder"]["position_embedding"].shape == (2 + 4 * 12, 48)
    assert evaluate_sounds.evaluate(config, str(tmp_path / "stretched"))["num_clips"] == 24


def test_a_classifier_does_not_keep_a_run_from_being_used_or_exported(scratch, tmp_path, capsys):
    sound_ = np.random.default_rng(0).standard_normal(RATE_HZ).astype(np.float32) / 4
    known = mc3_jax.load(scratch[1]).embed_audio(sound_, RATE_HZ)
    assert known.shape == (8,)
    for kind, name in (("folder", "towers"), ("safetensors", "towers.safetensors")):
        convert.main(["export", scratch[1], "--to", kind, "--out", str(tmp_path / name)])
        assert "the classifier of 3 classes is not exported" in capsys.readouterr().out
        model = None if kind == "folder" else dataclasses.replace(scratch[0].model, num_classes=0)
        again = mc3_jax.load(str(tmp_path / name), model=model).embed_audio(sound_, RATE_HZ)
        np.testing.assert_array_equal(again, known)


def test_the_benchmark_takes_a_towers_sizes_from_its_run(scratch, tmp_path):
    config = config_lib.Config()
    for flag in sounds.tower_flags(scratch[1]):
        path, value = flag.removeprefix("--config.model.audio.").split("=")
        setattr(config.model.audio, path, int(value))
    own = scratch[0].model.audio
    masks = {"max_time_mask": own.max_time_mask, "max_mel_mask": own.max_mel_mask}  # these are not sizes
    assert dataclasses.replace(config.model.audio, **masks) == own
    assert sounds.tower_flags(str(tmp_path / "tower.safetensors")) == []


def test_a_number_of_classes_other_than_that_of_the_data_is_refused(clips, tmp_path):
    config = small_config(clips, "scratch")
    config.model.num_classes = 4
    with pytest.raises(ValueError, match="num_classes = 4: .* has 3 classes, set it to 3"):
        run_lib.set_up(config, str(tmp_path))


def test_clips_that_the_run_was_trained_on_are_counted_and_reported(scratch, tmp_path, capsys):
    config, workdir, _, results = scratch
    assert results["num_seen"] == 0
    place = shutil.copytree(workdir, tmp_path / "run")
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, folds=(2, 3)))
    assert evaluate_sounds.evaluate(config, str(place))["num_seen"] == 24
    assert "warning: the run was trained on 24 of these 48 clips" in capsys.readouterr().out
    assert "24 of them were trained on" in (place / "report" / "index.html").read_text()


def test_the_best_epoch_is_that_of_the_highest_top1_and_the_last_the_newest(scratch, tmp_path, monkeypatch):
    config, workdir, _, _ = scratch

    def scores(config, workdir, source, mesh):
        classes = np.array([source[i].class_id for i in range(len(source))])
        right = np.eye(3)[classes]
        for step, probabilities in ((1, 1 - right), (2, right), (3, 1 - right)):
            yield step, probabilities / probabilities.sum(1, keepdims=True), classes

    monkeypatch.setattr(evaluate_sounds, "_scores", scores)
    found = evaluate_sounds.evaluate(config, str(shutil.copytree(workdir, tmp_path / "run")))
    assert (found["best"]["step"], found["last"]["step"]) == (2, 3)


def test_data_with_other_classes_or_counts_are_not_taken_for_the_runs(scratch, tmp_path):
    config, workdir, _, results = scratch
    place = shutil.copytree(workdir, tmp_path / "run")
    path = place / "data.json"
    facts = json.loads(path.read_text())
    assert (facts["num_clips"], facts["classes"]) == (48, list(CLASSES))
    path.write_text(json.dumps(facts | {"num_clips": 96}))
    assert evaluate_sounds.evaluate(config, str(place))["last"]["epoch"] == results["last"]["epoch"] / 2
    path.write_text(json.dumps(facts | {"classes": ["tone", "rain", "saw"]}))
    with pytest.raises(ValueError, match="class 1 of .* is 'noise', but that of the run in .* is 'rain': evaluate it on"):
        evaluate_sounds.evaluate(config, str(place))
    path.write_text(json.dumps(facts | {"classes": []}))
    with pytest.raises(ValueError, match="has 3 classes, but the run in .* was trained on data with 0 and a classifier of 3"):
        evaluate_sounds.evaluate(config, str(place))
    unnamed = ["tone", "class 1", "clicks"]  # of which the annotations had no example
    path.write_text(json.dumps(facts | {"num_clips": 96, "classes": unnamed}))
    assert evaluate_sounds.evaluate(config, str(place))["last"]["epoch"] == results["last"]["epoch"] / 2


def test_a_classifier_is_evaluated_by_its_run_alone(scratch):
    config, workdir, _, _ = scratch
    with pytest.raises(ValueError, match="config.checkpoint = 'towers.safetensors': .*name --workdir instead"):
        evaluate_sounds.evaluate(dataclasses.replace(config, checkpoint="towers.safetensors"), workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "model.num_classes = 0: must be the data's number of classes"),
        ({"num_classes": 1}, "model.num_classes = 1: must be at least 2"),
        ({"chunk_size": 8}, "data.chunk_size = 8: .*mixup mixes rows of the whole batch"),
        ({"contrastive_weight": 1.0}, "mixup = 0.5: is for phases whose only loss is classification"),
        ({"mixup": -1.0}, "mixup = -1.0: must not be negative"),
        ({"memory": MemoryConfig(16, 16), "contrastive_weight": 1.0, "mixup": 0.0}, "pool_size = 16: holds keys of"),
        ({"num_bootstrap": 0}, "eval.num_bootstrap = 0: must be at least 1"),
        ({"trainable": ("audio",)}, r"phases\[0\].trainable = \('audio',\): must name 'classifier', since the phase"),
        (
            {"classification_weight": 0.0, "contrastive_weight": 1.0, "mixup": 0.0},
            "model.num_classes = 3: no phase classifies: set 0, or classification_weight",
        ),
    ],
)
def test_impossible_settings_are_refused(clips, change, message):
    config = small_config(clips, "scratch")
    for field, value in change.items():
        holder = next(x for x in (config.phases[0], config.model, config.data, config.eval) if hasattr(x, field))
        setattr(holder, field, value)
    with pytest.raises(ValueError, match=message):
        validation.validate(config)


def test_a_classifier_may_stay_fixed_only_after_a_phase_that_has_trained_it():
    config = esc.get_config("finetune")
    (trains,) = config.phases
    fixed = dataclasses.replace(trains, name="fixed", trainable=("audio",))
    aligns = dataclasses.replace(  # names the classifier, but has no loss that would train it
        trains, name="aligns", contrastive_weight=1.0, classification_weight=0.0, mixup=0.0
    )
    config.phases = [aligns, trains, fixed]
    validation.validate(config)
    config.phases = [aligns, fixed, trains]
    with pytest.raises(ValueError, match=r"phases\[1\].trainable = .*: must name 'classifier', .* no phase before it"):
        validation.validate(config)
    config.phases = []
    validation.validate(config)


def test_a_phase_can_not_train_a_classifier_that_the_model_lacks():
    config = esc.get_config("probe")
    config.model.num_classes = 0
    config.phases = [PhaseConfig(trainable=("audio", CLASSIFIER))]
    with pytest.raises(ValueError, match="must not name 'classifier', since model.num_classes is 0"):
        validation.validate(config)


def test_cross_entropy_and_mixup_are_those_of_float64():
    rng = np.random.default_rng(0)
    logits, classes = rng.standard_normal((6, 4)), np.array([0, 3, -1, 2, 2, 1])
    targets = np.eye(5)[classes][:, :4]  # all zeros for -1, a row without a class
    value, aux = classification_loss.cross_entropy(jnp.float32(logits), jnp.float32(targets))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    known = classes >= 0
    assert value == pytest.approx(-np.log(shares[known, classes[known]]).mean(), rel=1e-5)
    assert aux["accuracy"] == pytest.approx((logits[known].argmax(1) == classes[known]).mean())
    audio = rng.integers(-9000, 9000, (6, 100)).astype(np.int16)
    keys = frontend.row_keys(jax.random.key(0), jnp.arange(6))
    mixed, shared = frontend.mix(jnp.asarray(audio), jnp.float32(targets), keys, 0.5)
    waves = audio / 32768 - (audio / 32768).mean(1, keepdims=True)
    for row in range(6):
        other = 5 - row
        # The share of the row's own sound in the mixture, by least squares.
        apart = waves[row] - waves[other]
        share = ((mixed[row] - waves[other]) @ apart) / (apart @ apart)
        assert 0 <= share <= 1
        np.testing.assert_allclose(mixed[row], share * waves[row] + (1 - share) * waves[other], atol=1e-5)
        np.testing.assert_allclose(shared[row], share * targets[row] + (1 - share) * targets[other], atol=1e-4)
    assert len({round(float(x), 4) for x in shared[:, 0]}) > 2


def test_classifying_in_chunks_has_the_gradient_of_the_whole_batch(clips):
    config = small_config(clips, "scratch")
    config.phases[0].mixup = 0.0
    source = loader.open_split(config.data.dir, config.data.split, 0, config.data.folds)
    batch = next(loader.train_batches(source, tokenizer.blank(16), batch_size=16, seed=0))
    model, mesh = model_lib.make_model(config.model), mesh_lib.make_mesh()
    phase = phases_lib.Phase(config.phases[0], 0, 100)
    params = jax.jit(functools.partial(model_lib.init_params, model, config.model, 0))()
    found = []
    for chunk_size in (0, 8):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, chunk_size=chunk_size))
        with jax.set_mesh(mesh):
            grad_fn = jax.jit(step_lib.make_grad_fn(model, config, phase.config))
            grads, _ = grad_fn(params, jnp.int32(0), mesh_lib.put_batch(mesh, batch))
        found.append(checkpoint.flatten(jax.device_get(grads)))
    for name, whole in found[0].items():
        np.testing.assert_allclose(found[1][name], whole, atol=1e-5 * max(np.abs(whole).max(), 1e-3), err_msg=name)
    assert np.abs(found[0]["classifier/head/kernel"]).max() > 0


@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_the_recipe_of_epic_sounds_is_three_phases_at_falling_rates(mode):
    config = epic_sounds.get_config(mode)
    validation.validate(config)
    rates = [phase.optimizer.learning_rate for phase in config.phases]
    np.testing.assert_allclose(rates, [1e-4, 5e-6, 1e-6])
    assert sum(phase.epochs for phase in config.phases) == 30
    learns = (CLASSIFIER,) if mode == "probe" else ("audio", CLASSIFIER)
    assert all(phase.trainable == learns for phase in config.phases)
    assert config.model == ModelConfig(audio=AudioConfig(max_time_mask=12, max_mel_mask=26), num_classes=44)
    # With the public list's 60,055 segments the state of every epoch is kept, or the best one could have been deleted.
    ends = [phase.stop for phase in phases_lib.plan_phases(config.phases, 60_055, config.data.batch_size)]
    saved = {*range(0, ends[-1] + 1, config.save.every_steps), *ends} - {0}
    assert 30 <= len(saved) <= config.save.keep
