"""Records: clips survive the round trip, the bytes never vary, and whatever is wrong is named."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from mc3_jax.data import records


def make_clip(**changes) -> records.Clip:
    clip = records.Clip(
        clip_id="v_a", video_uid="v", narration="#C C stirs the pötage", source="narration_pass_1", time_us=1_000_000,
        start_us=500_000, stop_us=2_000_000, frames=[b"\xff\xd8one", b"", b"three\x00"],
        frame_times_us=np.array([500_000, 533_333, -1], np.int64), frame_height=112, frame_width=199,
        audio=np.array([-32768, 32767, 0, 258], np.int16), verb_id=3, noun_id=-1, label=1,
    )  # fmt: skip
    return dataclasses.replace(clip, **changes)


def make_info(**changes) -> records.ClipsInfo:
    split = records.SplitInfo(1, 1, 1, [records.Shard("w-train.array_record-00000-of-00001", 1, 9, "ab", [1])])
    info = records.ClipsInfo(
        name="w", window_s=(0.5, 1.0), num_intervals=3, num_candidates=1, short_side_px=112, canvas_px=(112, 200),
        num_samples=4, verbs=["stir"], nouns=[], splits={"train": split},
    )  # fmt: skip
    return dataclasses.replace(info, **changes)


def test_a_clip_survives_the_round_trip():
    clip, back = make_clip(), records.decode(records.encode(make_clip()))
    for field in dataclasses.fields(clip):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(clip, field.name), err_msg=field.name)
    assert back.audio.dtype == np.int16
    assert back.frame_times_us.dtype == np.int64


def test_a_sound_without_pictures_survives_the_round_trip_with_class_and_fold():
    clip = make_clip(frames=[], frame_times_us=np.zeros(0, np.int64), frame_height=0, frame_width=0, class_id=43, fold=5)
    back = records.decode(records.encode(clip))
    for field in dataclasses.fields(clip):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(clip, field.name), err_msg=field.name)
    info = make_info(num_intervals=0, num_candidates=0, short_side_px=0, canvas_px=(0, 0), max_samples=4, classes=["x"] * 44)
    records.check(back, info)
    with pytest.raises(ValueError, match="holds 3 frames, clips.json says 0"):
        records.check(make_clip(), info)
    with pytest.raises(ValueError, match="larger than the canvas"):
        records.check(dataclasses.replace(back, frame_height=1), info)


@pytest.mark.parametrize(("num", "good"), [(0, False), (1, True), (4, True), (9, True), (10, False)])
def test_sounds_may_be_shorter_or_longer_than_the_readers_window_up_to_a_limit(num, good):
    clip, info = make_clip(audio=np.zeros(num, np.int16)), make_info(max_samples=9)
    if good:
        records.check(clip, info)
    else:
        with pytest.raises(ValueError, match=f"holds {num} samples, clips.json says from 1 to 9"):
            records.check(clip, info)


def test_equal_clips_are_equal_bytes_and_every_field_changes_them():
    base = records.encode(make_clip())
    assert base == records.encode(make_clip())
    numbers = ({"label": 0}, {"class_id": 1}, {"fold": 1})
    for change in (*numbers, {"narration": "x"}, {"audio": np.zeros(4, np.int16)}, {"frames": [b"", b"", b""]}):
        assert records.encode(make_clip(**change)) != base, change


def test_the_bytes_are_a_tf_train_example_to_an_independent_reader():
    example = tf_example_pb2.Example.FromString(records.encode(make_clip()))
    feature = example.features.feature
    assert list(feature["frames"].bytes_list.value) == make_clip().frames
    assert list(feature["frame_times_us"].int64_list.value) == [500_000, 533_333, -1]
    assert feature["audio"].bytes_list.value[0] == b"\x00\x80\xff\x7f\x00\x00\x02\x01"  # little-endian


def _edited(edit) -> bytes:
    example = tf_example_pb2.Example.FromString(records.encode(make_clip()))
    edit(example.features.feature)
    return example.SerializeToString()


def test_the_classes_of_inner_messages_outlive_the_garbage_collector():
    """Otherwise threads that decode crash: with six threads and a busy garbage collector within some 20 s."""

    def classes():
        features = records._Example.FromString(records.encode(make_clip())).features
        one = features.feature["frames"]
        return [weakref.ref(type(x)) for x in (features, one, one.bytes_list)]

    known = classes()
    gc.collect()
    assert all(known_class() is not None for known_class in known)


def test_an_unknown_feature_is_ignored():
    record = _edited(lambda feature: feature["caption"].bytes_list.value.append(b"new"))
    assert records.decode(record).clip_id == "v_a"


def _as_float(feature):
    feature["label"].float_list.value.append(1.0)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda f: f.pop("label") if hasattr(f, "pop") else f.__delitem__("label"), "lacks the feature 'label'"),
        (_as_float, "'label' must be int64_list, got float_list"),
        (lambda f: f["frame_times_us"].int64_list.value.append(7), "'frame_times_us' must hold 3 value"),
        (lambda f: f["narration"].bytes_list.value.append(b"again"), "'narration' must hold 1 value"),
    ],
)
def test_a_broken_record_is_named(edit, words):
    with pytest.raises(ValueError, match=words):
        records.decode(_edited(edit))


def test_bytes_that_are_no_example_are_refused():
    with pytest.raises(ValueError, match="9 bytes is not a tf.train.Example"):
        records.decode(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff")


def test_audio_must_be_int16_and_frames_need_times():
    with pytest.raises(ValueError, match="int16"):
        records.encode(make_clip(audio=np.zeros(4, np.float32)))
    with pytest.raises(ValueError, match="2 frames but 3 frame times"):
        records.encode(make_clip(frames=[b"", b""]))


def test_clips_json_survives_the_round_trip(tmp_path):
    make_info().dump(tmp_path)
    assert records.ClipsInfo.load(tmp_path) == make_info()
    assert make_info().clip_samples("train").tolist() == [4]
    shard = records.Shard("w-train.array_record-00000-of-00001", 2, 9, "ab", [2], [7, 1])
    info = make_info(
        num_intervals=0, num_candidates=0, short_side_px=0, canvas_px=(0, 0), max_samples=7, classes=["hum"],
        splits={"train": records.SplitInfo(2, 0, 0, [shard])},
    )  # fmt: skip
    info.dump(tmp_path)
    assert records.ClipsInfo.load(tmp_path) == info
    assert info.clip_samples("train").tolist() == [7, 1]


def test_what_is_wrong_with_a_data_folder_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no data folder"):
        records.ClipsInfo.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no clips.json"):
        records.ClipsInfo.load(tmp_path)
    (tmp_path / "clips.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        records.ClipsInfo.load(tmp_path)
    with pytest.raises(ValueError, match="clips.json: it is a file, name the folder of the data set"):
        records.ClipsInfo.load(tmp_path / "clips.json")
    make_info(schema_version=99).dump(tmp_path)
    with pytest.raises(ValueError, match="schema version 99, this code reads 3"):
        records.ClipsInfo.load(tmp_path)
    values = dataclasses.asdict(make_info())
    del values["splits"]
    (tmp_path / "clips.json").write_text(records.manifest(values))
    with pytest.raises(ValueError, match="incomplete.*splits"):
        records.ClipsInfo.load(tmp_path)
    (tmp_path / "clips.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="can't be read: RecursionError"):
        records.ClipsInfo.load(tmp_path)


def test_clips_json_of_another_content_than_was_written_is_refused(tmp_path):
    info = make_info(verbs=["tap", "tape"])
    info.dump(tmp_path)
    whole = (tmp_path / "clips.json").read_text()
    for changed in (whole.replace('"tape"', '"cape"'), whole.replace("0.5", "0.4"), whole.replace('"sha256"', '"sha512"')):
        assert changed != whole
        (tmp_path / "clips.json").write_text(changed)
        with pytest.raises(ValueError, match=r"clips.json is damaged: its content does not match its SHA-256 .*: convert"):
            records.ClipsInfo.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["name"], 1), (["verbs"], None), (["nouns"], [1]), (["window_s"], [1.0]), (["canvas_px"], [16]),
        (["canvas_px"], ["a", "b"]), (["canvas_px"], [10**9, 10**9]), (["num_intervals"], "4"), (["num_candidates"], 0),
        (["sample_rate_hz"], 0), (["num_samples"], 1.5), (["splits"], []), (["splits", "train"], []),
        (["splits", "train", "num_clips"], "1"), (["splits", "train", "shards", 0, "bytes"], None),
        (["splits", "train", "shards", 0, "file"], 3), (["splits", "train", "shards", 0, "video_clips"], [1.0]),
        (["splits", "train", "shards", 0, "video_clips"], [-1, 2]), (["splits", "train", "shards", 0, "video_clips"], None),
        (["splits", "train", "shards", 0], 5), (["splits", "train", "shards", 0, "clip_samples"], [4]),
        (["splits", "train", "shards", 0, "clip_samples"], None), (["max_samples"], -1), (["max_samples"], 9),
        (["max_samples"], None), (["classes"], "abc"), (["num_intervals"], 0), (["short_side_px"], 0),
        (["canvas_px"], [0, 0]),
    ],
)  # fmt: skip
def test_a_damaged_field_of_clips_json_is_one_line(tmp_path, path, value):
    make_info().dump(tmp_path)
    content = place = dataclasses.asdict(make_info())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "clips.json").write_text(records.manifest(content))
    with pytest.raises(ValueError, match="(?s)clips.json is (damaged|incomplete).*convert again"):
        records.ClipsInfo.load(tmp_path)


def test_an_empty_shard_list_a_missing_shard_and_an_unknown_split_are_named(tmp_path):
    info = make_info()
    with pytest.raises(ValueError, match="no split 'dev', only \\['train'\\]"):
        info.shard_paths(tmp_path, "dev")
    with pytest.raises(ValueError, match="1 of 1 shards are missing"):
        info.shard_paths(tmp_path, "train")
    info.splits["train"].shards = []
    with pytest.raises(ValueError, match=r"has no clips in 'train' \(train 1\)"):
        info.shard_paths(tmp_path, "train")


def test_a_clip_of_another_frame_count_length_or_size_is_refused():
    records.check(make_clip(), make_info())
    with pytest.raises(ValueError, match="3 frames, clips.json says 4 intervals x 1 candidates"):
        records.check(make_clip(), make_info(num_intervals=4))
    with pytest.raises(ValueError, match="4 samples, clips.json says 24000"):
        records.check(make_clip(), make_info(num_samples=24_000))
    with pytest.raises(ValueError, match="larger than the canvas"):
        records.check(make_clip(), make_info(canvas_px=(112, 198)))
