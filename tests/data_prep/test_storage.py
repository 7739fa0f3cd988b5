"""Buckets and disks: the data set is the same wherever files are; none is lost, mistaken for missing, or left behind."""

import argparse
import fcntl
import json
import os
import pathlib
import shutil
import tempfile
import threading

import fsspec
import pytest

from data_prep import ego4d, own_videos, storage, video_files
from mc3_jax.data import records
from tests import world
from tests.data_prep import bucket

OPTIONS = ("--short_side", "32", "--num_shards", "3")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    return world.make_videos(tmp_path_factory.mktemp("storage") / "world", num_videos=6, seconds=8)


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of a data set's files by path; reports without what depends on where the videos are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    for name in found:
        if name.startswith("reports/"):
            report = json.loads(found[name])
            del report["fingerprint"]
            found[name] = json.dumps(report).encode()
    return found


@pytest.fixture(scope="module")
def local(root, tmp_path_factory) -> dict[str, bytes]:
    """The files that the conversion from disk to disk makes."""
    folder = tmp_path_factory.mktemp("storage") / "local"
    ego4d.main(["--root", str(root), "--out", str(folder), *OPTIONS, "--num_workers", "1"])
    return content(folder)


def convert(root: str | pathlib.Path, out: str | pathlib.Path, scratch: pathlib.Path, *args: str) -> None:
    scratch.mkdir(exist_ok=True)
    ego4d.main(
        ["--root", str(root), "--out", str(out), *OPTIONS, "--num_workers", "1", "--scratch", str(scratch), *args]
    )
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_from_bucket_to_bucket_two_workers_make_the_data_set_that_disks_make(root, local, buckets, tmp_path):
    shutil.copytree(root, buckets / "mine" / "ego4d")
    (tmp_path / "scratch").mkdir()
    done = world.run(
        "data_prep.ego4d", "--root", "gs://mine/ego4d", "--out", "gs://mine/clips", *OPTIONS, "--num_workers", "2",
        "--scratch", tmp_path / "scratch",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(buckets / "mine" / "clips") == local
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not list(world.ROOT.glob("gs:*"))


@pytest.mark.slow
def test_disk_to_bucket_and_bucket_to_disk(root, local, buckets, tmp_path):
    convert(root, "s3://mine/clips", tmp_path / "scratch")
    assert content(buckets / "mine" / "clips") == local
    shutil.copytree(root, buckets / "mine" / "ego4d")
    convert("s3://mine/ego4d", tmp_path / "out", tmp_path / "scratch")
    assert content(tmp_path / "out") == local


def test_missing_and_forbidden_objects_are_rejects_and_a_network_that_comes_back_is_none(
    root, local, buckets, tmp_path
):
    shutil.copytree(root, buckets / "mine" / "ego4d")
    videos = sorted((buckets / "mine" / "ego4d" / "v2" / "video_540ss").iterdir())
    (buckets / "faults" / videos[0].name).write_text("forbidden")
    (buckets / "faults" / videos[1].name).write_text("2")
    videos[2].unlink()
    convert("gs://mine/ego4d", tmp_path / "out", tmp_path / "scratch")
    clips = {row["clip_id"] for row in map(json.loads, local["rejected.jsonl"].decode().splitlines())}

    def told() -> set[tuple[str, str, str]]:
        """Returns (video, reason, detail) of rejected clips that the conversion on disks does not reject."""
        rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
        return {(row["video_uid"], row["reason"], row["detail"]) for row in rows if row["clip_id"] not in clips}

    missing = (videos[2].stem, "video file is missing", "")
    assert told() == {(videos[0].stem, "video file can't be read", "Permission denied"), missing}
    (buckets / "faults" / videos[0].name).unlink()  # the file itself does not change
    convert("gs://mine/ego4d", tmp_path / "out", tmp_path / "scratch")
    assert told() == {missing}


def test_a_network_that_stays_away_ends_the_run_in_one_line_and_costs_no_clip(
    root, local, buckets, tmp_path, capsys, monkeypatch
):
    shutil.copytree(root, buckets / "mine" / "ego4d")
    videos = sorted((buckets / "mine" / "ego4d" / "v2" / "video_540ss").iterdir())
    fault = buckets / "faults" / videos[-1].name
    fault.write_text("1000")
    with pytest.raises(SystemExit) as ended:
        convert("gs://mine/ego4d", "gs://mine/clips", tmp_path / "scratch")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: a worker failed: gs://mine/ego4d/v2/video_540ss/")
    assert "RuntimeError: 503 Service Unavailable" in err.splitlines()[-1]
    assert not (buckets / "mine" / "clips" / "clips.json").exists()
    fault.unlink()
    # An expired token forbids everything, for which the videos are not to blame.
    monkeypatch.setattr(bucket.Buckets, "ls", lambda *args, **kwargs: 1 / 0)
    video_files._listing.cache_clear()
    with pytest.raises(SystemExit):
        convert("gs://mine/ego4d", "gs://mine/clips", tmp_path / "scratch")
    assert "ZeroDivisionError" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()


@pytest.mark.slow
def test_a_run_that_broke_off_in_a_bucket_reads_no_finished_video_again(root, local, buckets, tmp_path, capsys):
    shutil.copytree(root, buckets / "mine" / "ego4d")
    videos = {p.name for p in (buckets / "mine" / "ego4d" / "v2" / "video_540ss").iterdir()}
    log = buckets / "opened"
    publish, left = storage.publish, [10]

    def breaks_off(path, target):
        left[0] -= str(target).startswith("gs://")
        if left[0] < 0:
            raise OSError("no more")
        publish(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "publish", breaks_off)
        with pytest.raises(SystemExit):
            convert("gs://mine/ego4d", "gs://mine/clips", tmp_path / "scratch")
    first = [name for name in log.read_text().split() if name in videos]
    log.write_text("")
    convert("gs://mine/ego4d", "gs://mine/clips", tmp_path / "scratch")
    second = [name for name in log.read_text().split() if name in videos]
    assert content(buckets / "mine" / "clips") == local
    assert len(set(first) & set(second)) <= 1  # the one that could not be stored
    assert len(first) >= 3
    assert set(first) | set(second) == videos


def test_own_videos_in_a_bucket_are_named_with_or_without_suffix(root, buckets, tmp_path):
    folder = buckets / "mine" / "videos"
    folder.mkdir(parents=True)
    source = sorted((root / "v2" / "video_540ss").iterdir())[0]
    for name in ("a.mp4", "monday.mp4", "c.mp4", "c.mov"):
        shutil.copy(source, folder / name)
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\n{source}\n#EXT-X-ENDLIST\n")
    table = buckets / "mine" / "mine.csv"
    rows = ["a,2.5,chops", "monday.mp4,3,stirs", "c,3,cuts", "gone,3,x", "../mine.csv,3,x", "list,3,x"]
    table.write_text("video,time_s,text\n" + "\n".join(rows) + "\n")
    out = tmp_path / "out"
    own_videos.main(["--videos", "gs://mine/videos", "--narrations", "gs://mine/mine.csv", "--out", str(out),
                     "--num_workers", "1", "--short_side", "32"])  # fmt: skip
    told = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert sorted((row["video_uid"], row["reason"]) for row in told) == [
        ("../mine.csv", "video name points outside the folder"),
        ("c", "several files have this video name: give the name with its suffix"),
        ("gone", "video file is missing"), ("list.mp4", "video file is a playlist"),
    ]  # fmt: skip
    assert sum(split.num_clips for split in records.ClipsInfo.load(out).splits.values()) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gs://mine/x", "gs:// needs gcsfs: pip install gcsfs"),
        ("s3://mine/x", "s3:// needs s3fs: pip install s3fs"),
        ("", "an empty path: is a shell variable not set?"),
        ("https://example.com/x", "'https://example.com/x' must be a local path, gs:// or s3://"),
    ],
)
def test_an_address_that_cannot_be_opened_is_one_line(text, words, monkeypatch, capsys):
    def lacks(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", lacks)
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        storage.parse(text)
    with pytest.raises(SystemExit) as ended:
        ego4d.main(["--root", text, "--out", "x"])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_training_says_that_it_reads_no_bucket():
    with pytest.raises(ValueError, match="gs://mine/clips is in a bucket: .* copy or mount it"):
        records.ClipsInfo.load("gs://mine/clips")


def test_a_file_that_was_replaced_by_one_of_its_size_is_another(buckets, tmp_path):
    (buckets / "mine").mkdir()
    for folder, at in ((tmp_path, tmp_path), (storage.as_path("gs://mine"), buckets / "mine")):
        found = []
        for content in (b"12345", b"54321"):
            (at / "file").write_bytes(content)
            found.append(storage.stat(folder / "file"))
            assert storage.files(folder)["file"] == found[-1]
            assert found[-1].bytes == storage.size(folder / "file") == 5
        assert found[0].version != found[1].version
        assert storage.stat(folder / "none") is storage.size(folder / "none") is None


def test_names_are_listed_and_no_file_is_looked_at(buckets, tmp_path, monkeypatch):
    for at, folder in ((tmp_path / "here", tmp_path / "here"), (buckets / "mine", storage.as_path("gs://mine"))):
        assert storage.names(folder) == []
        at.mkdir()
        for name in ("a", "b"):
            (at / name).touch()
        assert sorted(storage.names(folder)) == ["a", "b"]
    monkeypatch.setattr(os, "scandir", None)
    monkeypatch.setattr(os, "stat", None)
    assert sorted(storage.names(tmp_path / "here")) == ["a", "b"]


def test_half_an_upload_is_reported(buckets, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"12345")
    monkeypatch.setattr(bucket.Upload, "__exit__", lambda self, *args: self._path.write_bytes(b"123"))
    with pytest.raises(OSError, match="gs://mine/file: 3 of 5 bytes arrived"):
        storage.publish(tmp_path / "file", storage.as_path("gs://mine/file"))


def test_scratch_folders_of_killed_processes_go_and_those_in_use_stay(tmp_path):
    with storage.scratch_folder(tmp_path) as mine:
        prefix, [mark] = mine.name[:-8], [p.name for p in mine.iterdir()]
    dead, used, young, foreign = (tmp_path / f"{prefix}{name}" for name in ("dead", "used", "young", "foreign"))
    for folder in (dead, used, young, foreign):
        folder.mkdir()
        (folder / "video.mp4").touch()
        if folder is not foreign:  # somebody else's with such a name
            (folder / mark).touch()
    for folder in (dead, used, foreign):
        os.utime(folder, (0, 0))
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with storage.scratch_folder(tmp_path) as mine:
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([used.name, young.name, foreign.name, mine.name])
    os.close(descriptor)
    assert not mine.exists()


def test_a_new_scratch_folder_waits_for_a_process_that_looks_whether_it_is_an_orphan(tmp_path, monkeypatch):
    ends = threading.Event()

    def end(descriptor: int) -> None:
        ends.set()
        os.close(descriptor)

    class Seen(tempfile.TemporaryDirectory):
        def __enter__(self) -> str:
            descriptor = os.open(self.name, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            threading.Timer(0.3, end, [descriptor]).start()
            return super().__enter__()

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Seen)
    with storage.scratch_folder(tmp_path) as mine:
        assert mine.is_dir()
        assert ends.is_set()


def test_libraries_make_their_temporary_files_in_a_scratch_folder(tmp_path):
    before = tempfile.gettempdir()
    with storage.temporary_files(tmp_path) as folder:
        assert pathlib.Path(tempfile.mkdtemp()).parent == folder
        assert folder.parent == tmp_path
    assert tempfile.gettempdir() == before
    assert list(tmp_path.iterdir()) == []


def test_a_local_file_is_synced_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    storage.write(tmp_path / "file", b"123")
    aside, *rest = calls
    assert aside.startswith(f"{tmp_path}/.file.")
    assert rest == ["replace", str(tmp_path)]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
