"""The encoders compute the outputs of the original PyTorch code, from its checkpoints, which are read as a user's are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mc3_jax import checkpoint, model as model_lib, weights
from tests import golden_models
from tests.golden_models import GOLDEN, normalize

EGOVLP_FILES = ("egovlp_tiny.pth", "egovlp_config.pth")


def encoder(params, config, tower):
    """Returns a function from an encoder's inputs to its features, before the projection."""
    module = getattr(model_lib.make_model(config), f"{tower}_tower")
    own = checkpoint.unflatten(params)[tower]["encoder"]
    return jax.jit(lambda *inputs: module.apply({"params": own}, *inputs))


def embed(params, config, **inputs):
    """Returns the L2-normalised embedding of the single modality in `inputs`."""
    model = model_lib.make_model(config)
    (embedding,) = jax.jit(model.apply)({"params": checkpoint.unflatten(params)}, **inputs).values()
    return embedding


@pytest.fixture(scope="module", params=EGOVLP_FILES)
def egovlp(request):
    """(parameters of EgoVLP's video and text towers, inputs and outputs of the original)."""
    path = str(GOLDEN / request.param)
    params, _ = weights.read_towers({"video": path, "text": path}, golden_models.model_config())
    return params, golden_models.egovlp_outputs()


@pytest.mark.parametrize(("num_frames", "output"), [(4, "video_features"), (1, "video_1frame_features")])
def test_video_features_are_egovlps(num_frames, output, egovlp):
    params, golden = egovlp
    features = encoder(params, golden_models.model_config(), "video")(golden["video"][:, :num_frames])
    np.testing.assert_allclose(features, golden[output], atol=1e-4, rtol=0)


def test_every_token_of_text_is_egovlps(egovlp):
    params, golden = egovlp
    hidden = encoder(params, golden_models.model_config(), "text")(golden["input_ids"], golden["attention_mask"])
    np.testing.assert_allclose(hidden, golden["text_hidden"], atol=1e-4, rtol=0)


def test_video_and_text_embeddings_are_egovlps_normalised(egovlp):
    params, golden = egovlp
    config = golden_models.model_config()
    text = {"text_ids": golden["input_ids"], "text_mask": golden["attention_mask"]}
    found = {"video": embed(params, config, video=golden["video"]), "text": embed(params, config, **text)}
    for tower, embedding in found.items():
        np.testing.assert_allclose(embedding, normalize(golden[f"{tower}_embedding"]), atol=1e-5, rtol=0)


def test_more_temporal_positions_than_the_checkpoint_has_change_nothing_for_its_own_frames(egovlp):
    config, path = golden_models.model_config(video__num_positions=16), str(GOLDEN / "egovlp_tiny.pth")
    params, notes = weights.read_towers({"video": path}, config)
    features = encoder(params, config, "video")(egovlp[1]["video"])
    np.testing.assert_allclose(features, egovlp[1]["video_features"], atol=1e-4, rtol=0)
    assert "padded with zeros from 4 to 16" in notes[0]


def read_audio(file, **changes):
    """Returns (parameters of the audio tower from a golden file, config of their model)."""
    config = golden_models.model_config(**changes)
    return weights.read_towers({"audio": str(GOLDEN / file)}, config)[0], config


def test_the_ast_checkpoint_computes_asts_features_and_head():
    params, config = read_audio("ast_tiny_148.pth", embed_dim=7)
    golden = golden_models.ast_outputs()
    spectrogram = jnp.asarray(golden["spectrogram_148"])
    features = encoder(params, config, "audio")(spectrogram)
    np.testing.assert_allclose(features, golden["features_148"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(embed(params, config, audio=spectrogram), normalize(golden["logits_148"]), atol=1e-5)


@pytest.mark.parametrize("num_time_frames", [148, 1024])
def test_ast_made_from_deit_is_the_ast_the_original_code_made(num_time_frames):
    """With 148 frames the grid is cut along both axes; with 1024 it is cut along mel and stretched along time."""
    params, config = read_audio("deit_tiny.pth", audio__num_time_frames=num_time_frames)
    golden = golden_models.ast_outputs()
    expected = golden[f"pos_embed_{num_time_frames}"][0]
    np.testing.assert_allclose(params["audio/encoder/position_embedding"], expected, atol=1e-5, rtol=0)
    features = encoder(params, config, "audio")(jnp.asarray(golden[f"spectrogram_{num_time_frames}"]))
    np.testing.assert_allclose(features, golden[f"features_{num_time_frames}"], atol=1e-4, rtol=0)


def test_an_ast_stretched_to_a_longer_input_keeps_its_own_positions_interpolated_along_time():
    short, _ = read_audio("ast_tiny_148.pth")
    long, config = read_audio("ast_tiny_148.pth", audio__num_time_frames=1024)
    name = "audio/encoder/position_embedding"
    np.testing.assert_array_equal(long[name][:2], short[name][:2])
    grid = torch.from_numpy(short[name][2:].reshape(12, 14, 48).astype(np.float64)).permute(2, 0, 1)
    expected = torch.nn.functional.interpolate(grid[None], (12, 101), mode="bilinear")[0].permute(1, 2, 0)
    np.testing.assert_allclose(long[name][2:].reshape(12, 101, 48), expected, atol=1e-6)
    assert encoder(long, config, "audio")(jnp.asarray(golden_models.ast_outputs()["spectrogram_1024"])).shape == (2, 48)


def test_bfloat16_stays_close_to_float32():
    config = golden_models.model_config()
    paths = {"audio": "ast_tiny_148.pth", "video": EGOVLP_FILES[0], "text": EGOVLP_FILES[0]}
    flat, _ = weights.read_towers({tower: str(GOLDEN / file) for tower, file in paths.items()}, config)
    params = weights.complete(flat, config, seed=0)
    golden, ast = golden_models.egovlp_outputs(), golden_models.ast_outputs()
    inputs = {
        "audio": {"audio": ast["spectrogram_148"]},
        "video": {"video": golden["video"]},
        "text": {"text_ids": golden["input_ids"], "text_mask": golden["attention_mask"]},
    }
    for tower, value in inputs.items():
        exact, rough = (
            np.asarray(embed(params, golden_models.model_config(dtype=dtype), **value)) for dtype in ("float32", "bfloat16")
        )
        assert rough.dtype == np.float32
        assert 0 < np.max(1 - np.sum(exact * rough, axis=-1)) < 1e-3, tower
        assert np.linalg.norm(exact - rough) / np.linalg.norm(exact) < 2e-2, tower


@pytest.mark.large
def test_bfloat16_stays_close_to_float32_at_the_papers_sizes():
    """With noise as input and random towers; their time attention does not start at zero, so that it takes part."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30000, (2, 30)).astype(np.int32)
    inputs = {
        "audio": {"audio": rng.normal(size=(2, 149, 128)).astype(np.float32)},
        "video": {"video": rng.normal(size=(1, 4, 224, 224, 3)).astype(np.float32)},
        "text": {"text_ids": ids, "text_mask": np.ones_like(ids)},
    }
    config = golden_models.ModelConfig(dtype="float32")
    config.video.time_init = "random"
    params = weights.complete({}, config, seed=0)
    for tower, value in inputs.items():
        config.dtype = "float32"
        exact = np.asarray(embed(params, config, **value))
        config.dtype = "bfloat16"
        rough = np.asarray(embed(params, config, **value))
        cosine, error = np.max(1 - np.sum(exact * rough, axis=-1)), np.linalg.norm(exact - rough) / np.linalg.norm(exact)
        print(f"\n{tower}: 1 - cosine {cosine:.2e}, relative L2 {error:.2e}")
        assert cosine < 1e-3
        assert error < 2e-2
