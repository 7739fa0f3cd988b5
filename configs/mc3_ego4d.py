"""The paper's run: MC3 on 250K Ego4D clips, Sec. 4.4 and 5 of SoundingActions (CVPR 2024).

    python -m mc3_jax.train --config=configs/mc3_ego4d.py --workdir=runs/mc3_ego4d \
        --config.data.dir=data/ego4d_clips --config.data.tokenizer=weights/distilbert-base-uncased

Towers start from random weights here; the paper starts video and text from EgoVLP and audio from ImageNet (DeiT).
"""

from mc3_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, PhaseConfig


def get_config() -> Config:
    """Returns the paper's run, number by number."""
    adam = dict(learning_rate=3e-5)  # Sec. 4.4: Adam, 3e-5; no schedule, warm-up or decay is named
    return Config(
        name="mc3_ego4d",
        # Sec. 4.4: TimeSformer as in EgoVLP (ViT-B/16, 224 px, 4 frames), DistilBERT base, AST base; 256-d joint space.
        model=ModelConfig(),
        data=DataConfig(batch_size=256),  # Sec. 4.4: 256 over 8 A40s
        phases=[
            # Sec. 4.1 and 4.4: 5 epochs for each stage (open: whether "5 epochs for both stages" means 5 + 5).
            PhaseConfig(name="align", epochs=5, temperature=0.05, optimizer=OptimizerConfig(**adam)),
            PhaseConfig(
                name="refine", epochs=5, temperature=0.05, consensus_weight=1.0, optimizer=OptimizerConfig(**adam)
            ),  # Eq. 4: both terms, weight 1; anchor audio, α_v = 0.5, α_l = 1 (Sec. 4.4) are the defaults
        ],
        checkpoint=CheckpointConfig(every_steps=500, keep=2),
    )
