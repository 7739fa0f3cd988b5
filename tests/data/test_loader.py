"""The order of training clips, and the canvas their pictures come onto."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
import simplejpeg

from mc3_jax.data import loader, transforms
from tests import world
from tests.data import test_sounds

VIDEO_CLIPS = [7, 1, 12, 4, 0, 9]
VIDEO = np.repeat(np.arange(len(VIDEO_CLIPS)), VIDEO_CLIPS)


@pytest.mark.parametrize("clips_per_video", [1, 2, 4, 100])
def test_an_epoch_has_every_clip_once_in_an_order_of_its_own(clips_per_video):
    orders = [loader.epoch_order(VIDEO_CLIPS, clips_per_video, 5, epoch) for epoch in (0, 1, 0)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(len(VIDEO)))
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], loader.epoch_order(VIDEO_CLIPS, clips_per_video, 6, 0))


def test_clips_come_in_groups_of_a_video_that_differ_from_epoch_to_epoch():
    groups = []
    for epoch in range(20):
        order = loader.epoch_order(VIDEO_CLIPS, 4, 0, epoch)
        # Neighbouring groups may be of one video: such a stretch is as long as its groups together.
        cuts = np.flatnonzero(np.diff(VIDEO[order])) + 1
        for stretch in np.split(order, cuts):
            size = VIDEO_CLIPS[VIDEO[stretch[0]]]
            assert len(stretch) in {4 * n for n in range(1, 4)} | {size % 4 + 4 * n for n in range(3)}
        assert len(cuts) + 1 <= sum(-(-n // 4) for n in VIDEO_CLIPS)
        groups.append(frozenset(order[:4].tolist()))
    assert len(set(groups)) > 10


def test_single_clips_do_not_come_in_groups():
    counts = [50] * 40
    video = np.repeat(np.arange(40), 50)
    order = loader.epoch_order(counts, 1, 0, 0)
    assert np.mean(video[order[1:]] == video[order[:-1]]) < 0.06  # 1 in 40 by chance
    order = loader.epoch_order(counts, 10, 0, 0)
    assert np.mean(video[order[1:]] == video[order[:-1]]) > 0.85


def test_an_order_does_not_repeat_the_files_order_within_a_group():
    order = loader.epoch_order([64], 8, 0, 0)
    assert np.mean(np.diff(order) == 1) < 0.2


@pytest.mark.parametrize("canvas", [(24, 32), (30, 40)])
def test_frames_are_decoded_onto_their_canvas_of_their_size_or_larger(canvas):
    pictures = np.random.default_rng(0).integers(0, 255, (2, 24, 32, 3)).astype(np.uint8)
    files = [simplejpeg.encode_jpeg(picture, 95) for picture in pictures]
    out = np.full((2, *canvas, 3), 7, np.uint8)
    assert transforms.decode_frames(files, out, "c").tolist() == [24, 32]
    for file, frame in zip(files, out, strict=True):
        np.testing.assert_array_equal(frame[:24, :32], simplejpeg.decode_jpeg(file))
    assert not out[:, 24:].any()
    assert not out[:, :, 32:].any()


def test_a_frame_that_is_larger_than_the_canvas_or_no_jpeg_is_named():
    file = simplejpeg.encode_jpeg(np.zeros((24, 32, 3), np.uint8))
    out = np.zeros((2, 24, 30, 3), np.uint8)
    with pytest.raises(ValueError, match=r"clip c: frame 0 can't be decoded: it has \(24, 32\) px, more than .*\(24, 30\)"):
        transforms.decode_frames([file], out, "c")
    narrow = np.zeros((1, 26, 30, 3), np.uint8)  # it would hold the bytes
    with pytest.raises(ValueError, match=r"it has \(24, 32\) px, more than the canvas \(26, 30\)"):
        transforms.decode_frames([file], narrow, "c")
    with pytest.raises(ValueError, match="clip c: frame 1 can't be decoded: "):
        transforms.decode_frames([file, file[:40]], np.zeros((2, 24, 32, 3), np.uint8), "c")


def test_memory_is_taken_again_once_nobody_holds_a_part_of_it():
    memory = loader._Memory((3, 5, 7))
    first = memory.take()
    place, part = first.ctypes.data, first[1, 2:]
    part[:] = 7
    del first
    gc.collect()
    second = memory.take()
    second[:] = 1
    assert (part == 7).all()
    del part
    gc.collect()
    with mock.patch.object(np, "empty", side_effect=AssertionError("new memory")):
        third = memory.take()
    assert third.ctypes.data == place
    assert second.shape == third.shape == (3, 5, 7)
    assert second.ctypes.data % 64 == place % 64 == 0


@pytest.mark.parametrize("readers", [{"num_threads": 2}, {"num_workers": 2}], ids=["threads", "workers"])
@pytest.mark.parametrize("keep", [lambda video: video[1:], jax.device_put], ids=["a part", "on the device"])
def test_batches_that_are_kept_keep_what_they_hold(tmp_path, keep, readers):
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    batches = loader.train_batches(source, test_sounds.tokenize, batch_size=3, seed=0, **readers)
    kept, copies = [], []
    for _ in range(12):
        video = next(batches)["video"]
        kept.append(keep(video))
        copies.append(video[-len(kept[-1]) :].copy())
        del video
    for part, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(part, copy)


def test_pictures_come_onto_a_cpu_without_a_copy(tmp_path):
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    batches = (
        loader.train_batches(source, test_sounds.tokenize, batch_size=3, seed=0, num_threads=2),
        loader.eval_batches(source, test_sounds.tokenize, batch_size=3, num_threads=2),
    )
    for batch in (*(next(batches[0]) for _ in range(5)), *batches[1]):
        placed = jax.device_put(batch["video"], jax.devices("cpu")[0])
        assert placed.unsafe_buffer_pointer() == batch["video"].ctypes.data


@pytest.fixture(params=[1, 1 << 30], ids=["shared memory", "pipe"])
def way(request, monkeypatch):
    """How workers hand over pictures; what lies in shared memory must be gone afterwards."""
    monkeypatch.setattr(loader, "_LARGE", request.param)
    before = set(os.listdir("/dev/shm"))
    yield request.param
    deadline = time.monotonic() + 10  # Grain frees it in a thread
    while left := [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def find_workers():
    return [child for child in multiprocessing.active_children() if "grain" in child.name]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name, values in batch.items():
            assert type(values) is type(other[name]) is np.ndarray
            np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_workers_read_what_threads_read(tmp_path, kind):
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    options = dict(batch_size=4, process_index=1, process_count=2)
    read, more = {"train": (loader.train_batches, {"seed": 3, "start_step": 5}), "eval": (loader.eval_batches, {})}[kind]
    threads, workers = (
        read(source, test_sounds.tokenize, **options, **more, **readers)
        for readers in ({"num_threads": 2}, {"num_workers": 2, "prefetch": 3})
    )
    if kind == "train":
        assert_equal(itertools.islice(threads, 7), itertools.islice(workers, 7))
        workers.close()
    else:
        assert_equal(threads, workers)
    assert not find_workers()


def refuse(_):
    raise ValueError("no such word")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_what_is_wrong_with_a_clip_is_said_by_its_worker(tmp_path, num_workers):
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
    with pytest.raises(ChildProcessError, match=r"died \(signal 9\): if there is too little memory, take fewer"):
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


@pytest.fixture
def reader(tmp_path):
    """A process that tells its worker's number as soon as there is one, and that it has read a batch."""
    script = tmp_path / "read.py"
    script.write_text(READ.format(folder=str(test_sounds.write(tmp_path, pictures=True))))
    # A script's folder is on the path in place of the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(world.ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


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
def test_a_job_that_is_told_to_end_leaves_that_to_the_parent(reader):
    worker = int(reader.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker, number)  # it is starting
    assert reader.stdout.readline() == "read\n"
    os.kill(worker, signal.SIGTERM)
    time.sleep(0.5)
    assert os.path.exists(f"/proc/{worker}")
