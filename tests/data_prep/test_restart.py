"""A conversion killed at any moment and restarted redoes no finished video and makes the folder of an uninterrupted run."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from data_prep import pieces, storage
from tests import world

MARK = "MC3_TEST_RESTART"
OPTIONS = ("--num_shards", "3")
SMALL = ("--short_side", "32")
# Converts in a process that is killed at a given event: before a file is renamed, synced, removed or made, or a clip is put
# into a piece. Prints the files, or data sets of an HDF5 file, that it starts to decode. Forking for each line of input saves
# the imports.
WRAPPER = """
import builtins, io, os, pathlib, signal, sys
import apache_beam.runners.portability.fn_api_runner
from data_prep import ego4d, epic_sounds, esc50, guard, storage
from mc3_jax.data import records

def convert(events, command, argv):
    left = [events]
    def counted(call):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapped
    for module, name in ((os, "replace"), (os, "fsync"), (os, "rmdir"), (records, "encode"), (storage, "remove"),
                         (pathlib.Path, "mkdir"), (pathlib.Path, "write_bytes"), (storage, "aside_of")):
        setattr(module, name, counted(getattr(module, name)))
    cut = guard.cut_windows
    def told(path, *args, hdf5=None, **kwargs):
        os.write(1, f"cuts {hdf5[0] if hdf5 else pathlib.Path(path).stem}\\n".encode())
        return cut(path, *args, hdf5=hdf5, **kwargs)
    guard.cut_windows = told
    globals()[command].main(argv)

for line in iter(sys.stdin.readline, ""):
    events, command, *argv = line.split()
    pid = os.fork()
    if pid == 0:
        try:
            convert(int(events), command, argv)
        except BaseException as error:
            os.write(1, f"failed {error!r}\\n".encode())
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    os.write(1, f"ended {os.waitstatus_to_exitcode(status)}\\n".encode())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    return world.make_videos(tmp_path_factory.mktemp("restart") / "world", num_videos=6, seconds=8)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> dict[str, bytes]:
    """The files that an uninterrupted run with one worker makes."""
    folder = tmp_path_factory.mktemp("restart") / "whole"
    done = world.run("data_prep.ego4d", "--root", root, *SMALL, "--out", folder, *OPTIONS, "--num_workers", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    files = content(folder)
    assert {"clips.json", "rejected.jsonl", "dataset_info.json", "features.json"} < set(files)
    assert not [name for name in files if "tmp" in name or "spool" in name or "plan" in name]
    return files


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of every file in a folder, also of hidden ones, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def finished_videos(folder: pathlib.Path) -> set[str]:
    """Returns ids of the videos and clips that a restart need not decode: for ESC, recordings have other names than files."""
    found = set()
    for path in folder.glob("spool/*.piece"):
        if re.fullmatch(pieces.NAME, path.name):
            piece = pieces.read(path)
            found |= {row[key] for row in piece.clips + piece.rejects for key in ("video_uid", "clip_id")}
    return found


def finished_shards(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Returns (inode, modification time in ns) of each shard that has a report, by its name."""
    shards = [folder / path.name.removesuffix(".json") for path in folder.glob("reports/[!.]*.json")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


def processes(mark: str) -> list[str]:
    """Returns the command lines of processes that have the mark in their environment."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def assert_all_end(mark: str) -> None:
    deadline = time.monotonic() + 30
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.mark.slow
def test_a_conversion_killed_at_any_step_resumes_after_the_last_finished_video(root, whole, tmp_path):
    kill_at_steps("ego4d", ["--root", root, *SMALL], whole, tmp_path / "out")


def kill_at_steps(
    module: str, inputs: list, whole: dict[str, bytes], folder: pathlib.Path, most_killed: int = 25
) -> None:
    """Kills a conversion again and again; asserts each time what is kept, and in the end what was made."""
    rng = random.Random(0)
    temporary = folder.parent / "temporary"
    temporary.mkdir()
    environment = {**os.environ, MARK: module, "TMPDIR": str(temporary)}
    wrapper = subprocess.Popen(
        [sys.executable, "-c", WRAPPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, cwd=world.ROOT, env=environment,
    )  # fmt: skip
    num_killed, ended = 0, ""
    try:
        while ended != "ended 0":
            videos, shards = finished_videos(folder), finished_shards(folder)
            argv = [module, *inputs, "--out", folder, *OPTIONS, "--num_workers", "1"]
            # A conversion of six videos has fewer than 10,000 events, so the last one is not killed.
            events = rng.randint(8, 40) if num_killed < most_killed else 10_000
            print(events, *argv, file=wrapper.stdin, flush=True)
            cut = set()
            for line in wrapper.stdout:
                kind, _, what = line.strip().partition(" ")
                assert kind != "failed", line
                cut |= {what} if kind == "cuts" else set()
                if kind == "ended":
                    ended = line.strip()
                    break
            assert ended in ("ended 0", f"ended -{signal.SIGKILL}")
            num_killed += ended != "ended 0"
            assert not cut & videos
            assert shards.items() <= finished_shards(folder).items()
    finally:
        wrapper.stdin.close()
        wrapper.wait(timeout=30)
    assert num_killed >= 8
    assert content(folder) == whole
    # Only folders that kills left in the last minute; a later run removes them.
    assert {path.name.rpartition("-")[0] + "-" for path in temporary.iterdir()} <= {storage._SCRATCH}
    assert_all_end(module)


def start(root: pathlib.Path, folder: pathlib.Path, num_workers: int, mark: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_prep.ego4d", "--root", root, *SMALL, "--out", folder, *OPTIONS,
               "--num_workers", num_workers]  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command], cwd=world.ROOT, start_new_session=True, env={**os.environ, MARK: mark},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("all_at_once", [True, pytest.param(False, marks=pytest.mark.large)])
def test_killed_workers_leave_no_process_and_another_number_of_them_resumes(root, whole, tmp_path, all_at_once):
    folder, rng, mark = tmp_path / "out", random.Random(1), f"workers-{all_at_once}"
    for num_workers in (2, 3):
        process = start(root, folder, num_workers, mark)
        # Kill once there is a piece or plan, or a little later; so the run has begun on any machine.
        deadline = time.monotonic() + 60
        while not list(folder.glob("spool/*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        shards = finished_shards(folder)
        # Kill all, as a batch system does, or the launcher alone, as when memory runs out.
        os.killpg(process.pid, signal.SIGKILL) if all_at_once else process.kill()
        process.wait(timeout=30)
        assert_all_end(mark)
        assert shards.items() <= finished_shards(folder).items()
    shards = finished_shards(folder)
    assert start(root, folder, 1, mark).wait(timeout=120) == 0
    assert content(folder) == whole
    assert shards.items() <= finished_shards(folder).items()
    assert_all_end(mark)
