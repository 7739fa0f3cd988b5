"""The benchmarks that run the project's commands: what they choose, what they skip, and what their tables say."""

import dataclasses
import importlib
import json
import sys
import time
import types

import jax
import numpy as np
import pytest

from benchmarks import checkpoint, runs, search_by, sounds, supplementary, table_pages, tables, timed_process
from mc3_jax import phases as phases_lib, validation
from mc3_jax.data import records
from mc3_jax.evals import comparison, embeddings as embeddings_lib, metrics, suite_report
from tests import world

RNG = np.random.default_rng(0)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def values(flags: list[str]) -> dict[str, str]:
    return dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)


@pytest.fixture
def fake_runs(monkeypatch):
    """Replaces runs by a score that is computed from their flags; returns (workdir, flags) of every run, in order."""
    done = []

    def run(suite, config, workdir, flags, *, trains=True):
        done.append((workdir, flags))
        numbers = {name: value for name, value in values(flags).items() if value[0].isdigit()}
        at = {name.split("].")[1]: float(value) for name, value in numbers.items() if "]." in name}
        score = 0.9 - abs(at.get("temperature", 0.1) - 0.1) - at.get("consensus_weight", 0) / 100
        score -= at["optimizer.learning_rate"] if at else 0
        area = {pair: {"roc_auc": score, "average_precision": score} for pair in ("av", "al")}
        return {"discovery": area, "seconds": 1.0}

    monkeypatch.setattr(runs, "run", run)
    return done


def test_the_sweep_is_at_most_thirty_runs_on_validation_and_takes_the_best_of_each_axis(fake_runs, tmp_path):
    suite = runs.Suite("soundworld", tmp_path, ())
    found = tables.sweep(suite, list(tables.ROWS), lambda line: None)
    assert len(fake_runs) == 28 <= 30
    assert len({workdir for workdir, _ in fake_runs}) == 28
    for _, flags in fake_runs:
        assert "--config.eval.split=validation" in flags
        epochs = [float(value) for name, value in values(flags).items() if name.endswith("epochs")]
        assert sum(epochs) == pytest.approx(9 / 2)
    assert found["mc3"]["chosen"] == {"temperature": 0.1, "consensus_weight": 1.0, "learning_rate": 0.5}
    assert found["clap"]["chosen"] == {"learning_rate": 0.5}
    assert found["without_contrastive"] == {"chosen": found["mc3"]["chosen"], "trials": [], "like": "mc3"}
    of = found["without_consensus"]["chosen"]
    assert found["cmc"] == {"chosen": of, "trials": [], "like": "without_consensus"}
    assert "random" not in found
    assert json.loads((tmp_path / "sweep.json").read_text()) == found


def test_every_row_runs_once_per_seed_on_the_test_split_with_the_chosen_settings(fake_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(table_pages, "write", lambda *args: "")
    monkeypatch.setattr(runs, "make_world", lambda out: ())
    tables.main(["--out", str(tmp_path), "--seeds", "3,4"])
    final = fake_runs[28:]
    assert [str(workdir.relative_to(tmp_path / "runs")) for workdir, _ in final] == [
        f"{row.file}/seed-{seed}" for seed in (3, 4) for row in tables.ROWS
    ]
    for workdir, flags in final:
        assert not any("eval.split" in flag or "epochs" in flag for flag in flags)
        assert f"--config.seed={workdir.name.removeprefix('seed-')}" in flags
    rows = {workdir.parent.name: values(flags) for workdir, flags in final}
    assert rows["mc3"]["phases[0].temperature"] == rows["mc3"]["phases[1].temperature"] == "0.1"
    assert "phases[1].temperature" not in rows["image_bind"]  # its scale of 20 is part of the method
    assert not any("temperature" in name for name in rows["clap"])  # it is learned


@pytest.mark.parametrize("row", tables.ROWS, ids=lambda row: row.file)
@pytest.mark.parametrize("suite", ["soundworld", "ego4d"])
def test_settings_name_fields_the_row_has(row, suite):
    config = tables.base_config(suite, row)
    setting = {axis: choices[-1] for axis, choices in tables.AXES.items()}
    for name, value in values(tables.overrides(config, row, setting, 0.5)).items():
        *path, last = name.replace("[", ".").replace("]", "").split(".")
        holder = config
        for part in path:
            holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
        assert isinstance(getattr(holder, last), (int, float))
        setattr(holder, last, float(value))
    validation.validate(config)


def test_a_trial_that_diverges_scores_0_and_any_other_failure_ends_the_sweep(tmp_path, monkeypatch):
    row = next(row for row in tables.ROWS if row.file == "clap")

    def run(suite, config, workdir, flags, *, trains=True):
        if "learning_rate-1" in workdir.name:
            raise runs.DivergedError(["train"], 2, "log")
        return {"discovery": {"al": {"roc_auc": 0.6}}}

    monkeypatch.setattr(runs, "run", run)
    suite = runs.Suite("soundworld", tmp_path, ())
    chosen, trials = tables.sweep_row(suite, row, lambda line: None)
    assert chosen == {"learning_rate": 0.5}
    assert [trial["score"] for trial in trials] == [0.0, 0.6]

    def fail(*args, **kwargs):
        raise runs.RunError(["train"], 75, "log")

    monkeypatch.setattr(runs, "run", fail)
    with pytest.raises(runs.RunError):
        tables.sweep_row(suite, row, lambda line: None)


def test_a_run_that_is_done_is_skipped_and_one_with_other_flags_is_refused(tmp_path, monkeypatch):
    called, read = [], []

    def call(command, log):
        called.append(command[2])
        read.append(command[-1])
        if command[2] == "mc3_jax.evaluate":
            (tmp_path / "run" / "results.json").write_text('{"split": "test"}')

    monkeypatch.setattr(runs, "call", call)
    suite = runs.Suite("soundworld", tmp_path, (f"--config.data.dir={tmp_path}/clips",))
    workers = "--config.data.num_workers=16"
    for reading in ((workers,), ()):  # how clips are read does not identify a run
        with_workers = dataclasses.replace(suite, reading=reading)
        results = runs.run(with_workers, "configs/tables/mc3.py", tmp_path / "run", ["--config.seed=1"])
        assert results["split"] == "test"
        assert {runs.OWN_CLIPS, "--config.seed=1", "--config=configs/tables/mc3.py:soundworld"} < set(results["words"])
    assert called == ["mc3_jax.train", "mc3_jax.evaluate"]
    assert read == [workers, workers]
    assert workers not in results["words"]
    other_clips = runs.Suite("soundworld", tmp_path, ("--config.data.dir=elsewhere",))
    for other, config, flag, said in (
        (suite, "mc3", "--config.seed=2", "--config.seed=1, --config.seed=2"),
        (other_clips, "mc3", "--config.seed=1", "--config.data.dir=./clips, --config.data.dir=elsewhere"),
        (suite, "cmc", "--config.seed=1", "--config=configs/tables/cmc.py:soundworld"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with other options .*{said}"):
            runs.run(other, f"configs/tables/{config}.py", tmp_path / "run", [flag])
    assert len(called) == 2
    (tmp_path / "run" / runs.TOOK).write_text("{")
    with pytest.raises(ValueError, match="took.json is damaged .*: remove .*run and run again"):
        runs.run(suite, "configs/tables/mc3.py", tmp_path / "run", ["--config.seed=1"])


def test_seconds_are_those_of_all_starts_and_a_diverged_run_is_not_started_again(tmp_path, monkeypatch):
    suite, ends = runs.Suite("soundworld", tmp_path, ()), [75, 0, 0, 2]

    def call(command, log):
        time.sleep(0.2)
        if status := ends.pop(0):
            if status == 2:
                (tmp_path / "b" / "diverged-7.json").touch()
            raise runs.RunError(command, status, log.name, "error: its last line")
        (tmp_path / "a" / "results.json").write_text("{}")

    monkeypatch.setattr(runs, "call", call)
    with pytest.raises(runs.RunError, match="status 75"):
        runs.run(suite, "configs/tables/mc3.py", tmp_path / "a", [])
    assert runs.run(suite, "configs/tables/mc3.py", tmp_path / "a", [])["seconds"] >= 0.6
    for said in ("which ends with: error: its last line", "status 2; see"):
        with pytest.raises(runs.DivergedError, match=said):
            runs.run(suite, "configs/tables/mc3.py", tmp_path / "b", [])
    assert not ends


def test_a_row_that_diverges_is_left_out_and_the_others_are_run(tmp_path, monkeypatch, capsys):
    began = []

    def run(suite, config, workdir, flags, *, trains=True):
        began.append(workdir.name)
        if "without_contrastive" in config:
            raise runs.DivergedError(["train"], 2, "log")
        return {"discovery": {pair: {"roc_auc": 0.6} for pair in ("av", "al")}}

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "make_world", lambda out: ())
    monkeypatch.setattr(table_pages, "write", lambda *args: "")
    tables.main(["--out", str(tmp_path), "--seeds", "0,1"])
    assert "w/o contrastive, seed 1, diverged and is left out" in capsys.readouterr().out
    assert began[-9:] == ["seed-1"] * 9
    tables.main(["--out", str(tmp_path), "--seeds", "0", "--rows", "clap"])
    assert set(json.loads((tmp_path / "sweep.json").read_text())) == {row.file for row in tables.ROWS} - {"random"}


def test_other_clips_than_the_worlds_need_their_tokenizer(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main(["--out", str(tmp_path), "--clips", "elsewhere"])
    error = capsys.readouterr().err
    assert "--clips elsewhere: the demo's vocabulary does not fit other clips: give their --tokenizer too" in error


def make_clips(folder, **labels: tuple[int, int]) -> None:
    """Writes the `clips.json` of a data set; `labels`: split → (number of positive clips, number of labelled clips)."""
    splits = {}
    for name in records.SPLITS:
        positive, labelled = labels.get(name, (0, 0))
        splits[name] = records.SplitInfo(num_clips=9, num_labelled=labelled, num_positive=positive, shards=[])
    folder.mkdir()
    records.ClipsInfo(
        name="made_up", window_s=(0.5, 1.0), num_intervals=4, num_candidates=1, short_side_px=72, canvas_px=(72, 96),
        num_samples=24_000, verbs=[], nouns=[], splits=splits,
    ).dump(folder)  # fmt: skip


def ended(command, capsys, *words: str) -> str:
    """Returns the line with which a command ends on standard error, with status 2."""
    with pytest.raises(SystemExit, match="2"):
        command.main(list(words))
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_clips_without_labels_of_both_kinds_are_refused_before_anything_is_trained(fake_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table_pages, "write", lambda *args: "")
    make_clips(tmp_path / "both", validation=(2, 5), test=(3, 5))
    make_clips(tmp_path / "validation", validation=(2, 5), test=(5, 5))
    make_clips(tmp_path / "neither")
    for command, clips, split, positive, others in (
        (tables, "validation", "test", 5, "validation and test"),
        (tables, "neither", "validation", 0, "validation and test"),
        (supplementary, "neither", "validation", 0, "validation"),
    ):
        given = ["--suite=ego4d", f"--out={tmp_path}/out", f"--clips={tmp_path}/{clips}"]
        given += ["--axes=inverse"] if command is supplementary else []
        line = ended(command, capsys, *given)
        said = f"{clips} has {positive} clips labelled as sounding and 0 as not: nothing to measure without both"
        assert line.startswith(f"error: split '{split}' of ")
        assert said in line
        assert line.endswith(f"convert with --labels, of both kinds for {others}")
    assert "no data folder /nowhere" in ended(tables, capsys, "--suite=ego4d", f"--out={tmp_path}/out", "--clips=/nowhere")
    assert "gs://b/c is in a bucket" in ended(tables, capsys, "--suite=ego4d", f"--out={tmp_path}/out", "--clips=gs://b/c")
    monkeypatch.setattr(runs, "ROOT", tmp_path)  # the folder in which commands run
    assert f"no data folder {tmp_path}/data/ego4d_clips" in ended(tables, capsys, "--suite=ego4d", f"--out={tmp_path}/out")
    assert not fake_runs
    tables.main(["--suite=ego4d", f"--out={tmp_path}/out", "--clips=both", "--rows=clap", "--seeds=0"])
    supplementary.main(["--suite=ego4d", f"--out={tmp_path}/out", "--clips=validation", "--axes=inverse"])
    assert len(fake_runs) == 2 + 1 + 3


@pytest.mark.parametrize("command", [tables, supplementary])
def test_only_overrides_of_how_clips_are_read_may_follow_the_double_dash(command, tmp_path, monkeypatch, capsys):
    suites = []

    def run(suite, config, workdir, flags, *, trains=True):
        suites.append(suite)
        raise runs.RunError(["train"], 2, "log")

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "make_world", lambda out: ())
    reading = [f"--config.data.{name}=16" for name in ("num_workers", "num_threads", "prefetch")]
    ended(command, capsys, f"--out={tmp_path}", "--", *reading)
    assert [suite.reading for suite in suites] == [tuple(reading)]
    for word in ("--config.data.batch_size=8", "--config.data.num_workers", "--config.data.num_workers=a", "16"):
        line = ended(command, capsys, f"--out={tmp_path}", "--", reading[0], word)
        fix = "only --config.data.{num_threads,num_workers,prefetch}=N can"
        assert line.startswith(f"error: '{word}' can't follow --: {fix}")
    assert len(suites) == 1


@pytest.mark.parametrize("command", [tables, supplementary])
def test_copies_that_slurm_has_started_are_refused_and_one_process_of_a_larger_job_is_not(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runs, "make_world", lambda out: ())
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of the whole job
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    line = ended(command, capsys, f"--out={tmp_path}/out")
    assert line.startswith("error: SLURM_STEP_NUM_TASKS is 8: that many copies would make the same runs in one folder;")
    assert "start one process" in line
    for tasks in ("1", None):
        monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
        if tasks:
            monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
        assert runs.make_suite("soundworld", tmp_path, None, None, []).name == "soundworld"


def test_a_command_that_fails_names_itself_and_its_log(tmp_path):
    (tmp_path / "log").write_text("error: of an earlier start\n")
    for line, said in (
        ("", "$"),
        ("error: \x1b[31mno labels\n\n", r", which ends with: error: \\x1b\[31mno labels$"),
    ):
        command = ["sh", "-c", 'printf "%s" "$1"; exit 2', "sh", f"on its way\n{line}" if line else ""]
        with (tmp_path / "log").open("a") as log, pytest.raises(runs.RunError, match=f"ended with status 2; see .*log{said}"):
            runs.call(command, log)


def discovered(scores: np.ndarray, labels: np.ndarray) -> dict:
    return {
        "roc_auc": metrics.roc_auc(labels, scores), "average_precision": metrics.average_precision(labels, scores),
        "pr_auc_trapezoid": metrics.pr_auc_trapezoid(labels, scores), "within_verb_roc_auc": 0.5,
    }  # fmt: skip


@pytest.fixture
def suite_folder(tmp_path):
    """A suite with two seeds of MC3 and of CMC and one of CLAP; MC3 tells sounding clips from silent ones better than CMC."""
    n, out = 400, tmp_path / "suite"
    labels = RNG.integers(0, 2, n)
    known = {"index": np.arange(n), "label": labels, "verb_id": RNG.integers(0, 9, n), "noun_id": RNG.integers(0, 9, n),
             "loudness": RNG.standard_normal(n), "onset_strength": RNG.standard_normal(n),
             "clip_id": np.arange(n).astype(str), "video_uid": (np.arange(n) // 4).astype(str)}  # fmt: skip
    for file, hears, seeds in (("mc3", 2.0, (0, 1)), ("cmc", 0.7, (0, 1)), ("clap", 0.7, (0,))):
        for seed in seeds:
            workdir = out / "runs" / file / f"seed-{seed}"
            workdir.mkdir(parents=True)
            audio = unit(RNG.standard_normal((n, 8)))
            noise = {name: RNG.standard_normal((n, 8)) for name in ("video", "text")}
            towers = {name: unit(audio * (hears * labels)[:, None] + x) for name, x in noise.items()}
            embeddings_lib.save(workdir / embeddings_lib.FILE, {"audio": audio, **towers}, known)
            pairs = {"av": np.sum(audio * towers["video"], 1), "al": np.sum(audio * towers["text"], 1)}
            hits = {f"{name}@{k}": 0.1 for name in ("hit", "mean_hits") for k in (5, 10)}
            results = {
                "discovery": {pair: discovered(score, labels) for pair, score in pairs.items()}, "data": "made up",
                "split": "test", "retrieval": {d: {**hits, "chance": hits} for d in suite_report.DIRECTION_TITLES},
            }  # fmt: skip
            (workdir / "results.json").write_text(json.dumps(results))
            took = {"seconds": 8.0 + seed, "words": [], "done": True}
            (workdir / runs.TOOK).write_text(json.dumps(took))
    return out


ROWS = [("clap", "CLAP", ("al",)), ("cmc", "CMC", ("av", "al")), ("mc3", "MC3", ("av", "al")), ("random", "Random", ("av",))]


def test_tables_hold_means_deviations_the_papers_numbers_and_the_lead(suite_folder):
    text = table_pages.write(suite_folder, ROWS, [0, 1])
    content = json.loads((suite_folder / "tables.json").read_text())
    assert set(content["rows"]) == {"CLAP", "CMC", "MC3"}  # Random was not run
    two = [json.loads((suite_folder / f"runs/mc3/seed-{i}/results.json").read_text()) for i in (0, 1)]
    areas = [run["discovery"]["av"]["roc_auc"] for run in two]
    assert content["rows"]["MC3"]["av_roc_auc"] == pytest.approx([np.mean(areas), np.std(areas, ddof=1)])
    lead = content["leads"]["av"]["CMC"]["roc_auc"]
    other = content["rows"]["CMC"]["av_roc_auc"][0]
    assert lead["lead"] == pytest.approx(np.mean(areas) - other)
    assert 0 < lead["interval"][0] < lead["lead"] < lead["interval"][1]
    assert "CLAP" not in content["leads"]["av"]
    assert content["interval_over"] == "videos"
    assert "in brackets: 95 % interval over videos" in text
    assert "| 0.598 |" in next(line for line in text.splitlines() if line.startswith("| MC3"))
    assert "± nan" not in text
    for curves in content["pr_curves"].values():
        for curve in curves.values():
            assert np.all(np.diff(curve["precision"]) <= 1e-12)


def test_rows_of_other_clips_are_refused(suite_folder):
    path = suite_folder / "runs" / "cmc" / "seed-0" / embeddings_lib.FILE
    embeddings, known = embeddings_lib.load(path)
    embeddings_lib.save(path, embeddings, known | {"index": known["index"] + 1})
    with pytest.raises(ValueError, match="cmc/seed-0 was evaluated on other clips|mc3/seed-0 was evaluated on other clips"):
        table_pages.write(suite_folder, ROWS, [0, 1])
    with pytest.raises(ValueError, match="holds no run that is done"):
        table_pages.write(suite_folder / "nowhere", ROWS, [0])


def test_the_paired_interval_is_narrower_than_that_of_two_samples():
    n = 600
    labels = RNG.integers(0, 2, n)
    common = labels + RNG.standard_normal(n) * 2
    ours, theirs = common + 0.2 * labels, common + 0.05 * RNG.standard_normal(n)
    options, videos = {"num_bootstrap": 500, "seed": 0}, np.arange(n)
    found = comparison.lead(ours[None], theirs[None], labels, videos, metrics.roc_auc, **options)
    low, high = found["interval"]
    assert found["lead"] == pytest.approx(metrics.roc_auc(labels, ours) - metrics.roc_auc(labels, theirs))
    assert 0 < low < found["lead"] < high
    alone = metrics.bootstrap_interval(lambda w: metrics.roc_auc(labels, ours, w), videos, 500, 0)
    assert high - low < (alone[1] - alone[0]) / 3
    same = comparison.lead(ours[None], ours[None], labels, videos, metrics.roc_auc, **options)
    assert (same["lead"], same["interval"]) == (0.0, [0.0, 0.0])


def test_the_lead_in_a_region_is_that_over_its_own_negatives():
    n = 900
    regions = np.array(["I", "II", "III"])[np.arange(n) % 3]
    labels = (regions == "I").astype(int)
    noise = RNG.standard_normal((2, n))
    scores = {"ours": noise + 3 * (regions != "II"), "theirs": noise + 3 * (regions != "III")}
    inside = {name: regions == name for name in ("II", "III", "IV")}
    one_verb, videos = np.zeros(n, int), np.arange(n)
    found = comparison.leads(scores, "ours", labels, one_verb, videos, inside, num_bootstrap=200, seed=0)["theirs"]
    assert found["roc_auc_region_II"]["lead"] > 0.3
    assert found["roc_auc_region_III"]["lead"] < -0.3
    assert "roc_auc_region_IV" not in found  # it has no clip


def test_a_weight_within_groups_counts_as_that_many_copies():
    n = 200
    labels, scores, groups = RNG.integers(0, 2, n), RNG.standard_normal(n), RNG.integers(0, 7, n)
    weights = RNG.integers(0, 3, (4, n))
    means, used = metrics.within_group_roc_auc(labels, scores, groups, weights)
    for row, mean, size in zip(weights, means, used, strict=True):
        copies = np.repeat(np.arange(n), row)
        alone, num = metrics.within_group_roc_auc(labels[copies], scores[copies], groups[copies])
        assert (mean, size) == (pytest.approx(alone), num)


@pytest.mark.parametrize("damage", [lambda b: b[:-50], lambda b: b"PK" + b[9:], lambda b: b""])
def test_damaged_embeddings_are_one_line(tmp_path, damage):
    path = tmp_path / embeddings_lib.FILE
    embeddings = {name: unit(RNG.standard_normal((5, 4))) for name in embeddings_lib.TOWERS}
    known = {name: np.arange(5) for name in embeddings_lib.NUMBERS}
    ids = {name: np.array(["a", "of another length", "\u00e9", "", name], object) for name in embeddings_lib.NAMES}
    embeddings_lib.save(path, embeddings, known | ids)
    loaded = embeddings_lib.load(path)[1]
    assert loaded["label"].tolist() == [0, 1, 2, 3, 4]
    for name in embeddings_lib.NAMES:
        assert loaded[name].tolist() == ["a", "of another length", "\u00e9", "", name]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="embeddings.npz can't be read.*evaluate the run again"):
        embeddings_lib.load(path)
    with path.open("wb") as file:
        np.savez(file, **embeddings, **known)  # as earlier versions did: without names
    assert set(embeddings_lib.load(path)[1]) == set(embeddings_lib.NUMBERS)
    with path.open("wb") as file:
        np.savez(file, **embeddings, **known | {"label": np.arange(4)})
    with pytest.raises(ValueError, match="arrays whose shapes don't match"):
        embeddings_lib.load(path)
    with path.open("wb") as file:
        np.savez(file, **embeddings, **known | {"label": np.array([None] * 5, object)}, allow_pickle=True)
    with pytest.raises(ValueError, match="can't be read"):
        embeddings_lib.load(path)


def test_every_axis_of_the_supplementary_shares_the_run_that_changes_nothing(fake_runs, tmp_path):
    suite = runs.Suite("soundworld", tmp_path, ())
    axes = [axis for axis in supplementary.AXES if axis != "duration_s"]
    found = supplementary.run_axes(suite, axes, 0, lambda line: None)
    names = [workdir.parent.name for workdir, _ in fake_runs]
    assert names.count("base") == len(axes)
    others = [name for name in names if name != "base"]
    assert len(others) == len(set(others)) == sum(len(supplementary.AXES[axis]) - 1 for axis in axes)
    assert all("--config.eval.split=validation" in flags for _, flags in fake_runs)
    assert set(found) == set(axes)
    assert supplementary.render(found).count("\n") == 2 + len(fake_runs)


def test_refines_share_moves_the_switch_and_not_the_learning_rate():
    row = next(row for row in tables.ROWS if row.file == "mc3")
    rates = []
    for share in ("suite's", "0.5", "0.67", "0.9"):
        config = tables.base_config("soundworld", row)
        if share != "suite's":
            for name, value in values(supplementary.share_flags(config, float(share))).items():
                phase = config.phases[int(name[7])]
                holder = phase.optimizer if "optimizer" in name else phase
                setattr(holder, name.split(".")[-1], float(value))
        validation.validate(config)
        phases = phases_lib.plan_phases(config.phases, 900 * config.data.batch_size, config.data.batch_size)
        assert phases[1].stop == 8100
        if share != "suite's":
            assert phases[1].stop - phases[1].start == pytest.approx(8100 * float(share), abs=1)
        rates.append(np.concatenate([
            np.asarray(jax.vmap(phases_lib.learning_rate(p))(np.arange(p.start, p.stop))) for p in phases
        ]))  # fmt: skip
    for others in rates[1:]:
        np.testing.assert_allclose(others, rates[0], atol=2e-3 * rates[0].max())
    with pytest.raises(ValueError, match="refine_share 0.2: the suite's is 0.33, and it can't be less"):
        supplementary.share_flags(tables.base_config("soundworld", row), 0.2)


def test_each_fold_is_held_out_once(monkeypatch, tmp_path):
    seen = []

    def run(suite, config, workdir, flags, *, trains=True):
        mode = workdir.parent.name
        assert suite.name == mode.replace("untrained", "probe")
        assert any("init.audio" in flag for flag in flags) == (mode in ("probe", "finetune"))
        seen.append((mode, *(values(flags)[f"{part}.folds"] for part in ("data", "eval"))))
        top1 = {"untrained": 45.0, "probe": 50.0, "finetune": 80.0, "scratch": 70.0}[mode]
        return {name: {"top1": top1, "mAP": 0.5} for name in ("last", "best")} | {"seconds": 1.0}

    monkeypatch.setattr(runs, "run", run)
    found = sounds.run_folds(tmp_path, tmp_path, "init", 10, 0, lambda line: None)
    for mode in sounds.MODES:
        held_out = [(data, fold) for name, data, fold in seen if name == mode]
        assert [fold for _, fold in held_out] == [f"({i},)" for i in sounds.FOLDS]
        assert all(fold.strip("(,)") not in data for data, fold in held_out)
    assert "scratch, last epoch: +10.0 points (+10.0, +10.0, +10.0, +10.0, +10.0)" in sounds.render(found, 10)
    assert "untrained, last epoch: +5.0 points (+5.0, +5.0, +5.0, +5.0, +5.0)" in sounds.render(found, 10)


def test_steps_are_timed_with_the_memory_settings_of_the_makefile_and_one_arena():
    makefile = (world.ROOT / "Makefile").read_text().replace("$\\\n\t", "")
    (kept,) = timed_process.KEEP_MEMORY.values()
    assert f"KEEP_MEMORY = GLIBC_TUNABLES={kept.removesuffix(':glibc.malloc.arena_max=1')}\n" in makefile


def test_malloc_keeps_memory_only_where_there_is_no_gpu(tmp_path):
    assert timed_process.settings(tmp_path).keys() == {"GLIBC_TUNABLES", "XLA_PYTHON_CLIENT_PREALLOCATE"}
    (tmp_path / "nvidia0").touch()
    assert timed_process.settings(tmp_path).keys() == {"XLA_PYTHON_CLIENT_PREALLOCATE"}


def test_a_text_is_compared_with_sound_pictures_and_both_and_its_own_clip_is_no_hit():
    # Clips 0 to 3 sound and have the same verb and noun, clip 4 sounds and has another verb. Clip 5 has the first verb and
    # noun but is silent; clips 6 to 11 have no label.
    known = {
        "label": np.array([1, 1, 1, 1, 1, 0] + [-1] * 6),
        "verb_id": np.array([0, 0, 0, 0, 1, 0] + [-1] * 6),
        "noun_id": np.zeros(12, int),
    }
    sounds = np.eye(12)[[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]
    pictures = np.eye(12)[[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]
    embeddings = {"audio": sounds, "video": pictures, "text": np.tile(np.eye(12)[0], (12, 1))}
    found, num_queries = search_by.precision(embeddings, known)
    assert num_queries == 4  # clips 0 to 3
    assert found["audio"] == pytest.approx(3 / 5)  # each query finds the three others first
    assert found["video"] == 0
    assert found["chance"] == pytest.approx(3 / 11)
    with pytest.raises(ValueError, match="no clip that sounds has 2 others"):
        search_by.precision(embeddings, known | {"label": np.zeros(12, int)})


@pytest.mark.parametrize(("on_disk_s", "status"), [(29.9, 0), (30.1, 1)])
def test_a_slow_save_is_in_the_results_as_missed(on_disk_s, status, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.jax.config, "update", lambda *setting: None)  # the number of devices is fixed by now
    monkeypatch.setattr(checkpoint, "make_state", lambda mesh: ({"x": np.zeros(2**18, np.float32)}, None))
    monkeypatch.setattr(checkpoint, "measure_ours", lambda *of: {"blocked": 1.0, "on disk": on_disk_s, "restore": 2.0})
    monkeypatch.setattr(checkpoint, "measure_orbax", lambda *of: {"blocked": 0.5, "on disk": 99.0, "restore": 2.0})
    monkeypatch.setattr(checkpoint.mesh_lib, "make_mesh", lambda fsdp: None)
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "--repeats=1", f"--results={tmp_path}/r.md"])
    with pytest.raises(SystemExit) as end:
        checkpoint.main()
    assert end.value.code == status
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("\n## A save of the paper's run\n\n`")
    assert "python -m benchmarks.checkpoint --repeats=1`" in text
    assert f"| 1 | ours | 1.0 | {on_disk_s} | 2.0 |\n| 1 | Orbax alone | 0.5 | 99.0 | 2.0 |" in text
    assert ("Missed: a save is on disk after 30.1 s, wanted 30." in text) == bool(status)


@pytest.fixture
def extraction(tmp_path, monkeypatch):
    """Returns a function (measure, words) → (status, results) of `benchmarks.clip_extraction` with `measure` in its place."""
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", types.SimpleNamespace(get_ffmpeg_version=lambda: "n9.0.2"))
    clip_extraction = importlib.import_module("benchmarks.clip_extraction")
    monkeypatch.setattr(clip_extraction, "make_base", lambda path, seed: None)
    monkeypatch.setattr(clip_extraction, "lengthen", lambda base, path, seconds: path.write_bytes(bytes(600_000)))

    def run(measure, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(clip_extraction, measure.__name__, measure)
        with pytest.raises(SystemExit) as end:
            clip_extraction.main([*words, f"--results={tmp_path}/r.md"])
        return end.value.code, (tmp_path / "r.md").read_text()

    return run


@pytest.mark.parametrize(("slower", "status"), [(4.0, 0), (1.9, 1)])
def test_clips_per_second_are_in_the_results(slower, status, extraction):
    def measure(path, gap_s, rounds, peers, seconds):
        rates = {"ours": 12.0, "input seek": 12.0 / slower, "output seek": 0.1}
        return {name: {"clips": 5, "clips_per_cpu_s": rates[name], "clips_per_wall_s": 1.0, "jpeg_bytes": 18_792.4,
                       "luma_step": 11.5} for name in ("ours", *peers)}  # fmt: skip

    found, text = extraction(measure, "--minutes=0.1", "--gaps", "2.7")
    assert found == status
    assert "\n6 s of video at 0.80 Mbit/s; libavcodec " in text
    assert ", ffmpeg n9.0.2." in text
    goal = "at least 2"
    assert f"| 2.7 | input seek | 5 | {12 / slower:.3g} | 1 | {slower:.3g} | 18,792 | 11.5 | {goal} |" in text
    assert ("Missed: 1.90 times input seek at 2.7 s, wanted 2." in text) == bool(status)


@pytest.mark.parametrize(("peak_mb", "status"), [(600.0, 0), (601.0, 1)])
def test_the_memory_of_a_child_is_in_the_results(peak_mb, status, extraction):
    def memory(path, seconds, gap_s):
        return [{"at_s": 9.0, "clips": 1234, "resident_mb": 150.0, "peak_mb": peak_mb}]

    found, text = extraction(memory, "--hours=0.001")
    assert found == status
    assert f"| 1,234 | 9 | 150 | {peak_mb:.0f} |" in text
    assert ("Missed: 601 MiB, wanted 600." in text) == bool(status)
