"""SoundWorld is deterministic, varied, laid out as Ego4D, and difficult in the same way as the paper's data."""

import ast
import collections
import concurrent.futures
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import av
import librosa
import numpy as np
import pytest
import scipy.io.wavfile
import soxr

from data_prep import narrations
from data_prep.soundworld import __main__ as soundworld, annotate, materials, plan, sound, taxonomy, video_file
from data_prep.soundworld.voices import RATE_HZ
from data_prep.sources import narration_json, sounding_labels
from mc3_jax.evals import controls, metrics
from tests import world
from tests.data_prep import test_verify

# librosa imports a module that Python 3.13 has removed.
pytestmark = pytest.mark.filterwarnings("ignore:.*slated for removal in Python 3.13:DeprecationWarning")

ESC10 = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "esc10" / "audio"

VIDEOS = [plan.plan_video(0, i, 60.0, 112) for i in range(160)]


def labelled():
    """Returns (verb, label, segment) of every labelled action."""
    return [(segment.verb, label, segment) for video in VIDEOS for _, label, segment in labelled_lines(video)]


def labelled_lines(video: plan.Video) -> list[tuple[float, int, plan.Segment]]:
    """Returns (time, label, segment) of a video's labelled narrations."""
    rng, rows, seen = np.random.default_rng([video.seed, 2]), [], set()
    for line in annotate.narrate(video):
        segment = video.segments[line.segment]
        if segment.wearer and line.segment not in seen:
            seen.add(line.segment)
            rows.append((line.timestamp_s, int(sum(annotate._votes(segment, rng)) >= 2), segment))
    return rows


def labelled_clips(seed: int, index: int) -> tuple[list, list, list, list]:
    """Returns (labels, verbs, loudness, onset strength) of the labelled clips of video `index`; no frames are rendered."""
    video = plan.plan_video(seed, index, 60.0, 112)
    wave = sound.synthesize(video, [])
    labels, verbs, clips = [], [], []
    if wave is not None:
        wave = soxr.resample(wave.mean(0).astype(np.float32), video.sample_rate_hz, 16_000, quality="HQ")
        for time_s, label, segment in labelled_lines(video):
            at = round((time_s - 0.5 - video.audio_start_s) * 16_000)
            if at >= 0 and at + 24_000 <= len(wave):
                labels.append(label)
                verbs.append(segment.verb)
                clips.append(np.clip(np.round(wave[at : at + 24_000] * 32768), -32768, 32767).astype(np.int16))
    if not clips:
        return [], [], [], []
    audio = np.stack(clips)
    return labels, verbs, controls.loudness(audio).tolist(), controls.onset_strength(audio, 16_000).tolist()


@pytest.fixture(scope="module")
def control_scores() -> dict[int, list[np.ndarray]]:
    """Seed of a world → [labels, verbs, loudness, onset strength] of its labelled test clips, for three worlds.

    All test videos of the first world, which is the demo's, and every third of the others.
    """
    indices = [i for i in range(160) if plan.split_of(i) == "test"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # two processes already use two cores
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = {
                seed: [pool.submit(labelled_clips, seed, i) for i in indices[:: 1 if seed == 0 else 3]]
                for seed in (0, 1, 2)
            }
    return {
        seed: [np.concatenate(column) for column in zip(*(job.result() for job in part), strict=True)]
        for seed, part in jobs.items()
    }


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


@pytest.mark.slow
def test_materials_can_be_told_apart_by_ear_but_not_perfectly():
    accuracy, commonest = materials.held_out_accuracy(num_videos=16, seed=0)
    assert accuracy > commonest + 0.2
    assert accuracy < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_control_alone_tells_the_label(control_scores, seed):
    labels, verbs, loudness, onsets = control_scores[seed]
    labels, verbs = labels.astype(int), verbs.astype(int)
    assert len(labels) > (800 if seed == 0 else 280)  # so standard errors are 0.02 and 0.03
    assert 0.42 <= metrics.roc_auc(labels, loudness) <= 0.58
    assert 0.42 <= metrics.roc_auc(labels, onsets) <= 0.58
    assert controls.verb_prior_roc_auc(verbs, labels) <= 0.72


def test_an_actions_blows_are_heard_when_the_hand_or_the_thing_is_down():
    hop = 48  # 2 ms
    verbs = collections.Counter()
    for segment in (s for v in VIDEOS[:12] for s in v.segments):
        verb = taxonomy.VERBS[segment.verb]
        if verb.motion not in ("strike", "tap", "drop", "place"):
            continue
        # At most half the period of strikes, so that the neighbourhoods of two contacts don't overlap.
        reach = 0.06
        wave = np.pad(sound.isolated_action(segment).astype(np.float32), (2400, 0))
        flux = librosa.onset.onset_strength(y=wave, sr=RATE_HZ, hop_length=hop, n_fft=256, n_mels=32)
        heard_s = segment.start_s + (np.arange(len(flux)) * hop - 2400) / RATE_HZ
        fine_s = np.arange(segment.start_s, segment.stop_s, 0.0005)
        pose = segment.pose(fine_s)
        height = pose.right_y if verb.motion in ("strike", "tap") else pose.object_y  # y is downwards
        contacts = segment.contacts()
        assert contacts
        for at, _ in contacts if verb.motion in ("strike", "tap") else contacts[:1]:
            near = np.abs(heard_s - at) < reach
            assert heard_s[near][flux[near].argmax()] == pytest.approx(at, abs=0.004), (verb.name, at)
            near = np.abs(fine_s - at) < reach
            if verb.motion == "place":  # heard in the last part of its way down to the table
                assert height[near].max() - height[np.abs(fine_s - at).argmin()] < 0.03
            else:
                assert height[np.abs(fine_s - at).argmin()] == pytest.approx(height[near].max(), abs=0.002)
            verbs[verb.name] += 1
    assert {"cut", "hit", "tap", "drop", "put"} == set(verbs)
    assert min(verbs.values()) > 8


@pytest.fixture
def recordings(tmp_path) -> list[str]:
    """Paths of two recordings: whistles of 3.3 and 5.2 kHz, frequencies at which nothing in SoundWorld sounds."""
    paths = []
    for hz, rate in ((3300, 22_050), (5200, 44_100)):
        times = np.arange(int(1.5 * rate)) / rate
        paths.append(str(tmp_path / f"{hz}.wav"))
        scipy.io.wavfile.write(paths[-1], rate, np.round(9000 * np.sin(2 * np.pi * hz * times)).astype(np.int16))
    return paths


def silent(video: plan.Video) -> plan.Video:
    """Returns the video without any sound source."""
    segments = [dataclasses.replace(s, action_db=None, machine="") for s in video.segments]
    return dataclasses.replace(video, segments=segments, distractors=[])


def share_of_whistles(wave: np.ndarray, rate: int) -> np.ndarray:
    """Returns the share of the whistles in the energy of each second."""
    seconds = wave[0][: len(wave[0]) // rate * rate].reshape(-1, rate)
    power = np.abs(np.fft.rfft(seconds * np.hanning(rate))) ** 2  # bins of 1 Hz
    whistles = sum(power[:, hz - 20 : hz + 20].sum(1) for hz in (3300, 5200))
    return whistles / power[:, 60:].sum(1)


def test_ambience_is_mixed_in_quietly_and_deterministically(recordings):
    video = plan.plan_video(0, 0, 20.0, 64)
    plain, first, second = (sound.synthesize(video, files) for files in ([], recordings, recordings))
    assert first.shape == plain.shape
    np.testing.assert_array_equal(first, second)
    assert share_of_whistles(plain, video.sample_rate_hz).max() < 0.1
    share = share_of_whistles(first, video.sample_rate_hz)
    assert np.median(share) > 3 * np.median(share_of_whistles(plain, video.sample_rate_hz))
    heard = [s for s in video.segments if s.action_db is not None and not s.drowned]
    assert heard
    middles = [int(s.narration_s) for s in heard]
    assert np.median(share[middles]) < 0.5  # the action is louder


def test_ambience_is_still_there_when_the_world_is_silent(recordings):
    video = silent(plan.plan_video(0, 0, 20.0, 64))
    assert share_of_whistles(sound.synthesize(video, []), video.sample_rate_hz).max() < 0.05
    share = share_of_whistles(sound.synthesize(video, recordings), video.sample_rate_hz)
    assert share.min() > 0.5


@pytest.mark.skipif(not ESC10.is_dir(), reason=f"no folder {ESC10}")
def test_real_recordings_are_heard_in_a_silent_world():
    files = sorted(str(path) for path in ESC10.glob("*.ogg"))[:4]
    video = silent(plan.plan_video(0, 0, 12.0, 64))
    plain, real = sound.synthesize(video, []), sound.synthesize(video, files)
    np.testing.assert_array_equal(real, sound.synthesize(video, files))
    size = min(plain.shape[1], real.shape[1])
    assert np.abs(real[:, :size] - plain[:, :size]).mean() > 0.3 * np.abs(plain).mean()


def make_world(folder, *args) -> None:
    soundworld.main(
        [
            "--out",
            str(folder),
            "--videos",
            "1",
            "--video_seconds",
            "8",
            "--short_side",
            "64",
            "--num_workers",
            "1",
            *args,
        ]
    )


def sound_of(folder) -> np.ndarray:
    (path,) = (folder / "v2" / "video_540ss").glob("*.mp4")
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


@pytest.mark.slow
def test_the_command_mixes_a_folder_in(tmp_path, recordings, capsys):
    shutil.move(recordings[1], tmp_path / "sub.WAV")
    for name, args in (("plain", []), ("mixed", ["--ambience", str(tmp_path)])):
        make_world(tmp_path / name, *args)
        assert capsys.readouterr().out.startswith("1 videos, ")
    assert not np.array_equal(sound_of(tmp_path / "plain"), sound_of(tmp_path / "mixed"))
    assert json.loads((tmp_path / "mixed" / "ego4d.json").read_text())["ambience"] == ["3300.wav", "sub.WAV"]


def test_what_the_command_cannot_do_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.wav").write_text("no sound")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "ego4d.json").write_text('{"videos": []}')
    make_world(tmp_path / "world")
    capsys.readouterr()
    for out, args, words in (
        ("x", ["--ambience", str(tmp_path / "none")], "--ambience: no .wav, .ogg, .flac, .mp3 files in"),
        ("y", ["--ambience", str(tmp_path / "bad")], "a.wav can't be read as a recording"),
        ("foreign", [], "ego4d.json does not belong to a SoundWorld: choose another folder"),
        ("world", ["--seed", "1"], "holds a world with another seed, length, size or ambience"),
        ("world", ["--video_seconds", "9"], "holds a world with another seed, length, size or ambience"),
        ("world", ["--short_side", "66"], "holds a world with another seed, length, size or ambience"),
    ):
        with pytest.raises(SystemExit) as ended:
            make_world(tmp_path / out, *args)
        assert ended.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        assert words in line
    for args in (["--videos", "0"], ["--short_side", "65"], ["--video_seconds", "nan"], ["--seed", "-1"],
                 ["--num_workers", "-1"], ["--ambience", "absent"]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            make_world(tmp_path / "x", *args)
        assert ended.value.code == 2
        assert f"error: {args[0]}" in capsys.readouterr().err or args[0] in ("--seed", "--num_workers")


@pytest.mark.slow
def test_a_world_can_grow(tmp_path):
    for videos in ("1", "2"):
        make_world(tmp_path, "--videos", videos)
        entries = json.loads((tmp_path / "ego4d.json").read_text())["videos"]
        assert sorted(p.stem for p in (tmp_path / "v2" / "video_540ss").glob("*.mp4")) == sorted(
            entry["video_uid"] for entry in entries
        )


INTERRUPTED = """
import signal, sys
from data_prep.soundworld import __main__ as soundworld
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
    soundworld.main(["--out", sys.argv[1], "--videos", "50", "--num_workers", "2"])
"""


def test_ctrl_c_ends_all_processes_with_one_line_while_they_still_start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(tmp_path / "world")]
    where = {"cwd": world.ROOT, "env": os.environ | {"PYTHONPATH": str(world.ROOT)}}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **where) as process:
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        test_verify.wait_until(lambda: len(children.read_text().split()) >= 2)  # multiprocessing's tracker and a worker
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.communicate(timeout=30) == (None, "interrupted: run the same command again to continue\n")
    assert process.returncode == 130
    test_verify.wait_until(lambda: not test_verify.is_group_alive(process.pid))


def test_by_default_there_are_as_many_processes_as_cores_that_it_may_use(tmp_path, monkeypatch):
    asked = []

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, num_workers, mp_context):
            asked.append(num_workers)
            super().__init__(num_workers)

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(video_file, "write_video", lambda video, folder, ambience: 1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})
    soundworld.main(["--out", str(tmp_path), "--videos", "2"])
    assert asked == [3]


@pytest.fixture(scope="module")
def annotations(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("annotations")
    annotate.write_annotations(folder, VIDEOS, 0)
    return folder


@pytest.mark.parametrize("num_bytes", [1_000, 20_000])
def test_a_start_that_cannot_write_its_annotations_leaves_the_world_as_it_was(tmp_path, num_bytes):
    for num_videos in (4, 40):
        # Files that are too large fail as on a full disk, in the middle.
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                annotate.write_annotations(tmp_path, VIDEOS[:num_videos], 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        annotate.check_same_world(tmp_path, VIDEOS[:40], 0, [])
        assert not list(tmp_path.rglob("*.tmp"))
        annotate.write_annotations(tmp_path, VIDEOS[:4], 0)


def test_narrations_have_ego4ds_shape_and_its_slips(annotations):
    content = json.loads((annotations / "v2" / "annotations" / "narration.json").read_text())["videos"]
    assert set(content) == {video.uid for video in VIDEOS}
    whole = {f"narration_pass_{n}" for n in (1, 2)}
    assert {frozenset(video) for video in content.values()} >= {frozenset(whole)}
    assert all(set(video) <= whole and video for video in content.values())
    lines = [line for video in content.values() for part in video.values() for line in part["narrations"]]
    for video in content.values():
        for part in video.values():
            assert set(part) == {"narrations", "summaries"}
            times = [line["timestamp_sec"] for line in part["narrations"]]
            assert times == sorted(times)
    for line in lines:
        assert set(line) == {"timestamp_sec", "timestamp_frame", "narration_text", "annotation_uid"}
        assert line["timestamp_frame"] == int(line["timestamp_sec"] * 30)
    assert len({line["annotation_uid"] for line in lines}) == len(lines)
    speakers = collections.Counter(narrations.who(line["narration_text"]) for line in lines)
    assert speakers["wearer"] > 0.85 * len(lines)
    assert speakers["other"] > 0.02 * len(lines)
    assert speakers["unsure"] > 0.005 * len(lines)
    assert speakers["unknown"] == 0
    slips = collections.Counter(line["narration_text"][:4] for line in lines)
    assert {"#C C", "#c C", "#C c"} < set(slips)
    assert any(text.startswith("#C  C") or text.startswith("# C C") for text in (n["narration_text"] for n in lines))
    # The converter's own reader finds them all.
    found = narration_json.read(annotations / "v2" / "annotations" / "narration.json")
    assert len({n.clip_id for n in found}) == len(found) == len(lines)


def test_taxonomies_list_every_form_and_narrations_are_spelt_with_them_but_for_slips(annotations):
    folder = annotations / "v2" / "annotations"
    verbs, nouns = (narrations.read_taxonomy(folder / f"narration_{kind}_taxonomy.csv") for kind in ("verb", "noun"))
    for found, entries in ((verbs, taxonomy.VERBS), (nouns, taxonomy.NOUNS)):
        assert [label.split("_(")[0] for label in found.labels] == [e.name for e in entries]
        assert all(found.forms[(form,)] == i for i, e in enumerate(entries) for form in (e.name, *e.forms))
    with (folder / "narration_verb_taxonomy.csv").open(newline="") as f:
        assert all(isinstance(ast.literal_eval(row["group"]), list) for row in csv.DictReader(f))
    truth = json.loads((annotations / "truth.json").read_text())
    right = []
    for n in narration_json.read(folder / "narration.json"):
        segment = truth[n.video_uid]["segments"][truth[n.video_uid]["narrations"][n.annotation_uid]]
        ids = narrations.find_verb_and_noun(n.text, verbs, nouns)
        right.append(ids == (segment["verb"], segment["noun"]))
    assert 0.95 < np.mean(right) < 1.0  # typos occur and hide about one in thirty


def test_labels_have_three_votes_for_each_wearers_action_outside_training(annotations):
    folder = annotations / "v2" / "annotations"
    splits = narrations.read_splits(folder / "splits.csv")
    assert splits == {video.uid: video.split for video in VIDEOS}
    with (folder / "sounding_labels.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    texts = {(n.video_uid, n.annotation_uid): n for n in narration_json.read(folder / "narration.json")}
    for row in rows:
        assert splits[row["video_uid"]] != "train"
        assert {row["vote_1"], row["vote_2"], row["vote_3"]} <= {"0", "1"}
        line = texts[row["video_uid"], row["annotation_uid"]]
        assert (line.text, line.source) == (row["narration_text"], row["narration_pass"])
        assert line.time_s == float(row["timestamp_sec"])
    split_votes = np.mean([len({row["vote_1"], row["vote_2"], row["vote_3"]}) == 2 for row in rows])
    assert 0.05 < split_votes < 0.5  # annotators sometimes disagree
    truth = json.loads((annotations / "truth.json").read_text())
    judged = collections.Counter(
        (row["video_uid"], truth[row["video_uid"]]["narrations"][row["annotation_uid"]]) for row in rows
    )
    expected = {(v.uid, i) for v in VIDEOS if v.split != "train" for i, s in enumerate(v.segments) if s.wearer}
    assert set(judged) == expected
    assert set(judged.values()) == {1}
    agree = []
    for n in sounding_labels.read(folder / "sounding_labels.csv"):
        segment = truth[n.video_uid]["segments"][truth[n.video_uid]["narrations"][n.annotation_uid]]
        agree.append(n.label == (segment["region"] == "I"))
    assert 0.9 < np.mean(agree) < 1.0


def test_metadata_and_truth_say_what_the_plan_says(annotations):
    videos = json.loads((annotations / "ego4d.json").read_text())["videos"]
    metadata = {video["video_uid"]: video for video in videos}
    truth = json.loads((annotations / "truth.json").read_text())
    assert set(metadata) == set(truth) == {video.uid for video in VIDEOS}
    for video in VIDEOS:
        entry, told = metadata[video.uid]["video_metadata"], truth[video.uid]
        assert metadata[video.uid]["duration_sec"] == video.duration_s
        assert (entry["fps"], entry["display_resolution_width"]) == (video.fps, video.width_px)
        assert (entry["audio_start_sec"] is None) == (not video.has_audio) == (entry["audio_duration_sec"] is None)
        assert [s["region"] for s in told["segments"]] == [s.region for s in video.segments]
        assert [d["kind"] for d in told["distractors"]] == [d.kind for d in video.distractors]
        assert set(told["narrations"].values()) == set(range(len(video.segments)))
        assert told["split"] == video.split
