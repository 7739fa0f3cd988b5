"""Moments are ranked by a query: by the right cosine, without overlaps, and in files that say where to look."""

import csv
import dataclasses

import numpy as np
import pytest

from mc3_jax.evals import moments as moments_lib

UNIT = np.eye(4, dtype=np.float32)


def make(audio, video, starts_s, uids) -> moments_lib.Moments:
    start_us = (1e6 * np.array(starts_s)).astype(np.int64)
    names = np.array([f"{uid}_{start}" for uid, start in zip(uids, starts_s, strict=True)])
    return moments_lib.Moments(
        np.float32(audio), np.float32(video), names, np.array(uids), start_us, start_us + 1_500_000
    )


def turned(cosine: float, towards: int, away: int) -> np.ndarray:
    """Returns a unit vector with this cosine to axis `towards`, the rest along axis `away`."""
    return cosine * UNIT[towards] + np.sqrt(1 - cosine**2) * UNIT[away]


@pytest.fixture
def moments() -> moments_lib.Moments:
    """Four moments of a video; cosines with axis 0: sound 0.9, 0.1, 0.5, 0.3, pictures 0.2, 0.8, 0.6, 0.3."""
    audio = [turned(c, 0, 1) for c in (0.9, 0.1, 0.5, 0.3)]
    video = [turned(c, 0, 2) for c in (0.2, 0.8, 0.6, 0.3)]
    return make(audio, video, [0, 10, 20, 30], ["v", "v", "v", "v"])


@pytest.mark.parametrize(
    ("by", "order", "best"),
    [("audio", [0, 2, 3, 1], 0.9), ("video", [1, 2, 3, 0], 0.8), ("both", [0, 2, 1, 3], 0.55)],
)
def test_moments_are_ranked_by_sound_pictures_or_both(moments, by, order, best):
    hits = moments_lib.find(moments, UNIT[0], by, 10)
    assert [hit.row for hit in hits] == order
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert hits[0].score == pytest.approx(best)
    of_first = next(hit for hit in hits if hit.row == 0)
    assert (of_first.audio, of_first.video) == (pytest.approx(0.9), pytest.approx(0.2))
    assert of_first.agreement == pytest.approx(0.18)


def test_without_a_query_moments_are_ranked_by_the_agreement_of_sound_and_pictures(moments):
    hits = moments_lib.find(moments, None, "both", 2)
    assert [(hit.row, hit.audio, hit.video) for hit in hits] == [(2, None, None), (0, None, None)]
    assert [hit.score for hit in hits] == pytest.approx([0.30, 0.18])


def test_a_hit_has_no_cosine_with_a_tower_that_was_never_trained(moments, tmp_path):
    hits = moments_lib.find(moments, UNIT[0], "video", 2, ("audio",))
    assert [(hit.row, hit.audio, hit.agreement) for hit in hits] == [(1, None, None), (2, None, None)]
    assert [hit.video for hit in hits] == pytest.approx([0.8, 0.6])
    assert moments_lib._describe_cosines(hits[0]) == "frames 0.800"
    of_all = moments_lib.find(moments, UNIT[0], "video", 2, ("text",))
    assert moments_lib._describe_cosines(of_all[0]) == "sound 0.100, frames 0.800, sound with frames 0.080"
    assert moments_lib._describe_cosines(moments_lib.find(moments, None, "both", 1)[0]) == ""
    moments_lib.write_csv(tmp_path / "hits.csv", moments, {"x": hits})
    with (tmp_path / "hits.csv").open(newline="") as f:
        row = next(csv.DictReader(f))
    assert (row["audio"], row["video"], row["audio_video"]) == ("", "0.8000", "")


def test_only_the_best_of_moments_that_overlap_in_a_video_is_found():
    cosines = [0.5, 0.9, 0.6, 0.8, 0.7]
    vectors = [turned(c, 0, 1) for c in cosines]
    # The second overlaps the first and the third and is better. The fourth begins where it ends; the last is another video's.
    found = make(vectors, vectors, [0.0, 1.0, 2.0, 2.5, 1.0], ["a", "a", "a", "a", "b"])
    assert [hit.row for hit in moments_lib.find(found, UNIT[0], "both", 10)] == [1, 3, 4]
    assert [hit.row for hit in moments_lib.find(found, UNIT[0], "both", 2)] == [1, 3]


def test_a_file_is_reused_only_for_the_same_clips_and_model(moments, tmp_path):
    path = tmp_path / moments_lib.FILE
    assert moments_lib.load(path, "x") is None
    moments_lib.save(path, moments, "x")
    found = moments_lib.load(path, "x")
    for field in dataclasses.fields(moments):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(moments, field.name))
    assert moments_lib.load(path, "y") is None
    path.write_bytes(path.read_bytes()[:-200])
    assert moments_lib.load(path, "x") is None
    np.savez(path, made_of=np.array("x"), audio=np.array([{}], object))
    assert moments_lib.load(path, "x") is None  # pickled arrays are not read


@pytest.mark.parametrize(
    ("time_us", "shown"),
    [(0, "0:00.0"), (1_449_999, "0:01.4"), (59_960_000, "1:00.0"), (754_300_000, "12:34.3"), (3_661_000_000, "1:01:01.0")],
)
def test_a_clock_shows_a_tenth_of_a_second(time_us, shown):
    assert moments_lib.clock(time_us) == shown


def test_a_table_of_hits_says_where_to_look(moments, tmp_path):
    found = {"#C C chops, fast": moments_lib.find(moments, UNIT[0], "both", 2)}
    found[""] = moments_lib.find(moments, None, "both", 1)
    moments_lib.write_csv(tmp_path / "hits.csv", moments, found)
    with (tmp_path / "hits.csv").open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [(row["query"], row["rank"], row["clip_id"]) for row in rows] == [
        ("#C C chops, fast", "1", "v_0"), ("#C C chops, fast", "2", "v_20"), ("", "1", "v_20")
    ]  # fmt: skip
    assert (rows[1]["start_s"], rows[1]["stop_s"], rows[1]["audio_video"]) == ("20.000", "21.500", "0.3000")
    assert (rows[0]["audio"], rows[2]["audio"]) == ("0.9000", "")
