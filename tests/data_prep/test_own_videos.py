"""A folder of videos and a CSV: every row is a clip or has a reason, whatever file names are; nothing is read outside."""

import collections
import csv
import json
import math
import os
import pathlib
import shutil

import av
import numpy as np
import pytest

from data_prep import guard, narrated, narrations, own_videos, storage, verify, video_files
from data_prep.sources import grid, own_csv
from mc3_jax import evaluate
from mc3_jax.config import EvalConfig
from mc3_jax.data import loader, records
from tests.data_prep import test_media
from tests.data_prep.converted import Converted

HEADER = ["video", "time_s", "text", "label"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    """A folder of videos in several containers, one of them in a subfolder, and a video outside that links lead to."""
    outside = tmp_path_factory.mktemp("own")
    folder = outside / "videos"
    (folder / "monday").mkdir(parents=True)
    test_media.write(folder / "a.mp4")
    test_media.write(folder / "b c.MKV")
    test_media.write(folder / "monday" / "d.e.mov")
    quick = {"deadline": "good", "cpu-used": "5"}  # so that the result does not depend on speed
    test_media.write(folder / "-f.webm", video="libvpx", audio="libopus", video_options=quick)
    # With AAC, FLV's muxer would shift frames and sound by the priming.
    test_media.write(folder / "$(touch g); g.flv", audio="pcm_s16le", rate=44100)
    test_media.write(folder / "mute.mp4", audio=None)
    (folder / "a.txt").write_text("notes on a")
    (folder / "broken.mp4").write_bytes(b"no video")
    shutil.copy(folder / "a.mp4", outside / "secret.mp4")
    os.symlink(outside / "secret.mp4", folder / "link.mp4")
    os.symlink(outside, folder / "up")
    os.symlink("a.mp4", folder / "same.mp4")
    return folder


def write(folder: pathlib.Path, *rows, header=HEADER) -> pathlib.Path:
    path = folder / "mine.csv"
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return path


@pytest.mark.parametrize(
    ("name", "uid"),
    [
        ("a.mp4", "a.mp4"),
        ("a", "a.mp4"),  # a.txt is no video
        ("./a", "a.mp4"),
        ("same", "a.mp4"),  # a link is no second video
        ("b c", "b c.MKV"),
        ("monday/d.e", "monday/d.e.mov"),
        ("monday//d.e.mov", "monday/d.e.mov"),
        ("-f", "-f.webm"),
        ("$(touch g); g", "$(touch g); g.flv"),
        ("up/videos/a", "a.mp4"),  # leads out and back in
        ("a.txt", "a.txt"),  # found: only opening it shows that it is no video
    ],
)
def test_a_name_with_or_without_suffix_is_the_path_of_its_file(videos, name, uid):
    assert video_files.find(videos, name) == (uid, "")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../secret.mp4", "video name points outside the folder"),
        ("monday/../a.mp4", "video name points outside the folder"),
        ("monday/../../secret", "video name points outside the folder"),
        ("OUTSIDE/secret.mp4", "video name points outside the folder"),
        ("/dev/zero", "video name points outside the folder"),
        ("link.mp4", "video file is a link that points outside the folder"),
        ("link", "video file is a link that points outside the folder"),
        ("up/secret.mp4", "video file is a link that points outside the folder"),
        ("up/secret", "video file is a link that points outside the folder"),
        ("a.mp4\0.txt", "video name can't be a file name"),
        ("a\ud83d", "video name can't be a file name"),
        ("", "narration names no video"),
        (".", "narration names no video"),
        ("./", "narration names no video"),
        ("monday", "video file is missing"),
        ("monday/d", "video file is missing"),  # d.e.mov has another name
        ("A", "video file is missing"),
        ("*", "video file is missing"),
        ("a.mp", "video file is missing"),
        ("a.mp4/b", "video file is missing"),
        ("absent/a", "video file is missing"),
        ("x" * 5000, "video file is missing"),
        ("http://example.com/a.mp4", "video file is missing"),
    ],
)
def test_a_name_that_leads_out_or_nowhere_gets_its_reason(videos, name, problem):
    name = name.replace("OUTSIDE", str(videos.parent))
    assert video_files.find(videos, name) == (name, problem)


def test_a_playlist_which_would_lead_ffmpeg_out_of_the_folder_is_no_video(videos, tmp_path):
    outside = videos.parent / "secret.mp4"
    lists = {
        "h.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\n{outside}\n#EXT-X-ENDLIST\n",
        "c.ffconcat": f"ffconcat version 1.0\nfile {outside}\n",
    }
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
        assert video_files.find(tmp_path, name) == (name, "video file is a playlist")
    assert video_files.find(tmp_path, "h") == ("h", "video file is a playlist")
    shutil.copy(videos / "a.mp4", tmp_path / "h.mp4")
    assert video_files.find(tmp_path, "h") == ("h.mp4", "")


def test_of_several_files_that_differ_in_their_suffix_the_one_video_is_meant_and_two_are_asked_about(videos, tmp_path):
    for file in ("a.mp4", "a.mov"):
        shutil.copy(videos / "a.mp4", tmp_path / file)
    assert video_files.find(tmp_path, "a") == ("a", "several files have this video name: give the name with its suffix")
    assert video_files.find(tmp_path, "a.mov") == ("a.mov", "")
    shutil.copy(videos / "mute.mp4", tmp_path / "a.mov")
    assert video_files.find(tmp_path, "a") == ("a.mp4", "")


def test_the_launcher_itself_opens_no_media(videos, tmp_path, monkeypatch):
    for file in ("a.mp4", "a.mov"):
        shutil.copy(videos / "a.mp4", tmp_path / file)
    (tmp_path / "a.mov").write_bytes(b"no video")
    monkeypatch.setattr(av, "open", None)
    assert video_files.find(tmp_path, "a") == ("a.mp4", "")


def test_rows_that_can_be_no_clip_are_counted_and_cost_the_others_nothing(videos, tmp_path):
    path = write(
        tmp_path, ["a", 1.5, "chops", 1], ["a.mp4", "1.5", "chops", 1], ["same", 1.5, "chops", ""], ["a", 1.5, "cuts", ""],
        ["a", "", "chops", 1], ["a", "nan", "cuts", 1], ["a", 2.5, " ", 1], ["../secret", 1, "x", 1], ["gone", 1, "x", ""],
        ["link", 1, "x", ""], ["a", 3, "#O man X walks", "1.0"], ["a", 3.5, "#unsure", "0"],
        ["a", 2, "pours", 1], ["same", 2, "pours", 0],
    )  # fmt: skip
    rows = own_csv.read(path, videos)
    chosen, rejects = narrated.choose([], rows, {"a.mp4": "test"}, own_table=True)
    # Tags have no meaning here: everything that can be cut is taken.
    assert [(n.time_s, n.text, n.label) for n in chosen["test"]] == [
        (1.5, "chops", 1), (1.5, "cuts", -1), (3.0, "#O man X walks", 1), (3.5, "#unsure", 0),
    ]  # fmt: skip
    assert collections.Counter(r.reason for r in rejects) == {
        "same narration twice": 2, "narration has no time": 2, "narration has no text": 1, "video file is missing": 1,
        "video name points outside the folder": 1, "video file is a link that points outside the folder": 1,
        "labels contradict each other": 2,
    }  # fmt: skip
    again = own_csv.read(write(tmp_path, ["a", 9, "new", ""], ["a", 1.5, "chops", 1]), videos)
    assert again[1].clip_id == rows[0].clip_id  # one more row changes no other id


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([["a", "soon", "x", ""]], HEADER, "mine.csv, row 2: time_s must be seconds, got 'soon'"),
        ([["a", "0:01", "x", ""]], HEADER, "row 2: time_s must be seconds, got '0:01'"),
        ([["a", 1, "x", ""], ["a", 1, "x", "yes"]], HEADER, "row 3: label must be 1, 0 or empty, got 'yes'"),
        ([["a", 1, "chops, then stirs"], ["a", 1, "x", "y"]], HEADER[:3], "row 3: it does not have one value per column"),
        ([["a", 1]], HEADER[:3], "row 2: it does not have one value per column"),
        ([], ["video", "text"], "lacks the column(s) time_s; it has 'video', 'text'"),
        ([], ["video;time_s;text"], "it has 'video;time_s;text': separate the values by ',' instead of ';'"),
        ([["a", 1, "x", 1]], [*HEADER[:3], "lable"], "the unknown column 'lable': only video, time_s, text and label"),
        ([["a", 1, "x", 1]], [*HEADER[:3], "text"], "has the column 'text' more than once"),
        ([], HEADER, "mine.csv has no rows below the names of its columns: add one for each narration"),
        (
            [["gone", 1, "x", ""]], HEADER,
            "none of 1 annotations can become a clip: 1 video file is missing; the first belongs to 'gone' in VIDEOS",
        ),
    ],
)
def test_a_table_of_another_shape_is_one_line_and_status_2(videos, tmp_path, capsys, rows, header, words):
    path = write(tmp_path, *rows, header=header)
    with pytest.raises(SystemExit) as ended:
        own_videos.main(["--videos", str(videos), "--narrations", str(path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert words.replace("VIDEOS", str(videos)) in err
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_one_line_and_stays(videos, tmp_path, capsys):
    path, out = write(tmp_path, ["a", 1, "x", ""]), tmp_path / "out"
    out.write_text("kept")
    for more in ([], ["--dry_run"]):
        with pytest.raises(SystemExit) as ended:
            own_videos.main(["--videos", str(videos), "--narrations", str(path), "--out", str(out), *more])
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: --out {out} is a file: name a folder\n"
    assert out.read_text() == "kept"


def test_a_folder_is_listed_once_a_table_however_many_names_lack_their_suffix(tmp_path, monkeypatch):
    listed, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: (listed.append(folder), listdir(folder))[1])
    (tmp_path / "more").mkdir()
    for number in range(20):
        (tmp_path / f"v{number}.mp4").touch()
    table = write(tmp_path, *([f"v{number}", 1, "x", ""] for number in range(21)), ["more/a", 1, "x", ""])
    problems = [narration.problem for narration in own_csv.read(table, tmp_path)]
    assert problems == [""] * 20 + ["video file is missing"] * 2
    assert listed == [tmp_path, tmp_path / "more"]
    (tmp_path / "v20.mkv").touch()
    assert [narration.problem for narration in own_csv.read(table, tmp_path)][20] == ""


def test_an_unclosed_quotation_mark_is_reported_and_swallows_no_rows(videos, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('video,time_s,text\na,1,"chops\na,2,stirs\n')
    with pytest.raises(ValueError, match="can't be read: unexpected end of data"):
        own_csv.read(path, videos)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,test\na.mp4,train\n", "video 'a.mp4' is a.mp4, in 'train' here and in 'test' under another name"),
        ("../secret,test\n", "video '../secret': video name points outside"),
    ],
)
def test_splits_name_videos_as_the_table_does_and_none_stands_in_two(videos, tmp_path, content, words):
    path = tmp_path / "splits.csv"
    path.write_text("video_uid,split\nb c,validation\nmonday/d.e,test\n")
    named = {"b c.MKV": "validation", "monday/d.e.mov": "test"}
    assert own_csv.read_own_splits(path, videos) == (named, [])
    with path.open("a") as file:
        file.write("gone,test\n")
    assert own_csv.read_own_splits(path, videos) == (named, ["gone"])
    path.write_text("video_uid,split\n" + content)
    with pytest.raises(ValueError, match=words):
        own_csv.read_own_splits(path, videos)


def convert(videos: pathlib.Path, out: pathlib.Path, table: pathlib.Path, *args) -> Converted:
    own_videos.main(["--videos", str(videos), "--narrations", str(table), "--out", str(out), "--num_workers", "1",
                     "--num_shards", "2", *map(str, args)])  # fmt: skip
    return Converted(videos, out)


def test_clips_of_any_container_show_and_sound_what_their_moment_does(videos, tmp_path):
    names = ("a", "b c.MKV", "monday/d.e", "-f", "$(touch g); g")
    rows = [[name, time_s, "#C C  chops", int(time_s > 1)] for name in names for time_s in (1.0, 2.5)]
    rows += [["mute", 1, "x", ""], ["broken.mp4", 1, "x", ""], ["a", 3.9, "too late", ""]]
    (tmp_path / "splits.csv").write_text("video_uid,split\n" + "".join(f"{n},train\n" for n in [*names, "mute", "broken"]))
    made = convert(videos, tmp_path / "out", write(tmp_path, *rows), "--splits", tmp_path / "splits.csv")
    uids = ["$(touch g); g.flv", "-f.webm", "a.mp4", "b c.MKV", "monday/d.e.mov"]
    assert sorted((c.video_uid, c.time_us, c.label) for c in made.splits["train"]) == [
        (uid, time_us, label) for uid in uids for time_us, label in ((1_000_000, 0), (2_500_000, 1))
    ]
    for clip in made.splits["train"]:
        records.check(clip, made.info)
        number = math.floor((clip.start_us / 1e6 + 1.5 / 8) * 30 + 1e-4)  # the middle of the first interval, at 30 fps
        assert test_media.number_in(clip.frames[2]) == number, clip.clip_id
        lag, correlation = test_media.lag_of(clip.audio, clip.start_us / 1e6)
        assert abs(lag) < 20, clip.clip_id
        assert correlation > 0.7, clip.clip_id
        assert (clip.narration, clip.source, clip.verb_id, clip.noun_id) == ("#C C  chops", "own_csv", -1, -1)
    assert (made.info.verbs, made.info.nouns, made.info.name) == ([], [], "own_clips")
    reasons = made.reasons()
    assert (reasons["no audio stream"], reasons.total()) == (1, 3)
    assert made.reasons("broken.mp4") == {"video file can't be opened": 1}
    assert not (pathlib.Path.cwd() / "g").exists()


def test_without_narrations_every_video_is_cut_from_its_beginning_to_its_end(videos, tmp_path, capsys):
    own_videos.main(["--videos", str(videos), "--every_s", "1", "--out", str(tmp_path), "--num_workers", "1",
                     "--num_shards", "2"])  # fmt: skip
    made = Converted(videos, tmp_path)
    assert {split: len(clips) for split, clips in made.splits.items()} == {"train": 0, "validation": 0, "test": 15}
    places = collections.defaultdict(list)
    for clip in made.splits["test"]:
        records.check(clip, made.info)
        places[clip.video_uid].append(clip.start_us)
        assert (clip.time_us - clip.start_us, clip.stop_us - clip.start_us) == (500_000, 1_500_000)
        assert (clip.narration, clip.source, clip.label) == ("", "grid", -1)
        middles = [math.floor((clip.start_us / 1e6 + (i + 0.5) * 1.5 / 4) * 30 + 1e-4) for i in range(4)]
        assert [test_media.number_in(frame) for frame in clip.frames] == middles, clip.clip_id
        lag, correlation = test_media.lag_of(clip.audio, clip.start_us / 1e6)
        assert abs(lag) < 20, clip.clip_id
        assert correlation > 0.7, clip.clip_id
    uids = ["$(touch g); g.flv", "-f.webm", "a.mp4", "b c.MKV", "monday/d.e.mov"]  # each once, in spite of links
    assert places == {uid: [0, 1_000_000, 2_000_000] for uid in uids}
    assert made.reasons() == {
        "no audio stream": 1, "video file can't be opened": 1, "video file is a link that points outside the folder": 1,
    }  # fmt: skip
    assert verify.verify(tmp_path, 1)[0] == []
    with pytest.raises(SystemExit):  # narrations would replace the windows
        convert(videos, tmp_path, write(tmp_path, ["a", 1.0, "#C C chops", 1]))
    assert "own_windows" in capsys.readouterr().err


def test_a_grid_ends_where_the_video_does_and_believes_no_absurd_length(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.MOV", "c.txt", ".hidden.mp4", "short.mkv", "endless.ts", "silent.webm"):
        (tmp_path / name).write_bytes(b"")
    lengths = {"a.mp4": 3.0, "b.MOV": 2.4999, "short.mkv": 1.49, "endless.ts": 1e9, "silent.webm": None}
    monkeypatch.setattr(guard, "length_s", lambda path, kinds, limits: lengths[path.name])
    moments, rejects = grid.read(tmp_path, 0.5, (0.5, 1.0), guard.Limits())
    found = [(moment.video_uid, moment.time_s) for moment in moments]
    assert found == [("a.mp4", 0.5), ("a.mp4", 1.0), ("a.mp4", 1.5), ("a.mp4", 2.0), ("b.MOV", 0.5), ("b.MOV", 1.0)]
    assert [(r.video_uid, r.reason, r.detail) for r in rejects] == [
        ("endless.ts", "video is implausibly long", "1000000000.000 s"),
        ("short.mkv", "video is shorter than a window", "1.490 s"),
        ("silent.webm", "container does not say how long the video is", ""),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--every_s", "0"], "--every_s must be from 0.05 to 3600 seconds, got 0"),
        (["--every_s", "nan"], "--every_s must be from 0.05 to 3600 seconds, got nan"),
        (["--every_s", "1"], "no video files in"),
        (["--every_s", "1", "--splits", "s.csv"], "--splits is only for --narrations"),
        (["--every_s", "1", "--clean_text"], "--clean_text is only for --narrations"),
        (
            ["--every_s", "1", "--max_train_clips", "9", "--sample_seed", "2"],
            "--max_train_clips, --sample_seed are only for --narrations: windows of --every_s have no text",
        ),
        (["--every_s", "1", "--nouns", "VERBS"], "--nouns is only for --narrations"),
        (["--every_s", "1", "--verbs", "VERBS"], "--verbs is only for --narrations"),
    ],
)
def test_a_grid_that_makes_no_sense_is_one_line_and_status_2(tmp_path, capsys, options, words):
    (tmp_path / "verbs.csv").write_text("label,group\n")
    options = [str(tmp_path / "verbs.csv") if option == "VERBS" else option for option in options]
    with pytest.raises(SystemExit) as ended:
        own_videos.main(["--videos", str(tmp_path), "--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


def test_a_grid_over_a_bucket_is_refused(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_remote", lambda path: path == videos)
    args = own_videos._parser().parse_args(["--videos", str(videos), "--every_s", "1", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="--every_s needs a local folder"):
        own_videos._read_grid(args)


def test_videos_held_upright_make_a_data_set_that_is_sound_and_can_be_read(tmp_path):
    (tmp_path / "videos").mkdir()
    test_media.write(tmp_path / "videos" / "wide.mp4")
    test_media.write(tmp_path / "videos" / "turned.mp4", matrix=(0, 1, -1, 0))
    test_media.write(tmp_path / "videos" / "tall.mp4", size=(test_media.HEIGHT, test_media.WIDTH))
    rows = [[name, 1.5, "#C C chops", ""] for name in ("wide", "turned", "tall")]
    (tmp_path / "splits.csv").write_text("video_uid,split\nwide,train\nturned,train\ntall,train\n")
    table = write(tmp_path, *rows)
    made = convert(tmp_path / "videos", tmp_path / "out", table, "--splits", tmp_path / "splits.csv", "--short_side", "48")
    sizes = {clip.video_uid: (clip.frame_height, clip.frame_width) for clip in made.splits["train"]}
    assert sizes == {"wide.mp4": (48, 96), "turned.mp4": (96, 48), "tall.mp4": (96, 48)}
    assert made.info.canvas_px == (96, 96)
    assert verify.verify(tmp_path / "out", 1)[0] == []
    source = loader.open_split(tmp_path / "out", "train", 4)
    tokenize = lambda text: (np.zeros(4, np.int32), np.ones(4, np.int32))  # noqa: E731
    [batch] = loader.eval_batches(source, tokenize, batch_size=3)
    assert batch["video"].shape == (3, 4, 96, 96, 3)
    assert sorted(map(tuple, batch["video_size"].tolist())) == sorted(sizes.values())


def test_a_video_replaced_by_another_of_the_same_size_is_cut_again(videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    whole = (videos / "a.mp4").read_bytes()
    (folder / "kept.mp4").write_bytes(whole)
    (folder / "again.mp4").write_bytes(bytes(len(whole)))  # as left by a download that broke off
    table = write(tmp_path, ["kept", 1.5, "x", ""], ["again", 1.5, "x", ""])
    assert convert(folder, tmp_path / "out", table).reasons() == {"video file can't be opened": 1}
    (folder / "again.mp4").write_bytes(whole)
    made = convert(folder, tmp_path / "out", table)
    assert made.reasons() == {}
    assert {clip.video_uid for clips in made.splits.values() for clip in clips} == {"kept.mp4", "again.mp4"}


def test_videos_with_a_label_are_held_out_and_of_the_others_a_sample_is_trained_on(videos, tmp_path, capsys):
    rows = [["a", t, "#O man X cuts", label] for t, label in ((1, 1), (1.5, 0), (2, ""))]
    rows += [["b c", t / 4, "chops", ""] for t in range(2, 10)]
    args = ("--max_train_clips", 3, "--sample_seed", 5)
    made = convert(videos, tmp_path / "out", write(tmp_path, *rows), *args)
    home = narrations.held_out_by_hash("a.mp4")
    assert sorted((c.time_us, c.label) for c in made.splits[home]) == [(1_000_000, 1), (1_500_000, 0), (2_000_000, -1)]
    assert [c.video_uid for c in made.splits["train"]] == ["b c.MKV"] * 3
    assert made.reasons() == {"not sampled": 5}
    assert f"\n{home}: 2 labelled, 50.0% of them positive\n" in capsys.readouterr().out
    again = convert(videos, tmp_path / "again", write(tmp_path, *rows[::-1]), *args)
    assert set(again.clips) == set(made.clips)


def test_with_taxonomies_verbs_and_nouns_are_found_and_cleaning_is_an_option(videos, tmp_path):
    for kind, group in (("verbs", "['chop', 'cut']"), ("nouns", "['onion']")):
        (tmp_path / f"{kind}.csv").write_text(f'label,group\n{kind}_0,[]\n{kind}_1,"{group}"\n')
    table = write(tmp_path, ["a", 1, "#C C  cuts onions", ""], ["a", 1.5, "sits", ""], header=HEADER)
    made = convert(
        videos, tmp_path / "out", table, "--verbs", tmp_path / "verbs.csv", "--nouns", tmp_path / "nouns.csv", "--clean_text"
    )
    clips = sorted(made.clips.values(), key=lambda clip: clip.time_us)
    assert [(c.narration, c.verb_id, c.noun_id) for c in clips] == [("cuts onions", 1, 1), ("sits", -1, -1)]
    assert made.info.verbs == ["verbs_0", "verbs_1"]
    assert json.loads((tmp_path / "out" / "clips.json").read_text())["nouns"] == ["nouns_0", "nouns_1"]


def test_evaluation_copes_with_clips_whose_verb_and_noun_are_unknown():
    rng = np.random.default_rng(0)
    num, unit = 40, lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    embeddings = {name: unit(rng.normal(size=(num, 8)).astype(np.float32)) for name in ("audio", "video", "text")}
    known = {name: np.full(num, -1) for name in ("verb_id", "noun_id")} | {"label": np.arange(num) % 2}
    known |= {name: rng.normal(size=num) for name in ("loudness", "onset_strength")}
    found = evaluate.measure(embeddings, known, np.arange(num), EvalConfig(num_bootstrap=20))
    assert found["retrieval"] == {}  # there are no pairs of verb and noun
    # All have the one unknown verb, so the value within verbs is that of all clips.
    assert found["discovery"]["av"]["within_verb_roc_auc"] == found["discovery"]["av"]["roc_auc"]
    assert found["controls"]["verb_prior"] is None
