"""The configuration of a run, as dataclasses: every field with unit, default and source.

A file in `configs/` returns one `Config`. Any field can be overridden on the command line:
`--config=configs/demo.py --config.data.batch_size=64 --config.phases[0].epochs=2`. Unknown fields and wrong types are
refused; `mc3_jax.validation` checks the values. "(open)" marks a choice that neither the paper nor public code settles;
`docs/method.md` gives the reason for the default.
"""

import dataclasses
import json
import typing

MODALITIES = ("audio", "video", "text")
CLASSIFIER = "classifier"
PAIRS = ("av", "al", "vl")


@dataclasses.dataclass
class AudioConfig:
    """The audio encoder: AST (Gong et al., Interspeech 2021) on Kaldi log-mel spectrograms; defaults are the paper's sizes.

    Attributes:
      num_mel: Number of mel bands.
      num_time_frames: Spectrogram length in frames; shorter spectrograms are padded with zeros after normalising.
      patch_px, stride_px: Patch size and stride, the same along mel and time.
      width, depth, num_heads: Sizes of the transformer.
      max_time_mask, max_mel_mask: Longest SpecAugment mask in training, in frames and in mel bands; 0 is off (open: the
        paper does not mention SpecAugment).
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
    """The video encoder: EgoVLP's SpaceTimeTransformer; defaults are the paper's sizes.

    Attributes:
      image_size_px, patch_px: Side length of a frame and of a patch; both are square.
      num_frames: Frames per clip (open: 4, as in EgoVLP's loader).
      num_positions: Length of the table of temporal positions; EgoVLP's checkpoint holds 16, of which the first
        `num_frames` are used.
      width, depth, num_heads: Sizes of the transformer.
      time_init: How time attention starts where no file holds it. "zeros", as in EgoVLP's code: with output 0, so that a
        tower from an image model sees a still as that model does, but without a gradient other than rounding errors.
        "random": like all other weights, with a gradient from the first step. See `mc3_jax.models.video`.
      resize_px: Length that a frame's short side is resized to in evaluation, before the centre crop of `image_size_px`.
        If both are equal, the crop is the whole central square, as in EgoVLP's evaluation; a larger value cuts off the
        border of that square.
      crop_scale: Range (low, high) of the share of the frame's area that a random crop takes in training.
      flip_probability: Probability of a horizontal flip in training.
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
    """The text encoder: DistilBERT base uncased; defaults are the paper's sizes.

    Attributes:
      vocab_size: Rows of the embedding table; the tokenizer may have fewer tokens.
      num_positions: Rows of the position table.
      num_tokens: Number of tokens that narrations are padded or cut to.
      width, depth, num_heads, mlp_width: Sizes of the transformer.
      dropout: Dropout rate in training, wherever DistilBERT has dropout.
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
      embed_dim: Dimension of the joint space (EgoVLP's projections: 256).
      dtype: Compute dtype, "float32" or "bfloat16"; parameters, softmax, norms and losses are always float32. With "float32",
        JAX by default lets GPUs round the inputs of the towers' matrix products to TensorFloat-32, and TPUs to bfloat16;
        JAX_DEFAULT_MATMUL_PRECISION=highest in the environment prevents it.
      scan_layers: Whether to run all of a tower's blocks but the last as one loop. At the paper's sizes this saves minutes of
        compiling for a TPU, but copies their parameters; a GPU moves twice the memory. Parameters keep their names and
        shapes.
      remat: Which of a block's activations are kept for the backward pass; the others are computed again. "none" computes
        nothing again, "dots" keeps the outputs of Dense layers, "full" keeps only the block's input.
      attention: Implementation of audio and video attention. "einsum": matrix products that run on any machine. "cudnn": for
        bfloat16 on an NVIDIA GPU, cuDNN's flash attention, and sums for frames and class tokens
        (`mc3_jax.models.attention`). "auto": "cudnn" if available, else "einsum". If "cudnn" is set but not available,
        training refuses to start; all other programs use "einsum".
      num_classes: Number of classes of a classifier (AST's head) on the audio tower; 0 is no classifier.
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
    """Files that each tower's weights start from; "" is random. `mc3_jax.weights.read_towers` lists the formats it reads.

    Attributes:
      audio: AST or DeiT/ViT (paper: DeiT-B distilled, ImageNet), or a checkpoint that holds an audio tower.
      video: EgoVLP (paper), ViT or DeiT, or a checkpoint that holds a video tower.
      text: EgoVLP (paper) or DistilBERT, or a checkpoint that holds a text tower.
      temporal: How the table of temporal positions grows if the model has more than the checkpoint: "zeros" appends zeros,
        "linear" interpolates.
    """

    audio: str = ""
    video: str = ""
    text: str = ""
    temporal: str = "zeros"


@dataclasses.dataclass
class DataConfig:
    """Training data: clips made by `data_prep`, how they form batches and how they are read.

    Attributes:
      dir: Folder of shards; holds `clips.json`.
      tokenizer: Folder of a `distilbert-base-uncased` tokenizer, or one made by `python -m data_prep.vocabulary`; not needed
        if no phase uses text.
      split: Split trained on, or several joined by "+".
      folds: Folds of these splits trained on; empty (`--config.data.folds=`) means all.
      num_samples: Length of the audio window in samples; longer clips are cropped at random. 0 takes the data set's length.
      silence_db: For sounds longer than the window: windows more than this many dB quieter than the sound's loudest window
        are not trained on, nor counted when evaluation averages the scores of windows; 0 takes all windows.
      batch_size: Global batch size, over all processes and devices (paper: 256).
      chunk_size: Rows of the global batch embedded at a time in training, 0 for all at once: gradient caching (Gao et al.,
        RepL4NLP 2021). Loss and gradient stay those of the whole batch, at the cost of one more forward pass.
      accumulate_steps: Must be 1: gradients accumulated over small batches are not those of one large contrastive batch.
      clips_per_video: Clips are shuffled in groups of up to this many from one video, so that a batch holds negatives from
        the same room and recorder (after EgoVLP's scene-aware negatives, Lin et al., NeurIPS 2022). 1 shuffles single clips
        (open).
      num_threads: Reading and decoding threads per process, used if there are no workers.
      num_workers: Reading and decoding processes per training process, instead of threads; Linux only, 0 is none. Meant for
        hosts with many cores: Python's global lock lets threads keep only about five of them busy.
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
    """The consensus term, Eq. 2 and 3 of the paper.

    Attributes:
      anchor: Modality that the others are compared with (Sec. 4.4: audio).
      alpha_audio, alpha_video, alpha_text: Exponents of K_i (Sec. 4.4: 0.5 for video, 1 for language); the anchor's
        is unused.
      inverse: How K is inverted (open): "argmin" uses the exponent of the modality that attained the minimum, so that the
        consensus c is one of the scores; "linear" is 2y - 1; "per_modality" uses each modality's own exponent, so that no
        score is raised.
      stop_gradient: Whether c is a fixed target, through which no gradient flows (open).
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
      pool_size: Keys of past batches kept for each modality, a multiple of the batch size; 0 is no memory.
      dictionary_size: Negatives kept for each modality, a multiple of the batch size.
      momentum: Share of the key encoders' parameters that is kept at each step; the rest comes from the trained encoders
        (0.9 in the public code).
    """

    pool_size: int = 0
    dictionary_size: int = 0
    momentum: float = 0.9


@dataclasses.dataclass
class OptimizerConfig:
    """Adam, which the paper uses, and options that it does not mention.

    Attributes:
      learning_rate: Peak learning rate (Sec. 4.4: 3e-5).
      b1, b2, eps: Adam's decay rates β₁ and β₂, and its ε.
      weight_decay: Decoupled weight decay; 0 is plain Adam. Biases, norms, class tokens and embedding tables are not decayed.
      clip_norm: Global norm that larger gradients are clipped to; 0 is off.
      schedule: "constant" (the paper names no schedule), or "cosine" decay to `final_scale` at the end of the phase.
      final_scale: Learning rate at the end of the cosine, as a share of the peak.
      hold_share: Share of the phase's steps, including warm-up, after which the cosine begins.
      warmup_steps: Length of the linear warm-up from 0 at the beginning of the phase.
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
      name: Name shown in logs and the report; unique in a run.
      epochs: Length in passes over the training split; may be fractional.
      pairs: Modality pairs contrasted, each in both directions.
      temperature: Temperature of InfoNCE (open: 0.05, EgoVLP's).
      learn_scale: Whether to learn 1/temperature, starting from `temperature` and limited to 100, as CLAP does.
      memory: Memory that provides negatives beside the batch's own.
      mask_same_text: Whether other clips of the batch with the same narration, token by token, are left out of the negatives
        of every pair.
      contrastive_weight, consensus_weight: Weights of the two terms of Eq. 4.
      classification_weight: Weight of the classifier's cross entropy, if the model has a classifier.
      mixup: Parameter of the Beta distribution that mixup draws from; 0 is off. Mixup mixes the waveform of each sound, as
        AST does, and its class with those of another sound of the batch (Zhang et al., ICLR 2018).
      consensus: Details of Eq. 2 and 3.
      trainable: Towers to train, each with its projection, and "classifier"; those that the loss does not use stay fixed. A
        phase that classifies has to name "classifier", which starts at random, unless an earlier phase has trained it.
      optimizer: Optimizer of this phase.
      reset_optimizer: Whether to start from fresh moments instead of those of the previous phase (open: they are kept). They
        can be kept if both phases train the same parameters.
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
      every_steps: Interval between checkpoints, in steps.
      keep: Number of newest checkpoints kept, ends of phases among them. With 2, a damaged one costs at most one interval.
    """

    every_steps: int = 500
    keep: int = 2


@dataclasses.dataclass
class ValidationConfig:
    """Validation during training: the loss on clips that are not trained on.

    Attributes:
      every_steps: Interval between measurements, in steps; the end of each phase is measured as well. 0 is never.
      split: Split used, or several joined by "+".
      folds: Folds of these splits used; empty means all.
      num_batches: Number of batches, each of `data.batch_size` clips; at most as many as the split fills. They hold the same
        clips every time.
    """

    every_steps: int = 0
    split: str = "validation"
    folds: tuple[int, ...] = ()
    num_batches: int = 4


@dataclasses.dataclass
class EvalConfig:
    """Evaluation by `mc3_jax.evaluate`.

    Attributes:
      split: Split evaluated, or several joined by "+".
      folds: Folds of these splits evaluated; empty means all.
      hop_samples: With a classifier, for sounds longer than the window: the scores of windows this many samples apart are
        averaged. 0 takes only the middle window.
      batch_size: Global batch size, over all processes and devices.
      num_bootstrap: Number of bootstrap resamples for each 95 % interval.
      instance_pool: Number of clips, drawn at random, for instance retrieval: each of them has to find itself among them by
        another modality. If 0, or if the split has fewer, all its clips; time grows with the square of their number.
      num_examples: Number of best clips, and of worst clips, shown in the report.
      num_clusters: Number of clusters of the video embeddings shown in the report (20 in the paper).
      num_cluster_examples: Number of clips shown for each cluster (8 in the paper).
      seed: Seed of the bootstrap, of the random halves of retrieval groups, and of the report's random choices.
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
    """Logging of metrics, and where they go beside the terminal and `metrics.jsonl`.

    Attributes:
      every_steps: Interval between rows of metrics, in steps.
      clips: Whether to write the clips that each step uses to `clips.jsonl` (`clips-1.jsonl` in the second process, ...).
      tensorboard: Whether to write TensorBoard event files.
      wandb_project: Weights & Biases project (needs the `wandb` extra); empty is off.
    """

    every_steps: int = 10
    clips: bool = False
    tensorboard: bool = True
    wandb_project: str = ""


@dataclasses.dataclass
class Config:
    """One run.

    Attributes:
      name: Name of the run.
      seed: Seed of initialisation, data order, augmentation and dropout.
      fsdp: Number of devices that parameters and optimizer state are sharded over, which is the size of mesh axis "fsdp". The
        other axis, "data", has the size that is left. A step gathers all parameters on every device and scatters their
        gradients; with `data.chunk_size` it does so for each chunk.
      loss_block_rows: Rows of a pair's similarity matrix [batch, batch] held at once, for batches whose matrix would not fit
        in memory; 0 holds all. The loss and its gradient are the same. A phase with a memory has no such matrix.
      heartbeat_timeout_s: Seconds after which a silent process counts as lost, so that the other processes end.
      hang_timeout_s: Seconds without progress after which training ends and says which process hangs and where; 0 is
        never. Compiling, restoring and saving may take `mc3_jax.watchdog.LONG` times as long.
      checkpoint: For evaluation only: file or folder of weights to evaluate instead of the workdir's run, in a format that
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
    """Returns the config as nested plain values, the form in which it is saved beside checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values, where: str = "config"):
    """Returns the dataclass with these values, the inverse of `to_dict`; fields that `values` lacks get their defaults.

    Args:
      kind: Class of the result: `Config`, `ModelConfig`, ...
      values: Nested plain values, e.g. read from a JSON file; need not be valid.
      where: How the error message names `values`.

    Raises:
      ValueError: `values` is no dictionary, has an unknown field, or a value has the wrong type; the message names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a JSON object, got {values!r:.80}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    made = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{where}.{name} is unknown: this version knows {', '.join(fields)}")
        made[name] = _from_plain(fields[name].type, value, f"{where}.{name}")
    return kind(**made)


def _from_plain(kind, value, where: str):
    """Returns a plain value converted to a field's type: dictionary to dataclass, list to tuple, int to float."""
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
