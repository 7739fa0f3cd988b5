"""A vocabulary depends only on the training narrations, and texts decode to themselves."""

import collections
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import transformers

from data_prep import shards, vocabulary
from mc3_jax.data import records

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [f"#C C {verb} the {noun}" for verb in ("stirs", "cuts", "washes") for noun in ("pot", "carrot", "cup")]


def make_clips(item: dict, settings: dict):
    for i, text in enumerate(item["texts"]):
        yield records.Clip(
            clip_id=f"{item['uid']}_{i}", video_uid=item["uid"], narration=text, source="s", time_us=1, start_us=0,
            stop_us=2, frames=[b"jpeg"], frame_times_us=np.zeros(1, np.int64), frame_height=2, frame_width=2,
            audio=np.zeros(10, np.int16),
        )  # fmt: skip


@pytest.fixture
def clips(tmp_path) -> pathlib.Path:
    """A data set with `TEXTS` in its training split and another word in its test split."""
    folder = tmp_path / "clips"
    folder.mkdir()
    parts = {"train": TEXTS, "test": ["#C C juggles"]}
    tasks = [shards.ShardTask(split, 0, 1, ({"uid": split, "texts": texts},), len(texts)) for split, texts in parts.items()]
    reports = [shards.write_shard(task, str(folder), "clips", make_clips, {}) for task in tasks]
    info = records.ClipsInfo(
        name="clips", window_s=(0.5, 1.0), num_intervals=1, num_candidates=1, short_side_px=2, canvas_px=(2, 2),
        num_samples=10, verbs=[], nouns=[], splits={},
    )  # fmt: skip
    shards.finish(reports, folder, info, [], len(TEXTS) + 1)
    return folder


def test_pieces_are_the_commonest_neighbours_and_the_alphabet_breaks_ties():
    words = collections.Counter({"aab": 3, "aac": 2, "dd": 3, "q": 1})
    # a##a occurs 5 times; then dd and aa##b tie with 3; then comes aa##c.
    expected = ["##a", "##b", "##c", "##d", "a", "b", "c", "d", "q", "aa", "aab", "dd", "aac"]
    for size in (9, 10, 11, 12, 13, 100):
        assert vocabulary.learn_pieces(words, size) == expected[:size]
    assert vocabulary.learn_pieces(collections.Counter({"ab": 1}), 10) == ["##b", "a", "b"]  # once is too rare
    repeated = vocabulary.learn_pieces(collections.Counter({"aaaa": 2}), 10)
    assert repeated == ["##a", "a", "##aa", "##aaa", "aaaa"]  # a##a##a##a, a##aa##a, a##aaa
    with pytest.raises(ValueError, match="8 tokens are too few: the narrations' characters alone need 9, raise"):
        vocabulary.learn_pieces(words, 8)


def test_another_process_with_other_hashes_gives_the_same_ids():
    code = f"from data_prep import vocabulary as v; print(sorted(v.train_vocabulary({TEXTS}, 100).get_vocab().items()))"
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


def test_equal_texts_in_any_order_give_equal_ids_and_decode_to_themselves():
    one, two = vocabulary.train_vocabulary(TEXTS, 120), vocabulary.train_vocabulary(TEXTS[::-1], 120)
    assert one.get_vocab() == two.get_vocab()
    assert len(one) <= 120
    for text in TEXTS:
        ids = one(text)["input_ids"]
        assert (ids[0], ids[-1]) == (one.cls_token_id, one.sep_token_id)
        assert one.unk_token_id not in ids
        assert one.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_only_training_narrations_count_and_the_saved_folder_loads(clips, tmp_path, capsys):
    assert sorted(vocabulary.read_texts(clips)) == sorted(TEXTS)
    vocabulary.main(["--clips", str(clips), "--out", str(tmp_path / "v"), "--size", "100"])
    assert f"from {len(TEXTS)} narrations" in capsys.readouterr().out
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "v")
    assert loaded.get_vocab() == vocabulary.train_vocabulary(TEXTS, 100).get_vocab()
    assert "j" not in loaded.get_vocab()  # only in the test split's "juggles"


def test_what_it_cannot_do_is_one_line_and_status_2(clips, tmp_path, capsys):
    (tmp_path / "file").touch()
    for args, words in (
        (["--clips", str(tmp_path / "absent"), "--out", str(tmp_path / "v")], "no data folder"),
        (["--clips", str(tmp_path), "--out", str(tmp_path / "v")], "holds no clips.json"),
        (["--clips", str(clips), "--out", str(tmp_path / "v"), "--size", "10"], "--size must be at least 64, got 10"),
        (["--clips", str(clips), "--out", str(tmp_path / "file")], "File exists"),
    ):
        with pytest.raises(SystemExit) as ended:
            vocabulary.main(args)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1, err
        assert words in err
