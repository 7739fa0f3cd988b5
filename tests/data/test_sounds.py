"""Sounds of any length: crops and windows hold the clip's own sound, every window counts once, padding is reported."""

import functools
import pathlib

import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter

from mc3_jax.data import loader, records, transforms

WINDOW = 100
LENGTHS = [30, 100, 101, 250, 999, 1, 100, 455, 640, 77, 300]
CLASSES = ["bark", "rain", "hum"]
JPEG = simplejpeg.encode_jpeg(np.full((16, 24, 3), 90, np.uint8))


def sound_of(number: int) -> np.ndarray:
    """Returns the sound of a clip: each sample identifies the clip and the position, and none is 0."""
    return (1 + 1000 * number + np.arange(LENGTHS[number])).astype(np.int16)


def make_clip(number: int, pictures: bool = False) -> records.Clip:
    return records.Clip(
        clip_id=f"c{number:02d}", video_uid=f"v{number // 2}", narration=str(number), source="s", time_us=0, start_us=0,
        stop_us=1, frames=[JPEG] * 2 if pictures else [], frame_times_us=np.arange(2 if pictures else 0),
        frame_height=16 if pictures else 0, frame_width=24 if pictures else 0, audio=sound_of(number),
        class_id=number % 3, fold=1 + number // 2 % 3,
    )  # fmt: skip


def write(folder: pathlib.Path, pictures: bool = False, **changes) -> pathlib.Path:
    """Writes a data set with a clip of each of `LENGTHS`, the last three for validation, and returns its folder."""
    splits = {}
    for split, numbers in (("train", range(8)), ("validation", range(8, 11))):
        path = folder / f"s-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        clips = [make_clip(i, pictures) for i in numbers]
        for clip in clips:
            writer.write(records.encode(clip))
        writer.close()
        videos = [clip.video_uid for clip in clips]
        counts = [videos.count(uid) for uid in dict.fromkeys(videos)]
        shard = records.Shard(path.name, len(clips), 1, "", counts, [len(clip.audio) for clip in clips])
        splits[split] = records.SplitInfo(len(clips), 0, 0, [shard])
    shape = (2, 1, 16, (16, 24)) if pictures else (0, 0, 0, (0, 0))
    info = records.ClipsInfo(
        "s", (0.0, 1.0), *shape, WINDOW, [], [], splits, **{"classes": CLASSES, "max_samples": 999, **changes}
    )
    info.dump(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write(tmp_path_factory.mktemp("sounds"))


def tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([int(text)], np.int32), np.ones(1, np.int32)


def rows_of(batches) -> list[dict[str, np.ndarray]]:
    return [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(len(batch["row"]))]


def assert_own_sound(row: dict[str, np.ndarray], size: int = WINDOW):
    """Asserts that a row's audio is its clip's from `audio_start` on, with zeros only behind the clip's end."""
    number, start, length = int(row["text_ids"][0]), int(row["audio_start"]), int(row["audio_length"])
    sound = sound_of(number)
    assert row["audio"].shape == (size,)
    assert row["audio"].dtype == np.int16
    assert length == min(size, len(sound) - start) > 0
    np.testing.assert_array_equal(row["audio"][:length], sound[start : start + length])
    assert not row["audio"][length:].any()


def test_windows_cover_every_sample_and_need_no_padding_unless_the_sound_is_shorter():
    rng = np.random.default_rng(0)
    for _ in range(500):
        length, size = int(rng.integers(1, 500)), int(rng.integers(1, 200))
        hop = int(rng.integers(1, size + 1))
        starts = transforms.audio_windows(length, size, hop)
        heard = np.zeros(max(length, size), int)
        for start in starts:
            heard[start : start + size] += 1
        assert heard[:length].all(), (length, size, hop)
        assert starts[0] == 0
        assert starts[-1] == max(length - size, 0)
        assert (np.diff(starts) > 0).all()
        assert (np.diff(starts)[:-1] == hop).all()
        assert len(starts) == transforms.num_windows(np.array([length]), size, hop)[0]


def test_a_random_crop_may_lie_anywhere_and_that_of_evaluation_in_the_middle():
    rng = np.random.default_rng(0)
    assert {transforms.crop_start(13, 10, rng) for _ in range(200)} == {0, 1, 2, 3}
    assert {transforms.crop_start(length, 10, rng) for length in (1, 9, 10) for _ in range(9)} == {0}
    assert [transforms.crop_start(length, 10, None) for length in (5, 10, 13, 20)] == [0, 0, 1, 5]


def test_training_crops_anew_in_each_epoch_and_has_the_class_and_no_frames(folder):
    source = loader.open_split(folder, "train", 0)
    batches = loader.train_batches(source, tokenize, batch_size=4, seed=0, num_threads=2)
    rows = rows_of([next(batches) for _ in range(40)])
    assert set(rows[0]) == {"audio", "audio_start", "audio_length", "text_ids", "text_mask", "row", "index", "class_id"}
    for row in rows:
        assert_own_sound(row)
        assert row["class_id"] == int(row["text_ids"][0]) % 3
    assert len({int(row["audio_start"]) for row in rows if row["text_ids"][0] == 4}) > 10  # in 20 epochs, of 900 starts
    again = loader.train_batches(source, tokenize, batch_size=4, seed=0, start_step=33, num_threads=1)
    for row, other in zip(rows[4 * 33 :], rows_of([next(again)]), strict=False):
        for name in row:
            np.testing.assert_array_equal(row[name], other[name], err_msg=name)


def test_several_processes_crop_as_one_would(folder):
    source = loader.open_split(folder, "train", 0)
    whole = next(loader.train_batches(source, tokenize, batch_size=4, seed=3, start_step=5))
    parts = [
        next(loader.train_batches(source, tokenize, batch_size=4, seed=3, start_step=5, process_index=p, process_count=2))
        for p in range(2)
    ]
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]), err_msg=name)


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (8, 1), (8, 2), (9, 3), (64, 4)])
@pytest.mark.parametrize("hop", [30, 100])
def test_every_window_counts_once_on_any_number_of_processes(folder, batch_size, processes, hop):
    source = loader.open_split(folder, "train+validation", 0)
    rows = []
    for index in range(processes):
        batches = loader.eval_batches(
            source, tokenize, batch_size=batch_size, hop_samples=hop, process_index=index, process_count=processes,
            num_threads=3,
        )  # fmt: skip
        rows += rows_of(batches)
    assert len(rows) % batch_size == 0
    valid = [row for row in rows if row["valid"]]
    for row in valid:
        assert_own_sound(row)
        number = int(row["index"])
        assert row["text_ids"][0] == number
        assert (row["class_id"], row["fold"], row["label"]) == (number % 3, 1 + number // 2 % 3, -1)
    expected = [
        (i, int(start)) for i, length in enumerate(LENGTHS) for start in transforms.audio_windows(length, WINDOW, hop)
    ]
    assert sorted((int(row["index"]), int(row["audio_start"])) for row in valid) == expected
    assert len(rows) - len(valid) < batch_size


def test_without_windows_evaluation_hears_the_middle_of_every_clip_once(folder):
    source = loader.open_split(folder, "validation", 0)
    rows = rows_of(loader.eval_batches(source, tokenize, batch_size=2))
    assert [bool(row["valid"]) for row in rows] == [True, True, True, False]
    for row, length in zip(rows, LENGTHS[8:], strict=False):
        assert_own_sound(row)
        assert row["audio_start"] == max(length - WINDOW, 0) // 2


def test_silent_windows_are_distinguished_from_loud_ones_by_their_level():
    sound = np.random.default_rng(0).integers(-3, 4, 1000).astype(np.int16)
    sound[300:320] = 8000 * (-1) ** np.arange(20)
    starts = transforms.audio_windows(1000, 100, 50)
    loud = transforms.loud_windows(sound, 100, starts, 30)
    assert starts[loud].tolist() == [250, 300]
    level = 10 * np.log10([np.sum((sound[s : s + 100] - sound.mean()) ** 2) for s in starts])
    for db in (1, 17, 55):
        assert transforms.loud_windows(sound, 100, starts, db).tolist() == (level >= level.max() - db).tolist()
    assert transforms.loud_windows(sound[:30], 100, np.array([0]), 30).tolist() == [True]
    assert transforms.loud_windows(np.zeros(300, np.int16), 100, np.array([0, 100, 200]), 30).all()


def test_silent_or_short_sounds_are_cropped_as_usual_where_silence_is_left_out(folder):
    source = loader.open_split(folder, "train", 0)
    for clip in (source[5], source[0], source[3]):  # of 1, 30 and 250 samples
        clip.audio = np.zeros_like(clip.audio)
        rng = np.random.default_rng(0)
        arrays = transforms.make_sample(clip, source.info, tokenize, rng, pictures=False, silence_db=20.0).arrays
        assert arrays["audio"].shape == (WINDOW,)
        assert arrays["audio_length"] == min(len(clip.audio), WINDOW)


def test_silence_is_neither_trained_on_nor_counted(folder, monkeypatch):
    # In clip 4 (999 samples) only a tenth is not silent, far from the middle; other clips are equally loud throughout.
    quiet = sound_of(4)
    quiet[:] = 0
    quiet[700:800] = 900 * (-1) ** np.arange(100)
    monkeypatch.setattr(records, "decode", lambda data, real=records.decode: _with_sound(real(data), "c04", quiet))
    source = loader.open_split(folder, "train", 0)
    heard: dict[float, list[int]] = {}
    for silence_db in (0.0, 10.0):
        batches = loader.train_batches(source, tokenize, batch_size=8, seed=0, num_threads=2, silence_db=silence_db)
        rows = rows_of([next(batches) for _ in range(60)])
        heard[silence_db] = [int(row["audio_start"]) for row in rows if row["text_ids"][0] == 4]
        for row in rows:
            assert silence_db == 0 or np.any(row["audio"])
    assert np.mean([600 < start < 800 for start in heard[0.0]]) < 0.4
    # A crop must hold a tenth of the energy: 10 of the 100 samples.
    assert min(heard[10.0]) < 640
    assert max(heard[10.0]) > 760
    assert all(610 <= start <= 790 for start in heard[10.0])
    for silence_db, counted in ((0.0, 19), (10.0, 3)):
        rows = rows_of(
            loader.eval_batches(source, tokenize, batch_size=4, hop_samples=50, silence_db=silence_db, num_threads=2)
        )
        valid = [row for row in rows if row["valid"] and row["text_ids"][0] == 4]
        assert len(valid) == counted
        assert {int(row["index"]) for row in rows if row["valid"]} == set(range(8))
    options = dict(batch_size=6, hop_samples=50, silence_db=10.0, process_count=3, num_threads=0)
    parts = [rows_of(loader.eval_batches(source, tokenize, process_index=i, **options)) for i in range(3)]
    told = [{(int(row["index"]), int(row["audio_start"])) for row in part if row["valid"]} for part in (rows, *parts)]
    assert sum(map(len, told[1:])) == len(told[0])
    assert set.union(*told[1:]) == told[0]


def _with_sound(clip: records.Clip, clip_id: str, sound: np.ndarray) -> records.Clip:
    if clip.clip_id == clip_id:
        clip.audio = sound
    return clip


def test_a_reader_may_want_another_length_than_the_data_set_says(folder):
    source = loader.open_split(folder, "train", 0)
    for batches in (
        loader.eval_batches(source, tokenize, batch_size=3, num_samples=333),
        loader.eval_batches(source, tokenize, batch_size=3, num_samples=333, hop_samples=50),
        [next(loader.train_batches(source, tokenize, batch_size=8, seed=0, num_samples=333))],
    ):
        for row in rows_of(batches):
            assert_own_sound(row, 333)


def test_folds_are_read_alone_whole_and_from_any_split(folder):
    folds = [loader.ClipSource(folder, "train+validation", [fold]) for fold in (1, 2, 3)]
    found = [[source[i].clip_id for i in range(len(source))] for source in folds]
    assert sorted(clip_id for ids in found for clip_id in ids) == [f"c{i:02d}" for i in range(11)]
    for fold, source in enumerate(folds, 1):
        assert {source[i].fold for i in range(len(source))} == {fold}
        assert sum(source.video_clips) == len(source)
        assert source.clip_samples.tolist() == [len(source[i].audio) for i in range(len(source))]
    two = loader.open_split(folder, "train+validation", 0, folds=(1, 3))
    assert [two[i].clip_id for i in range(len(two))] == sorted(found[0] + found[2])
    rows = rows_of(loader.eval_batches(two, tokenize, batch_size=4, hop_samples=100))
    assert {int(row["fold"]) for row in rows} == {1, 3}
    with pytest.raises(ValueError, match="no clips of the fold\\(s\\) \\[7\\], only of \\[1, 2, 3\\]"):
        loader.open_split(folder, "train", 0, folds=[7])


def test_sounds_are_refused_where_frames_are_wanted(folder):
    with pytest.raises(ValueError, match="holds sounds without video, but the model takes 4 frames per clip"):
        loader.open_split(folder, "train", 4)


def test_frames_are_left_out_if_none_are_wanted_and_else_come_with_every_window(tmp_path):
    write(tmp_path, pictures=True)
    for num_frames, names in ((0, set()), (2, {"video", "video_size"})):
        source = loader.open_split(tmp_path, "train", num_frames)
        rows = rows_of(loader.eval_batches(source, tokenize, batch_size=4, hop_samples=60))
        train = next(loader.train_batches(source, tokenize, batch_size=4, seed=0))
        for row in (*rows, train):
            assert {"video", "video_size"} & set(row) == names
        if names:
            assert rows[-1]["video"].shape == (2, 16, 24, 3)
            assert abs(int(rows[-1]["video"].mean()) - 90) < 2


def test_a_clip_of_another_length_than_counted_is_refused(tmp_path):
    write(tmp_path)
    info = records.ClipsInfo.load(tmp_path)
    [counts] = [shard.clip_samples for shard in info.splits["train"].shards]
    counts[counts.index(250)] = 251
    info.dump(tmp_path)
    source = loader.open_split(tmp_path, "train", 0)
    with pytest.raises(ValueError, match="clip c03 holds 250 samples, clips.json counts 251"):
        list(loader.eval_batches(source, tokenize, batch_size=4, hop_samples=50))
    for batches in (loader.eval_batches, functools.partial(loader.train_batches, seed=0)):
        with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 processes, got 5"):
            batches(source, tokenize, batch_size=5, process_count=2)
    with pytest.raises(ValueError, match="hop_samples must be at least 1, got 0"):
        loader.eval_batches(source, tokenize, batch_size=4, hop_samples=0)


def test_a_sound_longer_than_its_data_set_allows_is_refused(tmp_path):
    source = loader.open_split(write(tmp_path, max_samples=300), "train", 0)
    with pytest.raises(ValueError, match="clip c04 holds 999 samples, clips.json says from 1 to 300"):
        list(loader.eval_batches(source, tokenize, batch_size=4))
