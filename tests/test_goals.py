"""What the benchmarks of speed call met and missed, and whether they would notice what they are for."""

import math

import pytest

from benchmarks import devices_agree, paper_step
from mc3_jax.models import attention, video


def make_small(*, make=paper_step.make_config, **sizes):
    """Returns `paper_step.make_config` with towers of width 32."""
    config = make(**sizes)
    config.model.audio.stride_px, config.model.video.image_size_px, config.model.text.vocab_size = 16, 48, 2000
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.width, tower.num_heads = 32, 2
    config.model.text.mlp_width = 64
    return config


def backwards(query, key, value, class_key, class_value):
    """Attends by the keys of the frames in backward order."""
    return attention.attend_few(query, key[:, ::-1], value, class_key, class_value)


@pytest.mark.parametrize(
    ("attend", "status"), [(backwards, 1), pytest.param(attention.attend_few, 0, marks=pytest.mark.slow)]
)
def test_a_fault_in_the_gpus_time_attention_is_reported(monkeypatch, tmp_path, attend, status):
    monkeypatch.setattr(paper_step, "make_config", make_small)
    monkeypatch.setattr(devices_agree, "MOST", {devices_agree.GPU_FORM: 1e-3})  # the others take as long to compile
    monkeypatch.setitem(video._FORMS["cudnn"][1], "time", attend)
    results = tmp_path / "results.md"
    monkeypatch.setattr("sys.argv", ["devices_agree.py", "--batch=4", "--depth=1", f"--results={results}"])
    with pytest.raises(SystemExit, match=str(status)):
        devices_agree.main()
    missed = results.read_text().partition("Missed: ")[2]
    assert ("gradient, video in float32, the GPU's attention: " in missed) == bool(status)


def test_the_benchmarks_step_starts_with_time_attention_that_has_an_effect():
    assert paper_step.make_config(batch=2, depth=2, dtype="float32").model.video.time_init == "random"


NAN = math.nan


@pytest.mark.parametrize(
    ("numbers", "missed"),
    [
        ({}, []),
        ({"bfloat16": 0.06, "float32": 1e-3, devices_agree.GPU_FORM: 1e-3}, []),
        ({"bfloat16": 0.061}, ["loss in bfloat16: 6.1e-02"]),
        ({"float32": 1.1e-3}, ["loss in float32: 1.1e-03"]),
        ({devices_agree.GPU_FORM: 0.06}, ["loss in float32, the GPU's attention: 6.0e-02"]),
        ({"float32": NAN, "bfloat16": 0.0}, ["loss in float32: nan"]),
    ],
)
def test_devices_agree_up_to_the_limits(numbers, missed):
    assert devices_agree.judge({("loss", way): error for way, error in numbers.items()}) == missed
