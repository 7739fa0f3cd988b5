"""The converter end to end on a small SoundWorld: every narration becomes a clip or a reject, and both hold what is true."""

import csv
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import soxr

from data_prep import ego4d, narrated, narrations, pipeline, shards
from data_prep.soundworld import annotate, plan, sound, taxonomy, video_file
from data_prep.sources import narration_json
from data_prep.windows import frame_times
from mc3_jax.data import records
from tests import world as commands
from tests.data_prep.converted import Converted

# In this world of eight videos the fifth has no sound, the third's begins late, and all splits and frame rates occur.
SEED, NUM_VIDEOS = 438, 8
VIDEOS = [plan.plan_video(SEED, i, 20.0, 64) for i in range(NUM_VIDEOS)]
MUTE, LATE = VIDEOS[4], VIDEOS[2]
DOUBLE = "is also in the label list"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("ego4d")
    (folder / "v2" / "video_540ss").mkdir(parents=True)
    annotate.write_annotations(folder, VIDEOS, SEED)
    for video in VIDEOS:
        video_file.write_video(video, str(folder / "v2" / "video_540ss"), [])
    return folder


def convert(root: pathlib.Path, folder: pathlib.Path, *args) -> Converted:
    """Returns the data set that the command makes in this process, with one worker."""
    ego4d.main(["--root", str(root), "--out", str(folder), "--num_workers", "1", "--short_side", "64", *map(str, args)])
    return Converted(root, folder)


@pytest.fixture(scope="module")
def converted(root, tmp_path_factory) -> Converted:
    """The data set that the command makes with two worker processes."""
    folder = tmp_path_factory.mktemp("clips") / "out"
    done = commands.run("data_prep.ego4d", "--root", root, "--out", folder, "--short_side", "64", "--num_workers", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    result = Converted(root, folder)
    counts = ", ".join(f"{len(clips)} {name}" for name, clips in result.splits.items())
    total = len(result.clips) + len(result.rejected)
    assert done.stdout.startswith(f"{total} annotations: {counts}\nrejected {len(result.rejected)} (rejected.jsonl): ")
    assert "positive" in done.stdout
    return result


@pytest.fixture
def copy(root, tmp_path) -> pathlib.Path:
    """A copy of the world that a test may damage: copied annotations and links to the videos."""
    folder = tmp_path / "copy"
    shutil.copytree(root / "v2" / "annotations", folder / "v2" / "annotations")
    shutil.copy(root / "ego4d.json", folder / "ego4d.json")
    videos = folder / "v2" / "video_540ss"
    videos.mkdir()
    for path in (root / "v2" / "video_540ss").iterdir():
        (videos / path.name).symlink_to(path)
    return folder


def video_path(root: pathlib.Path, video: plan.Video) -> pathlib.Path:
    return root / "v2" / "video_540ss" / f"{video.uid}.mp4"


def id_of(uid: str, annotation: str, time_s: float, text: str) -> str:
    words = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
    return f"{uid}_{annotation}_{round(time_s * 1e6):011d}_{words[:8]}"


def all_ids(root: pathlib.Path) -> list[str]:
    """Returns the clip ids of all narrations, read from the JSON itself."""
    videos = json.loads((root / "v2" / "annotations" / "narration.json").read_text())["videos"]
    return [
        id_of(uid, line["annotation_uid"], line["timestamp_sec"], line["narration_text"])
        for uid, video in videos.items()
        for part in video.values()
        for line in part["narrations"]
    ]


def labels_by_id(root: pathlib.Path) -> dict[str, int]:
    with (root / "v2" / "annotations" / "sounding_labels.csv").open(newline="") as f:
        return {
            id_of(r["video_uid"], r["annotation_uid"], float(r["timestamp_sec"]), r["narration_text"]): int(
                int(r["vote_1"]) + int(r["vote_2"]) + int(r["vote_3"]) >= 2
            )
            for r in csv.DictReader(f)
        }


def test_every_narration_ends_as_a_clip_or_as_a_row_with_its_reason(converted):
    out = [*converted.clips, *(row["clip_id"] for row in converted.rejected)]
    labels = labels_by_id(converted.root)
    assert sorted(out) == sorted([*all_ids(converted.root), *labels])
    # Narrations in both files are listed twice: as a clip, or with the reason why not, and as a double.
    assert set(labels) <= set(all_ids(converted.root))
    doubles = [row["clip_id"] for row in converted.rejected if row["reason"] == DOUBLE]
    assert sorted(doubles) == sorted(labels)
    assert len(converted.clips) == sum(map(len, converted.splits.values())) > 30
    assert all(row["reason"] for row in converted.rejected)
    for name, split in converted.info.splits.items():
        assert split.num_clips == len(converted.splits[name])
        assert split.num_labelled == sum(c.label != records.UNKNOWN for c in converted.splits[name])
        assert split.num_positive == sum(c.label == 1 for c in converted.splits[name])


def test_a_video_without_audio_and_audio_that_begins_late_are_counted_not_filled_in(converted):
    assert converted.reasons(MUTE.uid)["no audio stream"] >= 5
    assert not [c for c in converted.clips.values() if c.video_uid == MUTE.uid]
    early = [s for s in LATE.segments if s.narration_s - 0.5 < LATE.audio_start_s - 0.1]
    assert early
    assert converted.reasons(LATE.uid)["audio does not cover the clip"] >= 1
    assert all(
        c.start_us > 1e6 * LATE.audio_start_s - 50_000 for c in converted.clips.values() if c.video_uid == LATE.uid
    )


def test_training_takes_the_wearers_narrations_and_the_other_splits_their_label_list_whole(converted):
    assert {narrations.who(c.narration) for c in converted.splits["train"]} == {"wearer"}
    assert {c.label for c in converted.splits["train"]} == {records.UNKNOWN}
    assert converted.reasons()["somebody else's action"] >= 1
    labels = labels_by_id(converted.root)
    labelled = {c.clip_id: c.label for name in ("validation", "test") for c in converted.splits[name]}
    rejected = {row["clip_id"] for row in converted.rejected}
    assert set(labels) == set(labelled) | (set(labels) & rejected)
    assert {row["reason"] for row in converted.rejected if row["clip_id"] in labels} <= {
        "audio does not cover the clip", "video does not cover the clip", DOUBLE,
    }  # fmt: skip


def test_labels_are_the_majority_of_the_votes(converted):
    labels = labels_by_id(converted.root)
    found = {c.clip_id: c.label for name in ("validation", "test") for c in converted.splits[name]}
    assert len(found) >= 10
    assert set(found.values()) == {0, 1}
    assert found == {clip_id: labels[clip_id] for clip_id in found}


def test_no_video_is_in_two_splits_and_all_are_where_the_file_says(converted):
    where = {name: {c.video_uid for c in clips} for name, clips in converted.splits.items()}
    assert all(where.values())
    for video in VIDEOS:
        homes = [name for name, uids in where.items() if video.uid in uids]
        assert homes == ([video.split] if video is not MUTE else [])


def test_verb_and_noun_are_the_true_ones_where_the_narrator_made_no_slip(converted):
    truth = json.loads((converted.root / "truth.json").read_text())
    assert converted.info.verbs[0].startswith("wash_(")
    num_right, num_slips = 0, 0
    for clip in converted.clips.values():
        segment = truth[clip.video_uid]["segments"][truth[clip.video_uid]["narrations"][clip.clip_id.split("_")[1]]]
        verb, noun = taxonomy.VERBS[segment["verb"]], taxonomy.NOUNS[segment["noun"]]
        words = clip.narration.lower().split()
        if set(words) & set(verb.forms) and set(words) & set(noun.forms):
            assert (clip.verb_id, clip.noun_id) == (segment["verb"], segment["noun"]), clip.narration
            num_right += 1
        else:
            num_slips += 1
    assert num_right > 30
    assert num_slips < 0.2 * num_right


def test_every_clip_holds_what_clips_json_promises(converted):
    assert converted.info.num_samples == 24_000
    assert (converted.info.num_intervals, converted.info.num_candidates) == (4, 4)
    assert converted.info.canvas_px[0] == 64
    rates = {v.uid: v.fps for v in VIDEOS}
    for clip in converted.clips.values():
        records.check(clip, converted.info)
        assert (clip.start_us, clip.stop_us) == (clip.time_us - 500_000, clip.time_us + 1_000_000)
        assert simplejpeg.decode_jpeg(clip.frames[0]).shape == (clip.frame_height, clip.frame_width, 3)
        wanted = np.array(frame_times(clip.start_us / 1e6, clip.stop_us / 1e6, 4, 4))
        shown = np.floor(wanted * rates[clip.video_uid] + 1e-4) / rates[clip.video_uid]
        np.testing.assert_allclose(clip.frame_times_us / 1e6, shown, atol=2e-6)


def test_a_clips_sound_is_the_videos_at_its_time(converted):
    for video in VIDEOS:
        mine = [c for c in converted.clips.values() if c.video_uid == video.uid]
        if not mine:
            continue
        wave = sound.synthesize(video, []).mean(0)
        whole = soxr.resample(wave.astype(np.float32), video.sample_rate_hz, 16_000, quality="HQ")
        late = 0.0 if video is not LATE else 17.0  # the muxer rounds the start of audio to 1 ms
        for clip in mine:
            at = round((clip.start_us / 1e6 - video.audio_start_s) * 16_000)
            part = whole[max(at, 0) : at + 24_000]
            size = 1 << 16
            product = np.fft.rfft(part, size) * np.fft.rfft(clip.audio[-len(part) :] / 32768.0, size).conj()
            lag = int(np.fft.irfft(product).argmax())
            lag -= size * (lag > size // 2)
            assert abs(lag) <= 1 + late, clip.clip_id


def test_one_worker_in_this_process_writes_the_same_shards(converted, tmp_path):
    again = convert(
        converted.root, tmp_path / "out", "--num_shards", sum(len(s.shards) for s in converted.info.splits.values())
    )
    assert {c: records.encode(a) for c, a in again.clips.items()} == {
        c: records.encode(a) for c, a in converted.clips.items()
    }
    assert again.rejected == converted.rejected


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_beams_portable_runner_makes_the_same_files(converted, tmp_path):
    portable = ("--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK")
    convert(converted.root, tmp_path / "out", *portable)
    assert content(tmp_path / "out") == content(converted.folder)


def test_parts_that_run_at_once_make_the_same_files_and_are_not_redone(converted, tmp_path, capsys):
    folder = tmp_path / "out"
    argv = ("--root", converted.root, "--out", folder, "--short_side", "64", "--num_workers", "1", "--part")
    command = [sys.executable, "-m", "data_prep.ego4d", *map(str, argv)]
    parts = [subprocess.Popen([*command, f"{i}/2"], cwd=commands.ROOT, stderr=subprocess.DEVNULL) for i in range(2)]
    assert [part.wait(timeout=100) for part in parts] == [0, 0]
    assert not (folder / "clips.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*array_record*")}
    assert len(before) == sum(len(split.shards) for split in converted.info.splits.values())
    convert(converted.root, folder)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert content(folder) == content(converted.folder)
    convert(converted.root, folder, "--part", "999/1000")
    assert f"part 999/1000: 0 of {len(before)} shards written" in capsys.readouterr().out
    assert content(folder) == content(converted.folder)


def test_a_dry_run_tells_what_is_to_be_done_and_writes_nothing(converted, copy, tmp_path, capsys):
    video_path(copy, VIDEOS[5]).unlink()
    ego4d.main(["--root", str(copy), "--out", str(tmp_path / "out"), "--num_workers", "2", "--dry_run"])
    told = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    early = {"somebody else's action", "narrator is unsure", "no label, but in the validation split",
             "no label, but in the test split", DOUBLE}  # fmt: skip
    late = [row for row in converted.rejected if row["reason"] not in early]
    assert f"clips: {len(converted.clips) + len(late)} (" in told
    num_bytes = sum(path.stat().st_size for path in (copy / "v2" / "video_540ss").iterdir())
    assert f"videos: {NUM_VIDEOS}, {num_bytes / 1e6:,.1f} MB to read, in {NUM_VIDEOS} shards" in told
    assert f"missing files: 1, e.g. {VIDEOS[5].uid}\n" in told
    assert f"rejected so far: {len(converted.rejected) - len(late)}\n" in told
    for reason, count in converted.reasons().items():
        assert (f"  {count} {reason}\n" in told) == (reason in early)
    assert re.search(r"\ndata set: about [\d.]+ MB\ntime: about [\d.]+ (s|min) on 2 cores\n$", told)
    assert re.search(r"\nlabelled: (\d+) \(0 train, [1-9]\d* validation, [1-9]\d* test\)\n", told)


def test_a_dry_run_of_a_part_is_about_the_part_and_one_that_would_be_refused_is(converted, capsys):
    argv = ["--root", str(converted.root), "--out", str(converted.folder), "--dry_run", "--num_workers", "1"]
    sums = []
    for part in (["--part", "0/2"], ["--part", "1/2"], []):
        ego4d.main([*argv, *part])
        told = capsys.readouterr().out
        assert told.startswith(f"part {part[1]}: " if part else "clips: ")
        sums.append([int(re.search(words, told)[1]) for words in (r"clips: (\d+)", r"videos: (\d+)", r"in (\d+) shards")])
    assert np.add(*sums[:2]).tolist() == sums[2]
    assert min(sums[0]) > 0
    ego4d.main([*argv, "--part", "999/1000"])
    assert capsys.readouterr().out == f"part 999/1000: 0 of {sums[2][2]} shards\n"
    with pytest.raises(SystemExit):
        ego4d.main([*argv, "--name", "other"])
    assert "holds the data set 'ego4d_clips'" in capsys.readouterr().err


def test_a_sample_of_the_training_clips_passes_over_videos_that_are_known_to_have_no_sound(root, copy, tmp_path, capsys):
    folder = ["--root", str(copy), "--out", str(tmp_path / "out"), "--dry_run", "--max_train_clips"]
    splits = write_splits(tmp_path, [v.uid for v in VIDEOS], "test")
    for video in (MUTE, VIDEOS[0]):
        splits.write_text(splits.read_text().replace(f"{video.uid},test", f"{video.uid},train"))
    num_sounding = sum(narrations.who(n.text) == "wearer" for n in lines_of(root, VIDEOS[0].uid))
    for num in (3, 1000):
        ego4d.main([*folder, str(num), "--splits", str(splits)])
        told = capsys.readouterr().out
        assert f" ({min(num, num_sounding)} train, " in told
        assert f"  {len(lines_of(root, MUTE.uid))} no audio stream\n" in told
        assert (f"  {num_sounding - num} not sampled\n" in told) == (num < num_sounding)
    (copy / "ego4d.json").write_text('{"videos": [3]}')
    with pytest.raises(SystemExit):
        ego4d.main([*folder, "3"])
    assert_one_line(capsys.readouterr().err, "ego4d.json, video 1 must be an object, got 3")


def lines_of(root: pathlib.Path, uid: str) -> list[narrations.Narration]:
    found = narration_json.read(root / "v2" / "annotations" / "narration.json")
    return [n for n in found if n.video_uid == uid]


def test_window_and_frame_counts_are_options(root, tmp_path):
    made = convert(root, tmp_path / "out", "--window", 0.25, 0.5, "--num_intervals", 3, "--num_candidates", 2)
    assert made.info.window_s == (0.25, 0.5)
    assert made.info.num_samples == 12_000
    assert (made.info.num_intervals, made.info.num_candidates) == (3, 2)
    rates = {v.uid: v.fps for v in VIDEOS}
    for clip in made.clips.values():
        records.check(clip, made.info)
        assert (clip.start_us, clip.stop_us) == (clip.time_us - 250_000, clip.time_us + 500_000)
        middles = (clip.start_us + 750_000 * (np.arange(3) + 0.5) / 3) / 1e6
        shown = np.floor(middles * rates[clip.video_uid] + 1e-4) / rates[clip.video_uid]
        np.testing.assert_allclose(clip.frame_times_us[1::2] / 1e6, shown, atol=2e-6)


def test_a_broken_a_mute_and_a_missing_video_cost_only_themselves(converted, copy, tmp_path):
    broken, missing = VIDEOS[0], VIDEOS[5]
    video_path(copy, broken).unlink()
    content = video_path(converted.root, broken).read_bytes()
    video_path(copy, broken).write_bytes(content[: len(content) // 3].replace(b"moov", b"zzzz"))
    video_path(copy, missing).unlink()
    made = convert(copy, tmp_path / "out")
    lost = {broken.uid, missing.uid}
    assert {c: records.encode(clip) for c, clip in made.clips.items()} == {
        c: records.encode(clip) for c, clip in converted.clips.items() if clip.video_uid not in lost
    }
    before = len([c for c in converted.clips.values() if c.video_uid == broken.uid])
    assert made.reasons(broken.uid)["video file can't be opened"] >= before > 3
    details = {r["detail"] for r in made.rejected if r["reason"] == "video file can't be opened"}
    assert details == {"Invalid data found when processing input"}
    assert made.reasons(missing.uid)["video file is missing"] > 3
    assert made.reasons(MUTE.uid) == converted.reasons(MUTE.uid)
    # Once the videos are there, a rerun cuts these and no others.
    untouched = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*validation*")}
    for video in (broken, missing):
        video_path(copy, video).unlink(missing_ok=True)
        video_path(copy, video).symlink_to(video_path(converted.root, video))
    again = convert(copy, tmp_path / "out")
    assert set(again.clips) == set(converted.clips)
    assert untouched == {p: p.stat().st_mtime_ns for p in untouched}


def test_odd_narrations_are_left_out_with_their_reasons_and_the_sums_still_hold(copy, tmp_path):
    path = copy / "v2" / "annotations" / "narration.json"
    content = json.loads(path.read_text())
    video = VIDEOS[0]
    lines = content["videos"][video.uid]["narration_pass_1"]["narrations"]
    odd = {
        "narration has no time": {"timestamp_sec": None, "narration_text": "#C C stirs", "annotation_uid": "x1"},
        "narration has no text": {"timestamp_sec": 5.0, "narration_text": None, "annotation_uid": "x2"},
        "narration is not valid Unicode": {
            "timestamp_sec": 5.0,
            "narration_text": "#C C \ud83d",
            "annotation_uid": "x3",
        },
        "narrator is unsure": {"timestamp_sec": 5.0, "narration_text": "#unsure", "annotation_uid": "x4"},
        "no tag says who acts": {"timestamp_sec": 5.0, "narration_text": "stirs", "annotation_uid": "x5"},
        "same narration twice": next(line for line in lines if narrations.who(line["narration_text"]) == "wearer"),
        "audio does not cover the clip": {"timestamp_sec": -3.0, "narration_text": "#C C", "annotation_uid": "x6"},
    }
    lines += odd.values()
    lines += [{"timestamp_sec": 1e300, "narration_text": "#C C far away", "annotation_uid": "x7"}]
    # An id that no record can hold loses only its own row.
    lines += [{"timestamp_sec": 5.0, "narration_text": "#C C stirs", "annotation_uid": "\ud800u"}]
    splits = write_splits(tmp_path, content["videos"])
    names = {
        "no-such-video": "video file is missing",
        "half a \ud83d": "video name can't be a file name",
        "no/such/video": "video name is not an Ego4D uid",
        # If a file had several names, one video could be in several splits.
        f"{video.uid}.mp4": "video name is not an Ego4D uid",
        f"./{video.uid}": "video name is not an Ego4D uid",
        f"../video_540ss/{video.uid}": "video name points outside the folder",
    }
    for name in names:
        content["videos"][name] = {"narration_pass_1": {"narrations": [lines[0]]}}
    path.write_text(json.dumps(content))
    made = convert(copy, tmp_path / "out", "--splits", splits)
    reasons = made.reasons(video.uid)
    assert all(reasons[reason] >= 1 for reason in odd), reasons
    assert reasons["narration is not valid Unicode"] == 2
    assert {name: made.reasons(name) for name in names} == {name: {reason: 1} for name, reason in names.items()}
    num_rows = sum(len(part["narrations"]) for v in content["videos"].values() for part in v.values())
    assert len(made.clips) + len(made.rejected) == num_rows + len(labels_by_id(copy))


def write_splits(folder: pathlib.Path, uids, split: str = "train") -> pathlib.Path:
    path = folder / "my_splits.csv"
    path.write_text("video_uid,split\n" + "".join(f"{uid},{split}\n" for uid in uids))
    return path


def test_without_labels_and_splits_files_videos_are_split_by_hash_and_the_wearers_narrations_count(copy, tmp_path):
    for name in ("sounding_labels.csv", "splits.csv"):
        (copy / "v2" / "annotations" / name).unlink()
    made = convert(copy, tmp_path / "out")
    for name, clips in made.splits.items():
        assert {narrations.split_by_hash(c.video_uid) for c in clips} <= {name}
        assert {c.label for c in clips} <= {records.UNKNOWN}
    assert {narrations.who(c.narration) for c in made.clips.values()} == {"wearer"}
    assert sorted([*made.clips, *(r["clip_id"] for r in made.rejected)]) == sorted(all_ids(copy))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--num_intervals", "0"], "--num_intervals must be at least 1, got 0"),
        (["--num_candidates", "-1"], "--num_candidates must be at least 1, got -1"),
        (["--num_shards", "-1"], "--num_shards must be at least 0, got -1"),
        (["--num_workers", "-2"], "--num_workers must be at least 0, got -2"),
        (["--short_side", "63"], "--short_side must be even and from 16 to 4320, got 63"),
        (["--short_side", "8"], "--short_side must be even and from 16 to 4320, got 8"),
        (["--short_side", "4322"], "--short_side must be even and from 16 to 4320, got 4322"),
        (["--short_side", "70000"], "--short_side must be even and from 16 to 4320, got 70000"),
        (["--jpeg_quality", "0"], "--jpeg_quality must be from 1 to 100, got 0"),
        (["--cpu_limit", "0", "1"], "--cpu_limit must be two numbers of seconds, the first above 0"),
        (["--cpu_limit", "60", "-1"], "the first above 0, the second at least 0, both at most 86400, got .60.0, -1.0.$"),
        (["--part", "3"], "--part must be I/N with I from 0 to N - 1, got '3'"),
        (["--part", "2/2"], "--part must be I/N with I from 0 to N - 1, got '2/2'"),
        (["--part=-1/2"], "--part must be I/N"),
        (["--scratch", "absent"], "no folder absent: make it or choose another --scratch"),
        (["--cpu_limit", "60", "nan"], "--cpu_limit must be .*nan"),
        (["--cpu_limit", "inf", "1"], "--cpu_limit must be .*at most 86400"),
        (["--memory_limit", "100"], "--memory_limit must be from 128 to 1048576 MiB, got 100"),
        (["--window", "-1", "1"], "--window must not be negative"),
        (["--window", "0", "0"], "--window must not be negative, empty"),
        (["--window", "nan", "1"], "--window must not be"),
        (["--window", "inf", "1"], "--window must not be negative, empty or longer than 60 s"),
        (["--window", "1e9", "1"], "--window must not be negative, empty or longer than 60 s"),
        (["--max_train_clips", "-1"], "--max_train_clips must be at least 1, or 0 for all, got -1"),
        (["--name", ""], "--name must be a letter followed by letters, digits and _, got ''"),
        (["--name", "a-b"], "--name must be a letter followed by letters, digits and _, got 'a-b'"),
        (["--name", "../up"], "--name must be"),
        (["--name", "é"], "--name must be"),
        (["--video_dir", "v2/clips"], "no folder .*v2/clips: mp4 files are elsewhere, use --video_dir v2/video_540ss$"),
        (["--video_dir", "v2/annotations"], "no mp4 files in .*v2/annotations: choose another --video_dir"),
        (["--labels", "absent.csv"], "no file absent.csv"),
        (["--splits", "absent.csv"], "no file absent.csv"),
        (["--short_sied", "72"], "unknown option.s. --short_sied 72; Beam's own are accepted only together with --runner"),
        (["--short_sied", "72"], r"; did you mean --short_side\?$"),
        (["--short", "72"], "unknown option.s. --short 72"),
        (["--runner=DataflowRunner", "--num_interval", "3"], r"option --num_interval: did you mean --num_intervals\?"),
        (["--runner=DataflowRunner", "--temp_locaton=x"], r"unknown option --temp_locaton: did you mean --temp_location\?"),
        (["--runner=DataflowRunner", "--xyz"], "unknown option --xyz: neither this command nor Beam has it"),
        (["--runner=DataflowRunner", "xyz"], "'xyz' does not belong to an option"),
        (["--runner=DataflowRunner", "--max_num_workers=x"], "Beam's options: argument --max_num_workers: invalid int"),
        (["--runner=PortableRunner", "--job_endpoint=localhost:1", "--job_server_timeout=1", "--an_option_of_flinks=3"],
         "no job server answers at localhost:1: start it or name another --job_endpoint"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(root, tmp_path, capsys, args, words):
    with pytest.raises(SystemExit) as ended:
        ego4d.main(["--root", str(root), "--out", str(tmp_path / "out"), *args])
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "gs://"])
def test_a_missing_video_folder_is_reported_with_those_that_hold_videos(buckets, monkeypatch, capsys, prefix):
    monkeypatch.chdir(buckets)
    for folder, name, words in (
        ("elsewhere", "a.mp4", "no folder {0}: point --root at the folder made by Ego4D's CLI$"),
        ("ego4d", "ego4d.json", "no folder {0}/v2: point --root at the folder made by Ego4D's CLI$"),
        ("ego4d/v2/clips", "a.mp4", "no folder {0}/v2/video_540ss: download videos, or name their folder by --video_dir$"),
        ("ego4d/v2/full_scale", "a.mp4", "no folder {0}/v2/video_540ss: .*, use --video_dir v2/full_scale$"),
        ("ego4d/v2/annotations", "narration.json", "use --video_dir v2/full_scale$"),
        ("ego4d/v2/mine", "a.mp4", "use --video_dir v2/full_scale or --video_dir v2/mine$"),
    ):
        (buckets / "mine" / folder).mkdir(parents=True, exist_ok=True)
        (buckets / "mine" / folder / name).touch()
        with pytest.raises(SystemExit):
            ego4d.main(["--root", f"{prefix}mine/ego4d", "--out", "out"])
        assert_one_line(capsys.readouterr().err, words.format(f"{prefix}mine/ego4d"))


def test_a_folder_of_other_videos_is_told_before_all_narrations_are_rejected(capsys, tmp_path):
    items = [{"video_uid": uid, "video_bytes": None} for uid in ("a", "b")]
    narrated._tell_if_all_miss([shards.ShardTask("train", 0, 1, tuple(items), 2)], tmp_path)
    assert f"warning: none of 2 videos is in {tmp_path}, the first is a: is it the right folder?" in capsys.readouterr().err
    items[1]["video_bytes"] = 7
    narrated._tell_if_all_miss([shards.ShardTask("train", 0, 1, tuple(items), 2)], tmp_path)
    assert capsys.readouterr().err == ""


def test_without_docker_beams_own_job_server_asks_for_another_environment(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        ego4d.main(["--root", str(root), "--out", str(tmp_path / "out"), "--runner=PortableRunner", "--job_endpoint=embed"])
    assert_one_line(capsys.readouterr().err, "Docker, which does not answer: start it or add --environment_type=LOOPBACK")


def assert_one_line(err: str, words: str):
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert re.search(words, err), err


LABELS = "video_uid,annotation_uid,narration_pass,timestamp_sec,narration_text,positive"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("narration.json", None, "no file .*narration.json"),
        ("narration.json", "{", "narration.json is not JSON"),
        ("narration.json", '{"v": 3}', "video v must be an object, got 3"),
        ("narration.json", "{}", "none of .* annotations can become a clip"),
        ("narration_verb_taxonomy.csv", None, "no file .*narration_verb_taxonomy.csv"),
        ("narration_noun_taxonomy.csv", "label,group\ncup,3\n", "narration_noun_taxonomy.csv, row 2: group '3'"),
        ("sounding_labels.csv", "video_uid\nv\n", "sounding_labels.csv lacks the column"),
        ("sounding_labels.csv", f"{LABELS}\n", "no row of .*sounding_labels.csv can be used: it has no rows"),
        ("sounding_labels.csv", f"{LABELS}\nv.mp4,a,p,1,#C C cuts,1\n", "is not an Ego4D uid .first row, video 'v.mp4'"),
        ("splits.csv", "video_uid,split\nv,dev\n", "splits.csv, row 2: split 'dev' is not one of"),
    ],
)
def test_a_wrong_annotation_file_is_one_line_and_status_2(copy, tmp_path, capsys, name, content, words):
    path = copy / "v2" / "annotations" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    if content == "{}":
        (copy / "v2" / "annotations" / "sounding_labels.csv").unlink()
    with pytest.raises(SystemExit) as ended:
        ego4d.main(["--root", str(copy), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err, words)


def test_an_option_of_another_type_or_a_missing_one_is_reported_without_a_traceback(root, tmp_path, capsys):
    for args in (["--num_intervals", "four"], ["--window", "1"], []):
        with pytest.raises(SystemExit) as ended:
            ego4d.main(["--root", str(root), *(["--out", str(tmp_path / "out")] if args else []), *args])
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("python -m data_prep.ego4d: error: ")


def test_a_folder_that_cannot_be_written_is_one_line(root, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        ego4d.main(["--root", str(root), "--out", str(tmp_path / "file" / "out"), "--num_workers", "1"])
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err, "Not a directory")


def test_a_folder_that_may_not_be_listed_is_no_folder_without_videos(root, tmp_path, capsys, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SystemExit):
        ego4d.main(["--root", str(root), "--out", str(tmp_path / "out")])
    assert_one_line(capsys.readouterr().err, "Permission denied: .*/v2/video_540ss")


def test_without_scratch_copies_lie_in_the_systems_folder_and_not_where_the_command_runs(root, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(pipeline, "run", lambda tasks, out, name, make, settings, *rest: seen.append(settings) or [])
    for words in ([], ["--scratch", tmp_path]):
        ego4d.main(["--root", str(root), "--out", str(tmp_path / "out"), "--part", "0/1", *map(str, words)])
    assert [settings["scratch"] for settings in seen] == ["", str(tmp_path)]
    with pytest.raises(SystemExit):
        ego4d.main(["--root", str(root), "--out", str(tmp_path / "out"), "--scratch", ""])
    assert "--scratch: an empty path" in capsys.readouterr().err


def test_converting_leaves_numpys_error_handling_as_it_was(root, tmp_path):
    before = np.geterr()
    with pytest.raises(SystemExit):
        ego4d.main(["--root", str(root), "--out", str(tmp_path), "--num_intervals", "0"])
    assert np.geterr() == before


@pytest.mark.parametrize("options", [[], ["--labels_split", "test"]])
def test_uids_with_a_suffix_in_the_splits_end_the_run(root, tmp_path, capsys, options):
    splits = write_splits(tmp_path, [f"{video.uid}.mp4" for video in VIDEOS], "test")
    with pytest.raises(SystemExit):
        ego4d.main(["--root", str(root), "--out", str(tmp_path / "out"), "--splits", str(splits), *options])
    assert_one_line(capsys.readouterr().err, "my_splits.csv names none of the narrations' videos")
