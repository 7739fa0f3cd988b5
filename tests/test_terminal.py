"""Nothing in a file can control the terminal: control characters are written as escapes wherever they are printed."""

import io
import json

import numpy as np
import pytest

from data_prep import ego4d, estimate, inspect, shards, verify
from mc3_jax import terminal
from mc3_jax.data import records

EVIL = "\x1b]0;pwned\x07\x1b[2J\u202e\n"
SEEN = r"\x1b]0;pwned\x07\x1b[2J\u202e\n"


def test_what_is_seen_stays_and_all_else_is_an_escape():
    assert terminal.printable("chops the onion, é, 漢字, 🔪, µ") == "chops the onion, é, 漢字, 🔪, µ"
    assert terminal.printable(EVIL) == SEEN
    assert terminal.printable("a\ud800b\tc\x85d\u2028e\u200bf\x7f") == r"a\ud800b\tc\x85d\u2028e\u200bf\x7f"
    assert terminal.error_line(ValueError(f"video{EVIL} is\n  none")) == rf"error: video{SEEN[:-2]} is none"


def test_an_output_that_knows_no_such_letter_gets_an_escape(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert terminal.printable("é 🔪") == r"\xe9 \U0001f52a"


def info_of(**fields) -> records.ClipsInfo:
    return records.ClipsInfo(
        name="clips", window_s=(0.5, 1.0), num_intervals=1, num_candidates=1, short_side_px=16, canvas_px=(16, 16),
        num_samples=24_000, verbs=[f"pick{EVIL}"], nouns=["cup"], splits={}, **fields,
    )  # fmt: skip


def assert_harmless(printed: str) -> None:
    assert all(line.isprintable() for line in printed.split("\n")), ascii(printed)
    assert "pwned" in printed


def make_clips(item: dict, settings: dict):
    yield records.Clip(
        clip_id=f"{EVIL}_0", video_uid=EVIL, narration=EVIL, source="mine", time_us=0, start_us=0, stop_us=1_500_000,
        frames=[b"no JPEG"], frame_times_us=np.zeros(1, np.int64), frame_height=16, frame_width=16,
        audio=np.zeros(24_000, np.int16), verb_id=0, noun_id=0, label=1,
    )  # fmt: skip


def test_missing_videos_of_a_dry_run_drive_no_terminal():
    task = shards.ShardTask("train", 0, 1, ({"video_uid": EVIL, "video_bytes": None},), 1)
    told = estimate.tell([task], info_of(), [], 1)
    assert_harmless(told)
    assert f"missing files: 1, e.g. {SEEN}\n" in told


def test_errors_about_what_stands_in_a_file_drive_no_terminal(tmp_path, capsys):
    annotations = tmp_path / "v2" / "annotations"
    annotations.mkdir(parents=True)
    (tmp_path / "v2" / "video_540ss").mkdir()
    (tmp_path / "v2" / "video_540ss" / "a.mp4").touch()
    for kind in ("verb", "noun"):
        (annotations / f"narration_{kind}_taxonomy.csv").write_text("label,group\nx,['x']\n")
    (tmp_path / "ego4d.json").write_text('{"videos": []}')
    (annotations / "narration.json").write_text(json.dumps({EVIL: 5}))
    with pytest.raises(SystemExit):
        ego4d.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert_harmless(err)
    assert len(err.splitlines()) == 1


def test_what_inspect_and_verify_print_of_a_data_set_drives_no_terminal(tmp_path, capsys):
    reports = [shards.write_shard(shards.ShardTask("test", 0, 1, ({},), 1), str(tmp_path), "clips", make_clips, {})]
    shards.finish(reports, tmp_path, info_of(), [], 1)
    with pytest.raises(SystemExit) as ended:
        verify.main([str(tmp_path), "--num_workers", "1"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert_harmless(printed)
    assert len(printed.splitlines()) == 2
    with pytest.raises(SystemExit) as ended:
        inspect.main([str(tmp_path), "--out", str(tmp_path / "pictures")])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert_harmless(out)
    assert_harmless(err)
    assert len(err.splitlines()) == 1
