"""A batch is masked, flipped and cropped for the model as its config says."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc3_jax import config as config_lib, model as model_lib
from mc3_jax.models import frontend

SIZE_PX = 24


def small_config() -> config_lib.ModelConfig:
    config = config_lib.ModelConfig()
    config.video.image_size_px = config.video.resize_px = SIZE_PX
    config.video.crop_scale = (1.0, 1.0)  # the whole of a square frame
    return config


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    arrays = {
        "audio": rng.integers(-3000, 3000, (2, 24_000), dtype=np.int16),
        "video": rng.integers(0, 256, (2, 1, SIZE_PX, SIZE_PX, 3), dtype=np.uint8),
        "video_size": np.full((2, 2), SIZE_PX, np.int32),
        "text_ids": np.ones((2, 4), np.int32), "text_mask": np.ones((2, 4), np.int32), "row": np.arange(2, dtype=np.int32),
    }  # fmt: skip
    return jax.tree.map(jnp.asarray, arrays)


@pytest.mark.parametrize(("masked", "across"), [("max_time_mask", 2), ("max_mel_mask", 1)])
def test_a_mask_covers_the_axis_it_is_named_after(batch, masked, across):
    config = small_config()
    setattr(config.audio, masked, 60)
    plain = model_lib.prepare(batch, config, None)["audio"][:, :148]  # without the last frame: padding
    changed = np.asarray(plain != model_lib.prepare(batch, config, jax.random.key(0))["audio"][:, :148])
    assert changed.any()
    np.testing.assert_array_equal(changed.any(across), changed.all(across))
    assert not changed.all()


def test_frames_are_flipped_as_often_and_cropped_as_much_as_the_config_says(batch):
    config = small_config()
    plain = np.asarray(model_lib.prepare(batch, config, None)["video"])
    for probability in (0.0, 1.0):
        config.video.flip_probability = probability
        found = model_lib.prepare(batch, config, jax.random.key(0))["video"]
        np.testing.assert_allclose(found, plain[..., ::-1, :] if probability else plain, atol=1e-5)
    cut = copy.deepcopy(config)
    cut.video.resize_px = 32
    wanted = frontend.center_video(batch["video"], batch["video_size"], SIZE_PX, 32)
    found = model_lib.prepare(batch, cut, None)["video"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(found - plain).max() > 0.1
