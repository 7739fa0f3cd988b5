"""Evaluates any checkpoint of the paper's sizes on the labelled test clips; no training run is needed.

    python -m mc3_jax.evaluate --config=configs/eval_ego4d.py --config.checkpoint=FILE \
        --config.data.dir=data/ego4d_clips

FILE holds all three towers with their projections: a `.pth` file with action2sound's layout, a safetensors file, a folder
made by `python -m mc3_jax.convert`, or the workdir of a run. Results and report go to `runs/eval_ego4d`, or to `--workdir`.
"""

from mc3_jax.config import Config, DataConfig, EvalConfig, ModelConfig


def get_config() -> Config:
    """Returns the evaluation of Tables 2 and 3."""
    return Config(
        name="eval_ego4d",
        model=ModelConfig(),
        data=DataConfig(dir="data/ego4d_clips", tokenizer="weights/distilbert-base-uncased"),
        eval=EvalConfig(split="test", batch_size=256),
    )
