"""The demo: align and refine on SoundWorld, small enough for two CPU cores. `make demo` runs it.

python -m mc3_jax.train --config=configs/demo.py --workdir=runs/demo/train
"""

from mc3_jax.config import (
    AudioConfig,
    Config,
    ConsensusConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    SaveConfig,
    TextConfig,
    VideoConfig,
)


def get_config() -> Config:
    """Returns the demo's run."""
    # From scratch, a rate of 2e-3 never gets the loss below chance, and 1e-3 gets there later than 5e-4; see
    # benchmarks/RESULTS.md.
    adam = dict(learning_rate=5e-4, weight_decay=0.05, clip_norm=1.0)
    return Config(
        name="demo",
        model=ModelConfig(
            audio=AudioConfig(
                num_mel=64, num_time_frames=149, stride_px=16, width=128, depth=3, num_heads=4, max_time_mask=40,
                max_mel_mask=16,
            ),
            video=VideoConfig(
                image_size_px=48, patch_px=12, num_frames=4, num_positions=4, width=128, depth=3, num_heads=4,
                resize_px=50, time_init="random", crop_scale=(0.4, 1.0),
            ),
            text=TextConfig(
                vocab_size=600, num_positions=16, num_tokens=16, width=128, depth=2, num_heads=4, mlp_width=512
            ),
            embed_dim=64,
            dtype="float32",
        ),
        data=DataConfig(
            dir="runs/demo/clips", tokenizer="runs/demo/vocabulary", batch_size=64, clips_per_video=8, num_threads=2
        ),
        phases=[
            PhaseConfig(
                name="align", epochs=10, temperature=0.07, optimizer=OptimizerConfig(**adam, warmup_steps=20)
            ),
            PhaseConfig(
                name="refine", epochs=5, temperature=0.07, consensus_weight=1.0, consensus=ConsensusConfig(),
                optimizer=OptimizerConfig(**adam, schedule="cosine"),
            ),
        ],
        save=SaveConfig(every_steps=100, keep=1),
    )  # fmt: skip
