"""ESC-50 and ESC-10: files are stored to their end, however long the last packet; every row is a clip or has a reason."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr
from PIL import Image

from data_prep import esc50, inspect, verify
from data_prep.sources import esc50 as source
from mc3_jax.data import loader, records
from tests.data_prep import test_media
from tests.data_prep.converted import Converted

REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "esc10"
HEADER = "filename,fold,target,category,esc10,src_file,take"
ROWS = [
    "1-100-A-0.wav,1,0,dog,True,100,A",
    "1-100-B-0.wav,1,0,dog,True,100,B",
    "2-200-A-36.ogg,2,36,vacuum_cleaner,False,200,A",
    "3-300-A-12.flac,3,12,crackling_fire,True,300,A",
    "4-400-A-12.wav,4,12,crackling_fire,True,400,A",
    "5-500-A-36.wav,5,36,vacuum_cleaner,False,500,A",
    "5-501-A-0.wav,5,0,dog,True,501,A",
    "5-502-A-0.wav,5,0,dog,True,502,A",  # no such file
    "5-503-A-0.wav,5,0,dog,True,503,A",  # no sound file
]
SECONDS = {"1-100-A-0.wav": 5.0, "1-100-B-0.wav": 7.25, "2-200-A-36.ogg": 5.0, "3-300-A-12.flac": 0.31, "4-400-A-12.wav": 1.5,
           "5-500-A-36.wav": 4.99, "5-501-A-0.wav": 0.05}  # fmt: skip


def table(folder: pathlib.Path, rows=ROWS, header: str = HEADER, name: str = "esc50.csv") -> pathlib.Path:
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta" / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    folder = table(tmp_path_factory.mktemp("esc"))
    (folder / "audio").mkdir()
    for name, seconds in SECONDS.items():
        wave = test_media.sound_at(np.arange(round(seconds * 44100)) / 44100)
        soundfile.write(folder / "audio" / name, wave, 44100)
    (folder / "audio" / "5-503-A-0.wav").write_bytes(b"no sound")
    return folder


def convert(root: pathlib.Path, folder: pathlib.Path, *options: str) -> Converted:
    esc50.main(["--root", str(root), "--out", str(folder), "--num_workers", "1", "--num_shards", "4", *options])
    return Converted(root, folder)


@pytest.fixture(scope="module")
def made(root, tmp_path_factory) -> Converted:
    return convert(root, tmp_path_factory.mktemp("clips"))


def test_every_row_is_a_clip_or_a_reason(made):
    assert sorted(made.clips) == [name.rsplit(".", 1)[0] for name in sorted(SECONDS)]
    told = {row["clip_id"]: row["reason"] for row in made.rejected}
    assert told == {"5-502-A-0": "video file is missing", "5-503-A-0": "video file can't be opened"}


def test_a_file_is_stored_whole_in_its_own_length(made, root):
    for name, seconds in SECONDS.items():
        clip = made.clips[name.rsplit(".", 1)[0]]
        wave, rate = soundfile.read(root / "audio" / name)
        expected = soxr.resample(wave, rate, 16_000, quality="HQ")
        assert abs(len(clip.audio) - seconds * 16_000) < 1, name
        assert abs(len(clip.audio) - len(expected)) <= 1, name
        # Except the first and last milliseconds, where the resampling filters reach over the edge.
        inner = slice(40, len(clip.audio) - 40)
        np.testing.assert_allclose(clip.audio[inner] / 32768, expected[inner], atol=3e-4, err_msg=name)
        assert (clip.start_us, clip.time_us, clip.stop_us) == (0, 0, round(len(clip.audio) * 62.5))


def test_class_fold_split_and_recording_are_the_files(made):
    assert made.info.classes == ["dog", "crackling_fire", "vacuum_cleaner"]
    clip = made.clips["2-200-A-36"]
    assert (clip.class_id, clip.fold, clip.video_uid, clip.narration) == (2, 2, "200", "vacuum cleaner")
    assert (clip.verb_id, clip.noun_id, clip.label, clip.frames) == (-1, -1, -1, [])
    folds = {name: sorted({clip.fold for clip in clips}) for name, clips in made.splits.items()}
    assert folds == {"train": [1, 2, 3], "validation": [4], "test": [5]}


def test_one_conversion_serves_every_fold(made):
    for fold in range(1, 6):
        rest = [f for f in range(1, 6) if f != fold]
        names = "train+validation+test"
        held, others = (loader.open_split(made.folder, names, 0, folds=f) for f in ([fold], rest))
        assert len(held) + len(others) == len(SECONDS)
        assert {held[i].fold for i in range(len(held))} == {fold}


def test_the_data_set_is_sound_and_a_wrong_count_of_samples_is_found(made, tmp_path):
    assert verify.verify(made.folder, 1)[0] == []
    folder = shutil.copytree(made.folder, tmp_path / "copy")
    info = dataclasses.asdict(made.info)
    info["splits"]["validation"]["shards"][0]["clip_samples"] = [23_999]
    (folder / "clips.json").write_text(records.manifest(info))
    [line] = verify.verify(folder, 1)[0]
    assert "its numbers of samples per clip differ from clips.json" in line
    info["splits"]["validation"]["shards"][0]["clip_samples"] = [24_000]
    (folder / "clips.json").write_text(records.manifest(info | {"classes": info["classes"][:2]}))
    assert [("class_id is 2" in line) for line in verify.verify(folder, 1)[0]] == [True, True]


def test_inspection_counts_classes_folds_and_durations_and_draws_sounds(made, tmp_path, capsys):
    inspect.main([str(made.folder), "--out", str(tmp_path), "--num_clips", "3", "--split", "train"])
    said = capsys.readouterr().out
    assert "train: 4 clips of 3 videos" in said
    assert "clips by fold: 2 in 1, 1 in 2, 1 in 3" in said
    assert "seconds: 0.31 (0 %), " in said
    assert ", 7.25 (100 %)" in said
    assert "dog 2" in said
    for name in ("contact_sheet.png", "statistics.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 10
    assert json.loads((tmp_path / "statistics.json").read_text())["train"]["classes"]["dog"] == 2


def test_tfds_reads_sounds_without_pictures_and_without_tensorflow(made):
    code = f"""
import sys
import numpy as np
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(made.folder)!r}).as_data_source(split="train")
for i in range(len(source)):
    clip = source[i]
    print(clip["clip_id"].decode(), clip["class_id"], clip["fold"], len(clip["frames"]), len(clip["audio"]) // 2)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=made.folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [f"{c.clip_id} {c.class_id} {c.fold} 0 {len(c.audio)}" for c in made.splits["train"]]
    assert done.stdout.splitlines() == expected


def test_esc10_is_its_rows_alone_its_classes_numbered_among_themselves(root, tmp_path, capsys):
    made = convert(root, tmp_path, "--esc10", "--max_audio_s", "1.5", "--test_fold", "1", "--validation_fold", "0")
    assert made.info.classes == ["dog", "crackling_fire"]
    assert {clip.clip_id for clip in made.splits["test"]} == {"1-100-A-0", "1-100-B-0"}
    assert made.splits["validation"] == []
    assert made.clips["4-400-A-12"].class_id == 1
    # Longer files are cut, and that is reported.
    assert max(len(clip.audio) for clip in made.clips.values()) == 24_000 == made.info.max_samples
    assert "3 more sounds have the full length of --max_audio_s 1.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.wav,1,0,dog,True,1,A", "b.wav,1,0,cat,True,2,A"], "row 3: class 0 is 'cat' here but 'dog' before"),
        (["a.wav,x,0,dog,True,1,A"], "row 2: fold must be a whole number from 1 to 9999, got 'x'"),
        (["a.wav,1,-1,dog,True,1,A"], "row 2: target must be"),
        (["a.wav,1,0,dog,yes,1,A"], "row 2: esc10 must be True or False, got 'yes'"),
        (["a.wav,1,0,dog,False,1,A"], "has no rows of ESC-10"),
        (["a.wav,1,0,dog,True,1,A"], "no row is in the validation fold 4: the folds are \\[1\\]"),
    ],
)
def test_a_table_that_makes_no_sense_is_one_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        source.read(table(tmp_path, rows), esc10=True, test_fold=1, validation_fold=4)


def test_a_recording_in_two_folds_is_refused_and_so_is_one_fold_for_two_splits(root, tmp_path, capsys):
    for rows, options, message in (
        (["1-100-A-0.wav,1,0,dog,True,100,A", "1-100-B-0.wav,5,0,dog,True,100,B", "x.wav,4,0,dog,True,1,A"], [],
         "recording 100 has sounds in train \\(fold 1\\) and in test \\(fold 5\\)"),
        (ROWS, ["--test_fold", "4"], "must be different folds, or 0 for none, got 4 and 4"),
        (ROWS, ["--max_audio_s", "nan"], "--max_audio_s must be from"),
    ):  # fmt: skip
        shutil.copytree(root / "audio", table(tmp_path, rows) / "audio", dirs_exist_ok=True)
        with pytest.raises(SystemExit):
            esc50.main(["--root", str(tmp_path), "--out", str(tmp_path / "out"), "--num_workers", "1", *options])
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert re.search(message, error)


def test_names_lead_nowhere_else(tmp_path):
    soundfile.write(tmp_path / "secret.wav", np.zeros(4410), 44100)
    (tmp_path / "esc" / "audio").mkdir(parents=True)
    rows = ["../../secret.wav,1,0,dog,True,1,A", "/etc/passwd,1,0,dog,True,2,A"]
    found, _ = source.read(table(tmp_path / "esc", rows), esc10=False, test_fold=0, validation_fold=0)
    assert [sound.problem for sound in found] == ["video name points outside the folder"] * 2


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/esc10")
def test_the_real_esc10_is_read_and_its_vorbis_files_are_whole(tmp_path):
    found, classes = source.read(REAL, esc10=True, test_fold=5, validation_fold=4)
    assert (len(found), len(classes), classes[5]) == (400, 10, "person_sneeze")
    assert {sound.problem for sound in found} == {""}
    assert {split: sum(s.split == split for s in found) for split in records.SPLITS} == {
        "train": 240, "validation": 80, "test": 80,
    }  # fmt: skip
    lines = (REAL / "meta" / "esc10.csv").read_text().splitlines()
    shutil.copytree(REAL / "audio", table(tmp_path, lines[1::19], lines[0], "esc10.csv") / "audio")
    made = convert(tmp_path, tmp_path / "clips")
    assert len(made.clips) == 22
    for clip in made.clips.values():
        info = soundfile.info(REAL / "audio" / f"{clip.clip_id}.ogg")
        assert abs(len(clip.audio) - info.frames * 16_000 / info.samplerate) <= 1, clip.clip_id
