"""Metrics: rows survive a crash and a resume, and a terminal shows a bar with loss terms and the time left."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mc3_jax import metric_writer
from tests import world

BAR = """
import time
from mc3_jax import metric_writer
options = dict(total_steps=4, start_step=0, batch_size=16, tensorboard=False)
with metric_writer.MetricWriter({folder!r}, **options) as writer:
    for step in range(1, 5):
        writer.write(step, "refine", dict(loss=2.5, contrastive=2.25, consensus=0.25, clips_per_s=64))
        writer.advance(step, "refine")
        time.sleep(0.12)
"""


def write(folder, start_step, steps, tensorboard=False):
    options = dict(total_steps=10, batch_size=4, tensorboard=tensorboard)
    with metric_writer.MetricWriter(str(folder), start_step=start_step, **options) as writer:
        for step in steps:
            writer.write(step, "align", {"loss": float(step)})


def test_rows_of_repeated_steps_are_replaced_and_an_incomplete_line_is_dropped(tmp_path):
    write(tmp_path, 0, [2, 4, 6])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')
    write(tmp_path, 4, [6, 8])
    rows = metric_writer.read_metrics(str(tmp_path))
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows


def test_a_clock_that_was_set_back_since_the_first_start_does_not_shorten_the_run(tmp_path):
    metric_writer.note_start(str(tmp_path), 0, {}, -3600.0)  # an hour from now
    assert metric_writer.note_start(str(tmp_path), 0, {}, 5.0) == 5.0
    row = {"step": 2, "elapsed_s": 70.0, "goodput": 0.9}
    (tmp_path / metric_writer.METRICS_FILE).write_text(json.dumps(row) + "\n")
    assert metric_writer.note_start(str(tmp_path), 2, {}, 5.0) == 75.0


@pytest.mark.parametrize("spoilt", [b"\xff\xfe{", b'{"stes": 2}', b"7", b"null", b"[" * 100_000, b'{"step": "9"}'])
def test_a_damaged_line_costs_only_that_line(tmp_path, spoilt):
    write(tmp_path, 0, [2, 4])
    metric_writer.note_start(str(tmp_path), 0, {}, 0.0)
    for name in (metric_writer.METRICS_FILE, metric_writer.STARTS_FILE):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(spoilt + b"\n" + kept)
    write(tmp_path, 4, [6])
    assert [row["step"] for row in metric_writer.read_metrics(str(tmp_path))] == [2, 4, 6]
    assert 5 <= metric_writer.note_start(str(tmp_path), 4, {}, 5.0) < 60


def test_tensorboard_files_hold_the_scalars(tmp_path):
    write(tmp_path, 0, [2, 4], tensorboard=True)
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, values = path.read_bytes(), {}
    while content:  # TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        values |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        content = content[16 + length :]
    assert values == {(2, "loss"): 2.0, (4, "loss"): 4.0}


def test_a_terminal_that_does_not_know_its_size_shows_the_bar_with_terms_rate_and_time_left(tmp_path):
    ours, theirs = pty.openpty()  # a new one is 0 columns wide
    code = BAR.format(folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
    assert child.wait() == 0
    os.close(ours)
    for words in (b"refine", b"loss=2.500", b"contrastive=2.250", b"consensus=0.250", b"clip/s", b"100%", b"/64"):
        assert words in shown, shown
    assert b"<00:00" in shown


FULL_DISK = """
import os, sys, time
from mc3_jax import metric_writer
folder = sys.argv[1]
options = dict(total_steps=4, start_step=0, batch_size=16, tensorboard=True)
scalars = {f"term_{i}": 1.0 for i in range(30)}
with metric_writer.MetricWriter(folder, **options) as writer:
    writer.write(1, "refine", scalars)
    with open(folder + "/filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(512))
        except OSError:
            pass
    writer._jsonl = open(os.devnull, "ab", buffering=0)  # its short rows may still fit
    for step in range(2, 400):
        if not sys.argv[2:]:
            writer.write(step, "refine", scalars)
    raise RuntimeError("the first error")
"""


@pytest.mark.parametrize("first", [[], ["the first error"]])
def test_a_full_disk_neither_hangs_a_run_nor_hides_what_ended_it(small_disk, first):
    words = [sys.executable, "-c", FULL_DISK, str(small_disk), *first]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=world.ROOT, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert (last == "RuntimeError: the first error") if first else ("tensorboard" in last and "OSError" in last), done.stderr


def test_a_full_disk_names_the_file_and_costs_no_row(small_disk):
    rows = [np.arange(100) + 1000 * step for step in range(500)]

    def write_all():
        with metric_writer.ClipWriter(str(small_disk), start_step=0, active=True) as clips:
            for step, row in enumerate(rows, 1):
                clips.write(step, row)

    with pytest.raises(OSError, match=r"No space left on device: '.*clips.jsonl'"):
        write_all()
    known = metric_writer.read_clips(str(small_disk))
    done = len(known)
    assert done > 200
    assert [row["step"] for row in known] == list(range(1, done + 1))
    assert all(row["clips"] == kept.tolist() for row, kept in zip(known, rows, strict=False))
    with pytest.raises(OSError, match="No space left on device"):  # started again while the disk is full
        metric_writer.ClipWriter(str(small_disk), start_step=done, active=True)
    assert metric_writer.read_clips(str(small_disk)) == known


def test_a_log_line_has_the_time_the_progress_the_rate_and_the_time_left(tmp_path, capsys):
    options = {"total_steps": 1804, "batch_size": 256, "num_clips": 46_000, "tensorboard": False}
    row = {"loss": 19.8841, "contrastive": 9.5, "learning_rate": 3e-5, "grad_norm": 2.4131, "clips_per_s": 639.2}
    with metric_writer.MetricWriter(str(tmp_path), start_step=0, **options) as writer:
        writer.write(200, "align", row | {"mfu": 0.3123})
        writer.write(1804, "refine", {"loss": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    assert [line[16:] for line in lines] == [
        "align  step 200/1804  epoch 1.11  loss 19.884  contrastive 9.500  lr 3e-05  grad_norm 2.41  639 clips/s  MFU 31.2%  "
        "10:42 left",
        "refine  step 1804/1804  epoch 10.04  loss 1.000",
    ]


class Wandb(types.ModuleType):
    """Stands in for the package `wandb`: records all calls; calls of the function named `fails` fail."""

    def __init__(self, fails: str = ""):
        super().__init__("wandb")
        self.fails, self.asked = fails, []

    def __getattr__(self, what: str):
        def ask(*args, **options):
            if what == self.fails:
                raise RuntimeError(f"no way\nto {what}")
            self.asked.append((what, args, options))
            return self

        return ask


def start_wandb(folder, *, resumed=False):
    return metric_writer.start_wandb(str(folder), "mine", "small", {"seed": 7}, resumed=resumed)


def write_to_wandb(folder, run):
    with metric_writer.MetricWriter(
        str(folder), total_steps=10, start_step=0, batch_size=4, tensorboard=False, wandb=run
    ) as writer:
        for step in (2, 4):
            writer.write(step, "align", {"loss": float(step)})


def test_wandb_gets_name_config_and_rows_under_one_id_at_each_start(tmp_path, monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for resumed in (False, True):
        write_to_wandb(tmp_path, start_wandb(tmp_path, resumed=resumed))
    starts = [options for what, _, options in stand_in.asked if what == "init"]
    assert starts[0] == starts[1]
    wanted = {"project": "mine", "name": "small", "config": {"seed": 7}, "dir": str(tmp_path), "resume": "allow"}
    assert wanted.items() <= starts[0].items()
    assert [what for what, *_ in stand_in.asked] == ["init", "log", "log", "finish"] * 2
    assert metric_writer.start_wandb(str(tmp_path), "", "small", {}, resumed=False) is None


def test_a_run_that_is_trained_anew_in_the_same_place_is_another_run_of_wandb(tmp_path, monkeypatch):
    stand_in, place = Wandb(), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for _ in range(3):  # on another machine, a folder of the same path is as empty as one that was removed
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        start_wandb(place)
        start_wandb(place, resumed=True)
    first, again, *others = [options["id"] for _, _, options in stand_in.asked]
    assert first == again
    assert len({first, *others}) == 3
    assert re.fullmatch("[0-9a-f]{16}", first)


def test_a_wandb_failure_is_an_error_at_the_first_start_and_a_warning_for_a_resumed_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("init"))
    with pytest.raises(ValueError, match=r"project = 'mine': W&B can't be started \(RuntimeError: no way to init\): `wandb"):
        start_wandb(tmp_path)
    assert start_wandb(tmp_path, resumed=True) is None
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it weren't installed
    with pytest.raises(ValueError, match="mine': W&B can't be started .*: `pip install mc3_jax"):
        start_wandb(tmp_path)
    for fails in ("log", "finish"):
        write_to_wandb(tmp_path, Wandb(fails))
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[:2] for line in said] == [["warning:", "log.wandb_project"]] + [["warning:", "W&B"]] * 2
    assert [row["step"] for row in metric_writer.read_metrics(str(tmp_path))] == [2, 4]
