"""Table 4: EPIC-Sounds by a trained audio tower, `:probe` or `:finetune`, by the recipe of the data set's SSAST baseline.

    python -m mc3_jax.train --config=configs/epic_sounds.py:finetune --workdir=runs/epic_sounds/finetune \
        --config.init.audio=runs/mc3_ego4d

then `python -m mc3_jax.evaluate` with the same words: validation, the last and the best epoch. Data are those of
`python -m data_prep.epic_sounds`.
"""

from mc3_jax.config import (
    CLASSIFIER,
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
STEPS_PER_EPOCH = 469  # of 60,055 segments in batches of 128


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
        model=ModelConfig(num_classes=44),
        init=InitConfig(audio="runs/mc3_ego4d"),
        data=DataConfig(dir="data/epic_sounds", batch_size=128),
        phases=phases,
        save=SaveConfig(every_steps=STEPS_PER_EPOCH, keep=30),  # every epoch, for the best one
        eval=EvalConfig(split="validation", hop_samples=12_000),
    )
