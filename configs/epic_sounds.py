"""Table 4: EPIC-Sounds with a trained audio tower, `:probe` or `:finetune`, at the rates of the data set's SSAST baseline.

    python -m mc3_jax.train --config=configs/epic_sounds.py:finetune --workdir=runs/epic_sounds/finetune \
        --config.init.audio=runs/mc3_ego4d

then `python -m mc3_jax.evaluate` with the same options: it evaluates the last and the best epoch on validation. The data are
made by `python -m data_prep.epic_sounds`. Optimizer, rates, epochs and batch size are the baseline's, the tower's input is
not: `docs/method.md`, "Table 4", lists the differences.
"""

from mc3_jax.config import (
    CLASSIFIER,
    AudioConfig,
    Config,
    DataConfig,
    EvalConfig,
    InitConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    SaveConfig,
)

# The baseline: AdamW at 1e-4, weight decay 1e-4, 30 epochs; the rate is multiplied by 1, 0.05, 0.01 from epoch 0, 10, 20 on.
RATES = {"first": 1e-4, "second": 5e-6, "third": 1e-6}
NUM_SEGMENTS, BATCH_SIZE = 60_055, 128  # segments in training
STEPS_PER_EPOCH = NUM_SEGMENTS // BATCH_SIZE
# The baseline's longest masks: fewer than 25 frames of 5 ms, 12 of ours, and fewer than 27 mel bands. It has two of each, and
# warps time.
MASKS = dict(max_time_mask=12, max_mel_mask=26)


def get_config(mode: str = "finetune") -> Config:
    """Returns the run of a mode.

    Args:
      mode: Given after the file's name and `:`. "probe" trains the last layer alone, "finetune" the audio tower as well.

    Raises:
      ValueError: The mode is neither.
    """
    if mode not in ("probe", "finetune"):
        raise ValueError(f"{mode!r} is neither probe nor finetune: --config=configs/epic_sounds.py:finetune")
    phases = []
    for name, rate in RATES.items():
        # Two epochs of warm-up, which begins at 0; the baseline's begins at 1e-6.
        warmup = 2 * STEPS_PER_EPOCH if name == "first" else 0
        phases.append(
            PhaseConfig(
                name, epochs=10, contrastive_weight=0.0, classification_weight=1.0,
                trainable=(CLASSIFIER,) if mode == "probe" else ("audio", CLASSIFIER),
                optimizer=OptimizerConfig(learning_rate=rate, weight_decay=1e-4, warmup_steps=warmup),
            )
        )  # fmt: skip
    return Config(
        name=f"epic_sounds_{mode}",
        model=ModelConfig(audio=AudioConfig(**MASKS), num_classes=44),
        init=InitConfig(audio="runs/mc3_ego4d"),
        data=DataConfig(dir="data/epic_sounds", batch_size=BATCH_SIZE),
        phases=phases,
        # All checkpoints are kept, so that the best epoch can be evaluated beside the last: one after each of 30 epochs, and
        # one at the end of each phase, which comes a few steps later.
        save=SaveConfig(every_steps=STEPS_PER_EPOCH, keep=100),
        eval=EvalConfig(split="validation", hop_samples=12_000),
    )
