"""Names and shapes that other people's checkpoints give the weights of our three towers: one table per tower.

Each row of a table has the name of one of our layers in each source. Import and export use the same tables, so a round trip
is bit-exact. Sources: showlab/EgoVLP (`model/model.py`, `model/video_transformer.py`), YuanGongND/ast
(`src/models/ast_models.py`), timm's VisionTransformer, huggingface/transformers (ViT, AST, DistilBERT),
ChanganVR/action2sound (EgoVLP's layout with an `audio_model`).

Parameters are flat dictionaries, such as {"encoder/block_0/mlp/out/kernel": array}. Uses numpy only.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from einops import rearrange

Tensors = dict[str, np.ndarray]
OURS = "mc3_jax"


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer or array of a tower, and its names in the sources.

    Attributes:
      kind: "dense" (kernel and bias), "norm" (scale and bias), "patches" (a convolution there, a matmul of patches here), or
        a single array: "array" with the same shape, "table" [n, w] that is [1, n, w] there, "token" [w], [1, 1, w] there.
      ours: Path in the tower's parameters; `{i}` stands for the index of a block.
      theirs: Source → the name there, or several names whose outputs are concatenated in our single matmul. Sources without
        this layer are absent.
    """

    kind: str
    ours: str
    theirs: Mapping[str, str | tuple[str, ...]]


def _vit_rows(norm_attention: str, attention: str, num_special: int) -> list[Row]:
    """Returns the rows for the layers that every ViT has.

    Args:
      norm_attention, attention: Names of these two layers in the blocks of our tower.
      num_special: 1 for a class token alone, 2 with a distillation token.
    """
    hf = "encoder.layer.{i}."
    names = {
        ("token", "class_token"): ("cls_token", "embeddings.cls_token"),
        ("token", "distillation_token"): ("dist_token", "embeddings.distillation_token"),
        ("table", "position_embedding"): ("pos_embed", "embeddings.position_embeddings"),
        ("patches", "patch_embedding"): ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("norm", "norm"): ("norm", "layernorm"),
        ("norm", "block_{i}/" + norm_attention): ("blocks.{i}.norm1", hf + "layernorm_before"),
        ("dense", "block_{i}/" + attention + "/qkv"): (
            "blocks.{i}.attn.qkv",
            tuple(f"{hf}attention.attention.{name}" for name in ("query", "key", "value")),
        ),
        ("dense", "block_{i}/" + attention + "/out"): ("blocks.{i}.attn.proj", hf + "attention.output.dense"),
        ("norm", "block_{i}/norm_mlp"): ("blocks.{i}.norm2", hf + "layernorm_after"),
        ("dense", "block_{i}/mlp/hidden"): ("blocks.{i}.mlp.fc1", hf + "intermediate.dense"),
        ("dense", "block_{i}/mlp/out"): ("blocks.{i}.mlp.fc2", hf + "output.dense"),
    }
    return [
        Row(kind, f"encoder/{ours}", {"timm": timm, "hf": hf})
        for (kind, ours), (timm, hf) in names.items()
        if num_special == 2 or ours != "distillation_token"
    ]


# EgoVLP's video_model is timm's ViT with a temporal attention added to every block.
_VIDEO_ONLY = [
    Row("table", "encoder/temporal_embedding", {"egovlp": "temporal_embed"}),
    Row("norm", "encoder/block_{i}/norm_time", {"egovlp": "blocks.{i}.norm3"}),
    Row("dense", "encoder/block_{i}/time_attention/qkv", {"egovlp": "blocks.{i}.timeattn.qkv"}),
    Row("dense", "encoder/block_{i}/time_attention/out", {"egovlp": "blocks.{i}.timeattn.proj"}),
]
_VIDEO = [
    Row(row.kind, row.ours, {**row.theirs, "egovlp": row.theirs["timm"]})
    for row in _vit_rows("norm_space", "space_attention", 1)
]
_TEXT_BLOCK = "transformer.layer.{i}."
TABLES: dict[str, list[Row]] = {
    "audio": [
        *_vit_rows("norm_attention", "attention", 2),
        Row("norm", "norm", {"head": "mlp_head.0", "hf_head": "classifier.layernorm"}),
        Row("dense", "projection", {"head": "mlp_head.1", "hf_head": "classifier.dense"}),
    ],
    "video": [*_VIDEO, *_VIDEO_ONLY, Row("dense", "projection", {"head": "vid_proj.0"})],
    "text": [
        Row("array", "encoder/word_embedding/embedding", {"hf": "embeddings.word_embeddings.weight"}),
        Row("array", "encoder/position_embedding", {"hf": "embeddings.position_embeddings.weight"}),
        Row("norm", "encoder/norm_embedding", {"hf": "embeddings.LayerNorm"}),
        Row(
            "dense",
            "encoder/block_{i}/attention/qkv",
            {"hf": tuple(f"{_TEXT_BLOCK}attention.{name}_lin" for name in "qkv")},
        ),
        Row("dense", "encoder/block_{i}/attention/out", {"hf": _TEXT_BLOCK + "attention.out_lin"}),
        Row("norm", "encoder/block_{i}/norm_attention", {"hf": _TEXT_BLOCK + "sa_layer_norm"}),
        Row("dense", "encoder/block_{i}/mlp/hidden", {"hf": _TEXT_BLOCK + "ffn.lin1"}),
        Row("dense", "encoder/block_{i}/mlp/out", {"hf": _TEXT_BLOCK + "ffn.lin2"}),
        Row("norm", "encoder/block_{i}/norm_mlp", {"hf": _TEXT_BLOCK + "output_layer_norm"}),
        Row("dense", "projection", {"head": "txt_proj.1"}),
    ],
}
# Classifiers, poolers and buffers, which our encoders don't have. Any other tensor that is left over is an error.
_UNUSED = re.compile(
    r"^(head|head_dist|pre_logits|fc|fc_norm|pooler|classifier|pre_classifier|qa_outputs|cls_classifier|"
    r"distillation_classifier|vocab_transform|vocab_layer_norm|vocab_projector|lm_head)(\.|$)|(^|\.)position_ids$"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tower found in a checkpoint.

    Attributes:
      tower: "audio", "video", "text", or "image" for a ViT or DeiT from which the audio or video tower can start.
      encoder: Key in `Row.theirs` for the encoder's rows: "timm", "egovlp" or "hf"; `OURS` if nothing needs renaming.
      head: Key in `Row.theirs` for the projection's rows, "" if the checkpoint has no projection.
      tensors: Tensors under the names that these keys give.
    """

    tower: str
    encoder: str
    head: str
    tensors: Tensors


def _take(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _strip(tensors: Tensors) -> Tensors:
    """Returns the tensors without the prefixes that wrappers such as DataParallel put before every name."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _strip(_take(tensors, prefix))
    return tensors


def _audio_source(tensors: Tensors) -> Source:
    head = _take(tensors, "mlp_head.")
    encoder = {name: value for name, value in tensors.items() if not name.startswith("mlp_head.")}
    inner = {f"mlp_head.{name}": value for name, value in head.items()}
    return Source("audio", "timm", "head" if head else "", {**_take(encoder, "v."), **inner})


def recognize(tensors: Tensors, path: str) -> dict[str, Source]:
    """Returns the towers of a checkpoint, recognised by the names of its tensors: tower → `Source`.

    Args:
      tensors: Tensors as read from the file.
      path: Path of the checkpoint, for error messages.

    Raises:
      ValueError: The names are of no known layout, or some belong to no tower of it; the message shows some of them. Or
        timm's ViT is not for RGB images.
    """
    if tensors and all(name.split("/")[0] in (*TABLES, "classifier") for name in tensors):
        return {tower: Source(tower, OURS, "", own) for tower in TABLES if (own := _take(tensors, f"{tower}/"))}
    tensors = _strip(tensors)
    found = {}
    if any(name.startswith(("video_model.", "text_model.", "audio_model.")) for name in tensors):
        groups = {"video": ("egovlp", "vid_proj."), "text": ("hf", "txt_proj.")}
        for tower, (encoder, head) in groups.items():
            own = _take(tensors, f"{tower}_model.")
            heads = {name: value for name, value in tensors.items() if name.startswith(head)}
            if own:
                found[tower] = Source(tower, encoder, "head" if heads else "", own | heads)
        if audio := _take(tensors, "audio_model."):
            found["audio"] = _audio_source(_strip(audio))
        used = ("video_model.", "text_model.", "audio_model.", "vid_proj.", "txt_proj.")
        if other := [name for name in tensors if not name.startswith(used)]:
            raise ValueError(f"{path}: EgoVLP's layout, but {_some(other)} belong(s) to none of {', '.join(used)}")
        return found
    for prefix in ("distilbert.", "audio_spectrogram_transformer.", "vit.", "deit."):
        if inner := _take(tensors, prefix):
            outer = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
            tensors = {**inner, **outer}
    if "v.cls_token" in tensors:
        return {"audio": _audio_source(tensors)}
    if "transformer.layer.0.attention.q_lin.weight" in tensors:
        return {"text": Source("text", "hf", "head" if "txt_proj.1.weight" in tensors else "", tensors)}
    if "temporal_embed" in tensors:
        return {"video": Source("video", "egovlp", "head" if "vid_proj.0.weight" in tensors else "", tensors)}
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is not None and "blocks.0.attn.qkv.weight" in tensors:
        if kernel.ndim != 4 or kernel.shape[1] != 3:
            raise ValueError(f"{path}: a ViT of timm, but patch_embed.proj.weight {list(kernel.shape)} is not for RGB images")
        return {"image": Source("image", "timm", "", tensors)}
    kernel = tensors.get("embeddings.patch_embeddings.projection.weight")
    if kernel is not None and kernel.ndim == 4:
        if kernel.shape[1] == 3:
            return {"image": Source("image", "hf", "", tensors)}
        heads = {"mlp_head.1.weight": "head", "classifier.dense.weight": "hf_head"}
        head = next((column for name, column in heads.items() if name in tensors), "")
        return {"audio": Source("audio", "hf", head, tensors)}
    raise ValueError(
        f"{path}: not a checkpoint of EgoVLP, action2sound, AST, DeiT, ViT or DistilBERT; it holds {_some(tensors)}"
    )


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"


def _depth(tensors: Tensors) -> int:
    """Returns the number of different blocks that names mention; not the largest index, since a forged one could be huge."""
    found = [re.search(r"(?:blocks|layer)\.(\d+)\.", name) for name in tensors]
    return len({match.group(1) for match in found if match})


def _leaves(row: Row) -> list[tuple[str, str]]:
    """Returns (suffix of our name, suffix of their name) for each array of a layer; a single array has empty suffixes."""
    leaves = {
        "dense": [("/kernel", ".weight"), ("/bias", ".bias")],
        "patches": [("/kernel", ".weight"), ("/bias", ".bias")],
        "norm": [("/scale", ".weight"), ("/bias", ".bias")],
    }
    return leaves.get(row.kind, [("", "")])


def _is_sound(kind: str, leaf: str, parts: list[np.ndarray]) -> bool:
    """Returns whether the arrays of a layer are floats, equal in shape, with the dimensions that it has in the source."""
    shape = parts[0].shape
    ones = {"token": 2, "table": 1}.get(kind, 0)  # leading dimensions of length 1
    num_dims = 1 if kind == "norm" or leaf == "/bias" else {"token": 3, "table": 3, "patches": 4}.get(kind, 2)
    is_float = all(part.dtype.kind == "f" or part.dtype.name == "bfloat16" for part in parts)
    same = all(part.shape == shape for part in parts)
    return is_float and same and len(shape) == num_dims and shape[:ones] == (1,) * ones and 0 not in shape


def _to_ours(kind: str, leaf: str, parts: list[np.ndarray]) -> np.ndarray:
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if kind == "token" or kind == "table":
        return array.reshape(array.shape[-1:] if kind == "token" else array.shape[-2:])
    if leaf == "/kernel":
        return rearrange(array, "o c i j -> (i j c) o") if kind == "patches" else array.T
    return array


def _to_theirs(kind: str, leaf: str, array: np.ndarray, num_parts: int, channels: int) -> list[np.ndarray]:
    if kind == "token" or kind == "table":
        return [array.reshape(1, -1, array.shape[-1])]
    if leaf == "/kernel":
        if kind == "patches":
            side = round((array.shape[0] / channels) ** 0.5)
            return [rearrange(array, "(i j c) o -> o c i j", i=side, j=side, c=channels)]
        array = array.T
    return np.split(array, num_parts)


def _names(row: Row, column: str, depth: int):
    """Yields (our path, their names, suffix of our path) for every array and block of a row."""
    theirs = row.theirs[column]
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    for i in range(depth) if "{i}" in row.ours else (0,):
        for leaf, suffix in _leaves(row):
            yield row.ours.format(i=i) + leaf, [name.format(i=i) + suffix for name in theirs], leaf


def to_ours(source: Source, tower: str, path: str) -> Tensors:
    """Returns a tower's parameters under our names and in our layout, float32, without those that the source's kind lacks.

    Args:
      source: One of the sources from `recognize`.
      tower: "audio", "video" or "text"; from an "image" source "audio" or "video".
      path: Path of the checkpoint, for error messages.

    Raises:
      ValueError: The source is for another tower, or is in our own layout but not float32, or a tensor that it should have
        is missing, is no float or hasn't the dimensions of its layer, or a tensor is left over. Such tensors are listed as
        - missing, ! malformed, + unexpected.
    """
    if source.tower not in (tower, "image") or (source.tower == "image" and tower == "text"):
        raise ValueError(f"{path} holds a tower for {source.tower}, not for {tower}")
    if source.encoder == OURS:
        if other := _shorten([f"! {name} {v.dtype}" for name, v in source.tensors.items() if v.dtype != np.float32]):
            raise ValueError(f"{path}: mc3_jax weights must be float32, but {'; '.join(other)}")
        return dict(source.tensors)
    rest = dict(source.tensors)
    params, missing, malformed = {}, [], []
    for row in TABLES[tower]:
        column = source.head if source.head in row.theirs else source.encoder
        if column not in row.theirs:
            continue
        for ours, theirs, leaf in _names(row, column, _depth(source.tensors)):
            if ours.endswith("distillation_token") and source.tower == "image" and theirs[0] not in rest:
                continue  # only a distilled DeiT has one
            lacking = [name for name in theirs if name not in rest]
            if lacking:
                missing += [f"- {name}" for name in lacking]
                continue
            parts = [rest.pop(name) for name in theirs]
            if not _is_sound(row.kind, leaf, parts):
                named = zip(theirs, parts, strict=True)
                malformed += [f"! {name} {part.dtype} {list(part.shape)}" for name, part in named]
                continue
            # To float32 before anything is computed from them: half precision would round sums.
            params[ours] = _to_ours(row.kind, leaf, [np.asarray(part, np.float32) for part in parts])
    second = ("dist_token", "embeddings.distillation_token") if (source.tower, tower) == ("image", "video") else ()
    is_distilled = any([rest.pop(name, None) is not None for name in second])
    unexpected = [f"+ {name} {list(value.shape)}" for name, value in rest.items() if not _UNUSED.search(name)]
    lines = [line for kind in (missing, malformed, unexpected) for line in _shorten(kind)]
    if lines:
        kinds = "- missing, ! malformed, + unexpected"
        raise ValueError(f"{path} does not hold a whole {tower} tower ({kinds}): {'; '.join(lines)}")
    if is_distilled:
        # The video tower has no distillation token, so DeiT's is dropped, and so is its position.
        position = params["encoder/position_embedding"]
        params["encoder/position_embedding"] = np.concatenate([position[:1], position[2:]])
    return params


def _shorten(lines: list[str]) -> list[str]:
    return lines[:10] + ([f"{lines[0][0]} {len(lines) - 10} more"] if len(lines) > 10 else [])


def to_theirs(params: Tensors, tower: str, encoder: str, head: str = "") -> Tensors:
    """Returns a tower's parameters under a source's names and in its layout, the reverse of `to_ours`.

    Args:
      params: Flat parameters of the tower.
      tower: "audio", "video" or "text".
      encoder: "timm", "egovlp" or "hf".
      head: "head", "hf_head", or "" to leave the projection out.
    """
    depth = 1 + max(int(match.group(1)) for name in params if (match := re.search(r"block_(\d+)/", name)))
    channels = 1 if tower == "audio" else 3
    tensors = {}
    for row in TABLES[tower]:
        column = head if head in row.theirs else encoder
        if column not in row.theirs:
            continue
        for ours, theirs, leaf in _names(row, column, depth):
            parts = _to_theirs(row.kind, leaf, params[ours], len(theirs), channels)
            tensors |= dict(zip(theirs, map(np.ascontiguousarray, parts), strict=True))
    return tensors
