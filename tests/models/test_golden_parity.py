"""The encoders against outputs of the original PyTorch code, from checkpoints in the layouts people have."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_weights
from einops import rearrange

from mc3_jax.models import checkpoint_files
from mc3_jax.models.audio import AudioSpectrogramTransformer
from mc3_jax.models.mc3 import MC3, AudioTower
from mc3_jax.models.text import DistilBert
from mc3_jax.models.video import SpaceTimeTransformer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
EGOVLP = json.loads((GOLDEN / "egovlp_tiny.json").read_text())

VIDEO = SpaceTimeTransformer(image_size_px=64, num_positions=4, width=48, depth=2, num_heads=4)
TEXT = DistilBert(vocab_size=120, num_positions=32, width=48, depth=2, num_heads=4, mlp_width=192)
AUDIO = AudioSpectrogramTransformer(num_time_frames=148, width=48, depth=2, num_heads=4)


def assert_same_structure(params, expected):
    """The converted tree has just the names and shapes of the model's own."""
    shapes = [
        {jax.tree_util.keystr(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, expected)
    ]
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def egovlp():
    """Weights of the EgoVLP-style checkpoint, parameters of ours, and the original's inputs and outputs."""
    weights = torch_weights.take(checkpoint_files.read_tensors(GOLDEN / "egovlp_tiny.pth"), "module.")
    params = {
        "video": {
            "encoder": torch_weights.space_time_transformer(torch_weights.take(weights, "video_model."), depth=2),
            "projection": torch_weights.dense(weights, "vid_proj.0"),
        },
        "text": {
            "encoder": torch_weights.distilbert(torch_weights.take(weights, "text_model."), depth=2),
            "projection": torch_weights.dense(weights, "txt_proj.1"),
        },
    }
    return params, np.load(GOLDEN / "egovlp_tiny.npz")


@pytest.fixture(scope="module")
def ast():
    """Parameters of the AST encoder and its head, and the original's inputs and outputs."""
    weights = torch_weights.take(checkpoint_files.read_tensors(GOLDEN / "ast_tiny_148.pth"), "module.")
    params = {
        "encoder": torch_weights.audio_spectrogram_transformer(torch_weights.take(weights, "v."), depth=2),
        "norm": torch_weights.norm(weights, "mlp_head.0"),
        "projection": torch_weights.dense(weights, "mlp_head.1"),
    }
    return params, np.load(GOLDEN / "ast_tiny.npz")


def normalize(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def frames(golden):
    return jnp.asarray(rearrange(golden["video"], "b t c y x -> b t y x c"))


def test_video_features_of_four_frames_are_egovlps(egovlp):
    params, golden = egovlp
    features = jax.jit(VIDEO.apply)({"params": params["video"]["encoder"]}, frames(golden))
    np.testing.assert_allclose(features, golden["video_features"], atol=1e-4, rtol=0)


def test_video_features_of_one_frame_are_egovlps(egovlp):
    params, golden = egovlp
    features = jax.jit(VIDEO.apply)({"params": params["video"]["encoder"]}, frames(golden)[:, :1])
    np.testing.assert_allclose(features, golden["video_1frame_features"], atol=1e-4, rtol=0)


def test_every_token_of_text_is_egovlps(egovlp):
    params, golden = egovlp
    ids, mask = (jnp.asarray(golden[name], jnp.int32) for name in ("input_ids", "attention_mask"))
    hidden = jax.jit(TEXT.apply)({"params": params["text"]["encoder"]}, ids, mask)
    np.testing.assert_allclose(hidden, golden["text_hidden"], atol=1e-4, rtol=0)


def test_video_and_text_embeddings_are_egovlps_normalised(egovlp):
    params, golden = egovlp
    model = MC3(AUDIO, VIDEO, TEXT, embed_dim=EGOVLP["projection_dim"])
    ids, mask = (jnp.asarray(golden[name], jnp.int32) for name in ("input_ids", "attention_mask"))
    inputs = {"video": {"video": frames(golden)}, "text": {"text_ids": ids, "text_mask": mask}}
    for name, value in inputs.items():
        own = {name: params[name]}
        assert_same_structure(own, jax.eval_shape(model.init, jax.random.key(0), **value)["params"])
        embeddings = jax.jit(model.apply)({"params": own}, **value)
        assert list(embeddings) == [name]
        np.testing.assert_allclose(embeddings[name], normalize(golden[f"{name}_embedding"]), atol=1e-5, rtol=0)


def test_audio_features_of_148_frames_are_asts(ast):
    params, golden = ast
    np.testing.assert_array_equal(params["encoder"]["position_embedding"], golden["pos_embed_148"][0])
    features = jax.jit(AUDIO.apply)({"params": params["encoder"]}, jnp.asarray(golden["spectrogram_148"]))
    np.testing.assert_allclose(features, golden["features_148"], atol=1e-4, rtol=0)


def test_audio_features_of_1024_frames_are_asts(ast):
    params, golden = ast
    encoder = params["encoder"] | {"position_embedding": golden["pos_embed_1024"][0]}
    model = AUDIO.clone(num_time_frames=1024)
    features = jax.jit(model.apply)({"params": encoder}, jnp.asarray(golden["spectrogram_1024"]))
    np.testing.assert_allclose(features, golden["features_1024"], atol=1e-4, rtol=0)


def test_the_audio_projection_is_asts_head(ast):
    params, golden = ast
    tower = AudioTower(AUDIO, embed_dim=7)
    spectrogram = jnp.asarray(golden["spectrogram_148"])
    assert_same_structure(params, jax.eval_shape(tower.init, jax.random.key(0), spectrogram)["params"])
    embedding = jax.jit(tower.apply)({"params": params}, spectrogram)
    np.testing.assert_allclose(embedding, normalize(golden["logits_148"]), atol=1e-5, rtol=0)


def test_a_weight_more_or_less_than_the_model_holds_is_refused():
    weights = checkpoint_files.read_tensors(GOLDEN / "egovlp_tiny.pth")
    weights = torch_weights.take(weights, "module.text_model.")
    with pytest.raises(ValueError, match="left over"):
        torch_weights.distilbert(weights | {"pooler.weight": np.zeros(1)}, depth=2)
    with pytest.raises(ValueError, match="layer.1"):
        torch_weights.distilbert(weights, depth=1)
    del weights["transformer.layer.1.ffn.lin1.bias"]
    with pytest.raises(KeyError, match="lin1.bias"):
        torch_weights.distilbert(weights, depth=2)


def test_bfloat16_stays_close_to_float32(egovlp, ast):
    params, golden = egovlp
    ids, mask = (jnp.asarray(golden[name][:2], jnp.int32) for name in ("input_ids", "attention_mask"))
    inputs = {"audio": jnp.asarray(ast[1]["spectrogram_148"]), "video": frames(golden), "text_ids": ids}
    inputs["text_mask"] = mask
    # The head of the AudioSet-like AST has 7 outputs; the joint space has 32.
    projection = {"kernel": params["video"]["projection"]["kernel"], "bias": np.zeros(32, np.float32)}
    params = {"audio": ast[0] | {"projection": projection}} | params
    exact, rough = (
        jax.jit(MC3(AUDIO.clone(dtype=d), VIDEO.clone(dtype=d), TEXT.clone(dtype=d), 32, d).apply)(
            {"params": params}, **inputs
        )
        for d in (jnp.float32, jnp.bfloat16)
    )
    for name in ("audio", "video", "text"):
        assert rough[name].dtype == jnp.float32
        distance = 1 - np.sum(np.asarray(exact[name]) * np.asarray(rough[name]), axis=-1)
        assert 0 < np.max(distance) < 1e-3, name
