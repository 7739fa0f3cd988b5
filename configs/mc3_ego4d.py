"""The paper's run: MC3 on 250K Ego4D clips, Sec. 4.4 and 5 of SoundingActions (CVPR 2024).

    python -m data_prep.ego4d --root ego4d --out data/ego4d_clips --max_train_clips 250000
    python -m mc3_jax.train --config=configs/mc3_ego4d.py --workdir=runs/mc3_ego4d
    python -m mc3_jax.evaluate --config=configs/mc3_ego4d.py --workdir=runs/mc3_ego4d

An epoch is a pass over the converted clips: with 250,000 of them the run has 9,766 steps, without `--max_train_clips` several
times as many. Evaluation needs the labels of sounding actions, which the conversion must already find (docs/data.md).

Beside the clips, the run reads three things from `weights/`, which you have to put there; nothing is downloaded:

- `weights/egovlp.pth`: the checkpoint that github.com/showlab/EgoVLP links as EgoVLP_PT_BEST, renamed. Video and text start
  from it.
- `weights/deit_base_distilled_patch16_384-d0272ac0.pth`: DeiT-B distilled at 384 px, from the model zoo of
  github.com/facebookresearch/deit, as AST (github.com/YuanGongND/ast) starts from ImageNet. Audio starts from it.
- `weights/distilbert-base-uncased/`: the tokenizer's files (`vocab.txt` or `tokenizer.json`, `tokenizer_config.json`) of
  huggingface.co/distilbert/distilbert-base-uncased. Its weights are not read.

For other names and places set `--config.data.dir=`, `--config.data.tokenizer=`, `--config.init.video=`, `.text=` and
`.audio=`; with an empty value, as in `--config.init.audio=`, a tower starts at random.

`--config=configs/mc3_ego4d.py:egovlp_rates` takes the learning rates that EgoVLP's trainer sets; the paper builds on
EgoVLP's code.
"""

import dataclasses

from mc3_jax.config import Config, DataConfig, InitConfig, ModelConfig, OptimizerConfig, PhaseConfig, SaveConfig

# EgoVLP's `learning_rate1` (run/train_egoclip.py), which trainer/trainer_egoclip.py sets after every epoch.
EGOVLP_RATE = 2e-4


def egovlp_rates(phase: PhaseConfig) -> list[PhaseConfig]:
    """Returns a phase split in two that share the optimizer state: one epoch at its own rate, the rest at `EGOVLP_RATE`."""
    first = dataclasses.replace(phase, name=f"{phase.name}_first", epochs=1)
    later = dataclasses.replace(phase.optimizer, learning_rate=EGOVLP_RATE)
    return [first, dataclasses.replace(phase, epochs=phase.epochs - 1, optimizer=later)]


def get_config(mode: str = "paper") -> Config:
    """Returns the paper's run, with all numbers that the paper gives.

    Args:
      mode: Given after the file's name and `:`. "paper" takes the paper's learning rate, "egovlp_rates" those of EgoVLP.

    Raises:
      ValueError: The mode is neither.
    """
    if mode not in ("paper", "egovlp_rates"):
        raise ValueError(f"{mode!r} is neither paper nor egovlp_rates: --config=configs/mc3_ego4d.py:egovlp_rates")
    adam = dict(learning_rate=3e-5)  # Sec. 4.4: Adam, 3e-5; no schedule, warm-up or decay is mentioned
    phases = [
        # Sec. 4.1 and 4.4: 5 epochs for each stage (open: whether "5 epochs for both stages" means 5 + 5).
        PhaseConfig(name="align", epochs=5, temperature=0.05, optimizer=OptimizerConfig(**adam)),
        PhaseConfig(
            name="refine", epochs=5, temperature=0.05, consensus_weight=1.0, optimizer=OptimizerConfig(**adam)
        ),  # Eq. 4: both terms, weight 1; anchor audio, α_v = 0.5, α_l = 1 (Sec. 4.4) are the defaults
    ]
    if mode == "egovlp_rates":
        phases = [part for phase in phases for part in egovlp_rates(phase)]
    return Config(
        name="mc3_ego4d" if mode == "paper" else f"mc3_ego4d_{mode}",
        # Sec. 4.4: TimeSformer as in EgoVLP (ViT-B/16, 224 px, 4 frames), DistilBERT base, AST base; 256-d joint space.
        # Blocks are not run as a loop, which moves twice the memory on a GPU. For a TPU add --config.model.scan_layers=True,
        # which saves minutes of compiling.
        model=ModelConfig(),
        # Sec. 4.4: video and text start from EgoVLP, audio from ImageNet; AST itself starts from DeiT-B distilled at 384 px.
        init=InitConfig(
            audio="weights/deit_base_distilled_patch16_384-d0272ac0.pth",
            video="weights/egovlp.pth",
            text="weights/egovlp.pth",
        ),
        # Sec. 4.4: 256 over 8 A40s.
        data=DataConfig(dir="data/ego4d_clips", tokenizer="weights/distilbert-base-uncased", batch_size=256),
        phases=phases,
        save=SaveConfig(every_steps=500, keep=2),
    )
