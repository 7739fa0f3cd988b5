"""Training of the shrunk demo: resumed equals uninterrupted, one device equals eight, bad set-ups are refused."""

import copy
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
from mc3_jax.data import loader, tokenizer, transforms
from mc3_jax.step_compiler import StepCompiler
from tests import world


def assert_equal_bits(left, right):
    leaves = zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True)
    for (path, a), b in leaves:
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "where",
    [
        "at the switch",
        pytest.param("before a damaged switch", marks=pytest.mark.slow),
        *(pytest.param(f"within {p}", marks=pytest.mark.large) for p in ("align", "refine")),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, tmp_path, monkeypatch, capsys, where):
    config, workdir, state = finished
    stops = [int(p.stop) for p in run_lib.set_up(config, workdir).phases]
    shutil.copytree(workdir, tmp_path / "run")
    folder = checkpoint.checkpoint_dir(str(tmp_path / "run"))
    kept = sorted(int(p.name) for p in folder.iterdir())
    step = {
        "within align": 3, "before a damaged switch": max(s for s in kept if s < stops[0]), "at the switch": stops[0],
        "within refine": stops[0] // 3 * 3 + 3,
    }[where]  # fmt: skip
    newest = stops[0] if "damaged" in where else step
    if newest != step:
        largest = max((p for p in (folder / str(newest)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
    assert step in kept
    for later in (s for s in kept if s > newest):
        shutil.rmtree(folder / str(later))
    events, first_state, begin = [], train._first_state, StepCompiler.begin
    monkeypatch.setattr(train, "_first_state", lambda run: events.append("restore") or first_state(run))
    monkeypatch.setattr(StepCompiler, "begin", lambda self, phase: events.append(phase.config.name) or begin(self, phase))
    config = copy.deepcopy(config)  # measuring the validation loss changes nothing
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
    times = [row["elapsed_s"] for row in rows]  # the second start continues the time of the first
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
    # The step of the newest checkpoint's phase is compiled before that is read; if it is damaged, once more in its turn.
    expected = {"within align": "align restore refine", "before a damaged switch": "refine restore align refine"}
    assert events == expected.get(where, "refine restore").split()
    if where == "at the switch":
        assert log[0] == "refine  compiling"
        assert re.fullmatch(rf"refine  compiled in [0-9.]+ s, to run from step {step} to {stops[1]}", log[1])


@pytest.mark.large  # test_survival and test_fits compare such meshes with one device for a small model
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
def test_a_preempted_run_saves_without_measuring_the_validation_loss_first(finished, tmp_path, monkeypatch):
    config = copy.deepcopy(finished[0])
    del config.phases[0]  # one phase compiles in half the time
    config.validation = config_lib.ValidationConfig(every_steps=1, split="validation+test", num_batches=1)
    monkeypatch.setattr(job_lib, "preempted", lambda asked: asked == 2)
    state = train.train(run_lib.set_up(config, str(tmp_path)))
    assert int(state.step) == checkpoint.steps_of(str(tmp_path))[-1] == 2
    rows = metric_writer.read_metrics(str(tmp_path))
    assert [(row["step"], "validation_loss" in row) for row in rows] == [(1, True), (2, False)]
    # It is measured after the last step, since no later start would do it.
    run = run_lib.set_up(config, str(tmp_path))
    monkeypatch.setattr(job_lib, "preempted", lambda asked: asked == run.phases[-1].stop - 2)
    assert int(train.train(run).step) == run.phases[-1].stop
    assert "validation_loss" in metric_writer.read_metrics(str(tmp_path))[-1]


@pytest.mark.slow
def test_a_run_resumed_on_another_mesh_reads_the_same_clips_in_the_same_rows(finished, tmp_path):
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
            for _ in range(2):  # the same clips each time
                found = measure.measure(phase, state.params)
                assert found["validation_loss"] == pytest.approx(float(expected), rel=1e-4)
                assert found["validation_consensus"] == pytest.approx(float(terms["consensus"]), rel=1e-3)
    assert [measure.is_due(step, 7) for step in (1, 7)] == [True, True]
    config.validation.every_steps = 4
    assert [measure.is_due(step, 7) for step in (3, 4, 7)] == [False, True, True]
    both = loader.open_split(config.data.dir, "train+test", 4)
    with pytest.raises(ValueError, match=rf"{len(both) - len(trained_on)} of the {len(source)} clips .* are trained on:"):
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


def test_a_run_is_resumed_on_moved_data_but_not_on_other_data(finished, tmp_path):
    config, workdir, _ = finished
    config, moved = copy.deepcopy(config), tmp_path / "vocabulary"
    shutil.copytree(config.data.tokenizer, moved)
    config.data.tokenizer = str(moved)
    run_lib.set_up(config, workdir)
    text = (moved / "tokenizer.json").read_text()
    (moved / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(ValueError, match="config.data.tokenizer names other data than the run in"):
        run_lib.set_up(config, workdir)


def test_time_attention_that_starts_without_a_gradient_is_told_of(finished, tmp_path, capsys):
    config, told = copy.deepcopy(finished[0]), "no file holds time attention, so it starts as config.model.video.time_init"
    config.model.video.time_init = "zeros"
    run_lib.set_up(config, str(tmp_path / "run"))
    assert told in capsys.readouterr().out
    assert told in run_lib._note_time_attention(config, {"video/encoder/norm/scale": np.ones(2)})[0]  # from an image model
    assert not run_lib._note_time_attention(config, {"video/encoder/block_0/time_attention/qkv/bias": np.ones(2)})
    for phase in config.phases:
        phase.trainable = ("audio", "text")
    assert not run_lib._note_time_attention(config, {})
    assert not run_lib._note_time_attention(finished[0], {})  # which starts it at random


def test_clips_shorter_than_what_the_audio_tower_hears_are_told(finished, capsys):
    config = copy.deepcopy(finished[0])
    run_lib._tell_of_padding(config, 24_000)
    assert not capsys.readouterr().err
    run_lib._tell_of_padding(config, 16_000)
    warning = capsys.readouterr().err
    assert "gives 1 s of sound, but config.model.audio.num_time_frames = 149 is for 1.5 s: the rest is padding" in warning
    assert "set it to 99, or" in warning


def test_a_run_keeps_a_copy_of_its_tokenizer_and_is_resumed_with_it_if_the_original_is_gone(finished, tmp_path):
    config, place = copy.deepcopy(finished[0]), shutil.copytree(finished[1], tmp_path / "run")
    learned = tokenizer.tokenizer_digest(config.data.tokenizer)
    assert tokenizer.tokenizer_digest(place / "tokenizer") == learned
    shutil.rmtree(place / "tokenizer")  # as in a run of an earlier version
    (place / "tokenizer.tmp").mkdir()  # left by a start that was killed
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


@pytest.mark.slow
def test_training_reads_clips_in_groups_of_clips_per_video(finished, monkeypatch, tmp_path):
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
        return np.stack([chosen, np.array(chosen)[order]])  # in the order of the batch, and of the clips

    first, second, other = epoch(0, seed=1), epoch(1, seed=1), epoch(0, seed=2)
    np.testing.assert_array_equal(epoch(0, seed=1), first)
    for choices in (second, other, np.roll(first, 1, axis=1)):
        assert (first == choices).all(axis=2).mean(axis=1).max() < 0.05  # 1 of 256 choices agrees by chance
    assert np.bincount(first[0].ravel(), minlength=16).min() > len(source) / 8


def _shards_gone(config, tmp_path):
    world.change_clips(config, tmp_path, train={"shards": [], "num_clips": 0})


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
    "no GPU": (_cudnn, "model.attention = 'cudnn' needs .* but this is bfloat16, 8 wide, on cpu: set auto"),
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


def test_clips_without_texts_are_refused_if_a_phase_uses_text(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loader.ClipSource, "has_texts", lambda source: False)
    config = world.small_config(data)
    with pytest.raises(ValueError, match=r"'train' of \S+ have no texts, which phases\[0\] and phases\[1\] of config use"):
        run_lib.set_up(config, str(tmp_path / "run"))
    for phase in config.phases:
        phase.pairs, phase.consensus_weight = ("av",), 0.0
    run_lib.set_up(config, str(tmp_path / "run"))


def test_clips_without_texts_are_no_validation_clips_if_a_phase_uses_text(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loader.ClipSource, "has_texts", lambda source: source.split == "train")
    config = world.small_config(data)
    config.validation.every_steps, config.validation.split = 2, "validation+test"
    with pytest.raises(ValueError, match="'validation.test' of .* have no texts, which a phase uses: choose others by val"):
        run_lib.set_up(config, str(tmp_path / "run"))


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


def test_batches_larger_than_the_split_are_refused_and_clips_twice_in_a_batch_are_reported(data, tmp_path, capsys):
    config = world.small_config(data)
    source = loader.open_split(config.data.dir, "train", 4)
    num_clips = len(source)
    config.data.batch_size = 8 * (num_clips // 8 + 1)
    with pytest.raises(ValueError, match=rf"batch_size = .* has {num_clips} clips, .* set it to at most {num_clips}"):
        run_lib.set_up(config, str(tmp_path / "run"))

    def warning(batch_size, **change):
        config.data.batch_size = batch_size
        phases = [dataclasses.replace(phase, epochs=3, **change) for phase in config.phases]
        run_lib._check_negatives(config, source, phases_lib.plan_phases(phases, num_clips, batch_size))
        return capsys.readouterr().err

    told = warning(num_clips // 2 + 1)
    assert re.match(r"warning: \d+ of \d+ batches span two epochs and hold clips twice, .*\(\d+ rows in all\)", told)
    assert not warning(num_clips // 10)  # too few to be reported
    assert not warning(num_clips)  # one batch per epoch
    assert not warning(num_clips // 2 + 1, contrastive_weight=0.0)
    assert not warning(num_clips // 2 + 1, mask_same_text=True)
    assert told.endswith("makes them rarer, and the phase's mask_same_text leaves them out of the negatives\n")
    blind = warning(num_clips // 2 + 1, pairs=("av",), consensus_weight=0.0)  # no texts that it could compare
    assert blind.endswith("makes them rarer\n")


def test_resolved_config_is_saved_beside_the_checkpoints(finished):
    config, workdir, _ = finished
    assert json.loads(pathlib.Path(f"{workdir}/config.json").read_text()) == config_lib.to_dict(config)
