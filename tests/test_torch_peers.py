"""The PyTorch model that `benchmarks.train_step` is timed against computes what EgoVLP's own code did."""

import numpy as np
import pytest
import torch

from benchmarks import torch_peers
from mc3_jax.models import checkpoint_files
from tests import golden_models

# Of a block of ours → of EgoVLP's.
NAMES = {
    "norm_time": "norm3", "norm_space": "norm1", "norm_mlp": "norm2", "time.qkv": "timeattn.qkv",
    "time.out": "timeattn.proj", "space.qkv": "attn.qkv", "space.out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2",
}  # fmt: skip
TOP = {"class_token": "cls_token", "position": "pos_embed", "temporal": "temporal_embed"}


def egovlp_name(name: str) -> str:
    """Returns what EgoVLP calls a parameter of the peer."""
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
