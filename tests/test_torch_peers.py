"""The PyTorch model that `benchmarks.train_step` is timed against computes what EgoVLP's own code did."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import torch

from benchmarks import paper_step, torch_peers
from mc3_jax import checkpoint, model as model_lib, weights
from mc3_jax.losses import contrastive
from mc3_jax.models import checkpoint_files, layouts
from tests import golden_models

# Name of a module in a block of the peer → in a block of EgoVLP.
NAMES = {
    "norm_time": "norm3", "norm_space": "norm1", "norm_mlp": "norm2", "time.qkv": "timeattn.qkv",
    "time.out": "timeattn.proj", "space.qkv": "attn.qkv", "space.out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2",
}  # fmt: skip
TOP = {"class_token": "cls_token", "position": "pos_embed", "temporal": "temporal_embed"}


def egovlp_name(name: str) -> str:
    """Returns EgoVLP's name of a parameter of the peer's video encoder."""
    if name in TOP:
        return TOP[name]
    if name.startswith("blocks."):
        _, i, *inner, kind = name.split(".")
        return f"blocks.{i}.{NAMES['.'.join(inner)]}.{kind}"
    return name.replace("patches.", "patch_embed.proj.")


@pytest.mark.parametrize("fused", [False, True])
def test_the_video_peer_computes_what_egovlp_did(fused):
    golden = golden_models.egovlp_outputs()
    prefix = "module.video_model."
    tensors = checkpoint_files.read_tensors(golden_models.GOLDEN / "egovlp_tiny.pth")
    encoder = torch_peers.VideoEncoder(golden_models.model_config().video, fused)
    state = {name: torch.from_numpy(np.array(tensors[prefix + egovlp_name(name)])) for name in encoder.state_dict()}
    encoder.load_state_dict(state)
    video = torch.from_numpy(golden["video"]).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        found = encoder(video).numpy()
    np.testing.assert_allclose(found, golden["video_features"], atol=2e-5)


@pytest.mark.parametrize(("over", "num_queries"), [("time", [1]), ("space", [1, 9])])
def test_no_kernel_for_long_sequences_attends_over_time(over, num_queries, monkeypatch):
    asked, real = [], torch_peers.F.scaled_dot_product_attention
    monkeypatch.setattr(
        torch_peers.F, "scaled_dot_product_attention", lambda q, k, v: asked.append(q.shape[-2]) or real(q, k, v)
    )
    attention = torch_peers.DividedAttention(16, 2, over, fused=True)
    eager = torch_peers.DividedAttention(16, 2, over, fused=False)
    eager.load_state_dict(attention.state_dict())
    x = torch.randn(3, 1 + 4 * 9, 16)
    torch.testing.assert_close(attention(x, 4), eager(x, 4))
    assert asked == num_queries  # of the class token, and over space of a frame's patches


def test_the_flops_of_the_peer_are_those_of_all_its_tokens():
    """A forward pass of the paper's towers takes 184.6 (785 tokens), 30.0 (170) and 2.6 GFLOP (30), by arithmetic."""
    config = paper_step.make_config(batch=7, depth=12, dtype="float32")
    assert torch_peers.clip_flops(config.model) == pytest.approx(3 * (184.6 + 30.0 + 2.6) * 1e9, rel=1e-3)


def test_attention_over_time_is_as_narrow_as_its_values():
    attention = torch_peers.DividedAttention(16, 2, "time", fused=True)
    query = torch.randn(3, 2, 1 + 4 * 9, 8)
    value = query.bfloat16()  # as on a GPU, where autocast computes the softmax of bfloat16 in float32
    out = attention._over_time(query, query, value, 4)
    assert out.dtype == torch.bfloat16


# Tower → (layer of the peer's head → its name in the checkpoints whose layout the tower has).
HEADS = {
    "audio": {"0": "mlp_head.0", "1": "mlp_head.1"}, "video": {"": "vid_proj.0"}, "text": {"1": "txt_proj.1"},
}  # fmt: skip


def our_params(peer: torch_peers.ThreeTowers, folder: pathlib.Path) -> dict:
    """Returns the peer's parameters as ours; towers of Hugging Face are saved first, as `layouts` knows names in files."""
    flat = {}
    for tower, names in HEADS.items():
        encoder = getattr(peer, tower)
        if tower == "video":
            tensors = {egovlp_name(name): value.numpy() for name, value in encoder.state_dict().items()}
            source = layouts.Source("video", "egovlp", "head", tensors)
        else:
            encoder.save_pretrained(folder / tower)
            source = dataclasses.replace(weights.read_sources(str(folder / tower))[tower], head="head")
        heads = {}
        for name, value in getattr(peer, f"{tower}_head").state_dict().items():
            layer, _, kind = name.rpartition(".")
            heads[f"{names[layer]}.{kind}"] = value.numpy()
        source = dataclasses.replace(source, tensors=source.tensors | heads)
        flat |= {f"{tower}/{name}": value for name, value in layouts.to_ours(source, tower, "peer").items()}
    return checkpoint.unflatten(flat)


@pytest.mark.parametrize("fused", [False, True])
def test_towers_heads_and_loss_are_ours(fused, tmp_path):
    config = golden_models.model_config()
    torch.manual_seed(0)
    peer = torch_peers.ThreeTowers(config, fused=fused).eval()
    with torch.no_grad():  # parameters that start as zeros or ones would hide a mistake
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    inputs = {
        "audio": rng.standard_normal((3, config.audio.num_time_frames, config.audio.num_mel), np.float32),
        "video": rng.standard_normal((3, config.video.num_frames, *2 * [config.video.image_size_px], 3), np.float32),
        "text_ids": rng.integers(0, config.text.vocab_size, (3, 10)).astype(np.int32),
        "text_mask": (np.arange(10) < np.array([[10], [4], [7]])).astype(np.int32),
    }
    theirs = {name: torch.from_numpy(value) for name, value in inputs.items()}
    theirs["video"] = theirs["video"].permute(0, 1, 4, 2, 3)
    theirs |= {name: value.long() for name, value in theirs.items() if name.startswith("text")}
    with torch.no_grad():
        expected = float(peer(**theirs))
    embed = jax.jit(functools.partial(model_lib.make_model(config).apply, train=False))
    embeddings = embed({"params": our_params(peer, tmp_path)}, **inputs)
    found, _ = contrastive.contrastive_loss(embeddings, 0.05)
    assert expected > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4)
