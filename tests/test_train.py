"""The demo's path, shrunk: real mp4 files to a report; resumed equals uninterrupted; one device equals eight."""

import copy
import csv
import dataclasses
import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from configs import demo
from mc3_jax import (
    checkpoint,
    config as config_lib,
    evaluate,
    evaluate_sounds,
    job as job_lib,
    mesh as mesh_lib,
    metric_writer,
    model as model_lib,
    objective,
    phases as phases_lib,
    run as run_lib,
    train,
    train_step as step_lib,
    validation_loss,
    weights,
)
from mc3_jax.data import loader, records, tokenizer, transforms
from mc3_jax.evals import embeddings as embeddings_lib, retrieval
from tests import world


def assert_equal_bits(left, right):
    leaves = zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True)
    for (path, a), b in leaves:
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "where", ["at the switch", *(pytest.param(f"within {p}", marks=pytest.mark.large) for p in ("align", "refine"))]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, tmp_path, capsys, where):
    config, workdir, state = finished
    stops = [int(p.stop) for p in run_lib.set_up(config, workdir).phases]
    step = {"within align": 3, "at the switch": stops[0], "within refine": stops[0] // 3 * 3 + 3}[where]
    shutil.copytree(workdir, tmp_path / "run")
    kept = sorted(int(p.name) for p in checkpoint.checkpoint_dir(str(tmp_path / "run")).iterdir())
    assert step in kept
    for later in (s for s in kept if s > step):
        shutil.rmtree(checkpoint.checkpoint_dir(str(tmp_path / "run")) / str(later))
    config = copy.deepcopy(config)  # looking at other clips meanwhile changes nothing
    config.validation = config_lib.ValidationConfig(every_steps=4, split="validation+test", num_batches=1)
    resumed = train.train(run_lib.set_up(config, str(tmp_path / "run")))
    assert int(resumed.step) == stops[-1]
    assert_equal_bits(resumed, state)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(measured) == [n for n in range(step + 1, stops[-1] + 1) if n % 4 == 0 or n in stops]
    assert all("validation_consensus" in row for row in rows if row["step"] in measured and row["phase"] == "refine")
    assert len(set(measured.values())) == len(measured)
    assert [r["step"] for r in rows] == sorted({r["step"] for r in rows})
    times = [row["elapsed_s"] for row in rows]  # go on where the first start's ended, or later
    assert times == sorted(times)
    starts = (tmp_path / "run" / metric_writer.STARTS_FILE).read_text().splitlines()
    starts = [json.loads(line) for line in starts]
    assert [start["step"] for start in starts] == [0, step]
    assert starts[1]["argv"] == sys.orig_argv
    assert starts[1]["config"] == config_lib.to_dict(config)
    assert {"host", "jaxlib", "xla_flags"} <= set(starts[1])
    log = [line[16:] for line in capsys.readouterr().out.splitlines() if re.match(r"\d\d-\d\d \d\d:\d\d:\d\d  ", line)]
    later = range(step + 1, stops[-1] + 1)
    assert [line.split("  ")[1] for line in log if "  step " in line] == [f"step {i}/{stops[-1]}" for i in later]
    saved = {int(found[1]) for line in log if (found := re.fullmatch(r"saved step ([0-9]+) in [0-9.]+ s", line))}
    assert saved == set(kept) & set(later)
    if where == "at the switch":
        assert log[0] == f"refine  compiling, to go from step {step} to {stops[1]}"
        assert re.fullmatch(r"refine  compiled in [0-9.]+ s", log[1])


@pytest.mark.large  # of a small model, test_survival and test_fits compare such meshes with one device
def test_one_device_equals_eight(data):
    config = world.small_config(data)
    source = loader.open_split(config.data.dir, "train", 4)
    tokenize = tokenizer.load_tokenizer(config.data.tokenizer, 16, 600)
    batch = next(loader.train_batches(source, tokenize, batch_size=16, seed=0, num_threads=1))
    model = model_lib.make_model(config.model)
    params = model_lib.init_params(model, config.model, 0)
    loss_fn = step_lib.make_loss_fn(model, config, config.phases[1])
    outcome = {}
    for shape in ((1, 1), (8, 1), (2, 4)):
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
        shapes = mesh_lib.abstract_state(mesh, jax.eval_shape(lambda: params))
        placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, shapes))
        with jax.set_mesh(mesh):
            value, grads = jax.jit(jax.value_and_grad(lambda p, b: loss_fn(p, 3, b)[0]))(
                placed, mesh_lib.put_batch(mesh, batch)
            )
        outcome[shape] = float(value), jax.device_get(grads)
    loss, grads = outcome[1, 1]
    for shape in ((8, 1), (2, 4)):
        other_loss, other_grads = outcome[shape]
        assert abs(other_loss - loss) <= 1e-6 * abs(loss)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
            assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(a)), 1e-12)


@pytest.mark.slow  # compiles both losses
def test_a_run_that_is_told_to_go_saves_without_measuring_first(finished, tmp_path, monkeypatch):
    config = copy.deepcopy(finished[0])
    config.validation = config_lib.ValidationConfig(every_steps=1, split="validation+test", num_batches=1)
    monkeypatch.setattr(job_lib, "preempted", lambda asked: asked == 2)
    state = train.train(run_lib.set_up(config, str(tmp_path)))
    assert int(state.step) == checkpoint.steps_of(str(tmp_path))[-1] == 2
    rows = metric_writer.read_metrics(str(tmp_path))
    assert [(row["step"], "validation_loss" in row) for row in rows] == [(1, True), (2, False)]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_the_same_clips_in_the_same_rows(finished, tmp_path):
    config, workdir, _ = finished
    config, moved = copy.deepcopy(config), tmp_path / "run"
    shutil.copytree(workdir, moved)
    for path in checkpoint.checkpoint_dir(str(moved)).iterdir():
        if int(path.name) > 3:
            shutil.rmtree(path)
    config.fsdp = 4
    train.train(run_lib.set_up(config, str(moved)))
    assert metric_writer.read_clips(str(moved)) == metric_writer.read_clips(workdir)
    for row, expected in zip(metric_writer.read_metrics(str(moved)), metric_writer.read_metrics(workdir), strict=True):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.slow  # compiles the objective several times
def test_the_validation_loss_is_that_of_the_objective_on_fixed_clips_whatever_the_chunks(finished):
    config, _, state = finished
    config = copy.deepcopy(config)
    config.validation = config_lib.ValidationConfig(every_steps=1, split="validation+test", num_batches=1)
    mesh, model = mesh_lib.make_mesh(), model_lib.make_model(config.model)
    tokenize = tokenizer.load_tokenizer(config.data.tokenizer, 16, 600)
    phase = phases_lib.plan_phases(config.phases, 100, 16)[1]
    trained_on = loader.open_split(config.data.dir, "train", 4)
    source = loader.open_split(config.data.dir, "validation+test", 4)
    batch = next(loader.train_batches(source, tokenize, batch_size=16, seed=0, clips_per_video=config.data.clips_per_video))
    embeddings = jax.jit(model_lib.make_embed_fn(model, config.model))(state.params, batch)
    expected, (terms, _) = objective.phase_loss(embeddings, phase.config)
    with jax.set_mesh(mesh):
        for chunk_size in (0, 8):
            config.data.chunk_size = chunk_size
            measure = validation_loss.ValidationLoss(config, mesh, model, tokenize, 4, trained_on)
            for _ in range(2):  # always the same clips
                found = measure.measure(phase, state.params)
                assert found["validation_loss"] == pytest.approx(float(expected), rel=1e-4)
                assert found["validation_consensus"] == pytest.approx(float(terms["consensus"]), rel=1e-3)
    assert [measure.is_due(step, 7) for step in (1, 7)] == [True, True]
    config.validation.every_steps = 4
    assert [measure.is_due(step, 7) for step in (3, 4, 7)] == [False, True, True]
    both = loader.open_split(config.data.dir, "train+test", 4)
    with pytest.raises(ValueError, match=rf"the {len(source)} clips .* {len(both) - len(trained_on)} are trained on:"):
        validation_loss.ValidationLoss(config, mesh, model, tokenize, 4, both)
    config.data.batch_size = 64
    with pytest.raises(ValueError, match="split 'validation.test' of .* clips, fewer than a batch of 64"):
        validation_loss.ValidationLoss(config, mesh, model, tokenize, 4, trained_on)


def test_a_mesh_has_the_devices_of_a_process_side_by_side():
    mesh = mesh_lib.make_mesh(2, devices=list(reversed(jax.devices())))
    assert [device.id for device in mesh.devices.flat] == sorted(device.id for device in jax.devices())
    assert mesh.devices.shape == (4, 2)


def test_a_process_that_does_not_see_the_checkpoints_reads_no_weights_alone(finished, monkeypatch):
    config, workdir, _ = finished
    monkeypatch.setattr(checkpoint, "steps_of", lambda workdir: [])
    monkeypatch.setattr(job_lib, "from_process_0", lambda value: value or 9)
    monkeypatch.setattr(weights, "read_initial", lambda config: pytest.fail("the others don't"))
    assert run_lib.set_up(config, workdir).initial == {}


def test_a_run_is_not_gone_on_with_on_other_data_but_on_moved_ones(finished, tmp_path):
    config, workdir, _ = finished
    config, moved = copy.deepcopy(config), tmp_path / "vocabulary"
    shutil.copytree(config.data.tokenizer, moved)
    config.data.tokenizer = str(moved)
    run_lib.set_up(config, workdir)
    text = (moved / "tokenizer.json").read_text()
    (moved / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(ValueError, match="config.data.tokenizer names other data than the run in"):
        run_lib.set_up(config, workdir)


def test_a_run_keeps_its_tokenizer_and_goes_on_with_the_copy_where_it_has_gone(finished, tmp_path):
    config, place = copy.deepcopy(finished[0]), shutil.copytree(finished[1], tmp_path / "run")
    learned = tokenizer.tokenizer_digest(config.data.tokenizer)
    assert tokenizer.tokenizer_digest(place / "tokenizer") == learned
    shutil.rmtree(place / "tokenizer")  # of a run begun before there was one
    (place / "tokenizer.tmp").mkdir()  # of a start that was killed
    (place / "tokenizer.tmp" / "tokenizer.json").write_text("half")
    run_lib.set_up(config, str(place))
    assert tokenizer.tokenizer_digest(place / "tokenizer") == learned
    (place / "tokenizer" / "tokenizer.json").write_text("{}")
    run_lib.set_up(config, str(place))
    assert tokenizer.tokenizer_digest(place / "tokenizer") == learned
    assert not (place / "tokenizer.tmp").exists()
    config.data.tokenizer = str(tmp_path / "gone")
    assert run_lib.set_up(config, str(place)).tokenize("#C C cuts")[1].sum() > 3
    (place / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer folder .*gone"):
        run_lib.set_up(config, str(place))


def test_masks_are_for_training_alone():
    config = demo.get_config().model
    rng = np.random.default_rng(0)
    batch = {
        "audio": rng.integers(-9000, 9000, (2, 24_000)).astype(np.int16),
        "video": rng.integers(0, 255, (2, 4, 72, 96, 3)).astype(np.uint8), "video_size": np.full((2, 2), (72, 96), np.int32),
        "text_ids": np.zeros((2, 16), np.int32), "text_mask": np.ones((2, 16), np.int32), "row": np.arange(2, dtype=np.int32),
    }  # fmt: skip
    batch, key = jax.tree.map(jax.numpy.asarray, batch), jax.random.key(0)
    masked = model_lib.prepare(batch, config, key)["audio"]
    whole = model_lib.prepare(batch, config, None)["audio"]
    assert np.mean(masked == whole) > 0.3
    lost = np.asarray(masked != whole)
    assert lost.any()
    assert not np.asarray(masked)[lost].any()
    config.audio.max_time_mask = config.audio.max_mel_mask = 0
    np.testing.assert_array_equal(model_lib.prepare(batch, config, key)["audio"], whole)


def test_training_reads_the_groups_that_the_config_names(finished, monkeypatch, tmp_path):
    config = copy.deepcopy(finished[0])
    config.data.clips_per_video = 5
    asked = {}

    def stop(source, tokenize, **options):
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(loader, "train_batches", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(run_lib.set_up(config, str(tmp_path / "run")))
    assert asked["clips_per_video"] == 5


@pytest.mark.parametrize(("clips_per_video", "num_processes", "num_threads"), [(1, 2, 2), (3, 2, 1), (1, 4, 5), (3, 4, 2)])
def test_a_batch_is_a_function_of_the_step_however_many_processes_and_threads_read_it(
    data, clips_per_video, num_processes, num_threads
):
    config = world.small_config(data)
    source = loader.open_split(config.data.dir, "train", 4)
    tokenize = tokenizer.load_tokenizer(config.data.tokenizer, 16, 600)

    def batch(step, num_threads=2, **kwargs):
        stream = loader.train_batches(
            source, tokenize, batch_size=8, seed=1, clips_per_video=clips_per_video, num_threads=num_threads, **kwargs
        )
        for _ in range(step):
            next(stream)
        return next(stream)

    whole = batch(7)
    later = batch(0, start_step=7)
    parts = [
        batch(2, num_threads, start_step=5, process_index=i, process_count=num_processes) for i in range(num_processes)
    ]
    for name, value in whole.items():
        np.testing.assert_array_equal(later[name], value)
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


def test_every_clip_epoch_and_seed_has_frames_chosen_of_its_own(data, monkeypatch):
    source = loader.open_split(world.small_config(data).data.dir, "train", 4)
    choose, chosen = transforms.choose_frames, []
    monkeypatch.setattr(transforms, "choose_frames", lambda *args: chosen.append(choose(*args)) or chosen[-1])

    def epoch(number, seed):
        batches = loader.train_batches(
            source, tokenizer.blank(4), batch_size=len(source), seed=seed, start_step=number, num_threads=0
        )
        chosen.clear()
        order = np.argsort(next(batches)["index"])
        return np.stack([chosen, np.array(chosen)[order]])  # place by place, and clip by clip

    first, second, other = epoch(0, seed=1), epoch(1, seed=1), epoch(0, seed=2)
    np.testing.assert_array_equal(epoch(0, seed=1), first)
    for choices in (second, other, np.roll(first, 1, axis=1)):
        assert (first == choices).all(axis=2).mean(axis=1).max() < 0.05  # of 256 choices one
    assert np.bincount(first[0].ravel(), minlength=16).min() > len(source) / 8


@pytest.fixture(scope="module")
def evaluated(finished) -> str:
    """The workdir of the finished run, evaluated."""
    config, workdir, _ = finished
    evaluate.evaluate(config, workdir)
    return workdir


def test_every_embedding_names_its_clip_and_its_video(evaluated, data):
    with np.load(f"{evaluated}/embeddings.npz", allow_pickle=False) as file:
        arrays = dict(file)
    source = loader.open_split(data / "clips", "test", 4)
    assert arrays["clip_id"].dtype.kind == "U"
    clips = [source[int(i)] for i in arrays["index"]]
    assert arrays["clip_id"].tolist() == [clip.clip_id for clip in clips]
    assert arrays["label"].tolist() == [clip.label for clip in clips]
    assert len(set(arrays["clip_id"].tolist())) == len(clips) > 1
    uids, videos = arrays["video_uid"].tolist(), source.videos[arrays["index"]]
    assert uids == [clip.video_uid for clip in clips]
    assert len(set(uids)) == len(set(videos.tolist())) == len(set(zip(uids, videos.tolist(), strict=True)))


def test_all_that_evaluation_writes_is_documented(evaluated):
    results = json.loads(pathlib.Path(f"{evaluated}/results.json").read_text())
    keys = set(world.keys_of(results))
    assert {"within_verb_roc_auc", "margin_interval", "sounding", "earlier"} <= keys
    if not results["retrieval"]:  # the little world has no group of three
        same = dict.fromkeys(("audio", "video", "text"), np.eye(6))
        keys |= set(world.keys_of(retrieval.retrieve(same, np.arange(6) // 3, 0)))
    assert "hit@5" in keys
    assert world.undocumented(keys) == []
    with np.load(f"{evaluated}/embeddings.npz") as arrays:
        assert world.undocumented(arrays.files) == []


def test_evaluation_counts_every_clip_once_and_writes_results_and_a_self_contained_report(evaluated, data):
    workdir = evaluated
    results = json.loads(pathlib.Path(f"{workdir}/results.json").read_text())
    clips = json.loads((data / "clips" / "clips.json").read_text())["splits"]["test"]
    for pair in ("av", "al"):
        found = results["discovery"][pair]
        assert found["num_clips"] == clips["num_labelled"]
        assert found["num_positive"] == clips["num_positive"]
        assert 0 <= found["roc_auc"] <= 1
    assert results["checkpoint"] == "refine"
    assert set(results["earlier"]) == {"align"}
    page = pathlib.Path(f"{workdir}/report/index.html").read_text()
    assert 'src="http' not in page
    assert "<audio controls" in page
    assert "SoundingActions" in page


def test_the_ends_of_phases_are_those_of_the_data_it_was_trained_on_and_the_tokens_its_own(finished, tmp_path, capsys):
    config, place = copy.deepcopy(finished[0]), shutil.copytree(finished[1], tmp_path / "run")
    path = place / "data.json"
    facts = json.loads(path.read_text())
    mesh = mesh_lib.make_mesh()
    assert list(evaluate._load_run(config, str(place), mesh)) == ["align", "refine"]
    path.write_text(json.dumps(facts | {"num_clips": 10 * facts["num_clips"]}))
    (name,) = evaluate._load_run(config, str(place), mesh)
    assert name.startswith("align, step ")
    path.write_text(json.dumps(facts))
    other = tmp_path / "vocabulary"
    shutil.copytree(config.data.tokenizer, other)
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    config.data.tokenizer = str(other)
    assert evaluate._find_tokenizer(config, str(place)) == f"{place}/tokenizer"
    assert f"{other} is not the tokenizer that the text tower of {place} has learned: that is in" in capsys.readouterr().err
    shutil.rmtree(place / "tokenizer")  # of a run of before
    assert evaluate._find_tokenizer(config, str(place)) == finished[0].data.tokenizer
    there = json.loads((place / "config.json").read_text())
    there["data"]["tokenizer"] = str(other)  # what was there once
    (place / "config.json").write_text(json.dumps(there))
    for named in (str(other), str(tmp_path / "absent")):
        config.data.tokenizer = named
        with pytest.raises(ValueError, match=f"tokenizer: {named}.* not the tokenizer that the text tower .* name that one"):
            evaluate.evaluate(config, str(place))
    config.checkpoint = str(place)
    with pytest.raises(ValueError, match="config.data.tokenizer: .*absent .*is not the tokenizer that the text tower of"):
        evaluate.evaluate(config, str(tmp_path / "elsewhere"))


def test_without_phases_the_towers_are_evaluated_as_they_start_and_not_trained(finished, data, tmp_path, capsys):
    config = world.small_config(data)
    config.phases = []
    config.data.num_samples, config.model.audio.num_time_frames = 16_000, 99  # cut out of 24,000, as in training
    # Two towers start at random, the third has learned another tokenizer than the one that is named.
    config.init.text, config.data.tokenizer = finished[1], str(shutil.copytree(data / "vocabulary", tmp_path / "other"))
    with (tmp_path / "other" / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    found = evaluate.evaluate(config, str(tmp_path / "untrained"))
    told = capsys.readouterr().err
    assert f"other is not the tokenizer that the text tower of {finished[1]} has learned" in told
    assert f"that is in {finished[1]}/tokenizer, which is taken" in told
    assert found["step"] == 0
    results = json.loads((tmp_path / "untrained" / "results.json").read_text())
    assert (results["checkpoint"], results["untrained"], results["num_seen"]) == ("untrained", ["audio", "video"], 0)
    with pytest.raises(ValueError, match="phases is empty: there is nothing to train"):
        run_lib.set_up(config, str(tmp_path / "run"))


@pytest.mark.slow  # evaluates twice
def test_what_a_run_has_seen_of_the_clips_and_never_of_texts_is_said_where_it_is_evaluated(finished, tmp_path, capsys):
    config, place = copy.deepcopy(finished[0]), tmp_path / "run"
    shutil.copytree(finished[1], place, ignore=shutil.ignore_patterns("tokenizer", "data.json"))
    for phase in config.phases:
        phase.pairs, phase.consensus_weight = ("av",), 0.0
    config.data.split = "train+test"
    (place / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    config.data.tokenizer = ""
    evaluate.evaluate(config, str(place))
    num = len(loader.open_split(config.data.dir, config.eval.split, 4))
    results, told = json.loads((place / "results.json").read_text()), capsys.readouterr().out
    assert (results["untrained"], results["num_seen"]) == (["text"], num)
    assert "no phase looks at text: what stands here of its pairs says nothing" in told
    assert f"warning: the run was trained on {num} of these clips" in told
    page = (place / "report" / "index.html").read_text()
    assert f"{num} of them were trained on; no phase looks at text, whose pairs say nothing" in page
    # The run's weights evaluated elsewhere are the run's; clips without a label are not measured, and so not counted.
    config.checkpoint, config.eval.split, config.data.split = str(place), "train+test", "train"
    digest = loader.open_split(config.data.dir, "train+test", 0).digest
    (place / "data.json").write_text(json.dumps({"data.dir": digest}))
    evaluate.evaluate(config, str(tmp_path / "elsewhere"))
    results = json.loads((tmp_path / "elsewhere" / "results.json").read_text())
    assert (results["untrained"], results["num_seen"]) == (["text"], num)
    assert results["discovery"]["av"]["num_clips"] == num


def test_measured_of_clips_that_all_sound_is_retrieval_alone():
    rng = np.random.default_rng(0)
    embeddings = {name: rng.normal(size=(40, 4)).astype(np.float32) for name in config_lib.MODALITIES}
    known = {"label": np.ones(40, np.int32), "verb_id": np.arange(40) % 2, "noun_id": np.zeros(40, np.int64)}
    known |= {name: rng.normal(size=40) for name in ("loudness", "onset_strength")}
    found = evaluate.measure(embeddings, known, np.arange(40), config_lib.EvalConfig(num_bootstrap=10))
    assert (found["discovery"], found["controls"], found["margin"]) == ({}, {}, None)
    assert found["retrieval"].keys() == {"v2a", "a2v", "l2a", "a2l"}
    assert found["instance_retrieval"]["v2l"]["pool_size"] == 40
    known_but_labels = known | {"label": np.full(40, -1)}
    unlabelled = evaluate.measure(embeddings, known_but_labels, np.arange(40), config_lib.EvalConfig(num_bootstrap=10))
    assert unlabelled == found | {"retrieval": {}}
    embeddings["video"][3:5, 1] = np.nan
    with pytest.raises(ValueError, match="the video embeddings of 2 of 40 clips are not finite: the weights are damaged"):
        evaluate.measure(embeddings, known, np.arange(40), config_lib.EvalConfig(num_bootstrap=10))
    embeddings["video"][3:5, 1] = 0
    known["label"][:12] = 0
    found = evaluate.measure(embeddings, known, np.arange(40), config_lib.EvalConfig(num_bootstrap=10))
    assert found["discovery"].keys() == {"av", "al", "vl"}
    of_videos = evaluate.measure(embeddings, known, np.arange(40) // 3, config_lib.EvalConfig(num_bootstrap=10))
    for pair in ("av", "al", "vl"):
        assert of_videos["discovery"][pair]["roc_auc"] == found["discovery"][pair]["roc_auc"]
        assert of_videos["discovery"][pair]["roc_auc_interval"] != found["discovery"][pair]["roc_auc_interval"]
    assert of_videos["margin"]["margin"] == found["margin"]["margin"]
    assert of_videos["margin"]["margin_interval"] != found["margin"]["margin_interval"]
    ahead = found["discovery"]["av"]["roc_auc"] - found["margin"]["best_control_roc_auc"]
    assert found["margin"]["margin"] == pytest.approx(ahead)


@pytest.mark.slow  # converts and evaluates
def test_clips_that_all_sound_are_evaluated(finished, data, tmp_path, capsys):
    with (data / "world" / "v2" / "annotations" / "sounding_labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row for row in rows if sum(int(row[name]) for name in row if name.startswith("vote_")) > 1)
    words = ("--root", data / "world", "--labels", tmp_path / "labels.csv", "--labels_only", "--labels_split", "test")
    done = world.run("data_prep.ego4d", *words, "--short_side", "72", "--out", tmp_path / "clips")
    assert done.returncode == 0, done.stderr
    config, place = copy.deepcopy(finished[0]), shutil.copytree(finished[1], tmp_path / "run")
    config.data.dir = str(tmp_path / "clips")
    found = evaluate.evaluate(config, str(place))
    assert (found["discovery"], found["controls"], found["margin"]) == ({}, {}, None)
    assert "all labelled clips sound: discovery is not measured" in capsys.readouterr().out
    page = (place / "report" / "index.html").read_text()
    assert "Not measured: all labelled clips sound." in page
    assert "ROC curves" not in page
    assert "Missed" in page
    assert "False alarms" not in page


@pytest.mark.slow  # embeds and shows the training clips
def test_clips_without_labels_are_evaluated(finished, tmp_path, capsys, monkeypatch):
    videos = []

    def measure(embeddings, known, own, config, real=evaluate.measure):
        videos.append(own)
        return real(embeddings, known, own, config)

    monkeypatch.setattr(evaluate, "measure", measure)
    config, place = copy.deepcopy(finished[0]), shutil.copytree(finished[1], tmp_path / "run")
    config.eval.split = "train"
    found = evaluate.evaluate(config, str(place))
    assert (found["discovery"], found["controls"], found["margin"], found["retrieval"]) == ({}, {}, None, {})
    pool = found["instance_retrieval"]["a2l"]["pool_size"]
    told, results = capsys.readouterr().out, json.loads((place / "results.json").read_text())
    assert re.search(r"refine: own clip V→A recall@5 0\.\d{3} \(chance 0\.\d{3}\)", told)
    assert "no clip is labelled: discovery is not measured" in told
    source = loader.open_split(config.data.dir, "train", 4)
    assert results["num_seen"] == pool == len(source)
    rows, trained = np.arange(pool), dataclasses.replace(config.data, folds=(1, 2))
    elsewhere = dataclasses.replace(config, checkpoint="run")
    assert evaluate_sounds.num_seen(elsewhere, source, rows, trained, {}) == 0  # folds that these data do not have
    with pytest.raises(ValueError, match="has no clip of the fold"):
        evaluate_sounds.num_seen(config, source, rows, trained, {})
    assert evaluate_sounds.num_seen(config, source, rows, config.data, {"data.dir": ""}) == 0
    uids = [source[i].video_uid for i in range(pool)]
    assert len(set(uids)) == len(set(zip(uids, videos[-1].tolist(), strict=True))) == videos[-1].max() + 1 > 1
    assert results["taxonomy"] == {"num_clips": 0, "num_sounding": 0, "verbs": [], "groups": []}
    _, known = embeddings_lib.load(place / embeddings_lib.FILE)
    assert known["label"].tolist() == [-1] * pool
    page = (place / "report" / "index.html").read_text()
    assert f"{pool} clips without labels" in page
    assert "Not measured: no clip is labelled." in page


def test_what_has_no_run_is_not_written_into_a_runs_workdir(finished):
    config = copy.deepcopy(finished[0])
    config.phases = []
    with pytest.raises(ValueError, match="holds a run: name another --workdir for what has none"):
        evaluate.evaluate(config, finished[1])


def _change_clips(config, tmp_path, **changes):
    """Has a config name a copy of its data whose `clips.json` says something else of some splits."""
    folder = tmp_path / "clips"
    shutil.copytree(config.data.dir, folder, dirs_exist_ok=True)
    info = json.loads((folder / "clips.json").read_text())
    for split, fields in changes.items():
        info["splits"][split] |= fields
    info.pop("sha256")
    (folder / "clips.json").write_text(records.manifest(info))
    config.data.dir = str(folder)


def _shards_gone(config, tmp_path):
    _change_clips(config, tmp_path, train={"shards": [], "num_clips": 0})


def test_what_can_not_be_measured_is_said_before_anything_is_computed(finished, tmp_path, monkeypatch):
    config, clips = copy.deepcopy(finished[0]), finished[0].data.dir
    monkeypatch.setattr(evaluate, "_load_run", lambda *_: pytest.fail("the parameters are read"))
    counts = {name: split.num_clips for name, split in records.ClipsInfo.load(clips).splits.items()}
    _change_clips(config, tmp_path, test={"num_positive": 0}, validation={"num_labelled": 3, "num_positive": 2})
    with pytest.raises(ValueError, match=r"has 0 clips labelled as sounding and \d+ as not: .*set --config.eval.split=val"):
        evaluate.evaluate(config, finished[1])
    config.data.dir = clips
    _change_clips(config, tmp_path, test={"num_positive": 0}, validation={"num_labelled": 3, "num_positive": 3})
    with pytest.raises(ValueError, match="nothing to measure without clips that sound; convert with labels of"):
        evaluate.evaluate(config, finished[1])
    empty = {"shards": [], "num_clips": 0, "num_labelled": 0, "num_positive": 0}
    config.data.dir = clips
    _change_clips(config, tmp_path, validation=empty)
    source = loader.open_split(config.data.dir, "train+validation+test", 4)
    assert len(source) == counts["train"] + counts["test"]
    assert source[len(source) - 1].clip_id == loader.open_split(clips, "test", 4)[counts["test"] - 1].clip_id
    config.eval.split = "validation"
    with pytest.raises(ValueError, match="has no clips in 'validation'") as raised:
        evaluate.evaluate(config, finished[1])
    told = f"(train {counts['train']}, validation 0, test {counts['test']}): set --config.eval.split=train, or convert with"
    assert f"{told} --splits CSV" in str(raised.value)
    with pytest.raises(ValueError, match=r"has no split 'dev', only \['test', 'train', 'validation'\]"):
        loader.open_split(config.data.dir, "train+dev", 4)
    with pytest.raises(ValueError, match=r"--config.data.split=train\+test\+train names a split twice, .*: name each once"):
        loader.open_split(config.data.dir, "train+test+train", 4)


def _cudnn(config, _):
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"


BAD = {
    "missing data folder": (lambda c, t: setattr(c.data, "dir", str(t / "absent")), "no data folder .*absent"),
    "empty shard list": (_shards_gone, r"no clips in 'train' \(train 0, .*, test \d+\): set --config.data.split=valid"),
    "another frame count": (
        lambda c, t: setattr(c.model.video, "num_frames", 2),
        "4 frame intervals .*num_frames is 2",
    ),
    "batch not divisible": (
        lambda c, t: setattr(c.data, "batch_size", 12),
        "batch_size = 12 is not divisible by the 8",
    ),
    "no GPU": (_cudnn, "model.attention = 'cudnn', but this is bfloat16 with heads 8 wide on cpu: .*set auto"),
    "no tokenizer": (lambda c, t: setattr(c.data, "tokenizer", str(t / "none")), "no tokenizer folder"),
    "vocabulary too large": (lambda c, t: setattr(c.model.text, "vocab_size", 50), "vocab_size is 50: raise it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_set_ups_are_refused_with_the_value_and_the_fix(case, data, tmp_path):
    config = world.small_config(data)
    change, message = BAD[case]
    change(config, tmp_path)
    with pytest.raises(ValueError, match=message):
        run_lib.set_up(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_workdir_of_a_different_run_is_refused_and_names_the_field(finished):
    config, workdir, _ = finished
    other = copy.deepcopy(config)
    other.phases[1].consensus.alpha_video = 0.25
    with pytest.raises(
        ValueError, match=r"different run: config.phases\[1\].consensus.alpha_video is 0.5 there and 0.25"
    ):
        run_lib.set_up(other, workdir)


def test_phases_that_cannot_keep_their_optimizer_are_refused_before_training(data, tmp_path):
    config = world.small_config(data)
    config.phases[1].trainable = ("audio",)
    with pytest.raises(ValueError, match="'refine' keeps the optimizer state"):
        run_lib.set_up(config, str(tmp_path / "run"))


def test_batches_larger_than_the_split_are_refused_and_clips_twice_in_a_batch_are_told(data, tmp_path, capsys):
    config = world.small_config(data)
    source = loader.open_split(config.data.dir, "train", 4)
    num_clips = len(source)
    config.data.batch_size = 8 * (num_clips // 8 + 1)
    with pytest.raises(ValueError, match=rf"batch_size = .* has {num_clips} clips, .* set it to {num_clips} at most"):
        run_lib.set_up(config, str(tmp_path / "run"))

    def warning(batch_size, **change):
        config.data.batch_size = batch_size
        phases = [dataclasses.replace(phase, epochs=3, **change) for phase in config.phases]
        run_lib._check_negatives(config, source, phases_lib.plan_phases(phases, num_clips, batch_size))
        return capsys.readouterr().err

    told = warning(num_clips // 2 + 1)
    assert re.match(r"warning: \d+ of \d+ steps go over .* hold clips twice, .*\(\d+ rows in all\)", told)
    assert not warning(num_clips // 10)  # too few to be told
    assert not warning(num_clips)  # an epoch a batch
    assert not warning(num_clips // 2 + 1, contrastive_weight=0.0)
    assert not warning(num_clips // 2 + 1, mask_same_text=True)
    assert told.endswith("makes it rarer and the phase's mask_same_text leaves them out\n")
    blind = warning(num_clips // 2 + 1, pairs=("av",), consensus_weight=0.0)  # may not compare what it does not look at
    assert blind.endswith("makes it rarer\n")


def test_resolved_config_is_saved_beside_the_checkpoints(finished):
    config, workdir, _ = finished
    assert json.loads(pathlib.Path(f"{workdir}/config.json").read_text()) == config_lib.to_dict(config)
