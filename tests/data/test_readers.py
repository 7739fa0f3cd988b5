"""Threads and worker processes that make batches."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mc3_jax.data import damage, loader, memory as memory_lib, readers as readers_lib, records, transforms
from tests import world
from tests.data import test_sounds


@pytest.mark.parametrize("readers", [{"num_threads": 2}, {"num_workers": 2}], ids=["threads", "workers"])
@pytest.mark.parametrize("keep", [lambda video: video[1:], jax.device_put], ids=["a part", "on the device"])
def test_the_content_of_batches_that_are_kept_does_not_change(tmp_path, keep, readers):
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    batches = loader.train_batches(source, test_sounds.tokenize, batch_size=3, seed=0, **readers)
    kept, copies = [], []
    with contextlib.closing(batches):
        for _ in range(12):
            video = next(batches)["video"]
            kept.append(keep(video))
            copies.append(video[-len(kept[-1]) :].copy())
            del video
    for part, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(part, copy)


@pytest.mark.parametrize("readers", [{"num_threads": 2}, {"num_workers": 2}], ids=["threads", "workers"])
def test_frames_are_put_on_a_cpu_device_without_a_copy(tmp_path, readers):
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    batches = loader.train_batches(source, test_sounds.tokenize, batch_size=3, seed=0, **readers)
    with contextlib.closing(batches):
        some = list(itertools.islice(batches, 5))
    for batch in (*some, *loader.eval_batches(source, test_sounds.tokenize, batch_size=3, **readers)):
        placed = jax.device_put(batch["video"], jax.devices("cpu")[0])
        assert placed.unsafe_buffer_pointer() == batch["video"].ctypes.data


ROWS = dict(batch_size=4, process_index=1, process_count=2, num_threads=1, prefetch=1)


def make_row(number):
    return transforms.Sample("c", {"audio": np.full(40_000, number, np.int16), "row": np.int32(number)}, [])


def assert_batches_are_of_steps(batches, steps):
    for step, batch in zip(steps, batches, strict=True):
        assert batch["row"].tolist() == [4 * step + 2, 4 * step + 3]
        np.testing.assert_array_equal(batch["audio"], np.repeat(batch["row"][:, None], 40_000, 1))


def test_large_arrays_are_made_in_reusable_memory(monkeypatch):
    taken = []

    def take(memory, shape, dtype, real=memory_lib.Memory.take):
        array = real(memory, shape, dtype)
        taken.append(array.ctypes.data)
        return array

    monkeypatch.setattr(memory_lib.Memory, "take", take)
    for batch in readers_lib.read(make_row, None, range(1, 7), num_workers=0, **ROWS):
        assert batch["audio"].ctypes.data in taken
        assert batch["row"].ctypes.data not in taken


def test_threads_make_batches_at_the_same_time():
    both = threading.Barrier(2)

    def row(number):
        both.wait(20)  # broken if the other thread makes none meanwhile
        return make_row(number)

    rows = ROWS | {"batch_size": 1, "process_index": 0, "process_count": 1, "num_threads": 2}
    assert len(list(readers_lib.read(row, None, range(8), num_workers=0, **rows))) == 8


def make_row_and_leave_a_file(folder, number):
    (folder / str(number)).touch()
    return make_row(number)


@pytest.mark.parametrize("readers", [{"num_threads": 2}, {"num_workers": 1}, {"num_workers": 2}], ids=str)
def test_batches_are_made_ahead_while_nobody_asks_for_them(tmp_path, readers):
    rows = ROWS | {"batch_size": 1, "process_index": 0, "process_count": 1, "num_workers": 0, "prefetch": 8} | readers
    batches = readers_lib.read(functools.partial(make_row_and_leave_a_file, tmp_path), None, range(100), **rows)
    next(batches)
    until = time.monotonic() + 20
    while len(os.listdir(tmp_path)) < 1 + 8 and time.monotonic() < until:
        time.sleep(0.01)
    assert 1 + 8 <= len(os.listdir(tmp_path)) < 50
    batches.close()


def test_several_rows_are_read_before_the_first_is_decoded(monkeypatch):
    done = []

    def row(number):
        done.append(f"read {number}")
        return transforms.Sample(str(number), {}, [b""])

    def decode(jpegs, canvas, clip_id):
        done.append(f"decode {clip_id}")
        return np.zeros(2, np.int32)

    monkeypatch.setattr(transforms, "decode_frames", decode)
    readers_lib._MakeBatch(row, (1, 2, 2, 3), 3, 0, 3, 2, memory_lib.Memory())(1)
    assert done == ["read 3", "read 4", "decode 3", "decode 4", "read 5", "decode 5"]


def list_shared():
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


def test_workers_use_no_dev_shm_which_containers_keep_small():
    before = list_shared()
    batches = readers_lib.read(make_row, None, range(1, 100), num_workers=1, **ROWS)
    held = [next(batches) for _ in range(4)]
    assert list_shared() <= before
    assert_batches_are_of_steps(held, range(1, 5))
    batches.close()


def make_row_and_free_records(number):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        sum(map(len, [bytes(170_000) for _ in range(64)]))  # all in memory at once
    made = make_row(number)
    made.arrays["page_faults"] = np.int32(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return made


def test_workers_keep_the_memory_of_records_that_they_free():
    batches = readers_lib.read(make_row_and_free_records, None, range(1, 5), num_workers=1, **ROWS)
    page_faults = np.concatenate([batch["page_faults"] for batch in batches])
    assert len(page_faults) == 8
    assert page_faults[0] >= 2000  # 64 records of 170 KB have 2,656 pages, some of which the new worker's heap already holds
    assert np.median(page_faults[1:]) < 500


def slowly(batches):
    for batch in batches:
        time.sleep(1.2)  # meanwhile workers that are done end
        yield batch


@pytest.mark.slow
def test_batches_outlive_the_workers_that_made_them():
    batches = readers_lib.read(make_row, None, range(1, 5), num_workers=3, **ROWS)
    assert_batches_are_of_steps(slowly(batches), range(1, 5))


def make_row_or_refuse(number):
    if number == 4 * 4 + 3:
        raise ValueError("clip c is no good")
    return make_row(number)


@pytest.mark.slow
def test_batches_before_one_that_can_not_be_made_are_not_lost():
    batches, made = slowly(readers_lib.read(make_row_or_refuse, None, range(1, 9), num_workers=2, **ROWS)), []
    with pytest.raises(ValueError, match=r"^clip c is no good"):
        made.extend(batches)
    assert_batches_are_of_steps(made, range(1, 4))


@pytest.mark.parametrize(
    ("is_known", "message"),
    [
        (True, r"opened \(.*Permission denied\): use fewer .*num_workers, or 0 for threads$"),
        (False, r"died \(exit status unknown\): if there is too little memory, use fewer"),
    ],
)
def test_memory_that_can_not_be_opened_is_reported(monkeypatch, is_known, message):
    def refuse(process, _, shape, dtype):
        return memory_lib.Received(process if is_known else 0, 0, PermissionError(13, "Permission denied"), shape, dtype)

    monkeypatch.setattr(memory_lib.Received, "of", refuse)
    batches = readers_lib.read(make_row, None, range(1, 9), num_workers=1, **ROWS)
    with pytest.raises(ChildProcessError, match=message):
        next(batches)
    assert not find_workers()


def find_workers():
    return [child for child in multiprocessing.active_children() if "grain" in child.name]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name, values in batch.items():
            assert type(values) is type(other[name]) is np.ndarray
            np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.mark.parametrize(("kind", "num_workers"), [("train", 2), ("eval", 1), ("eval", 5)])
def test_workers_read_what_threads_read(tmp_path, kind, num_workers):
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    options = dict(batch_size=4, process_index=1, process_count=2)
    read, more = {"train": (loader.train_batches, {"seed": 3, "start_step": 5}), "eval": (loader.eval_batches, {})}[kind]
    threads, workers = (
        read(source, test_sounds.tokenize, **options, **more, **readers)
        for readers in ({"num_threads": 2}, {"num_workers": num_workers, "prefetch": 3})
    )
    if kind == "train":
        assert_equal(itertools.islice(threads, 7), itertools.islice(workers, 7))
        workers.close()
    else:
        assert_equal(threads, workers)
    assert not find_workers()


def refuse(_):
    raise ValueError("no such word")


def damaged(folder, kind):
    """Writes clips whose training shard has the damage `kind`, see `DAMAGE`, and returns the folder."""
    shard = test_sounds.write(folder, pictures=True) / "s-train.array_record-00000-of-00001"
    if kind == "flipped":
        content = bytearray(shard.read_bytes())
        content[110] ^= 0xFF
        shard.write_bytes(content)
        return folder
    clips = [test_sounds.make_clip(i, pictures=True) for i in range(8)]
    clips[3].frames[1] = clips[3].frames[1][:40]
    rows = [records.encode(clip) for clip in clips]
    rows[3] = rows[3] if kind == "picture" else b"\xff\xff no record"
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for row in rows if kind != "short" else rows[4:]:
        writer.write(row)
    writer.close()
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    return folder


def take(folder, read):
    source = loader.open_split(folder, "validation+train", 2)
    return list(itertools.islice(read(source, test_sounds.tokenize, batch_size=4), 9))


DAMAGE = {
    "flipped": "00000-of-00001, record 0 can't be read: Corrupted Riegeli/records file: chunk data hash mismatch",
    "record": "00000-of-00001, record 3 can't be read: record of 12 bytes is not a tf.train.Example",
    "picture": "00000-of-00001, record 3 can't be read: clip c03: frame 1 can't be decoded",
    "truncated": "00000-of-00001 can't be read: Invalid Riegeli/records file",
    "short": "00000-of-00001 can't be read: it holds 4 clips, clips.json says 8",
}


@pytest.mark.parametrize(("kind", "num_workers"), [*((kind, 0) for kind in DAMAGE), ("flipped", 1)])
def test_damage_is_one_error_that_names_shard_and_record_and_what_mends_it(tmp_path, kind, num_workers):
    folder = damaged(tmp_path, kind)
    readers = [(loader.eval_batches, {}), (loader.train_batches, {"seed": 0})]
    for read, more in readers[: 1 if num_workers else 2]:  # workers take seconds to start
        with pytest.raises(damage.DataError) as raised:
            take(folder, functools.partial(read, num_workers=num_workers, **more))
        said = str(raised.value)
        assert said.startswith(f"{folder}/s-train.array_record-{DAMAGE[kind]}"), said
        assert f"run `python -m data_prep.verify {folder}`, delete the shards that it names and run the conv" in said
    assert not find_workers()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_an_error_with_a_clip_in_a_worker_is_raised_with_its_message(tmp_path, num_workers):
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    batches = loader.train_batches(source, refuse, batch_size=4, seed=0, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^no such word"):
        next(batches)


def test_a_worker_that_is_killed_ends_the_run_with_its_signal(tmp_path):
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    batches = loader.train_batches(source, test_sounds.tokenize, batch_size=4, seed=0, num_workers=2)
    next(batches)
    first, _ = find_workers()
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"died \(signal 9\): if there is too little memory, use fewer"):
        list(itertools.islice(batches, 50))
    assert not find_workers()


READ = """import multiprocessing, threading, time
from mc3_jax.data import loader, tokenizer

def tell():
    while not multiprocessing.active_children():
        time.sleep(0.01)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)

if __name__ == "__main__":
    source = loader.open_split({folder!r}, "train", 2)
    batches = loader.train_batches(source, tokenizer.blank(8), batch_size=4, seed=0, num_workers=1)
    threading.Thread(target=tell).start()
    next(batches)
    print("read", flush=True)
    time.sleep(100)
else:
    time.sleep(1)  # a worker that starts
"""


def start_reader(folder, script: str, **options) -> subprocess.Popen:
    """Starts a script, in which {folder!r} stands for new clips, as a process whose standard output is read."""
    path = folder / "read.py"
    path.write_text(script.format(folder=str(test_sounds.write(folder, pictures=True))))
    # Python puts a script's folder on its path, not the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(world.ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, str(path)], env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.fixture
def reader(tmp_path):
    """A process that prints the id of its worker process as soon as there is one, and "read" after the first batch."""
    with start_reader(tmp_path, READ) as process:
        yield process
        process.kill()


UNGUARDED = """from mc3_jax.data import loader, tokenizer
source = loader.open_split({folder!r}, "train", 2)
next(loader.train_batches(source, tokenizer.blank(8), batch_size=4, seed=0, num_workers=2))
"""


@pytest.mark.slow
def test_each_worker_that_runs_its_parents_script_says_so_in_one_line(tmp_path):
    with start_reader(tmp_path, UNGUARDED, stderr=subprocess.PIPE) as process:
        try:
            _, errors = process.communicate(timeout=100)
        finally:
            process.kill()
    *lines, last = errors.splitlines()
    told = "error: a worker runs this script once more: put what it does under `if __name__ == '__main__':`"
    assert lines[0] == told
    assert lines.count(told) <= 2
    assert last == "ChildProcessError: a worker that reads clips died (status 1)"
    assert errors.count("Traceback") == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_ready", [False, True], ids=["while it starts", "while it reads"])
def test_a_worker_ends_with_a_parent_that_is_killed(reader, is_ready):
    worker = int(reader.stdout.readline())
    assert not is_ready or reader.stdout.readline() == "read\n"
    reader.kill()
    reader.wait()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_ignore_signals_to_end_and_leave_them_to_the_parent(reader):
    worker = int(reader.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker, number)  # while it starts
    assert reader.stdout.readline() == "read\n"
    os.kill(worker, signal.SIGTERM)
    time.sleep(0.5)
    assert os.path.exists(f"/proc/{worker}")
