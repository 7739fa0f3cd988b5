"""Evaluation gives the same embeddings, every clip once and one report with any number of devices, processes, workers."""

import copy
import json
import os
import shutil

import numpy as np
import pytest

from mc3_jax import evaluate_sounds, run as run_lib, train
from mc3_jax.evals import embeddings as embeddings_lib
from tests import test_sounds, test_survival
from tests.test_sounds import clips  # noqa: F401  a fixture

pytestmark = pytest.mark.slow  # several processes


def evaluate_in(arguments, folder, num_processes: int, num_devices: int) -> list[str]:
    """Evaluates by the command line in one or two processes with `num_devices` devices each; returns their logs."""
    if num_processes == 2:
        job = test_survival.run_together(arguments, folder, num_devices=num_devices)
        assert [status for status, _ in job] == [0, 0], job
        return [log for _, log in job]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={num_devices}")
    process, log = test_survival.launch(arguments, folder, {"XLA_FLAGS": flags})
    assert process.wait(test_survival.LIMIT_S) == 0, log.read_text()
    return [log.read_text()]


def test_results_do_not_depend_on_devices_processes_and_workers(finished, tmp_path):
    config, workdir = copy.deepcopy(finished[0]), finished[1]
    config.eval.batch_size = 40
    config.phases[0].epochs = 9  # has no effect: evaluation takes the run's
    config_file = test_survival.write_config(tmp_path, config)
    found = []
    for num_processes, num_devices, num_workers in ((1, 1, 0), (2, 4, 1)):  # 0 workers: threads
        place = tmp_path / f"{num_processes}-{num_devices}"
        shutil.copytree(workdir, place)
        shutil.rmtree(place / "report", ignore_errors=True)
        words = ["-m", "mc3_jax.evaluate", f"--config={config_file}", f"--workdir={place}",
                 f"--config.data.num_workers={num_workers}"]  # fmt: skip
        logs = evaluate_in(words, tmp_path, num_processes, num_devices)
        assert sum("results.json" in log for log in logs) == 1  # only one process writes and prints
        assert f"{place} was trained with --config.phases[0].epochs=1.0; evaluation uses these settings\n" in logs[0]
        assert (place / "report" / "index.html").is_file()
        found.append((embeddings_lib.load(place / embeddings_lib.FILE), json.loads((place / "results.json").read_text())))
    (embeddings, known), results = found[0]
    assert known["index"].tolist() == sorted(set(known["index"].tolist()))
    assert len(known["index"]) % 40  # the last batch is a partial one
    for (others, here), result in found[1:]:
        assert "clip_id" in known
        for name, value in known.items():
            np.testing.assert_array_equal(here[name], value)
        for name, value in embeddings.items():
            np.testing.assert_allclose(others[name], value, atol=2e-6)
        for pair in ("av", "al"):
            ours, theirs = results["discovery"][pair], result["discovery"][pair]
            assert theirs["num_clips"] == ours["num_clips"] == len(known["index"])
            assert theirs["roc_auc"] == pytest.approx(ours["roc_auc"], abs=1e-3)  # two clips may swap ranks
        assert result["taxonomy"] == results["taxonomy"]


@pytest.mark.large
def test_scores_of_sounds_do_not_depend_on_devices_and_processes(clips, tmp_path):  # noqa: F811
    config, workdir = test_sounds.small_config(clips, "scratch"), tmp_path / "run"
    config.phases[0].epochs = 2
    train.train(run_lib.set_up(config, str(workdir)))
    wanted = evaluate_sounds.evaluate(config, str(workdir))
    scores = dict(np.load(workdir / "scores.npz"))
    config_file = test_survival.write_config(tmp_path, config)
    words = ["-m", "mc3_jax.evaluate", f"--config={config_file}", f"--workdir={workdir}"]
    evaluate_in(words, tmp_path, 2, 4)
    again = np.load(workdir / "scores.npz")
    np.testing.assert_array_equal(again["class_id"], scores["class_id"])
    np.testing.assert_allclose(again["probabilities"], scores["probabilities"], atol=1e-5)
    found = json.loads((workdir / "results.json").read_text())
    assert found["num_clips"] == wanted["num_clips"] == 24
    assert found["last"]["mAP"] == pytest.approx(wanted["last"]["mAP"], abs=0.02)


