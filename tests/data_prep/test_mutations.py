"""Media and annotation rows with random damage, as strangers may give us: no crash, no hang, no clip lost or made up.

Each test runs twenty cases, in `make soak` two hundred. A case depends only on its number, which is part of its name.
"""

import csv
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import soundfile

from data_prep import ego4d, epic_sounds, esc50, media, narrations, own_videos, sounds, verify
from data_prep.sources import (
    ego4dsounds,
    egoclip,
    epic_sounds as epic_sounds_source,
    esc50 as esc50_source,
    files,
    narration_json,
    own_csv,
    sounding_labels,
)
from data_prep.windows import Window, frame_times
from mc3_jax.data import records
from tests import world
from tests.data_prep import test_media
from tests.data_prep.converted import Converted

REAL = test_media.REAL
TIMES_S = (0.6, 1.7, 2.8)  # times of the narrations of each video
LIMIT_S = 900.0  # for two hundred videos on a busy machine; a hang would last for ever
INTACT = ("intact_1.mp4", "intact_2.mkv")
WORDS = "#C C chops the onion"


def flip_bits(data: bytearray, rng: np.random.Generator) -> None:
    for at in rng.integers(len(data), size=int(10 ** rng.uniform(0, 3))):
        data[at] ^= 1 << int(rng.integers(8))


def truncate(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(len(data))) :]


def remove_block(data: bytearray, rng: np.random.Generator) -> None:
    at, size = rng.integers(len(data)), int(10 ** rng.uniform(0, 4))
    del data[at : at + size]


def blank_block(data: bytearray, rng: np.random.Generator) -> None:
    at, size = int(rng.integers(len(data))), int(10 ** rng.uniform(1, 4.5))
    data[at : at + size] = bytes([int(rng.choice([0, 255]))]) * len(data[at : at + size])


def repeat_block(data: bytearray, rng: np.random.Generator) -> None:
    start, at, size = int(rng.integers(len(data))), int(rng.integers(len(data))), int(10 ** rng.uniform(1, 4.5))
    data[at:at] = data[start : start + size]


def forge_number(data: bytearray, rng: np.random.Generator) -> None:
    """Overwrites words near the file's ends, which hold sizes, counts and durations, big- or little-endian."""
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(min(4096, len(data)))) * int(rng.choice([1, -1])) % len(data)
        word = int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000000])).to_bytes(4, "big")
        data[at : at + 4] = word[: len(data[at : at + 4])]


def shuffle_blocks(data: bytearray, rng: np.random.Generator) -> None:
    cuts = np.sort(rng.integers(len(data), size=int(rng.integers(2, 9))))
    parts = [bytes(part) for part in np.split(np.frombuffer(bytes(data), np.uint8), cuts)]
    data[:] = b"".join(parts[i] for i in rng.permutation(len(parts)))


MUTATIONS = (flip_bits, flip_bits, truncate, remove_block, blank_block, repeat_block, forge_number, shuffle_blocks)


def originals(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns paths of intact files in several containers and codecs, and of the real ones if there are any."""
    folder.mkdir()
    # With several slices the decoder conceals a damaged one by means of the others.
    b_frames = {"preset": "veryfast", "g": "25", "bf": "3", "threads": "1", "x264-params": "slices=4"}
    test_media.write(folder / "a.mp4", video_options=b_frames)
    test_media.write(folder / "b.mkv", video_options=b_frames, rate=44100)
    test_media.write(folder / "c.ts", video_options=b_frames)
    test_media.write(folder / "d.webm", video="libvpx", audio="libopus", video_options={"deadline": "good", "cpu-used": "5"})
    test_media.write(folder / "e.mov", video="mjpeg", audio="pcm_s16le", pixels="yuvj420p", video_options={"threads": "1"})
    return sorted(folder.iterdir()) + sorted(path for path in REAL.glob("*.m*") if path.stat().st_size < 1 << 20)


def mutate(path: pathlib.Path, to: pathlib.Path, case: int) -> None:
    rng = np.random.default_rng([1, case])
    data = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        if data:
            MUTATIONS[int(rng.integers(len(MUTATIONS)))](data, rng)
    to.write_bytes(data)


def convert(videos: pathlib.Path, table: pathlib.Path, out: pathlib.Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_prep.own_videos", "--videos", videos, "--narrations", table, "--out", out,
               "--num_workers", "2", "--cpu_limit", "20", "2", "--memory_limit", "1024", *args]  # fmt: skip
    return subprocess.run(
        [str(part) for part in command], cwd=world.ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def write_table(path: pathlib.Path, header: list[str], rows: list[list]) -> pathlib.Path:
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return path


def differs(clip: records.Clip, original: pathlib.Path) -> bool:
    """Returns whether a clip's frames or sound differ from those of the original file at their time."""
    window = Window(
        clip.start_us / 1e6, clip.stop_us / 1e6, frame_times(clip.start_us / 1e6, clip.stop_us / 1e6, 4, 4)
    )
    ((_, cut),) = media.cut_windows(original, [window], short_side_px=64)
    if isinstance(cut, str) or len(cut.frames) != len(clip.frames):
        return True
    for a, b in zip(cut.frames, clip.frames, strict=True):
        x, y = (simplejpeg.decode_jpeg(jpeg, colorspace="GRAY").astype(int) for jpeg in (a, b))
        if x.shape != y.shape or np.abs(x - y).mean() > 1:
            return True
    return bool(np.abs(cut.audio.astype(int) - clip.audio).max() > 300)


# Prints (start of a frame that a full decode flags as corrupt, start of the next intact keyframe), µs. B-frames don't begin
# such a span, as no frame refers to them, nor do frames before the first intact one, whose references may not be there.
FLAGGED = """
import contextlib, json, sys
import av
from av.video.frame import PictureType
found, begin, sound = [], None, False
with av.open(sys.argv[1]) as container:
    (stream, *_) = container.streams.video
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}
    origin = stream.start_time if container.format.name == "mpegts" else 0
    packets = container.demux(stream)
    while True:
        packet, frames = None, []
        with contextlib.suppress(av.error.FFmpegError):
            packet = next(packets, None)
            frames = packet.decode() if packet else []
        if packet is None:
            break
        for frame in frames:
            if frame.pts is None:
                continue
            time_us = round(float((frame.pts - origin) * stream.time_base) * 1e6)
            if begin is not None and frame.key_frame and not frame.is_corrupt:
                found, begin = found + [(begin, time_us)], None
            if begin is None and sound and frame.is_corrupt and frame.pict_type != PictureType.B:
                begin = time_us
            sound = sound or not frame.is_corrupt
if begin is not None:
    found.append((begin, 1 << 60))
print(json.dumps(found))
"""


def flagged(path: pathlib.Path) -> list[tuple[int, int]]:
    """Returns the pairs that `FLAGGED` prints for a file; [] if the decoder crashes."""
    command = [sys.executable, "-c", FLAGGED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode <= 0, done.stderr[-3000:]
    return json.loads(done.stdout) if done.returncode == 0 else []


@pytest.mark.slow
def test_damaged_videos_lose_only_their_own_clips_and_every_clip_is_accounted_for(tmp_path, num_mutations):
    sources, videos = originals(tmp_path / "originals"), tmp_path / "videos"
    videos.mkdir()
    shutil.copy(sources[0], videos / INTACT[0])
    shutil.copy(sources[1], videos / INTACT[1])
    for case in range(num_mutations):
        source = sources[case % len(sources)]
        mutate(source, videos / f"case_{case:03d}{source.suffix}", case)
    names = sorted(path.name for path in videos.iterdir())
    assert len(names) == num_mutations + len(INTACT)
    rows = [[name, time_s, WORDS] for name in names for time_s in TIMES_S]
    table = write_table(tmp_path / "table.csv", ["video", "time_s", "text"], rows)

    done = convert(videos, table, tmp_path / "out", "--short_side", "64")
    assert done.returncode == 0, done.stderr[-3000:]
    made = Converted(videos, tmp_path / "out")
    told = [(clip.video_uid, clip.time_us) for clip in made.clips.values()]
    told += [(row["video_uid"], int(row["clip_id"].rsplit("_", 2)[1])) for row in made.rejected]
    assert sorted(told) == sorted((name, round(time_s * 1e6)) for name, time_s, _ in rows)
    assert all(row["reason"] for row in made.rejected)
    damaged = [clip for clip in made.clips.values() if clip.video_uid not in INTACT]
    assert damaged  # some damage must be survived and some not, or the mutations are no good
    assert made.rejected
    # Damaged parts are never filled in.
    odd = [clip for clip in damaged if differs(clip, sources[int(clip.video_uid[5:8]) % len(sources)])]
    assert len(odd) <= 0.25 * len(damaged)  # by damage that no decoder notices, or frames at another time
    for uid in sorted({clip.video_uid for clip in odd}):
        told = flagged(videos / uid)
        mine = [time_us for clip in odd if clip.video_uid == uid for time_us in clip.frame_times_us.tolist()]
        assert not [(t, begin, end) for t in mine for begin, end in told if begin <= t < end], uid
    # A clip of a damaged file has all its frames and samples, and verify reads them.
    checked = world.run("data_prep.verify", tmp_path / "out")
    assert checked.returncode == 0, checked.stdout
    # Damage of other files changes nothing for an intact file.
    keep = write_table(tmp_path / "keep.csv", ["video", "time_s", "text"], [row for row in rows if row[0] in INTACT])
    alone = convert(videos, keep, tmp_path / "alone", "--short_side", "64")
    assert alone.returncode == 0, alone.stderr[-3000:]
    expected = Converted(videos, tmp_path / "alone").clips
    assert len(expected) == len(INTACT) * len(TIMES_S)
    assert {uid: records.encode(made.clips[uid]) for uid in expected} == {
        uid: records.encode(clip) for uid, clip in expected.items()
    }


# Odd values: other types, not a number, too long, not text at all, or with a meaning for a shell, a file system, FFmpeg, a
# spreadsheet, a terminal or HTML.
VALUES = (
    "", " ", "nan", "NaN", "inf", "-inf", "-1", "1e308", "-1e308", "1e-320", "0x10", "1,5", "1_000", "９", "None", "null",
    "[]", "[1", "[99999]", "[-1]", "{}", "true", "../outside.mp4", "/etc/passwd", "videos/../../outside.mp4", "..", ".", "/",
    "a\x00b", "a\nb", "a\rb", "\t", '"', '""', "'", "a" * 5000, "🔪" * 300, "\u202etxt.4pm", "\x1b[2J", "é", "e\u0301",
    "$(touch pwned)", "`touch pwned`", "; touch pwned", "| touch pwned", "&& touch pwned", "-i", "--out", "*", "?", "~",
    "file:../outside.mp4", "concat:a.mp4|../outside.mp4", "http://localhost:1/a.mp4", "pipe:0", "subfile,,start,0,end,0,,:x",
    "a.mp4", "CON", "%s%n", "{0}", "=1+1", "<script>alert(1)</script>", "\ufeff", "\ud800",
)  # fmt: skip
NUMBERS = (None, True, -1, 10**400, 1e308, float("nan"), float("inf"), [], {}, [["x"]])
RATE = 24_000  # sample rate of EPIC-Sounds
# Layout → (a valid row, delimiter of its values).
LAYOUTS = {
    "own": ({"video": "a.mp4", "time_s": "1.0", "text": WORDS, "label": "1"}, ","),
    "egoclip": (
        {"video_uid": "a", "narration_source": "narration_pass_1", "narration_ind": "7", "narration_time": "1.0",
         "clip_text": WORDS, "tag_verb": "[0]", "tag_noun": "[0]"}, "\t",
    ),
    "ego4dsounds": (
        {"video_uid": "a", "narration_source": "narration_pass_1", "narration_ind": "7", "narration_time": "1.0",
         "clip_text": WORDS, "tag_verb": "[]", "tag_noun": "[]", "positive": "1.0"}, "\t",
    ),
    "labels": (
        {"video_uid": "a", "annotation_uid": "u", "narration_pass": "narration_pass_1", "timestamp_sec": "1.0",
         "narration_text": WORDS, "vote_1": "1", "vote_2": "0", "vote_3": "1"}, ",",
    ),
    "json": ({"timestamp_sec": 1.0, "timestamp_frame": 30, "narration_text": WORDS, "annotation_uid": "u"}, ""),
    "redacted": ({"time": 1.0, "text": WORDS}, ""),
    "taxonomy": ({"label": "chop", "group": "['chop', 'onion']"}, ","),
    "splits": ({"video_uid": "a", "split": "train"}, ","),
    "epic": (
        {"annotation_id": "P01_01_x", "participant_id": "P01", "video_id": "P01_01", "start_timestamp": "00:00:01.000",
         "stop_timestamp": "00:00:02.000", "start_sample": "24000", "stop_sample": "48000", "description": "tap",
         "class": "water", "class_id": "1"}, ",",
    ),
    "esc": (
        {"filename": "x.wav", "fold": "1", "target": "0", "category": "dog", "esc10": "True", "src_file": "100", "take": "A"},
        ",",
    ),
}  # fmt: skip
FILES = {"epic": "EPIC_Sounds_train.csv", "esc": "meta/esc50.csv", "json": "narration.json", "redacted": "redacted.json"}
TAXONOMY = narrations.Taxonomy(["chop"], {("chop",): 0})


def read(layout: str, path: pathlib.Path, videos: pathlib.Path) -> int:
    """Reads the file by its layout's reader and returns the number of rows read."""
    match layout:
        case "own":
            return len(own_csv.read(path, videos))
        case "egoclip":
            return len(egoclip.read(path, TAXONOMY, TAXONOMY))
        case "ego4dsounds":
            return len(ego4dsounds.read(path, TAXONOMY, TAXONOMY))
        case "labels":
            return len(sounding_labels.read(path))
        case "taxonomy":
            return len(narrations.read_taxonomy(path).labels)
        case "splits":
            splits = narrations.read_splits(path)
            return sum(row["video_uid"] in splits for _, row in files.read_csv(path, {"video_uid"}))
        case "epic":
            return sum(map(len, sounds.choose(epic_sounds_source.read([path])[0])))
        case "esc":
            found, _ = esc50_source.read(path.parents[1], esc10=False, test_fold=0, validation_fold=0)
            return sum(map(len, sounds.choose(found)))
    return len(narration_json.read(path))


def write_rows(layout: str, folder: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """Writes the rows as a file of this layout in `folder`, and returns its path."""
    base, delimiter = LAYOUTS[layout]
    path = folder / FILES.get(layout, f"{layout}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not delimiter:
        uids = [str(row.get("video_uid", "a")) for row in rows]
        lists = {uid: [row for own, row in zip(uids, rows, strict=True) if own == uid] for uid in uids}
        parts = {uid: {"narrations": part} for uid, part in lists.items()}
        content = parts if layout == "redacted" else {uid: {"narration_pass_1": part} for uid, part in parts.items()}
        path.write_text(json.dumps({"videos": content}))
        return path
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as f:
        writer = csv.DictWriter(f, base, delimiter=delimiter, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def row_of(layout: str, case: int) -> dict:
    """Returns the layout's valid row with a time or name of its own, so that no two rows are doubles."""
    time_s, row = round(1.0 + case / 1000, 3), dict(LAYOUTS[layout][0])
    samples = [round(second * RATE) for second in (time_s, time_s + 1)]
    stamps = [f"00:00:{second:06.3f}" for second in (time_s, time_s + 1)]
    own = {
        "time_s": str(time_s), "narration_time": str(time_s), "timestamp_sec": time_s if layout == "json" else str(time_s),
        "time": time_s, "annotation_id": f"P01_01_{case}", "filename": f"{case}.wav", "start_timestamp": stamps[0],
        "stop_timestamp": stamps[1], "start_sample": str(samples[0]), "stop_sample": str(samples[1]),
    }  # fmt: skip
    return row | {name: value for name, value in own.items() if name in row}


def mutated_row(layout: str, case: int) -> dict:
    rng, row = np.random.default_rng([2, case]), row_of(layout, case)
    names, values = (list(row), VALUES) if LAYOUTS[layout][1] else ([*row, "video_uid"], VALUES + NUMBERS)
    for name in rng.choice(names, size=int(rng.integers(1, 3)), replace=False):
        row[str(name)] = values[int(rng.integers(len(values)))]
    return row


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """A folder with one video and one sound under many names, and with files outside of theirs that no row may reach."""
    root = tmp_path / "root"
    (root / "v2" / "annotations").mkdir(parents=True)
    (root / "v2" / "videos").mkdir()
    (root / "audio").mkdir()
    test_media.write(root / "v2" / "videos" / "a.mp4")
    shutil.copy(root / "v2" / "videos" / "a.mp4", root / "v2" / "outside.mp4")
    soundfile.write(root / "audio" / "P01_01.wav", test_media.sound_at(np.arange(4 * RATE) / RATE), RATE)
    for name in ("x", *range(200)):
        (root / "audio" / f"{name}.wav").symlink_to("P01_01.wav")
    shutil.copy(root / "audio" / "P01_01.wav", root / "outside.wav")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mutated_rows_are_read_or_refused_in_one_line_that_names_them(layout, root, tmp_path, num_mutations):
    outcomes = {True: 0, False: 0}
    for case in range(num_mutations):
        rows = [mutated_row(layout, case), dict(LAYOUTS[layout][0])]
        path = write_rows(layout, tmp_path / f"case_{case:03d}", rows)
        try:
            found, words = read(layout, path, root / "v2" / "videos"), ""
        except ValueError as error:
            found, words = len(rows), str(error)
        if words:
            assert path.name in words or "recording" in words, (case, words)
            assert "row" in words or "JSON" in words or "recording" in words, (case, words)
        assert found == len(rows), (case, rows[0])
        outcomes[not words] += 1
    assert min(outcomes.values()) > 0  # both must occur, or the mutations are no good
    assert not list(pathlib.Path.cwd().glob("*pwned*"))


def readable(layout: str, num: int, root: pathlib.Path, folder: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Returns (file with a valid row and those of `num` mutated rows that can be read, number of its rows)."""
    rows = [dict(LAYOUTS[layout][0])]
    for case in range(num):
        more = [*rows, mutated_row(layout, case)]
        try:
            read(layout, write_rows(layout, folder, more), root / "v2" / "videos")
        except ValueError:
            continue
        rows = more
    assert len(rows) > 1
    return write_rows(layout, folder, rows), len(rows)


# Commands that read every layout, with their options; a layout's name stands for the path of its file.
COMMANDS = {
    "own": (own_videos, ["--videos", "VIDEOS", "--narrations", "own", "--verbs", "taxonomy", "--nouns", "taxonomy"]),
    "ego4d": (ego4d, ["--narrations", "json", "--labels", "labels", "--splits", "splits"]),
    "redacted": (ego4d, ["--narrations", "redacted"]),
    "others": (ego4d, ["--narrations", "egoclip", "--labels", "ego4dsounds", "--labels_split", "test"]),
    "epic": (epic_sounds, ["--annotations", "epic", "--audio", "AUDIO"]),
    "esc": (esc50, ["--root", "esc", "--test_fold", "0", "--validation_fold", "0"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_all_mutated_rows_that_can_be_read_become_clips_or_reasons_and_none_leaves_the_folder(
    name, root, tmp_path, num_mutations, capsys
):
    command, options = COMMANDS[name]
    argv, num_rows, out = [], 0, root / "out"
    for option in options:
        if option in LAYOUTS:
            folder = root if option == "esc" else tmp_path / "tables"
            path, num = readable(option, num_mutations, root, folder)
            num_rows += num if option not in ("taxonomy", "splits") else 0
            argv.append(str(root if option == "esc" else path))
        else:
            argv.append({"VIDEOS": str(root / "v2" / "videos"), "AUDIO": str(root / "audio")}.get(option, option))
    if command is ego4d:
        argv += ["--root", str(root), "--video_dir", "v2/videos"]
        for kind in ("verb", "noun"):
            path, _ = readable("taxonomy", num_mutations, root, tmp_path / "tables")
            shutil.copy(path, root / "v2" / "annotations" / f"narration_{kind}_taxonomy.csv")
    if command in (ego4d, own_videos):
        argv += ["--short_side", "64"]
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    command.main([*argv, "--out", str(out), "--num_workers", "1", "--num_shards", "2"])
    made = Converted(root, out)
    assert f"\n{num_rows} annotations: " in "\n" + capsys.readouterr().out
    assert len(made.clips) + len(made.rejected) == sum(map(len, made.splits.values())) + len(made.rejected) == num_rows
    assert all(row["reason"] for row in made.rejected)
    assert len(made.clips) >= (1 if name == "redacted" else 2)  # it has few values, and each matters
    if command in (ego4d, own_videos):
        assert {clip.video_uid for clip in made.clips.values()} == {"a.mp4" if command is own_videos else "a"}
        assert (1_000_000, WORDS) in {(clip.time_us, clip.narration) for clip in made.clips.values()}
    for split in made.info.splits.values():
        for shard in split.shards:
            assert verify.verify_shard(out, shard, made.info).problems == []
    after = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if not path.is_relative_to(out)]
    assert sorted(after) == before
    assert not list(world.ROOT.glob("*pwned*"))
