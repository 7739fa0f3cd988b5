"""Table 4: EPIC-Sounds by a trained audio tower, `:probe` or `:finetune`, at the rates of the data set's SSAST baseline.

    python -m mc3_jax.train --config=configs/epic_sounds.py:finetune --workdir=runs/epic_sounds/finetune \
        --config.init.audio=runs/mc3_ego4d

then `python -m mc3_jax.evaluate` with the same words: validation, the last and the best epoch. Data are those of
`python -m data_prep.epic_sounds`. Optimizer, rates, epochs and batch are the baseline's; what the tower hears is not:
`docs/method.md`, "Table 4", lists the differences.
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

# AdamW 1e-4, weight decay 1e-4, 30 epochs, the rate times 1, 0.05, 0.01 from epoch 0, 10, 20.
RATES = {"first": 1e-4, "second": 5e-6, "third": 1e-6}
NUM_SEGMENTS, BATCH_SIZE = 60_055, 128  # of training
STEPS_PER_EPOCH = NUM_SEGMENTS // BATCH_SIZE
# Its longest masks: below 25 frames of 5 ms, and below 27 mel bands. It has two of each, and warps time.
MASKS = dict(max_time_mask=12, max_mel_mask=26)


def get_config(mode: str = "finetune") -> Config:
    """Returns the run; after `:` behind the file's name, "probe" learns the last layer alone, "finetune" the tower too.

    Raises:
      ValueError: Another word.
    """
    if mode not in ("probe", "finetune"):
        raise ValueError(f"{mode!r} is neither probe nor finetune: --config=configs/epic_sounds.py:finetune")
    phases = []
    for name, rate in RATES.items():
        # Two epochs of warm-up, from 0 where the baseline's begins at 1e-6.
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
        # All of them are kept, for the best epoch beside the last: 30 epochs, and the ends of phases a few steps behind.
        save=SaveConfig(every_steps=STEPS_PER_EPOCH, keep=100),
        eval=EvalConfig(split="validation", hop_samples=12_000),
    )
