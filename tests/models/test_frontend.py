"""Spectrograms are Kaldi's, crops are PIL's, and padding and other rows of the batch do not matter."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mc3_jax import config
from mc3_jax.models import frontend

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MEAN, STD = (np.asarray(x) for x in (frontend.IMAGENET_MEAN, frontend.IMAGENET_STD))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "kaldi_fbank.npz")


def test_fbank_is_kaldis(golden):
    ours = frontend.kaldi_fbank(jnp.asarray(golden["waveform"])[None], num_mel=128)
    np.testing.assert_allclose(ours[0], golden["fbank"], atol=1e-3, rtol=0)


def test_log_mel_is_normalised_then_padded_with_zeros(golden):
    ours = frontend.log_mel(jnp.asarray(golden["waveform"])[None], num_mel=128, num_time_frames=150)
    assert ours.shape == (1, 150, 128)
    expected = (golden["fbank"] + 4.2677393) / (2 * 4.5689974)
    np.testing.assert_allclose(ours[0, :148], expected, atol=1e-4, rtol=0)
    assert not np.any(ours[0, 148:])


def test_int16_audio_gives_the_spectrogram_of_its_float_values(golden):
    pcm = np.round(golden["waveform"] * 32768).astype(np.int16)
    sizes = {"num_mel": 128, "num_time_frames": 148}
    ours = frontend.log_mel(jnp.asarray(pcm)[None], **sizes)
    np.testing.assert_array_equal(ours, frontend.log_mel(jnp.asarray(pcm / 32768, jnp.float32)[None], **sizes))


def test_a_constant_offset_of_the_audio_does_not_matter(golden):
    waveform = jnp.asarray(golden["waveform"])[None] * 0.5
    one, other = (frontend.log_mel(waveform + d, num_mel=128, num_time_frames=148) for d in (0.0, 0.3))
    np.testing.assert_allclose(one, other, atol=1e-3, rtol=0)


def test_silence_is_the_floor_and_not_minus_infinity():
    ours = frontend.kaldi_fbank(jnp.zeros((1, 400)), num_mel=128)
    np.testing.assert_allclose(ours, np.log(1.1920929e-7), rtol=1e-6)


@pytest.mark.parametrize(
    ("num_samples", "message"), [(24_000, "148 spectrogram frames"), (399, "one window needs 400")]
)
def test_audio_too_long_or_too_short_is_refused(num_samples, message):
    with pytest.raises(ValueError, match=message):
        frontend.log_mel(jnp.zeros((1, num_samples)), num_mel=128, num_time_frames=147)


def masked(num_rows=4000, time=11, mel=7, **longest):
    """Returns which values of spectrograms random masks keep: bool [rows, time, mel]."""
    keys = frontend.row_keys(jax.random.key(3), jnp.arange(num_rows))
    kept = frontend.mask_spectrogram(jnp.ones((num_rows, time, mel)), keys, **longest)
    assert set(np.unique(kept)) <= {0, 1}
    return np.asarray(kept) > 0


def test_masks_are_one_stretch_of_time_and_one_band_of_mel_of_uniform_length_anywhere():
    kept = masked(max_time_mask=4, max_mel_mask=7)
    lost_time = ~kept.any(2)
    lost_mel = ~kept.any(1)
    whole = lost_mel.all(1) | lost_time.all(1)  # a mask over a whole axis hides where the other mask is
    np.testing.assert_array_equal(kept[~whole], (~lost_time[:, :, None] & ~lost_mel[:, None])[~whole])
    for lost, longest in ((lost_time[~whole], 4), (lost_mel, 7)):
        lengths = lost.sum(1)
        assert lengths.max() == longest
        edges = np.diff(np.pad(lost, ((0, 0), (1, 1))).astype(int), axis=1) == 1
        assert (edges.sum(1) == (lengths > 0)).all()  # one stretch
        some = lost[lengths == 2]
        assert some.any(0).all()  # every position is masked in some row
    shares = np.bincount(lost_time[~whole].sum(1), minlength=5) / (~whole).sum()
    np.testing.assert_allclose(shares, 1 / 5, atol=0.03)


def test_masks_differ_from_row_to_row_and_a_length_of_zero_masks_nothing():
    assert len(np.unique(masked(64, max_time_mask=5, max_mel_mask=3).reshape(64, -1), axis=0)) > 30
    assert masked(64, max_time_mask=0, max_mel_mask=0).all()
    assert masked(64, max_time_mask=0, max_mel_mask=3).any(2).all()


def clip(height, width, canvas, num_frames=2, seed=0, padding=0):
    """Returns (blurred random clip in a corner of a canvas, uint8 [1, t, *canvas, 3]; its size; the clip alone)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(num_frames, 9, 9, 3), dtype=np.uint8)
    frames = np.stack([np.asarray(Image.fromarray(x).resize((width, height))) for x in coarse])
    video = np.full((1, num_frames, *canvas, 3), padding, np.uint8)
    video[0, :, :height, :width] = frames
    return jnp.asarray(video), jnp.asarray([[height, width]], jnp.int32), frames


def pil(frames, box, size, flip=False):
    """Returns frames cropped to `box` (left, top, right, bottom), resized by PIL in float, flipped and normalised."""

    def plane(x):
        return np.asarray(Image.fromarray(x.astype(np.float32)).crop(box).resize((size, size), Image.BILINEAR))

    out = np.stack([np.stack([plane(frame[..., c]) for c in range(3)], axis=-1) for frame in frames])
    out = out[:, :, ::-1] if flip else out
    return (out / 255 - MEAN) / STD


@pytest.mark.parametrize(("height", "width", "resize_px"), [(72, 100, 40), (100, 72, 36), (64, 64, 32), (70, 110, 32)])
def test_the_center_crop_is_pils_resize_then_crop(height, width, resize_px):
    video, size, frames = clip(height, width, (110, 120))
    ours = frontend.center_video(video, size, 32, resize_px)
    shape = [resize_px * n // min(height, width) for n in (height, width)]
    top, left = (round((n - 32) / 2) for n in shape)

    def two_steps(x):
        resized = Image.fromarray(x.astype(np.float32)).resize((shape[1], shape[0]), Image.BILINEAR)
        return np.asarray(resized)[top : top + 32, left : left + 32]

    expected = np.stack([np.stack([two_steps(frame[..., c]) for c in range(3)], axis=-1) for frame in frames])
    np.testing.assert_allclose(ours[0], (expected / 255 - MEAN) / STD, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(256, 341), (341, 256), (256, 256), (540, 960)])
def test_evaluation_sees_what_egovlps_three_transforms_show(height, width):
    """Compares with Resize(256), CenterCrop(256), Resize(224) of EgoVLP's data_loader/transforms.py, by PIL in float.

    For a square of 256 px both are the same. Otherwise the corners of the two crops are rounded at different sizes and a
    third of a pixel apart. With contrasts that extend over some 30 pixels, the difference is below 0.02 of ImageNet's
    deviation on average and 0.15 at most. A `resize_px` of 256, which cuts off the square's border, differs by more than
    ten times as much.
    """
    video, size, frames = clip(height, width, (height, width), num_frames=1)
    shape = [256 * n // min(height, width) for n in (height, width)]
    top, left = (round((n - 256) / 2) for n in shape)

    def transform(plane):
        resized = Image.fromarray(plane.astype(np.float32)).resize((shape[1], shape[0]), Image.BILINEAR)
        return np.asarray(resized.crop((left, top, left + 256, top + 256)).resize((224, 224), Image.BILINEAR))

    theirs = np.stack([transform(frames[0, ..., c]) for c in range(3)], axis=-1)
    theirs = (theirs / 255 - MEAN) / STD
    sizes = config.VideoConfig()
    ours = frontend.center_video(video, size, sizes.image_size_px, sizes.resize_px)[0, 0]
    away = np.abs(ours - theirs)
    assert away.mean() < (1e-5 if height == width else 0.02)
    assert away.max() < (1e-4 if height == width else 0.15)
    assert np.abs(frontend.center_video(video, size, 224, 256)[0, 0] - theirs).mean() > 10 * 0.02


def test_frames_smaller_than_the_crop_are_enlarged_as_pil_does():
    video, size, frames = clip(24, 24, (30, 40))
    ours = frontend.center_video(video, size, 32, 32)
    np.testing.assert_allclose(ours[0], pil(frames, (0, 0, 24, 24), 32), atol=1e-4, rtol=0)


@functools.partial(jax.jit, static_argnames=("image_size_px", "flip_probability"))
def augment(video, size, keys, image_size_px=32, flip_probability=0.5):
    return frontend.augment_video(video, size, keys, image_size_px, scale=(0.5, 1.0), flip_probability=flip_probability)


def drawn(key, size, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """Returns [corner, size] of the crop that `augment_video` draws, each (vertical, horizontal)."""
    crop_key, _ = jax.random.split(key)
    return [np.asarray(x) for x in frontend._random_crop(crop_key, size, scale, ratio)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_crop_is_pils_resize_of_its_box_flipped_or_not(seed, flip):
    video, size, frames = clip(72, 96, (80, 110))
    key = jax.random.key(seed)
    ours = augment(video, size, key[None], flip_probability=float(flip))
    (top, left), (height, width) = drawn(key, size[0])
    expected = pil(frames, (left, top, left + width, top + height), 32, flip)
    np.testing.assert_allclose(ours[0], expected, atol=1e-4, rtol=0)


def test_padding_around_a_clip_does_not_matter():
    keys = jax.random.split(jax.random.key(0), 1)
    results = []
    for canvas, padding in (((72, 96), 0), ((80, 110), 0), ((80, 110), 255), ((110, 120), 128)):
        video, size, _ = clip(72, 96, canvas, padding=padding)
        results.append((augment(video, size, keys), frontend.center_video(video, size, 32, 36)))
    for result in results[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=0), result, results[0])


def test_all_frames_of_a_clip_share_one_crop_and_flip():
    video, size, _ = clip(72, 96, (72, 96), num_frames=1)
    ours = augment(jnp.repeat(video, 3, axis=1), size, jax.random.split(jax.random.key(3), 1))
    np.testing.assert_array_equal(ours[:, 1:], ours[:, :-1])


def test_a_rows_augmentation_depends_on_the_key_and_its_row_alone():
    video = jnp.concatenate([clip(72, 96, (80, 110), seed=i)[0] for i in range(4)])
    size = jnp.asarray([[72, 96], [60, 96], [72, 96], [72, 80]], jnp.int32)
    key, row = jax.random.key(7), jnp.arange(4, dtype=jnp.int32)
    jitted = jax.jit(lambda v, s, k, r: augment(v, s, frontend.row_keys(k, r)))
    whole = jitted(video, size, key, row)
    order = jnp.asarray([2, 0])
    part = jitted(video[order], size[order], key, row[order])
    np.testing.assert_allclose(part, whole[order], atol=1e-5, rtol=0)
    same = jitted(video[:1].repeat(4, 0), size[:1].repeat(4, 0), key, row)
    assert np.max(np.abs(same[0] - same[1])) > 0.1
    other = jitted(video, size, jax.random.key(8), row)
    assert all(np.max(np.abs(x - y)) > 0.1 for x, y in zip(whole, other, strict=True))


def many_crops(height, width):
    """Returns [corners, sizes] of 500 random crops of a frame."""
    size = jnp.asarray([height, width])
    draw = jax.jit(jax.vmap(lambda key: frontend._random_crop(key, size, (0.5, 1.0), (3 / 4, 4 / 3))))
    return [np.asarray(x) for x in draw(jax.random.split(jax.random.key(0), 500))]


@pytest.mark.parametrize(("height", "width"), [(72, 128), (72, 96), (128, 72), (64, 64)])
def test_crops_lie_in_the_frame_and_keep_their_share_of_it_and_their_ratio(height, width):
    corner, crop = many_crops(height, width)
    assert np.all(corner >= 0)
    assert np.all(crop >= 1)
    assert np.all(corner + crop <= [height, width])
    # Sides are rounded to whole pixels.
    ratio = crop[:, 1] / crop[:, 0]
    assert np.all(ratio > 0.75 * 0.97)
    assert np.all(ratio < 4 / 3 * 1.03)
    assert np.all(np.prod(crop, axis=1) > 0.48 * height * width)
    assert len(np.unique(crop, axis=0)) > 20


@pytest.mark.parametrize(("size", "expected"), [((30, 200), (30, 40)), ((200, 30), (40, 30))])
def test_a_frame_that_no_crop_fits_is_cut_in_the_centre_to_the_nearest_ratio(size, expected):
    corner, crop = many_crops(*size)
    assert np.all(crop == expected)
    assert np.all(corner == (np.array(size) - expected) // 2)


def test_crops_have_torchvisions_distribution():
    torchvision_like = np.random.default_rng(0)

    def draw():
        """Returns (top, left, height, width) as RandomResizedCrop.get_params draws it, one try after another."""
        height, width = 72, 128
        for _ in range(10):
            area = height * width * torchvision_like.uniform(0.5, 1.0)
            ratio = np.exp(torchvision_like.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return torchvision_like.integers(0, height - h + 1), torchvision_like.integers(0, width - w + 1), h, w
        return 0, 16, 72, 96

    theirs = np.array([draw() for _ in range(4000)])
    keys = jax.random.split(jax.random.key(0), 4000)
    crops = jax.jit(jax.vmap(lambda k: frontend._random_crop(k, jnp.asarray([72, 128]), (0.5, 1.0), (3 / 4, 4 / 3))))
    ours = np.concatenate(crops(keys), axis=1)
    for column in range(4):
        deviation = np.std(theirs[:, column]) * np.sqrt(2 / 4000)
        assert abs(np.mean(theirs[:, column]) - np.mean(ours[:, column])) < 4 * deviation
        assert np.std(ours[:, column]) == pytest.approx(np.std(theirs[:, column]), rel=0.1)


def test_about_half_of_the_clips_are_flipped():
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    video = jnp.broadcast_to(jnp.asarray(ramp), (400, 1, 64, 64, 3))
    keys = jax.random.split(jax.random.key(0), 400)
    ours = jax.jit(lambda v, s, k: augment(v, s, k, 8))(video, jnp.full((400, 2), 64, jnp.int32), keys)
    flipped = np.mean(ours[:, 0, 0, 0, 0] > ours[:, 0, 0, -1, 0])
    assert 0.4 < flipped < 0.6


def test_a_resize_below_the_crop_is_refused():
    video, size, _ = clip(40, 40, (40, 40))
    with pytest.raises(ValueError, match="resize_px 30"):
        frontend.center_video(video, size, 32, 30)
