"""The order of training clips, and the canvas that their frames are decoded onto."""

import dataclasses

import numpy as np
import pytest
import simplejpeg

from mc3_jax.data import loader, transforms
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
        # Adjacent groups may be of the same video: then the stretch is as long as these groups together.
        cuts = np.flatnonzero(np.diff(VIDEO[order])) + 1
        for stretch in np.split(order, cuts):
            size = VIDEO_CLIPS[VIDEO[stretch[0]]]
            assert len(stretch) in {4 * n for n in range(1, 4)} | {size % 4 + 4 * n for n in range(3)}
        assert len(cuts) + 1 <= sum(-(-n // 4) for n in VIDEO_CLIPS)
        groups.append(frozenset(order[:4].tolist()))
    assert len(set(groups)) > 10


def test_an_order_is_drawn_once_an_epoch(tmp_path, monkeypatch):
    drawn, order = [], loader.epoch_order
    monkeypatch.setattr(loader, "epoch_order", lambda *of: drawn.append(of[-1]) or order(*of))
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    batches = loader.train_batches(
        source, test_sounds.tokenize, batch_size=2, seed=0, num_steps=len(source), num_threads=1
    )
    assert len(list(batches)) == len(source)
    assert drawn == [0, 1]


@pytest.mark.parametrize("text", ["", " ", "#C C knocks"])
def test_a_split_has_texts_if_one_of_its_clips_has(tmp_path, monkeypatch, text):
    make = test_sounds.make_clip
    monkeypatch.setattr(
        test_sounds, "make_clip",
        lambda i, pictures: dataclasses.replace(make(i, pictures), narration=text if i == 5 else ""),
    )  # fmt: skip
    source = loader.open_split(test_sounds.write(tmp_path, pictures=True), "train", 2)
    assert len(source) == 8
    assert source.has_texts() == bool(text.strip())


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


@pytest.mark.parametrize(("batch_size", "clips_per_video"), [(8, 1), (11, 1), (20, 3), (33, 1), (50, 2)])
def test_batches_that_hold_a_clip_twice_are_counted(batch_size, clips_per_video):
    source = object.__new__(loader.ClipSource)
    source.video_clips, source._places = VIDEO_CLIPS, np.arange(sum(VIDEO_CLIPS))
    detail = {"batch_size": batch_size, "seed": 3, "clips_per_video": clips_per_video}
    rows = [len(clips) - len(set(clips.tolist())) for clips in (loader.step_clips(source, t, **detail) for t in range(20))]
    assert loader.count_repeats(source, range(20), **detail) == (sum(n > 0 for n in rows), sum(rows))
    assert batch_size < 20 or (sum(rows) > 0) == (batch_size != 33)  # the split has 33 clips


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
    narrow = np.zeros((1, 26, 30, 3), np.uint8)  # large enough for the bytes
    with pytest.raises(ValueError, match=r"it has \(24, 32\) px, more than the canvas \(26, 30\)"):
        transforms.decode_frames([file], narrow, "c")
    with pytest.raises(ValueError, match="clip c: frame 1 can't be decoded: "):
        transforms.decode_frames([file, file[:40]], np.zeros((2, 24, 32, 3), np.uint8), "c")
