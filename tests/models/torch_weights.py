"""Reads PyTorch checkpoints without PyTorch, and renames their weights to ours.

A `.pth` file is a zip archive of a pickle and raw storages. Only dictionaries and tensors are rebuilt; any other class
the pickle names becomes an inert placeholder, so nothing of the file is ever executed, nor need its modules exist.
"""

import collections
import pathlib
import pickle
import zipfile

import numpy as np
from einops import rearrange

DTYPES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "LongStorage": np.int64, "HalfStorage": np.float16}
Weights = dict[str, np.ndarray]


class Placeholder:
    """Stands for an object of a class that is not a tensor; swallows what a pickle may do to one."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_) -> np.ndarray:
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    if min((offset, *strides)) < 0 or last >= len(storage):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {len(storage)} values: broken file")
    strides = [s * storage.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides).copy()


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, pickle_name: str):
        super().__init__(archive.open(pickle_name))
        self.archive, self.folder = archive, pickle_name.removesuffix("data.pkl")

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        return type(name, (Placeholder,), {})

    def persistent_load(self, pid):
        _, dtype, key, _, num_values = pid
        return np.frombuffer(self.archive.read(f"{self.folder}data/{key}"), dtype, num_values)


def read_pth(path: pathlib.Path) -> dict:
    """Returns what `torch.save` wrote, tensors as numpy arrays, objects of other classes as inert placeholders.

    Raises:
      ValueError: If it is not an archive as PyTorch 1.6 and later write it.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a zip archive: save it again with PyTorch 1.6 or later")
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return _Unpickler(archive, name).load()


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
