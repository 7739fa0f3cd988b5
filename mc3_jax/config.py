"""What a run is: dataclasses with units, defaults and sources; `mc3_jax.validation` says which values are allowed.

A file in `configs/` returns one `Config`. Any field can be overridden on the command line:
`--config=configs/demo.py --config.data.batch_size=64 --config.phases[0].epochs=2`. Unknown fields and wrong types are
refused. "(open)" marks what neither the paper nor public code settles; `docs/method.md` gives the reason for the default.
"""

import dataclasses
import json
import typing

MODALITIES = ("audio", "video", "text")
CLASSIFIER = "classifier"
PAIRS = ("av", "al", "vl")


@dataclasses.dataclass
class AudioConfig:
    """AST (Gong et al., Interspeech 2021) on Kaldi log-mel; defaults are the paper's sizes.

    Attributes:
      num_mel: Mel bands.
      num_time_frames: Spectrogram length; shorter ones are padded with zeros after normalising.
      patch_px, stride_px: Patch size and stride, the same along mel and time.
      width, depth, num_heads: Of the transformer.
      max_time_mask, max_mel_mask: Longest SpecAugment mask in training, in frames and in mel bands; 0 is off (open: the
        paper names none).
    """

    num_mel: int = 128
    num_time_frames: int = 149
    patch_px: int = 16
    stride_px: int = 10
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    max_time_mask: int = 0
    max_mel_mask: int = 0


@dataclasses.dataclass
class VideoConfig:
    """EgoVLP's SpaceTimeTransformer; defaults are the paper's sizes.

    Attributes:
      image_size_px, patch_px: Of a frame and its patches.
      num_frames: Frames per clip (open: 4, as EgoVLP's loader).
      num_positions: Length of the table of temporal positions; EgoVLP's checkpoint holds 16, of which the first are used.
      width, depth, num_heads: Of the transformer.
      time_init: "zeros", EgoVLP's, starts time attention with output 0, for weights inflated from images; "random" is for
        training from scratch, where zeros would keep the output at 0.
      resize_px: Short side in evaluation, before the centre crop of `image_size_px`. If both are equal, the crop is the
        whole central square, as in EgoVLP's evaluation; a larger short side cuts off its border.
      crop_scale: Share of the frame's area that a random crop takes in training, (low, high).
      flip_probability: Of a horizontal flip in training.
    """

    image_size_px: int = 224
    patch_px: int = 16
    num_frames: int = 4
    num_positions: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    time_init: str = "zeros"
    resize_px: int = 224
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip_probability: float = 0.5


@dataclasses.dataclass
class TextConfig:
    """DistilBERT base uncased; defaults are the paper's sizes.

    Attributes:
      vocab_size: Rows of the embedding table; the tokenizer may have fewer tokens.
      num_positions: Rows of the position table.
      num_tokens: Length that narrations are padded or cut to.
      width, depth, num_heads, mlp_width: Of the transformer.
      dropout: Everywhere DistilBERT has it.
    """

    vocab_size: int = 30522
    num_positions: int = 512
    num_tokens: int = 30
    width: int = 768
    depth: int = 6
    num_heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.1


@dataclasses.dataclass
class ModelConfig:
    """The three towers and their joint embedding space.

    Attributes:
      embed_dim: Of the joint space (EgoVLP's projections: 256).
      dtype: Compute dtype, "float32" or "bfloat16"; parameters, softmax, norms and losses are always float32. In float32 GPUs
        may round what the towers' matrix products take to TensorFloat-32 and TPUs to bfloat16, JAX's default; with
        JAX_DEFAULT_MATMUL_PRECISION=highest in the environment they don't.
      scan_layers: Run a tower's blocks, all but the last, as one loop. At the paper's sizes this saves minutes of compiling
        for a TPU and costs a copy of their parameters; a GPU moves twice the memory. Parameters keep their names and shapes.
      remat: What of a block stays in memory for the backward pass; the rest is computed again. "none" computes nothing
        again, "dots" keeps the outputs of Dense layers, "full" keeps only the block's input.
      attention: Of audio and video. "einsum": matrix products that run on any machine. "cudnn": for bfloat16 on an NVIDIA
        GPU, cuDNN's flash attention, and sums for frames and class tokens (`mc3_jax.models.attention`). "auto": "cudnn" if
        available, else "einsum". If "cudnn" is set and not available, training refuses it; all else uses "einsum".
      num_classes: Of a classifier on the audio tower, AST's head; 0 is none.
    """

    audio: AudioConfig = dataclasses.field(default_factory=AudioConfig)
    video: VideoConfig = dataclasses.field(default_factory=VideoConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    embed_dim: int = 256
    dtype: str = "bfloat16"
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "auto"
    num_classes: int = 0


@dataclasses.dataclass
class InitConfig:
    """Weights each tower starts from; empty is random. See `mc3_jax.weights.read_towers` for what is read.

    Attributes:
      audio: AST or DeiT/ViT (paper: DeiT-B distilled, ImageNet), or a checkpoint that holds an audio tower.
      video: EgoVLP (paper), ViT or DeiT, or a checkpoint that holds a video tower.
      text: EgoVLP (paper) or DistilBERT, or a checkpoint that holds a text tower.
      temporal: If the model has more temporal positions than the checkpoint, "zeros" appends zeros, "linear" interpolates.
    """

    audio: str = ""
    video: str = ""
    text: str = ""
    temporal: str = "zeros"


@dataclasses.dataclass
class DataConfig:
    """Clips made by `data_prep`, and the order they come in.

    Attributes:
      dir: Folder of shards; holds `clips.json`.
      tokenizer: Folder of a `distilbert-base-uncased` tokenizer, or one made by `python -m data_prep.vocabulary`; not needed
        if no phase uses text.
      split: Split trained on; several joined by "+".
      folds: Of those splits, the folds trained on; none means all.
      num_samples: Length of the audio; longer clips are cropped at random. 0 takes the data set's length.
      silence_db: For sounds longer than the window: windows whose level is more than this many dB below the loudest one's
        are not trained on, nor counted when evaluation averages the scores of windows; 0 takes all windows.
      batch_size: Global, over all processes and devices (paper: 256).
      chunk_size: Rows of the global batch embedded at a time in training, 0 for all at once: gradient caching (Gao et al.,
        RepL4NLP 2021). Loss and gradient stay those of the whole batch, at the cost of one more forward pass.
      accumulate_steps: Must be 1: gradients accumulated over batches are not those of a contrastive loss.
      clips_per_video: Clips are shuffled in groups of up to this many from one video, so that a batch holds negatives of
        the same room and recorder (after EgoVLP's scene-aware negatives, Lin et al., NeurIPS 2022). 1 shuffles single clips
        (open).
      num_threads: Threads that read and decode, per process, if there are no workers.
      num_workers: Processes that read and decode instead of threads, per training process, on Linux; 0 is none. For hosts
        with many cores: Python's lock lets threads keep only some five of them busy.
      prefetch: Batches read ahead, per process; at least one per thread or worker, since each makes a batch of its own.
    """

    dir: str = ""
    tokenizer: str = ""
    split: str = "train"
    folds: tuple[int, ...] = ()
    num_samples: int = 0
    silence_db: float = 0.0
    batch_size: int = 256
    chunk_size: int = 0
    accumulate_steps: int = 1
    clips_per_video: int = 1
    num_threads: int = 16
    num_workers: int = 0
    prefetch: int = 4


@dataclasses.dataclass
class ConsensusConfig:
    """Eq. 2 and 3 of the paper.

    Attributes:
      anchor: Modality that the others are compared with (Sec. 4.4: audio).
      alpha_audio, alpha_video, alpha_text: Exponents of K_i (Sec. 4.4: 0.5 for video, 1 for language); the anchor's
        is unused.
      inverse: K⁻¹ (open): "argmin" inverts with the exponent of the modality that attained the minimum, so that c is
        one of the scores; "linear" is 2y - 1; "per_modality" inverts with each modality's own exponent, so that no score is
        raised.
      stop_gradient: Whether c is a fixed target (open).
    """

    anchor: str = "audio"
    alpha_audio: float = 1.0
    alpha_video: float = 0.5
    alpha_text: float = 1.0
    inverse: str = "argmin"
    stop_gradient: bool = True


@dataclasses.dataclass
class MemoryConfig:
    """Negatives from a memory, chosen by their gradients (CM-ACC, Ma et al., ICLR 2021); see `mc3_jax.losses.active`.

    Attributes:
      pool_size: Keys of past batches kept for each modality, a multiple of the batch size; 0 is off.
      dictionary_size: Negatives for each modality, a multiple of the batch size.
      momentum: By which the encoders of keys follow the trained ones, per step (the public code's 0.9).
    """

    pool_size: int = 0
    dictionary_size: int = 0
    momentum: float = 0.9


@dataclasses.dataclass
class OptimizerConfig:
    """Adam, which the paper uses, and options that it does not name.

    Attributes:
      learning_rate: Peak (Sec. 4.4: 3e-5).
      b1, b2, eps: Adam's.
      weight_decay: Decoupled; 0 is plain Adam. Biases, norms and position embeddings are not decayed.
      clip_norm: Largest global norm of the gradient, which is clipped to it; 0 is off.
      schedule: "constant" (the paper names none) or "cosine" to `final_scale` at the end of the phase.
      final_scale: Where the cosine ends, as a share of the peak.
      hold_share: Share of the phase's steps, including warm-up, after which the cosine begins.
      warmup_steps: Linear warm-up from 0 at the beginning of the phase.
    """

    learning_rate: float = 3e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    schedule: str = "constant"
    final_scale: float = 0.0
    hold_share: float = 0.0
    warmup_steps: int = 0


@dataclasses.dataclass
class PhaseConfig:
    """A stretch of training with one loss and one optimizer.

    Attributes:
      name: Shown in logs and the report; unique in a run.
      epochs: Length in passes over the training split; may be fractional.
      pairs: Modality pairs contrasted, each in both directions.
      temperature: Of InfoNCE (open: 0.05, EgoVLP's).
      learn_scale: Learn 1/temperature, starting from `temperature` and limited to 100 (CLAP's).
      memory: Where negatives come from beside the batch.
      mask_same_text: Leave other clips of the batch with the same narration, token by token, out of every pair's negatives.
      contrastive_weight, consensus_weight: Of the two terms of Eq. 4.
      classification_weight: Of the classifier's cross entropy, if the model has a classifier.
      mixup: Parameter of the Beta distribution by which each sound and its class are mixed with another of the batch
        (Zhang et al., ICLR 2018; of waveforms, as in AST); 0 is off.
      consensus: Details of Eq. 2 and 3.
      trainable: Towers that learn, with their projections, and "classifier"; only those that the loss uses do so.
      optimizer: This phase's.
      reset_optimizer: Start from fresh moments instead of the previous phase's (open: kept).
    """

    name: str = "align"
    epochs: float = 5.0
    pairs: tuple[str, ...] = PAIRS
    temperature: float = 0.05
    learn_scale: bool = False
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    mask_same_text: bool = False
    contrastive_weight: float = 1.0
    consensus_weight: float = 0.0
    classification_weight: float = 0.0
    mixup: float = 0.0
    consensus: ConsensusConfig = dataclasses.field(default_factory=ConsensusConfig)
    trainable: tuple[str, ...] = MODALITIES
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    reset_optimizer: bool = False


@dataclasses.dataclass
class SaveConfig:
    """How often the state is saved and how many checkpoints are kept. The end of each phase is always saved and kept.

    Attributes:
      every_steps: Interval.
      keep: Number of newest checkpoints kept, ends of phases among them; with 2, a damaged one costs at most an interval.
    """

    every_steps: int = 500
    keep: int = 2


@dataclasses.dataclass
class ValidationConfig:
    """The loss on clips that are not trained on, measured during training.

    Attributes:
      every_steps: Interval; it is also measured at the end of each phase. 0 is never.
      split: Of the data set; several joined by "+".
      folds: Of those splits, the folds used; none means all.
      num_batches: Batches of `data.batch_size` clips, always of the same clips; at most as many as the split fills.
    """

    every_steps: int = 0
    split: str = "validation"
    folds: tuple[int, ...] = ()
    num_batches: int = 4


@dataclasses.dataclass
class EvalConfig:
    """What `mc3_jax.evaluate` does.

    Attributes:
      split: Split evaluated; several joined by "+".
      folds: Of those splits, the folds evaluated; none means all.
      hop_samples: For sounds longer than the window, the scores of windows this far apart are averaged; 0 takes only the
        middle one.
      batch_size: Global.
      num_bootstrap: Resamplings for each 95 % interval.
      instance_pool: Number of clips, drawn at random, among which each has to find itself by another modality; all clips of
        the split if it has fewer, or if 0, in time that grows with their square.
      num_examples: Number of best clips, and of worst clips, shown in the report.
      num_clusters: Of the video embeddings, shown in the report (20 in the paper).
      num_cluster_examples: Clips shown of each cluster (8 in the paper).
      seed: Of the bootstrap, of how retrieval groups are split in halves, and of what the report draws at random.
    """

    split: str = "test"
    folds: tuple[int, ...] = ()
    hop_samples: int = 0
    batch_size: int = 256
    num_bootstrap: int = 1000
    instance_pool: int = 1000
    num_examples: int = 4
    num_clusters: int = 20
    num_cluster_examples: int = 8
    seed: int = 0


@dataclasses.dataclass
class LogConfig:
    """Where numbers go beside the terminal and `metrics.jsonl`.

    Attributes:
      every_steps: Interval of rows.
      clips: Write to `clips.jsonl` which clips each step uses (`clips-1.jsonl` in the second process, and so on).
      tensorboard: Write TensorBoard event files.
      wandb_project: Weights & Biases project; empty is off (needs the `wandb` extra).
    """

    every_steps: int = 10
    clips: bool = False
    tensorboard: bool = True
    wandb_project: str = ""


@dataclasses.dataclass
class Config:
    """One run.

    Attributes:
      name: Of the run.
      seed: Of initialisation, data order, augmentation and dropout.
      fsdp: Number of devices that parameters are sharded over: the size of mesh axis "fsdp". The rest is axis "data".
      loss_block_rows: Rows of a pair's similarity matrix [batch, batch] held at once, for batches whose matrix would not fit;
        0 holds all. The loss and its gradient are the same. A phase with a memory has no such matrix.
      heartbeat_timeout_s: With several processes, one that is silent for this long counts as lost and the others end.
      hang_timeout_s: If training makes no progress for this long, it ends and says which process hangs and where; 0 is
        never. Compiling, restoring and saving may take `mc3_jax.watchdog.LONG` times as long.
      checkpoint: Evaluation only: weights to evaluate instead of the workdir's run, a file or folder that
        `mc3_jax.weights.read_checkpoint` reads.
    """

    name: str = "mc3"
    seed: int = 0
    fsdp: int = 1
    loss_block_rows: int = 0
    heartbeat_timeout_s: int = 100
    hang_timeout_s: int = 300
    checkpoint: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    phases: list[PhaseConfig] = dataclasses.field(default_factory=lambda: [PhaseConfig()])
    save: SaveConfig = dataclasses.field(default_factory=SaveConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


def to_dict(config: Config) -> dict:
    """Returns the config as nested plain values, as it is saved beside checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values, where: str = "config"):
    """Returns the dataclass that `to_dict` made `values` of; fields it lacks keep their defaults.

    Args:
      kind: `Config`, `ModelConfig`, ...
      values: Plain nested values, e.g. of a JSON file; whatever it holds.
      where: Name of the whole, for the error.

    Raises:
      ValueError: An unknown field or a value of another type; the message names both.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, got {values!r:.80}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    made = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{where}.{name} is unknown: this version knows {', '.join(fields)}")
        made[name] = _from_plain(fields[name].type, value, f"{where}.{name}")
    return kind(**made)


def _from_plain(kind, value, where: str):
    """Returns a plain value as a field's type wants it: nested dataclasses, lists of them, tuples, int for float."""
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_from_plain(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is float and type(value) is int:
        return float(value)
    if type(value) is not origin:
        raise ValueError(f"{where} = {value!r:.80}: must be {origin.__name__}")
    return value
