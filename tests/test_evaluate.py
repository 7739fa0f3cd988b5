"""What evaluation measures, reports and refuses: for runs, for towers without a run, for clips with and without labels."""

import copy
import csv
import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from mc3_jax import (
    checkpoint,
    config as config_lib,
    convert,
    evaluate,
    job as job_lib,
    mesh as mesh_lib,
    run as run_lib,
    training_clips,
    weights,
    workdir as workdir_lib,
)
from mc3_jax.data import loader, records
from mc3_jax.evals import embeddings as embeddings_lib, retrieval
from tests import world


@pytest.fixture(scope="module")
def evaluated(finished) -> str:
    """The workdir of the finished run, after evaluation."""
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
    if not results["retrieval"]:  # in the small world no verb and noun has three clips
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


def test_phases_end_as_for_the_data_of_training_and_texts_get_the_runs_own_tokenizer(finished, tmp_path, capsys):
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
    assert f"{other} is not the tokenizer that the text tower of {place} was trained with: that" in capsys.readouterr().err
    shutil.rmtree(place / "tokenizer")  # as in a run of an earlier version
    assert evaluate._find_tokenizer(config, str(place)) == finished[0].data.tokenizer
    there = json.loads((place / "config.json").read_text())
    there["data"]["tokenizer"] = str(other)  # as if it were overwritten since
    (place / "config.json").write_text(json.dumps(there))
    for named in (str(other), str(tmp_path / "absent")):
        config.data.tokenizer = named
        with pytest.raises(ValueError, match=f"tokenizer: {named}.* not the tokenizer that the text tower .* name that one"):
            evaluate.evaluate(config, str(place))
    config.checkpoint = str(place)
    with pytest.raises(ValueError, match="config.data.tokenizer: .*absent .*is not the tokenizer that the text tower of"):
        evaluate.evaluate(config, str(tmp_path / "elsewhere"))


def test_the_checkpoints_that_process_0_sees_are_evaluated_by_every_process(tmp_path, monkeypatch):
    config = world.small_config(tmp_path)
    monkeypatch.setattr(workdir_lib, "trained_on", lambda workdir: {"num_clips": 64})  # phases end at steps 4 and 8
    monkeypatch.setattr(job_lib, "list_from_process_0", lambda steps: [4, 8])  # this process sees none
    monkeypatch.setattr(checkpoint, "restore_newest_params", lambda *_: (8, {}))
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_: {})
    loaded = evaluate._load_run(config, str(tmp_path), mesh_lib.make_mesh())
    assert [(name, step) for name, (step, _) in loaded.items()] == [("align", 4), ("refine", 8)]


def test_that_the_clips_have_no_texts_is_told(finished, tmp_path, monkeypatch, capsys):
    config, workdir, _ = finished
    monkeypatch.setattr(loader.ClipSource, "has_texts", lambda source: False)
    evaluate.evaluate(config, str(shutil.copytree(workdir, tmp_path / "run")))
    told = "the clips have no texts: similarities with text mean nothing"
    assert told in capsys.readouterr().out.splitlines()
    assert told in (tmp_path / "run" / "report" / "index.html").read_text()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["has_texts"] is False


def test_without_phases_the_towers_are_evaluated_as_they_start_and_not_trained(finished, data, tmp_path, capsys):
    config = world.small_config(data)
    config.phases = []
    config.data.num_samples, config.model.audio.num_time_frames = 16_000, 99  # crops of the 24,000, as in training
    # Two towers are initialised at random; the third was trained with another tokenizer than the config names.
    config.init.text, config.data.tokenizer = finished[1], str(shutil.copytree(data / "vocabulary", tmp_path / "other"))
    with (tmp_path / "other" / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    found = evaluate.evaluate(config, str(tmp_path / "untrained"))
    told = capsys.readouterr().err
    assert f"other is not the tokenizer that the text tower of {finished[1]} was trained with" in told
    assert f"that one is in {finished[1]}/tokenizer: using that one" in told
    assert found["step"] == 0
    results = json.loads((tmp_path / "untrained" / "results.json").read_text())
    assert (results["checkpoint"], results["untrained"], results["num_seen"]) == ("untrained", ["audio", "video"], 0)
    assert results["has_texts"] is True
    with pytest.raises(ValueError, match="phases is empty: there is nothing to train"):
        run_lib.set_up(config, str(tmp_path / "run"))


def test_evaluation_of_a_folder_names_the_towers_that_were_never_trained(without_video, finished, tmp_path, capsys):
    folder, out = tmp_path / "folder", tmp_path / "out"
    convert.main(["export", without_video, "--to", "folder", "--out", str(folder)])
    evaluate.evaluate(dataclasses.replace(finished[0], checkpoint=str(folder)), str(out))
    assert json.loads((out / "results.json").read_text())["untrained"] == ["video"]
    assert "no phase uses video, whose similarities mean nothing" in capsys.readouterr().out


@pytest.mark.slow  # evaluates twice
def test_evaluation_says_how_many_clips_the_run_was_trained_on_and_that_it_never_saw_texts(finished, tmp_path, capsys):
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
    assert "no phase uses text, whose similarities mean nothing" in told
    assert f"warning: the run was trained on {num} of these clips" in told
    page = (place / "report" / "index.html").read_text()
    assert f"{num} of them were trained on; no phase uses text, whose similarities mean nothing" in page
    # In another workdir the run's weights still count as the run's. Clips without a label are not measured, so not counted.
    config.checkpoint, config.eval.split, config.data.split = str(place), "train+test", "train"
    digest = loader.open_split(config.data.dir, "train+test", 0).digest
    (place / "data.json").write_text(json.dumps({"data.dir": digest}))
    evaluate.evaluate(config, str(tmp_path / "elsewhere"))
    results = json.loads((tmp_path / "elsewhere" / "results.json").read_text())
    assert (results["untrained"], results["num_seen"]) == (["text"], num)
    assert results["discovery"]["av"]["num_clips"] == num


def test_clips_that_all_sound_are_measured_by_retrieval_alone():
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
    assert re.search(r"refine: instance V→A recall@5 0\.\d{3} \(chance 0\.\d{3}\)", told)
    assert "no clip is labelled: discovery is not measured" in told
    source = loader.open_split(config.data.dir, "train", 4)
    assert results["num_seen"] == pool == len(source)
    rows, trained = np.arange(pool), dataclasses.replace(config.data, folds=(1, 2))
    elsewhere = dataclasses.replace(config, checkpoint="run")
    assert training_clips.count_seen(elsewhere, source, rows, trained, {}) == 0  # these data have no folds
    with pytest.raises(ValueError, match="has no clips of the fold"):
        training_clips.count_seen(config, source, rows, trained, {})
    assert training_clips.count_seen(config, source, rows, config.data, {"data.dir": ""}) == 0
    uids = [source[i].video_uid for i in range(pool)]
    assert len(set(uids)) == len(set(zip(uids, videos[-1].tolist(), strict=True))) == videos[-1].max() + 1 > 1
    assert results["taxonomy"] == {"num_clips": 0, "num_sounding": 0, "verbs": [], "groups": []}
    _, known = embeddings_lib.load(place / embeddings_lib.FILE)
    assert known["label"].tolist() == [-1] * pool
    page = (place / "report" / "index.html").read_text()
    assert f"{pool} clips without labels" in page
    assert "Not measured: no clip is labelled." in page


TRAINED = (
    "--config.model.audio.num_time_frames=199",
    "--config.model.video.resize_px=256",
    "--config.model.text.num_tokens=77",
    "--config.data.num_samples=32000",
)


def test_the_weights_of_a_run_or_folder_are_evaluated_with_the_sizes_that_it_records(tmp_path, monkeypatch, capsys):
    trained, config = config_lib.Config(), config_lib.Config(name="theirs")
    trained.model.audio.num_time_frames, trained.model.video.resize_px, trained.model.text.num_tokens = 199, 256, 77
    trained.data.num_samples, trained.model.num_classes, trained.model.remat = 32_000, 3, "full"
    run, folder, given = tmp_path / "run", tmp_path / "folder", ["checkpoint"]
    (run / "checkpoints" / "7").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config_lib.to_dict(trained)))
    weights.write_folder(str(folder), {}, trained.model)
    evaluated = []
    monkeypatch.setattr(evaluate, "evaluate", lambda config, workdir: evaluated.append(config))
    monkeypatch.setattr(evaluate.cli, "overridden", lambda: given)
    monkeypatch.setattr(evaluate.job_lib, "initialize", lambda *_: None)

    def settings(path) -> tuple:
        """Evaluates `path` and returns the settings that this is done with."""
        evaluate.main(dataclasses.replace(config, checkpoint=str(path)), "results")
        made = evaluated.pop()
        assert (made.name, made.phases, made.model.remat, made.model.num_classes) == ("theirs", config.phases, "none", 0)
        model = made.model
        return model.audio.num_time_frames, model.video.resize_px, model.text.num_tokens, made.data.num_samples

    assert settings(run) == (199, 256, 77, 32_000)
    assert capsys.readouterr().out == f"{run} records {' '.join(TRAINED)}; evaluation uses these settings\n"
    assert settings(folder) == (199, 256, 77, 0)
    assert capsys.readouterr().out == f"{folder} records {' '.join(TRAINED[:3])}; evaluation uses these settings\n"
    weights.write_folder(str(folder), {}, trained.model, {"num_samples": 32_000})
    assert settings(folder) == (199, 256, 77, 32_000)
    assert capsys.readouterr().out == f"{folder} records {' '.join(TRAINED)}; evaluation uses these settings\n"
    given += ["model.text.num_tokens", "data.num_samples"]  # as if given on the command line
    assert settings(run) == (199, 256, 30, 0)
    config.model.text.num_tokens = 600
    with pytest.raises(SystemExit):
        settings(run)
    assert "config.model.text.num_tokens = 600: must be at most num_positions = 512" in capsys.readouterr().err
    assert settings(tmp_path / "theirs.pth") == (149, 224, 600, 0)
    assert capsys.readouterr().out == ""


def test_results_without_a_run_are_not_written_into_a_runs_workdir(finished):
    config = copy.deepcopy(finished[0])
    config.phases = []
    with pytest.raises(ValueError, match="holds a run: to evaluate other weights, name another --workdir"):
        evaluate.evaluate(config, finished[1])


def test_what_can_not_be_measured_is_said_before_anything_is_computed(finished, tmp_path, monkeypatch, capsys):
    config, clips = copy.deepcopy(finished[0]), finished[0].data.dir
    monkeypatch.setattr(evaluate, "_load_run", lambda *_: pytest.fail("the parameters are read"))
    counts = {name: split.num_clips for name, split in records.ClipsInfo.load(clips).splits.items()}
    world.change_clips(config, tmp_path, test={"num_positive": 0}, validation={"num_labelled": 3, "num_positive": 2})
    with pytest.raises(ValueError, match=r"has 0 clips labelled as sounding and \d+ as not: .*set --config.eval.split=val"):
        evaluate.evaluate(config, finished[1])
    config.data.dir = clips
    world.change_clips(config, tmp_path, test={"num_positive": 0}, validation={"num_labelled": 3, "num_positive": 3})
    with pytest.raises(ValueError, match="nothing to measure without clips that sound; convert with labels of"):
        evaluate.evaluate(config, finished[1])
    empty = {"shards": [], "num_clips": 0, "num_labelled": 0, "num_positive": 0}
    config.data.dir = clips
    world.change_clips(config, tmp_path, validation=empty)
    source = loader.open_split(config.data.dir, "train+validation+test", 4)
    assert len(source) == counts["train"] + counts["test"]
    assert source[len(source) - 1].clip_id == loader.open_split(clips, "test", 4)[counts["test"] - 1].clip_id
    config.model.audio.num_time_frames = 99
    with pytest.raises(ValueError, match="gives 1.5 s of sound, but the model's window is 1 s: convert again with --window"):
        evaluate._check_window(config, source)
    config.model.audio.num_time_frames = 147
    with pytest.raises(ValueError, match="convert again"):
        evaluate._check_window(config, source)
    config.model.audio.num_time_frames = 148  # all frames of 24,000 samples fit
    evaluate._check_window(config, source)
    config.model.audio.num_time_frames = 199
    evaluate._check_window(config, source)
    told = "gives 1.5 s of sound, but the model's window is 2 s: the rest of its spectrogram is padding, AudioSet's mean"
    assert told in capsys.readouterr().err
    config.model.audio.num_time_frames = 149
    evaluate._check_window(config, source)
    assert capsys.readouterr().err == ""
    config.eval.split = "validation"
    with pytest.raises(ValueError, match="has no clips in 'validation'") as raised:
        evaluate.evaluate(config, finished[1])
    told = f"(train {counts['train']}, validation 0, test {counts['test']}): set --config.eval.split=train, or convert with"
    assert f"{told} --splits CSV" in str(raised.value)
    with pytest.raises(ValueError, match=r"has no split 'dev', only \['test', 'train', 'validation'\]"):
        loader.open_split(config.data.dir, "train+dev", 4)
    with pytest.raises(ValueError, match=r"--config.data.split=train\+test\+train names a split twice, .*: name each once"):
        loader.open_split(config.data.dir, "train+test+train", 4)
