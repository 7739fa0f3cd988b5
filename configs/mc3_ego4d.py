"""The paper's run: MC3 on 250K Ego4D clips, Sec. 4.4 and 5 of SoundingActions (CVPR 2024).

    python -m data_prep.ego4d --root ego4d --out data/ego4d_clips --max_train_clips 250000
    python -m mc3_jax.train --config=configs/mc3_ego4d.py --workdir=runs/mc3_ego4d
    python -m mc3_jax.evaluate --config=configs/mc3_ego4d.py --workdir=runs/mc3_ego4d

Epochs are over the clips that are there: 9,766 steps for 250,000, several times as many without that sample. Evaluation
needs the labels of sounding actions, which have to be there at the conversion (docs/data.md).

Beside the clips it reads three things from `weights/`, which is for you to fill; nothing is downloaded:

- `weights/egovlp.pth`: the checkpoint that github.com/showlab/EgoVLP links as EgoVLP_PT_BEST, renamed. Video and text start
  from it.
- `weights/deit_base_distilled_patch16_384-d0272ac0.pth`: DeiT-B distilled at 384 px, from the model zoo of
  github.com/facebookresearch/deit, as AST (github.com/YuanGongND/ast) starts from ImageNet. Audio starts from it.
- `weights/distilbert-base-uncased/`: the tokenizer's files (`vocab.txt` or `tokenizer.json`, `tokenizer_config.json`) of
  huggingface.co/distilbert/distilbert-base-uncased. Its weights are not read.

Other names and places: `--config.data.dir=`, `--config.data.tokenizer=`, `--config.init.video=`, `.text=` and `.audio=`; an
empty `--config.init.audio=` starts a tower at random.

`--config=configs/mc3_ego4d.py:egovlp_rates` has the learning rates that EgoVLP's trainer sets, on whose code the paper is
built.
"""

import dataclasses

from mc3_jax.config import Config, DataConfig, InitConfig, ModelConfig, OptimizerConfig, PhaseConfig, SaveConfig

# Of EgoVLP: `learning_rate1` of run/train_egoclip.py, which trainer/trainer_egoclip.py sets after every epoch.
EGOVLP_RATE = 2e-4


def egovlp_rates(phase: PhaseConfig) -> list[PhaseConfig]:
    """Returns a phase in two, the optimizer's state kept: an epoch at its learning rate, the others at `EGOVLP_RATE`."""
    first = dataclasses.replace(phase, name=f"{phase.name}_first", epochs=1)
    later = dataclasses.replace(phase.optimizer, learning_rate=EGOVLP_RATE)
    return [first, dataclasses.replace(phase, epochs=phase.epochs - 1, optimizer=later)]


def get_config(mode: str = "paper") -> Config:
    """Returns the paper's run, number by number; after `:` behind the file's name, "egovlp_rates" has EgoVLP's rates.

    Raises:
      ValueError: Another word.
    """
    if mode not in ("paper", "egovlp_rates"):
        raise ValueError(f"{mode!r} is neither paper nor egovlp_rates: --config=configs/mc3_ego4d.py:egovlp_rates")
    adam = dict(learning_rate=3e-5)  # Sec. 4.4: Adam, 3e-5; no schedule, warm-up or decay is named
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
        # Blocks one after the other: on a GPU a loop over them moves twice the memory. For a TPU add
        # --config.model.scan_layers=True, with which the step compiles in minutes less.
        model=ModelConfig(),
        # Sec. 4.4: video and text from EgoVLP, audio from ImageNet: AST's own way is DeiT-B distilled at 384 px.
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
