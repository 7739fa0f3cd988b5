"""SoundWorld: deterministic, varied, laid out as Ego4D, and hard in the way the paper's data is."""

import collections
import hashlib

import av
import numpy as np
import pytest

from data_prep.soundworld import annotate, materials, plan, taxonomy, video_file

VIDEOS = [plan.plan_video(0, i, 60.0, 112) for i in range(160)]


def labelled():
    """Returns (verb, label, segment) of every labelled action."""
    rows = []
    for video in VIDEOS:
        rng = np.random.default_rng([video.seed, 2])
        seen = set()
        for line in annotate.narrate(video):
            segment = video.segments[line.segment]
            if segment.wearer and line.segment not in seen:
                seen.add(line.segment)
                rows.append((segment.verb, int(sum(annotate._votes(segment, rng)) >= 2), segment))
    return rows


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    video = plan.plan_video(3, 1, 8.0, 64)
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        video_file.write_video(video, str(tmp_path / name), [])
        digests.append(hashlib.sha256((tmp_path / name / f"{video.uid}.mp4").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_video_files_have_the_streams_the_plan_says(tmp_path):
    late = next(v for v in (plan.plan_video(0, i, 8.0, 64) for i in range(400)) if v.audio_start_s > 0 and v.has_audio)
    mute = next(v for v in (plan.plan_video(0, i, 8.0, 64) for i in range(400)) if not v.has_audio)
    for video in (late, mute):
        video_file.write_video(video, str(tmp_path), [])
    with av.open(str(tmp_path / f"{late.uid}.mp4")) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert (picture.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        assert picture.average_rate == late.fps
        assert sound.codec_context.sample_rate == late.sample_rate_hz
        assert float(sound.start_time * sound.time_base) == pytest.approx(late.audio_start_s, abs=0.03)
    with av.open(str(tmp_path / f"{mute.uid}.mp4")) as container:
        assert not container.streams.audio


def test_formats_regions_and_distractors_all_occur():
    assert {v.fps for v in VIDEOS} == {25, 30}
    assert {v.sample_rate_hz for v in VIDEOS} == {44100, 48000}
    assert {v.num_channels for v in VIDEOS} == {1, 2}
    assert 0 < sum(not v.has_audio for v in VIDEOS) < 20
    regions = collections.Counter(s.region for v in VIDEOS for s in v.segments)
    assert set(regions) == {"I", "II", "III", "IV"}
    assert min(regions.values()) > 100
    assert {d.kind for v in VIDEOS for d in v.distractors} == set(plan.DISTRACTORS)


def test_verbs_nouns_and_pairs_have_a_long_tail():
    assert len(taxonomy.VERBS) >= 16
    assert len(taxonomy.NOUNS) >= 16
    counts = collections.Counter((s.verb, s.noun) for v in VIDEOS for s in v.segments)
    assert len(counts) > 100
    shares = np.sort(list(counts.values()))[::-1] / sum(counts.values())
    assert shares[: len(shares) // 5].sum() > 0.45  # the commonest fifth
    assert shares[len(shares) // 2 :].sum() < 0.25  # the rarer half


def test_about_54_percent_sound_and_the_same_pair_sounds_in_one_clip_and_not_in_another():
    rows = labelled()
    assert np.mean([label for _, label, _ in rows]) == pytest.approx(0.54, abs=0.03)
    by_pair = collections.defaultdict(set)
    for _, label, segment in rows:
        by_pair[segment.verb, segment.noun].add(label)
    assert np.mean([len(labels) == 2 for labels in by_pair.values()]) > 0.7


def test_sounding_rates_reach_from_a_tenth_to_nine_tenths_but_most_lie_round_the_mean():
    by_verb = collections.defaultdict(list)
    for verb, label, _ in labelled():
        by_verb[verb].append(label)
    rates = np.array([np.mean(labels) for labels in by_verb.values()])
    assert rates.min() < 0.2
    assert rates.max() > 0.8
    assert np.mean(np.abs(rates - 0.54) < 0.2) > 0.7


def test_materials_can_be_told_apart_by_ear_but_not_perfectly():
    accuracy, commonest = materials.held_out_accuracy(num_videos=16, seed=0)
    assert accuracy > commonest + 0.2
    assert accuracy < 0.95
