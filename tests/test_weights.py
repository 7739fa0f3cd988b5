"""Towers from files: training starts from exactly what is read, and evaluation evaluates it."""

import copy
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mc3_jax import (
    checkpoint,
    config as config_lib,
    convert,
    evaluate,
    model as model_lib,
    run as run_lib,
    train,
    weights,
    workdir as workdir_lib,
)
from tests import world


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """Path of the finished run as a foreign `.pth`."""
    path = tmp_path_factory.mktemp("exported") / "theirs.pth"
    convert.main(["export", finished[1], "--to", "pth", "--out", str(path)])
    return str(path)


def first_params(config, workdir):
    """Returns the flat parameters that a run starts from."""
    run = run_lib.set_up(config, str(workdir))
    with jax.set_mesh(run.mesh):
        return {n: np.asarray(v) for n, v in checkpoint.flatten(train._first_state(run)[1].params).items()}


@pytest.mark.slow  # starts runs
def test_a_run_starts_from_the_files_its_config_names_and_at_random_elsewhere(finished, exported, tmp_path, capsys):
    config, workdir, state = finished
    trained = {name: np.asarray(value) for name, value in checkpoint.flatten(state.params).items()}
    fresh = first_params(config, tmp_path / "fresh")
    started = copy.deepcopy(config)
    started.init.audio, started.init.video = exported, workdir  # a foreign file, and a run
    params = first_params(started, tmp_path / "started")
    for name, value in params.items():
        expected = fresh if name.startswith("text/") else trained
        assert value.tobytes() == expected[name].tobytes(), name
    assert f"audio from {exported}" in capsys.readouterr().out
    assert any((fresh[name] != trained[name]).any() for name in fresh)


@pytest.mark.slow
def test_a_resumed_run_does_not_need_the_files_it_started_from(finished, exported, tmp_path):
    config = copy.deepcopy(finished[0])
    shutil.copy(exported, tmp_path / "gone.pth")
    config.init.text = str(tmp_path / "gone.pth")
    config.phases = config.phases[:1]
    config.phases[0].epochs = 0.5
    state = train.train(run_lib.set_up(config, str(tmp_path / "run")))
    (tmp_path / "gone.pth").unlink()
    again = train.train(run_lib.set_up(config, str(tmp_path / "run")))
    assert int(again.step) == int(state.step)
    with pytest.raises(ValueError, match="gone.pth is not a file"):
        run_lib.set_up(config, str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_resumed_run_has_the_init_it_began_with_and_says_so_if_another_is_given(finished, tmp_path, capsys):
    place, config = shutil.copytree(finished[1], tmp_path / "run"), copy.deepcopy(finished[0])
    assert run_lib.set_up(config, str(place)).config == finished[0]
    assert "config.init has no effect" not in capsys.readouterr().err
    config.init.audio = "gone.pth"
    assert run_lib.set_up(config, str(place)).config == finished[0]  # which starts.jsonl records
    told = "config.init has no effect, since the run resumes from a checkpoint; it began with --config.init.audio=''\n"
    assert told in capsys.readouterr().err


@pytest.mark.slow  # initialises towers
def test_a_run_whose_checkpoints_are_all_damaged_begins_again_from_its_own_init(finished, exported, tmp_path, monkeypatch):
    place, config = shutil.copytree(finished[1], tmp_path / "run"), copy.deepcopy(finished[0])
    config.init.audio = exported
    (place / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    config.init.audio = "gone.pth"
    monkeypatch.setattr(checkpoint, "restore_newest", lambda *_: (0, None))
    params, theirs = first_params(config, place), weights.read_run(finished[1])[1]
    tower = [name for name in params if name.startswith("audio/")]
    assert all(np.array_equal(params[name], theirs[name]) for name in tower)


def test_a_file_is_evaluated_without_a_run_and_as_the_run_it_came_from(finished, exported, tmp_path):
    config, workdir, _ = finished
    of_run = evaluate.evaluate(config, workdir)
    other = dataclasses.replace(config, checkpoint=exported, phases=finished[0].phases[:1])
    of_file = evaluate.evaluate(other, str(tmp_path / "results"))
    assert of_file["discovery"] == of_run["discovery"]
    assert of_file["retrieval"] == of_run["retrieval"]
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["checkpoint"] == "theirs.pth"
    assert results["earlier"] == {}
    assert (tmp_path / "results" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_evaluating_a_file_needs_no_workdir_on_the_command_line(exported, data, tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        f"import pathlib, sys\nsys.path.insert(0, {str(world.ROOT)!r})\nfrom tests import world\n\ndef get_config():\n"
        f"    config = world.small_config(pathlib.Path({str(data)!r}))\n    config.name = 'theirs'\n    return config\n"
    )
    done = world.run("mc3_jax.evaluate", f"--config={path}", f"--config.checkpoint={exported}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pathlib.Path(tmp_path / "runs" / "theirs" / "results.json").is_file()


def test_training_refuses_evaluations_field(finished, exported, tmp_path):
    with pytest.raises(ValueError, match=r"config.checkpoint is for evaluation only: .* config.init"):
        run_lib.set_up(dataclasses.replace(finished[0], checkpoint=exported), str(tmp_path / "run"))


def test_a_file_is_not_evaluated_over_a_runs_results(finished, exported):
    config, workdir, _ = finished
    with pytest.raises(ValueError, match="holds a run: to evaluate other weights, name another --workdir"):
        evaluate.evaluate(dataclasses.replace(config, checkpoint=exported), workdir)


def test_a_run_from_before_a_field_existed_is_resumed_and_one_with_an_unknown_field_is_not(finished, tmp_path):
    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    del saved["init"], saved["checkpoint"], saved["phases"][0]["optimizer"]["clip_norm"]
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"config.phases\[0\].optimizer.clip_norm is 0.0 there and 1.0 here"):
        workdir_lib.check_workdir(str(tmp_path / "run"), config)
    saved["phases"][0]["optimizer"]["clip_norm"] = 1
    path.write_text(json.dumps(saved))
    workdir_lib.check_workdir(str(tmp_path / "run"), config)
    path.write_text(json.dumps({**saved, "gravity": 9.8}))
    with pytest.raises(ValueError, match="gravity is unknown"):
        workdir_lib.check_workdir(str(tmp_path / "run"), config)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config.json must be a JSON object, got \[\]"):
        workdir_lib.check_workdir(str(tmp_path / "run"), config)


def test_towers_of_a_run_are_fitted_to_other_sizes_like_foreign_ones(finished):
    config, workdir, _ = finished
    sizes = copy.deepcopy(config.model)
    sizes.video.num_positions, sizes.video.image_size_px, sizes.video.resize_px = 6, 60, 60
    sizes.audio.num_time_frames, sizes.embed_dim = 200, 12
    params, notes = weights.read_towers(dict.fromkeys(("audio", "video", "text"), workdir), sizes)
    said = " ".join(notes)
    for words in ("from 4 to 6", "4x4 interpolated to 5x5", "4x9 cut or stretched to 4x12", "head of 8 outputs is skipped"):
        assert words in said
    # A grid of 36 positions has four rows here, but could have three or six: the run's config says how many.
    wider = copy.deepcopy(config.model)
    wider.audio.stride_px = 20
    rows, columns = model_lib.make_model(wider).audio_tower.grid
    assert rows == 3
    _, notes = weights.read_towers({"audio": workdir}, wider)
    assert f"4x9 cut or stretched to 3x{columns}" in notes[0]
    full = weights.complete(params, sizes, seed=0)
    assert {n: v.shape for n, v in full.items()} == {n: s.shape for n, s in weights.param_shapes(sizes).items()}


def test_a_file_that_lacks_something_is_not_evaluated_with_random_weights(finished, exported, tmp_path):
    import torch

    content = torch.load(exported, weights_only=True)
    del content["state_dict"]["module.vid_proj.0.weight"], content["state_dict"]["module.vid_proj.0.bias"]
    torch.save(content, tmp_path / "headless.pth")
    config = dataclasses.replace(finished[0], checkpoint=str(tmp_path / "headless.pth"))
    with pytest.raises(ValueError, match=r"headless.pth doesn't fit the model .*- video/projection/bias"):
        evaluate.evaluate(config, str(tmp_path / "results"))


def test_params_of_a_run_of_another_model_are_listed_not_passed_over(finished):
    config = copy.deepcopy(finished[0].model)
    config.embed_dim = 6
    with pytest.raises(ValueError, match=r"audio tower, doesn't fit .*! projection/bias \[8\], the model needs \[6\]"):
        weights.read_checkpoint(finished[1], config)
