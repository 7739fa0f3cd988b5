"""EPIC-Sounds: a segment has the same sound from HDF5, sound files and videos; every row is a clip or has a reason."""

import pathlib
import shutil

import h5py
import numpy as np
import pytest
import soundfile

from data_prep import epic_sounds, guard, media, verify
from data_prep.sources import epic_sounds as source
from data_prep.windows import Window
from mc3_jax.data import records
from mc3_jax.evals import sound_report
from tests.data_prep import test_media
from tests.data_prep.converted import Converted

REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "epic_sounds"
HEADER = (
    "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample,description,class,class_id"
)
SECONDS, RATE = 4.0, 24_000
SEGMENTS = {"a": (0.0, 0.2), "b": (0.5, 2.731), "c": (1.111, 1.4), "d": (2.5, 4.0), "e": (0.0, 4.0), "f": (3.7, 4.05)}


def stamp(time_s: float) -> str:
    return f"00:{int(time_s) // 60:02d}:{time_s % 60:06.3f}"


def row(name: str, video: str, start_s: float, stop_s: float, kind: str = "water", number: int = 1, **changes) -> str:
    values = {
        "id": f"{video}_{name}", "person": video.split("_")[0], "video": video, "start": stamp(start_s),
        "stop": stamp(stop_s), "first": round(start_s * RATE), "last": round(stop_s * RATE), "text": f"tap {name}",
        "class": kind, "class_id": number,
    }  # fmt: skip
    return ",".join(str(value) for value in {**values, **changes}.values())


def table(folder: pathlib.Path, rows: list[str], name: str = "EPIC_Sounds_train.csv") -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([HEADER, *rows]) + "\n")
    return folder


def wave(rate: int = RATE, seconds: float = SECONDS) -> np.ndarray:
    return test_media.sound_at(np.arange(round(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The sound of three videos in an HDF5 file, in sound files, and in videos laid out as by EPIC-Kitchens' downloads."""
    folder = tmp_path_factory.mktemp("epic")
    with h5py.File(folder / "EPIC_audio.hdf5", "w") as file:
        file["P01_01"] = wave().astype(np.float32)
        file["P02_101"] = np.round(wave() * 32768).astype(np.int16)
        file["P02_102"] = wave().astype(np.float32)
    (folder / "sounds").mkdir()
    soundfile.write(folder / "sounds" / "P01_01.wav", wave(), RATE)
    soundfile.write(folder / "sounds" / "P02_101.flac", wave(44100), 44100)
    soundfile.write(folder / "sounds" / "P02_102.ogg", wave(48000), 48000)
    for path in ("P01/videos/P01_01.MP4", "P02/P02_101.mp4", "P02_102.mkv"):
        (folder / "videos" / path).parent.mkdir(parents=True, exist_ok=True)
        test_media.write(folder / "videos" / path, seconds=SECONDS, fps=25, options={"movflags": "+faststart"})
    return {"hdf5": folder / "EPIC_audio.hdf5", "sounds": folder / "sounds", "videos": folder / "videos"}


@pytest.fixture(scope="module")
def annotations(tmp_path_factory) -> pathlib.Path:
    """Folder of annotations of three videos: six segments to train, six to validate, and two without a class for the test."""
    folder = tmp_path_factory.mktemp("annotations")
    table(folder, [row(name, "P01_01", *segment) for name, segment in SEGMENTS.items()])
    rows = [row(name, "P02_101", *segment, "cut / chop", 0) for name, segment in SEGMENTS.items()]
    table(folder, rows, "EPIC_Sounds_validation.csv")
    header = HEADER.split(",start_sample")[0]
    lines = [",".join(row(name, "P02_102", *SEGMENTS[name]).split(",")[:5]) for name in "bd"]
    (folder / "EPIC_Sounds_recognition_test_timestamps.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def convert(annotations: pathlib.Path, audio: pathlib.Path, folder: pathlib.Path, *options: str) -> Converted:
    epic_sounds.main(
        ["--annotations", str(annotations), "--audio", str(audio), "--out", str(folder), "--num_workers", "1",
         "--num_shards", "3", *options]
    )  # fmt: skip
    return Converted(annotations, folder)


@pytest.fixture(scope="module")
def made(places, annotations, tmp_path_factory) -> dict[str, Converted]:
    return {name: convert(annotations, path, tmp_path_factory.mktemp(name)) for name, path in places.items()}


@pytest.mark.parametrize("kind", ["hdf5", "sounds", "videos"])
def test_a_segment_is_what_sounded_at_its_time_wherever_it_is_cut_from(made, kind):
    assert len(made[kind].clips) == 14
    assert made[kind].rejected == []
    for clip in made[kind].clips.values():
        start_s, stop_s = SEGMENTS[clip.clip_id[-1]]
        expected = min(stop_s, SECONDS) - start_s
        # AAC's last packet holds some milliseconds more than was encoded.
        assert -1 <= len(clip.audio) - expected * 16_000 <= (0.05 * 16_000 if kind == "videos" else 1), clip.clip_id
        assert clip.start_us == clip.time_us == round(start_s * 1e6)
        assert clip.stop_us - clip.start_us == pytest.approx(len(clip.audio) * 62.5, abs=1)
        late, correlation = test_media.lag_of(clip.audio, start_s)
        assert abs(late) < 0.6, clip.clip_id
        assert correlation > 0.97, clip.clip_id
        assert clip.frames == []


def test_hdf5_and_wav_give_the_same_samples(made):
    for name in SEGMENTS:
        a, b = (made[kind].clips[f"P01_01_{name}"].audio for kind in ("hdf5", "sounds"))
        assert np.abs(a.astype(int) - b).max() <= 2  # wav has 16 bits, float 24


def test_class_text_and_split_are_the_rows(made):
    info = made["hdf5"].info
    assert info.classes == ["cut / chop", "water"]
    assert {name: split.num_clips for name, split in info.splits.items()} == {"train": 6, "validation": 6, "test": 2}
    clip = made["hdf5"].clips["P01_01_b"]
    assert (clip.class_id, clip.narration, clip.video_uid, clip.fold, clip.verb_id) == (1, "tap b", "P01_01", -1, -1)
    assert {(clip.class_id, clip.narration) for clip in made["hdf5"].splits["test"]} == {(-1, "")}
    for one in made.values():
        assert verify.verify(one.folder, 1)[0] == []


def test_frames_over_the_segment_come_with_it_where_they_are_asked_for(places, tmp_path, capsys):
    table(tmp_path, [row("b", "P01_01", 0.5, 2.5), row("e", "P01_01", 0.0, 4.0)])
    options = ("--frames", "--num_intervals", "2", "--num_candidates", "1", "--short_side", "96", "--max_audio_s", "3")
    made = convert(tmp_path, places["videos"], tmp_path / "out", *options)
    assert "1 of 2 sounds are longer than --max_audio_s 3" in capsys.readouterr().out
    for name, times in (("b", (1.0, 2.0)), ("e", (0.75, 2.25))):  # spread over the stored part
        clip = made.clips[f"P01_01_{name}"]
        assert [test_media.number_in(jpeg) for jpeg in clip.frames] == [int(t * 25 + 1e-6) for t in times]
        assert (clip.frame_height, clip.frame_width) == (96, 192)
    assert len(made.clips["P01_01_e"].audio) == 48_000 == made.info.max_samples
    assert verify.verify(made.folder, 1)[0] == []


def test_rows_that_give_no_clip_are_listed_with_their_reason_and_cost_the_others_nothing(places, tmp_path):
    table(
        tmp_path,
        [
            row("a", "P01_01", 0.5, 1.0), row("a", "P01_01", 0.5, 1.0), row("b", "P01_01", 0.5, 1.0, first=12_100),
            row("c", "P01_01", 1.0, 1.0), row("d", "P01_01", 2.0, 5.0), row("e", "P01_01", 9.0, 9.5),
            row("f", "P77_01", 0.5, 1.0), row("g", "../P01_01", 0.5, 1.0), row("h", "P01_01", 0.5, 1.0, class_id=""),
        ],
    )  # fmt: skip
    for kind, missing in (
        ("hdf5", "no audio of this video in the HDF5 file"), ("sounds", "video file is missing"),
    ):  # fmt: skip
        made = convert(tmp_path, places[kind], tmp_path / kind)
        assert set(made.clips) == {"P01_01_a"}
        told = {(line["clip_id"][-1], line["reason"]) for line in made.rejected}
        assert told == {
            ("a", "same annotation twice"), ("b", "time stamps and samples differ"), ("c", "segment is empty"),
            ("d", "audio does not cover the clip"), ("e", "audio does not cover the clip"), ("f", missing),
            ("g", "video name is not one of EPIC-Kitchens"), ("h", "annotation has no class"),
        }  # fmt: skip
        assert "the last 1.000 of 3.000 s are missing" in {line["detail"] for line in made.rejected}


def test_of_several_files_of_a_name_the_one_with_sound_is_meant_and_two_are_left_out(places, tmp_path):
    folder = shutil.copytree(places["sounds"], tmp_path / "sounds")
    (folder / "P01_01.txt").write_text("notes")
    (folder / "P02_101.wav").write_bytes((folder / "P01_01.wav").read_bytes())
    table(tmp_path / "ann", [row("a", video, 0.5, 1.0) for video in ("P01_01", "P02_101")])
    made = convert(tmp_path / "ann", folder, tmp_path / "out")
    assert set(made.clips) == {"P01_01_a"}
    [line] = made.rejected
    assert (line["reason"], line["detail"]) == ("several files have this video name", "keep only one")


def test_hdf5_that_would_lead_out_or_is_no_sound_is_left_out_with_its_reason(tmp_path):
    with h5py.File(tmp_path / "secret.hdf5", "w") as file:
        file["P01_01"] = wave()
    (tmp_path / "raw").write_bytes(wave().astype("<f8").tobytes())
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["good"] = wave()
        file["external_link"] = h5py.ExternalLink("secret.hdf5", "/P01_01")
        file["soft_link"] = h5py.SoftLink("/good")
        file.create_dataset("external", (1000,), "f8", external=[(str(tmp_path / "raw"), 0, 8000)])
        layout = h5py.VirtualLayout((1000,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.hdf5"), "P01_01", (96_000,))[:1000]
        file.create_virtual_dataset("virtual", layout)
        file.create_group("group")["good"] = wave()
        file["stereo"] = np.stack([wave(), wave()])
        file["words"] = np.array([b"no sound"] * 1000)
        file["nan"] = np.where(np.arange(96_000) == 30_000, np.nan, wave())
        file["loud"] = wave() * 32768
    expected = {
        "good": None, "external_link": "audio in the HDF5 file is a link", "soft_link": "audio in the HDF5 file is a link",
        "external": "audio of the HDF5 file is stored in other files",
        "virtual": "audio of the HDF5 file is stored in other files",
        "group": "audio in the HDF5 file is not a data set", "group/good": "no audio of this video in the HDF5 file",
        "stereo": "audio in the HDF5 file is not mono samples: float64 of shape (2, 96000)",
        "words": "audio in the HDF5 file is not mono samples: |S8 of shape (1000,)",
        "nan": "decoding failed: audio is not finite", "loud": "decoding failed: float samples up to",
        "absent": "no audio of this video in the HDF5 file",
    }  # fmt: skip
    for name, reason in expected.items():
        [(_, cut)] = cut_hdf5(path, name)
        assert (isinstance(cut, media.Cut) if reason is None else cut.startswith(reason)), (name, cut)
    path.write_bytes(path.read_bytes()[:2000])
    [(_, cut)] = cut_hdf5(path, "good")
    assert cut.startswith("audio file can't be opened")
    guard.stop()


def cut_hdf5(path: pathlib.Path, name: str, stop_s: float = 2.0) -> list:
    window = Window(0.5, stop_s, (), open_end=True)
    return list(guard.cut_windows(path, [window], short_side_px=0, limits=guard.Limits(), hdf5=(name, RATE)))


def test_hdf5_that_asks_for_too_much_memory_costs_itself(tmp_path):
    # HDF5 reads a chunk whole: half a gigabyte of zeros, from half a megabyte in the file.
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("bomb", (1 << 27,), "f4", chunks=(1 << 27,), compression="gzip")[:1] = 0.5
        file["good"] = wave()
    window = Window(0.5, 2.0, (), open_end=True)
    limits = guard.Limits(memory_mb=300)
    for name, good in (("bomb", False), ("good", True)):
        [(_, cut)] = guard.cut_windows(
            tmp_path / "a.hdf5", [window], short_side_px=0, limits=limits, hdf5=(name, RATE)
        )
        assert isinstance(cut, media.Cut) if good else cut.startswith("decoder ran out of memory"), cut
    guard.stop()


def test_a_damaged_chunk_costs_the_segments_in_it(tmp_path):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("P01_01", data=wave(), chunks=(24_000,), fletcher32=True)
        chunk = data.id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 100] ^= 0xFF
    path.write_bytes(content)
    windows = [Window(t, t + 0.3, ()) for t in (0.3, 2.3, 3.5)]
    cuts = dict(guard.cut_windows(path, windows, short_side_px=0, limits=guard.Limits(), hdf5=("P01_01", RATE)))
    assert [isinstance(cuts[i], media.Cut) for i in range(3)] == [True, False, True]
    assert cuts[1].startswith("decoding failed: ")
    guard.stop()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", "P01_01", 0, 1), row("b", "P01_01", 0, 1, "knock")], "row 3: class 1 is 'knock' here but 'water' before"),
        ([row("a", "P01_01", 0, 1), row("b", "P01_01", 0, 1, "water", 2)], "class 'water' has several ids: \\[1, 2\\]"),
        ([row("a", "P01_01", 0, 1, class_id="1.5")], "row 2: class_id must be a whole number"),
        ([row("a", "P01_01", 0, 1, class_id="9" * 20)], "row 2: class_id must be a whole number from 0 to 9999"),
        ([row("a", "P01_01", 0, 1, start="1.5")], "row 2: start_timestamp must be HH:MM:SS.sss, got '1.5'"),
        ([row("a", "P01_01", 0, 1, first=-1)], "row 2: start_sample must be a whole number"),
    ],
)
def test_a_file_that_makes_no_sense_is_one_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        source.read(source.find_files([table(tmp_path, rows)]))


def test_the_name_of_a_file_tells_its_split_and_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none of EPIC_Sounds_train.csv"):
        source.find_files([tmp_path])
    (tmp_path / "sound_events_not_categorised.csv").touch()
    with pytest.raises(ValueError, match="the file name determines the split and must be one of"):
        source.find_files([tmp_path / "sound_events_not_categorised.csv"])


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        ("hdf5", ["--frames"], "--frames needs videos"),
        ("absent", [], "no file or folder"),
        ("text", [], "is not an HDF5 file"),
        ("sounds", ["--max_audio_s", "0"], "--max_audio_s must be from 0.01 to 600 s, got 0"),
    ],
)
def test_bad_options_are_one_line(places, annotations, tmp_path, capsys, audio, options, message):
    (tmp_path / "text").write_text("no sound")
    with pytest.raises(SystemExit):
        convert(annotations, places.get(audio, tmp_path / audio), tmp_path / "out", *options)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/epic_sounds")
def test_all_public_validation_rows_are_read_and_their_times_agree():
    found, classes = source.read(source.find_files([REAL]))
    assert len(found) == len({sound.clip_id for sound in found}) == 8035
    assert len({sound.recording for sound in found}) == 137
    assert {sound.problem for sound in found} == {""}
    assert (len(classes), classes[0], classes[43]) == (44, "metal-only collision", "drink / eat")
    assert sound_report.are_of_epic_sounds(classes)
    lengths = [sound.stop_s - sound.start_s for sound in found]
    assert (min(lengths), max(lengths)) == (pytest.approx(0.2), pytest.approx(791.34, abs=0.01))
    assert sum(length > 60 for length in lengths) == 83
    assert {sound.split for sound in found} == {"validation"}
    assert found[0].class_id == classes.index("ceramic / wood collision") == 34
    assert records.UNKNOWN not in {sound.class_id for sound in found}
