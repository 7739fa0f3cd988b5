"""Renames the weights of PyTorch checkpoints to ours, tower by tower and by hand.

Independent of `mc3_jax.models.layouts`, so that the encoders are held against the originals without it.
"""

import numpy as np
from einops import rearrange

Weights = dict[str, np.ndarray]


def take(weights: Weights, prefix: str) -> Weights:
    """Returns the weights whose name starts with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def dense(weights: Weights, name: str) -> dict:
    """Converts `nn.Linear`."""
    return {"kernel": weights.pop(f"{name}.weight").T, "bias": weights.pop(f"{name}.bias")}


def norm(weights: Weights, name: str) -> dict:
    """Converts `nn.LayerNorm`."""
    return {"scale": weights.pop(f"{name}.weight"), "bias": weights.pop(f"{name}.bias")}


def _finish(weights: Weights, num_blocks: int, blocks: list[dict]) -> dict:
    if weights:
        raise ValueError(f"weights left over after {num_blocks} blocks: {sorted(weights)}")
    return {f"block_{i}": block for i, block in enumerate(blocks)}


def _attention(weights: Weights, name: str) -> dict:
    return {"qkv": dense(weights, f"{name}.qkv"), "out": dense(weights, f"{name}.proj")}


def _mlp(weights: Weights, name: str) -> dict:
    return {"hidden": dense(weights, f"{name}.fc1"), "out": dense(weights, f"{name}.fc2")}


def _patch_embedding(weights: Weights) -> dict:
    """Converts the convolution to a matmul of patches flattened (row, column, channel)."""
    kernel = rearrange(weights.pop("patch_embed.proj.weight"), "o c i j -> (i j c) o")
    return {"kernel": kernel, "bias": weights.pop("patch_embed.proj.bias")}


def space_time_transformer(weights: Weights, depth: int) -> dict:
    """Returns `SpaceTimeTransformer` parameters from EgoVLP's `video_model.`; every weight is used.

    Raises:
      ValueError: If weights are left over.
    """
    weights = dict(weights)
    params = {
        "class_token": weights.pop("cls_token")[0, 0],
        "position_embedding": weights.pop("pos_embed")[0],
        "temporal_embedding": weights.pop("temporal_embed")[0],
        "patch_embedding": _patch_embedding(weights),
        "norm": norm(weights, "norm"),
    }
    blocks = [
        {
            "norm_time": norm(weights, f"blocks.{i}.norm3"),
            "norm_space": norm(weights, f"blocks.{i}.norm1"),
            "norm_mlp": norm(weights, f"blocks.{i}.norm2"),
            "time_attention": _attention(weights, f"blocks.{i}.timeattn"),
            "space_attention": _attention(weights, f"blocks.{i}.attn"),
            "mlp": _mlp(weights, f"blocks.{i}.mlp"),
        }
        for i in range(depth)
    ]
    return params | _finish(weights, depth, blocks)


def audio_spectrogram_transformer(weights: Weights, depth: int) -> dict:
    """Returns `AudioSpectrogramTransformer` parameters from AST's `v.`; DeiT's own two heads are unused.

    Raises:
      ValueError: If other weights are left over.
    """
    weights = {name: value for name, value in weights.items() if not name.startswith(("head.", "head_dist."))}
    params = {
        "class_token": weights.pop("cls_token")[0, 0],
        "distillation_token": weights.pop("dist_token")[0, 0],
        "position_embedding": weights.pop("pos_embed")[0],
        "patch_embedding": _patch_embedding(weights),
        "norm": norm(weights, "norm"),
    }
    blocks = [
        {
            "norm_attention": norm(weights, f"blocks.{i}.norm1"),
            "norm_mlp": norm(weights, f"blocks.{i}.norm2"),
            "attention": _attention(weights, f"blocks.{i}.attn"),
            "mlp": _mlp(weights, f"blocks.{i}.mlp"),
        }
        for i in range(depth)
    ]
    return params | _finish(weights, depth, blocks)


def distilbert(weights: Weights, depth: int) -> dict:
    """Returns `DistilBert` parameters from Hugging Face's `DistilBertModel`; older files carry `position_ids`, too.

    Raises:
      ValueError: If other weights are left over.
    """
    weights = {name: value for name, value in weights.items() if name != "embeddings.position_ids"}

    def block(layer: str) -> dict:
        query, key, value = (dense(weights, f"{layer}.attention.{name}_lin") for name in "qkv")
        qkv = {name: np.concatenate([query[name], key[name], value[name]], axis=-1) for name in query}
        return {
            "attention": {"qkv": qkv, "out": dense(weights, f"{layer}.attention.out_lin")},
            "norm_attention": norm(weights, f"{layer}.sa_layer_norm"),
            "mlp": {"hidden": dense(weights, f"{layer}.ffn.lin1"), "out": dense(weights, f"{layer}.ffn.lin2")},
            "norm_mlp": norm(weights, f"{layer}.output_layer_norm"),
        }

    params = {
        "word_embedding": {"embedding": weights.pop("embeddings.word_embeddings.weight")},
        "position_embedding": weights.pop("embeddings.position_embeddings.weight"),
        "norm_embedding": norm(weights, "embeddings.LayerNorm"),
    }
    return params | _finish(weights, depth, [block(f"transformer.layer.{i}") for i in range(depth)])
