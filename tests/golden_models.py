"""The sizes of the golden checkpoints, as configs, and the inputs and outputs stored with them."""

import json
import pathlib

import numpy as np
from einops import rearrange

from mc3_jax.config import AudioConfig, ModelConfig, TextConfig, VideoConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
EGOVLP = json.loads((GOLDEN / "egovlp_tiny.json").read_text())


def model_config(**changes) -> ModelConfig:
    """Returns the config of the golden towers: EgoVLP's video and text, AST with 148 time frames, 32-d embeddings.

    Args:
      **changes: Fields to replace; `__` stands for the dot (`video__num_frames=2`).
    """
    video, text = EGOVLP["video"], EGOVLP["text"]
    config = ModelConfig(
        audio=AudioConfig(num_time_frames=148, width=48, depth=2, num_heads=4),
        video=VideoConfig(
            image_size_px=video["img_size"], resize_px=video["img_size"], patch_px=video["patch_size"],
            num_frames=video["num_frames"], num_positions=video["num_frames"], width=video["embed_dim"],
            depth=video["depth"], num_heads=video["num_heads"],
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"], num_positions=text["max_position_embeddings"], num_tokens=10,
            width=text["dim"], depth=text["n_layers"], num_heads=text["n_heads"], mlp_width=text["hidden_dim"],
        ),
        embed_dim=EGOVLP["projection_dim"],
        dtype="float32",
    )  # fmt: skip
    for name, value in changes.items():
        owner, *parts = [config, *name.split("__")]
        for part in parts[:-1]:
            owner = getattr(owner, part)
        setattr(owner, parts[-1], value)
    return config


def egovlp_outputs() -> dict[str, np.ndarray]:
    """Returns the golden inputs and outputs of EgoVLP, its frames as [b, t, y, x, 3]."""
    golden = dict(np.load(GOLDEN / "egovlp_tiny.npz"))
    golden["video"] = np.ascontiguousarray(rearrange(golden["video"], "b t c y x -> b t y x c"))
    return golden | {name: golden[name].astype(np.int32) for name in ("input_ids", "attention_mask")}


def ast_outputs() -> dict[str, np.ndarray]:
    """Returns the golden inputs and outputs of AST."""
    return dict(np.load(GOLDEN / "ast_tiny.npz"))


def normalize(x: np.ndarray) -> np.ndarray:
    """Returns the rows scaled to norm 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
