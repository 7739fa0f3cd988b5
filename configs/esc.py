"""ESC-50 or ESC-10 with the small audio tower of the demo, one fold held out: `:probe`, `:finetune` or `:scratch`.

    python -m data_prep.esc50 --root ESC-50 --esc10 --out data/esc10
    python -m mc3_jax.train --config=configs/esc.py:finetune --workdir=runs/esc10/finetune \
        --config.init.audio=runs/demo/train --config.data.dir=data/esc10

then `python -m mc3_jax.evaluate` with the same options. `--config.data.folds=(2,3,4,5) --config.eval.folds=(1,)` holds out
another fold; `benchmarks/sounds.py` runs all five.
"""

from configs import demo
from mc3_jax.config import CLASSIFIER, Config, DataConfig, EvalConfig, OptimizerConfig, PhaseConfig, SaveConfig

ALL = "train+validation+test"


def get_config(mode: str = "finetune") -> Config:
    """Returns the run of a mode.

    Args:
      mode: Given after the file's name and `:`. "probe" trains the last layer alone, "finetune" and "scratch" the audio
        tower as well.

    Raises:
      ValueError: The mode is none of these.
    """
    model = demo.get_config().model
    model.num_classes = 10
    if mode == "probe":
        model.audio.max_time_mask = model.audio.max_mel_mask = 0
        optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=1e-4, schedule="cosine", warmup_steps=20)
        phase = PhaseConfig(
            "probe", epochs=60, contrastive_weight=0.0, classification_weight=1.0, trainable=(CLASSIFIER,),
            optimizer=optimizer,
        )  # fmt: skip
    elif mode in ("finetune", "scratch"):
        # Chosen among a few rates, on folds 1 to 4; see benchmarks/RESULTS.md.
        optimizer = OptimizerConfig(
            learning_rate=5e-4 if mode == "finetune" else 1e-3, weight_decay=0.05, clip_norm=1.0, schedule="cosine",
            warmup_steps=50,
        )  # fmt: skip
        phase = PhaseConfig(
            mode, epochs=60, contrastive_weight=0.0, classification_weight=1.0, mixup=0.5,
            trainable=("audio", CLASSIFIER), optimizer=optimizer,
        )  # fmt: skip
    else:
        raise ValueError(f"{mode!r} is none of probe, finetune and scratch: --config=configs/esc.py:finetune")
    return Config(
        name=f"esc_{mode}",
        model=model,
        # ESC pads sounds shorter than 5 s with silence, in which every class sounds alike.
        data=DataConfig(dir="data/esc10", split=ALL, folds=(1, 2, 3, 4), silence_db=20.0, batch_size=32, num_threads=2),
        phases=[phase],
        # All checkpoints are kept, so that the best one can be evaluated beside the last.
        save=SaveConfig(every_steps=100, keep=100),
        eval=EvalConfig(split=ALL, folds=(5,), hop_samples=8_000, batch_size=64),
    )
