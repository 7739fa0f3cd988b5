"""Sounds with classes, converted from and to buckets, in parts, or interrupted: the result is that of one local run."""

import collections
import json
import pathlib
import re
import shutil

import h5py
import numpy as np
import pytest
import soundfile

from data_prep import decoder_answers, epic_sounds, esc50, guard, storage, verify
from data_prep.windows import Window
from tests import world
from tests.data_prep import bucket, test_epic_sounds, test_esc50, test_guard, test_media, test_restart
from tests.data_prep.test_storage import content

RATE = 24_000
VIDEOS = ("P01_01", "P02_101", "P02_102", "P03_04")
FOLDS = ((1, 5.0), (2, 0.4), (2, 2.0), (3, 1.0), (4, 3.3), (5, 1.5))  # (fold, seconds) of each recording


def segments() -> list[str]:
    return [
        test_epic_sounds.row(name, video, *segment, *(("cut / chop", 0) if name in "ab" else ("water", 1)))
        for video in VIDEOS for name, segment in test_epic_sounds.SEGMENTS.items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> pathlib.Path:
    """Sources of the commands: `ann`, `EPIC_audio.hdf5`, `sounds`, `videos`, `esc`; all but the first lack something."""
    root = tmp_path_factory.mktemp("sounds")
    test_epic_sounds.table(root / "ann", segments())
    with h5py.File(root / "EPIC_audio.hdf5", "w") as file:
        file["P00_00"] = np.zeros(2_000_000, np.float32)  # not in the annotations
        for i, video in enumerate(VIDEOS[:3]):
            file[video] = test_epic_sounds.wave(seconds=4 + i).astype(np.float32)
    (root / "sounds" / "P01").mkdir(parents=True)
    soundfile.write(root / "sounds" / "P01" / "P01_01.flac", test_epic_sounds.wave(), RATE)
    soundfile.write(root / "sounds" / "P02_101.wav", test_epic_sounds.wave(), RATE)
    soundfile.write(root / "sounds" / "P02_102.wav", test_epic_sounds.wave(), RATE)
    (root / "sounds" / "P02_102.d").mkdir()
    (root / "sounds" / "P02_102.d" / "notes").touch()
    (root / "videos" / "P01" / "videos").mkdir(parents=True)
    test_media.write(root / "videos" / "P01" / "videos" / "P01_01.MP4", seconds=4.0, fps=25)
    rows = [f"{fold}-{i}-A-{i % 2}.wav,{fold},{i % 2},{'ab'[i % 2]},True,{i},A" for i, (fold, _) in enumerate(FOLDS)]
    test_esc50.table(root / "esc", [*rows, "5-9-A-0.wav,5,0,a,True,9,A"])
    (root / "esc" / "audio").mkdir()
    for i, (fold, seconds) in enumerate(FOLDS):
        wave = test_media.sound_at(np.arange(round(seconds * 44100)) / 44100 + i)
        soundfile.write(root / "esc" / "audio" / f"{fold}-{i}-A-{i % 2}.wav", wave, 44100)
    return root


COMMANDS = {
    "hdf5": (epic_sounds, ["--annotations", "{}/ann", "--audio", "{}/EPIC_audio.hdf5"]),
    "sounds": (epic_sounds, ["--annotations", "{}/ann/EPIC_Sounds_train.csv", "--audio", "{}/sounds"]),
    "videos": (epic_sounds, ["--annotations", "{}/ann", "--audio", "{}/videos", "--frames", "--short_side", "32"]),
    "esc": (esc50, ["--root", "{}/esc"]),
}


def words(kind: str, where: pathlib.Path | str, out: pathlib.Path | str, *more: str) -> list[str]:
    inputs = [word.format(where) for word in COMMANDS[kind][1]]
    return [*inputs, "--out", str(out), "--num_shards", "4", *more]


def convert(kind: str, where: pathlib.Path | str, out: pathlib.Path | str, *more: str) -> None:
    COMMANDS[kind][0].main(words(kind, where, out, "--num_workers", "1", *more))


@pytest.fixture(scope="module")
def local(places, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Files that the conversions from disk to disk by one process make, by kind."""
    made = {}
    for kind in COMMANDS:
        folder = tmp_path_factory.mktemp(kind)
        convert(kind, places, folder)
        assert verify.verify(folder, 1)[0] == []
        made[kind] = content(folder)
    return made


def reasons(files: dict[str, bytes]) -> collections.Counter:
    return collections.Counter(json.loads(line)["reason"] for line in files["rejected.jsonl"].decode().splitlines())


@pytest.mark.slow
def test_the_data_sets_compared_below_hold_clips_and_reasons(local):
    counts = {}
    for kind, files in local.items():
        splits = json.loads(files["clips.json"])["splits"].values()
        counts[kind] = (sum(split["num_clips"] for split in splits), reasons(files).most_common(1))
    assert counts == {
        "hdf5": (18, [("no audio of this video in the HDF5 file", 6)]), "sounds": (18, [("video file is missing", 6)]),
        "videos": (5, [("video file is missing", 18)]), "esc": (6, [("video file is missing", 1)]),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hdf5", "esc"])
def test_from_bucket_to_bucket_two_workers_make_what_one_process_makes_on_disks(places, local, buckets, tmp_path, kind):
    shutil.copytree(places, buckets / "mine" / "in")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = words(kind, "gs://mine/in", "gs://mine/clips", "--num_workers", "2", "--scratch", scratch)
    done = world.run(COMMANDS[kind][0].__name__, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(buckets / "mine" / "clips") == local[kind]
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sounds", "videos"])
def test_sound_files_and_videos_come_from_a_bucket_as_from_a_disk(places, local, buckets, tmp_path, kind):
    shutil.copytree(places, buckets / "mine" / "in")
    convert(kind, "s3://mine/in", tmp_path / "out")
    assert content(tmp_path / "out") == local[kind]


def test_of_an_hdf5_file_in_a_bucket_the_parts_that_sounds_lie_in_are_read_and_nothing_is_copied(
    places, local, buckets, tmp_path, monkeypatch
):
    shutil.copytree(places, buckets / "mine")
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 20_000)
    monkeypatch.setattr(storage, "copy", None)
    asked, cat = [], bucket.Buckets.cat_file

    def counted(self, path, start=None, end=None, **kwargs):
        asked.append((start, end))
        return cat(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(bucket.Buckets, "cat_file", counted)
    convert("hdf5", "gs://mine", tmp_path / "out")
    assert content(tmp_path / "out") == local["hdf5"]
    whole = (places / "EPIC_audio.hdf5").stat().st_size
    assert 3 * 4 * RATE * 4 < sum(end - start for start, end in asked) < whole / 3
    assert max(end - start for start, end in asked) <= 20_000


@pytest.mark.parametrize("kind", ["hdf5", "sounds", "esc"])
def test_a_bucket_is_not_asked_about_every_row(places, buckets, tmp_path, monkeypatch, capsys, kind):
    shutil.copytree(places, buckets / "mine")
    calls, inside = [], [0]

    def counted(name: str):
        call = getattr(bucket.Buckets, name)

        def wrapped(self, path, *args, **kwargs):
            if not inside[0]:  # not when the stand-in calls itself
                calls.append((name, path.rpartition("/")[2]))
            inside[0] += 1
            try:
                return call(self, path, *args, **kwargs)
            finally:
                inside[0] -= 1

        return wrapped

    for name in ("info", "find", "ls", "open"):
        monkeypatch.setattr(bucket.Buckets, name, counted(name))
    convert(kind, "gs://mine", tmp_path / "out", "--dry_run")
    assert "clips: " in capsys.readouterr().out
    assert [path for name, path in calls if name == "find"] == {"hdf5": [], "sounds": ["sounds"], "esc": ["audio"]}[kind]
    assert len(calls) <= 12, calls


def test_objects_that_miss_or_are_forbidden_are_rejects_and_a_network_that_comes_back_is_none(
    places, local, buckets, tmp_path
):
    shutil.copytree(places, buckets / "mine")
    (buckets / "faults" / "2-1-A-1.wav").write_text("forbidden")
    (buckets / "faults" / "4-4-A-0.wav").write_text("2")
    (buckets / "faults" / "EPIC_audio.hdf5").write_text("2")
    (buckets / "mine" / "esc" / "audio" / "3-3-A-1.wav").unlink()
    convert("esc", "gs://mine", tmp_path / "esc")
    rows = map(json.loads, (tmp_path / "esc" / "rejected.jsonl").read_text().splitlines())
    assert sorted((row["clip_id"], row["reason"], row["detail"]) for row in rows) == [
        ("2-1-A-1", "video file can't be read", "Permission denied"),
        ("3-3-A-1", "video file is missing", "3-3-A-1.wav"), ("5-9-A-0", "video file is missing", "5-9-A-0.wav"),
    ]  # fmt: skip
    convert("hdf5", "gs://mine", tmp_path / "hdf5")
    assert content(tmp_path / "hdf5") == local["hdf5"]


def test_a_network_lost_in_the_middle_of_an_hdf5_file_ends_the_run_in_one_line_and_the_next_run_resumes(
    places, local, buckets, tmp_path, monkeypatch, capsys
):
    shutil.copytree(places, buckets / "mine")
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 100_000)
    cat, left = bucket.Buckets.cat_file, [8]

    def goes(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("503 Service Unavailable")
        return cat(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(bucket.Buckets, "cat_file", goes)
        with pytest.raises(SystemExit) as ended:
            convert("hdf5", "gs://mine", tmp_path / "out")
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: a worker failed: gs://mine/EPIC_audio.hdf5: RuntimeError: 503 Service Unavailable"
    assert list((tmp_path / "out" / "reports").iterdir())
    convert("hdf5", "gs://mine", tmp_path / "out")
    assert content(tmp_path / "out") == local["hdf5"]


def cut_remote(path: pathlib.Path, remote: guard.Remote, *times_s: float) -> list:
    windows = [Window(t, t + 0.5, (), open_end=True) for t in times_s]
    cuts = guard.cut_windows(path, windows, short_side_px=0, limits=guard.Limits(), hdf5=("P01_01", RATE), remote=remote)
    return [cut for _, cut in sorted(cuts, key=lambda pair: pair[0])]


def test_damage_in_a_remote_hdf5_file_costs_what_lies_in_it_and_a_short_object_ends_the_run(places, buckets, tmp_path):
    chunked = buckets / "mine" / "a.hdf5"
    chunked.parent.mkdir()
    with h5py.File(chunked, "w") as file:
        data = file.create_dataset("P01_01", data=test_epic_sounds.wave(), chunks=(12_000,), fletcher32=True)
        damaged = data.id.get_chunk_info(4).byte_offset + 100
    whole = bytearray(chunked.read_bytes())
    whole[damaged] ^= 0xFF
    chunked.write_bytes(whole)
    path = storage.as_path("gs://mine/a.hdf5")
    remote = guard.Remote(len(whole), storage.reader(path, len(whole)))
    for cut, other in zip(cut_remote(path, remote, 0.1, 1.9, 3.0), cut_remote(chunked, None, 0.1, 1.9, 3.0), strict=True):
        assert cut == other if isinstance(cut, str) else np.array_equal(cut.audio, other.audio)
        damage = isinstance(cut, str) and cut.startswith("decoding failed")
        assert damage == (cut is not None and isinstance(other, str))
    chunked.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(len(whole) - 8))
    assert cut_remote(path, guard.Remote(len(whole), storage.reader(path, len(whole))), 0.1)[0].startswith(
        "audio file can't be opened"
    )
    chunked.write_bytes(whole[:1000])
    with pytest.raises(OSError, match=r"a.hdf5: 1000 of \d+ bytes arrived"):
        cut_remote(path, guard.Remote(len(whole), storage.reader(path, len(whole))), 0.1)
    guard.stop()


def test_a_decoder_that_asks_for_another_part_costs_the_sounds_it_was_asked_for(tmp_path, monkeypatch):
    asked = []
    remote = guard.Remote(1000, lambda start, stop: asked.append((start, stop)) or bytes(stop - start))
    guard.stop()
    wrong = "stop is '1001', not a whole number from 1 to 1000"
    for start, stop, reason in ((0, 1001, wrong), (0, 8, "window 0 was answered twice")):
        question = json.dumps({"start": start, "stop": stop}) + "\\n"
        answer = json.dumps({"index": 0, "reason": "x"}) + "\\n"
        monkeypatch.setattr(guard, "COMMAND", test_guard.liar(f"b'{question}'", f"b'{answer}'", f"b'{answer}'"))
        *_, told = cut_remote(tmp_path / "absent", remote, 0.1, 2.0)
        assert told.startswith(test_guard.NONSENSE + reason)
    assert set(asked) == {(0, 8)}
    assert guard._idle == []


@pytest.mark.parametrize("asked", [{"start": -1, "stop": 5}, {"start": 99, "stop": 101}, {"start": 5, "stop": 5},
                                   {"start": 0, "stop": 1 << 23}, {"start": "0", "stop": 1}, {"start": 0}])  # fmt: skip
def test_a_decoder_that_asks_for_what_is_no_part_of_the_file_is_distinguished_from_one_that_answers(asked):
    assert decoder_answers.check_question(b'{"start": 10, "stop": 100}', 100) == (10, 100)
    assert decoder_answers.check_question(b'{"index": 0, "reason": "x"}', 100) is None
    with pytest.raises(ValueError, match="(start|stop) is "):
        decoder_answers.check_question(json.dumps(asked).encode(), 1 << 30 if asked.get("stop") == 1 << 23 else 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hdf5", "esc"])
def test_two_parts_and_a_run_without_make_what_one_run_makes(places, local, tmp_path, capsys, kind):
    folder = tmp_path / "out"
    for part in ("1/2", "0/2"):
        convert(kind, places, folder, "--part", part)
        assert not (folder / "clips.json").exists()
    assert "after all parts, run the command without --part" in capsys.readouterr().out
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record*")}
    convert(kind, places, folder)
    assert len(shards) >= 3
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert content(folder) == local[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hdf5", "esc"])
def test_a_conversion_killed_at_any_step_resumes_after_the_last_finished_file(places, tmp_path, kind):
    command, inputs = COMMANDS[kind][0], [word.format(places) for word in COMMANDS[kind][1]]
    command.main([*inputs, "--out", str(tmp_path / "whole"), *test_restart.OPTIONS, "--num_workers", "1"])
    whole = test_restart.content(tmp_path / "whole")
    test_restart.kill_at_steps(command.__name__.split(".")[1], inputs, whole, tmp_path / "out", most_killed=8)


def told(capsys) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("  "))


def test_a_dry_run_of_esc_tells_what_is_to_be_done_opens_nothing_and_writes_nothing(
    places, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(guard, "COMMAND", None)  # nothing may be decoded
    convert("esc", places, tmp_path / "out", "--dry_run")
    said = told(capsys)
    num_bytes = sum(path.stat().st_size for path in (places / "esc" / "audio").iterdir())
    assert said["clips"] == "6 (4 train, 1 validation, 1 test)"
    assert said["recordings"] == f"6 in 6 file(s), {num_bytes / 1e6:.1f} MB to read, in 5 shards"
    assert said["missing files"] == "1, e.g. 5-9-A-0.wav"
    assert said["rejected so far"] == "1"
    assert said["data set"] == f"about {6 * 5 * 25_600 / 1e6:.1f} MB"
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_epic_sounds_counts_recordings_once_and_hdf5_by_the_seconds(places, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(guard, "COMMAND", None)
    convert("hdf5", places, tmp_path / "out", "--dry_run", "--max_audio_s", "3")
    said = told(capsys)
    seconds = 4 * sum(min(stop - start, 3) for start, stop in test_epic_sounds.SEGMENTS.values())
    assert said["clips"] == "24 (24 train, 0 validation, 0 test)"
    assert said["recordings"].startswith(
        f"4 of EPIC_audio.hdf5 (whether it holds them is not checked), {seconds * 0.096:.1f} MB to read, in "
    )
    assert said["missing files"] == "0"
    assert said["data set"] == f"about {seconds * 25_600 / 1e6:.1f} MB"
    convert("sounds", places, tmp_path / "out", "--dry_run")
    said = told(capsys)
    assert said["clips"] == "18 (18 train, 0 validation, 0 test)"
    assert said["recordings"].startswith("3 in 3 file(s), ")
    assert said["missing files"] == "1, e.g. P03_04"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("esc", ("esc", "nowhere"), "no folder .*nowhere: point --root at the folder of ESC-50 or ESC-10"),
        ("esc", ("esc", "sounds"), "no file .*esc50.csv or esc10.csv: point --root at"),
        ("sounds", ("/sounds", "/esc/audio"), "esc/audio has no file for any of 24 sounds, such as P01_01: "),
        ("hdf5", ("/ann", "/nowhere"), "no file or folder .*nowhere: point --annotations at EPIC_Sounds_train.csv"),
        ("hdf5", ("/ann", "/esc"), "esc holds none of EPIC_Sounds_train.csv"),
        ("hdf5", ("EPIC_audio.hdf5", "esc/meta/esc50.csv"), "is not an HDF5 file: point --audio at EPIC_audio.hdf5 or"),
        ("hdf5", ("EPIC_audio.hdf5", "sounds/P02_102.d/notes"), "notes is not an HDF5 file: point --audio at "),
        ("hdf5", ("EPIC_audio.hdf5", "EPIC.hdf5"), "no file or folder .*EPIC.hdf5: point --audio at EPIC_audio.hdf5 or"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("remote", [False, True])
def test_a_wrong_path_is_one_line_on_disks_and_in_buckets(
    places, buckets, tmp_path, capsys, monkeypatch, kind, change, message, remote
):
    if remote:
        shutil.copytree(places, buckets / "mine")
    monkeypatch.setitem(COMMANDS, kind, (COMMANDS[kind][0], [word.replace(*change) for word in COMMANDS[kind][1]]))
    with pytest.raises(SystemExit) as ended:
        convert(kind, "gs://mine" if remote else places, tmp_path / "out")
    error = capsys.readouterr().err
    assert (ended.value.code, len(error.splitlines())) == (2, 1)
    assert re.match(f"error: .*{message}", error)


def test_an_hdf5_file_whose_download_broke_off_is_reported_as_that(places, tmp_path, capsys):
    shutil.copytree(places / "ann", tmp_path / "ann")
    (tmp_path / "EPIC_audio.hdf5").write_bytes((places / "EPIC_audio.hdf5").read_bytes()[:1_000_000])
    with pytest.raises(SystemExit):
        convert("hdf5", tmp_path, tmp_path / "out")
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "none of 24 annotations became a clip (24 audio file can't be opened: " in error
    assert "truncated file: eof = 1000000" in error


def test_an_hdf5_file_that_the_bucket_forbids_ends_the_command_in_one_line(places, buckets, tmp_path, capsys):
    shutil.copytree(places, buckets / "mine")
    (buckets / "faults" / "EPIC_audio.hdf5").write_text("forbidden")
    with pytest.raises(SystemExit):
        convert("hdf5", "gs://mine", tmp_path / "out")
    assert re.fullmatch("error: gs://mine/EPIC_audio.hdf5: Forbidden: .*\n", capsys.readouterr().err)


REAL = test_epic_sounds.REAL


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/epic_sounds")
def test_a_dry_run_of_the_public_validation_is_seconds_and_not_the_hours_of_video(tmp_path, capsys):
    (tmp_path / "EPIC_audio.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(1000))
    epic_sounds.main(["--annotations", str(REAL), "--audio", str(tmp_path / "EPIC_audio.hdf5"), "--out",
                      str(tmp_path / "out"), "--num_workers", "1", "--dry_run"])  # fmt: skip
    said = told(capsys)
    assert said["clips"].startswith("8,035 (0 train, 8,035 validation")
    assert said["recordings"].startswith("137 of EPIC_audio.hdf5")
    assert "2.6 GB to read" in said["recordings"]
    assert said["data set"] == "about 0.7 GB"
    assert said["time"] == "about 20 s on 1 core"
