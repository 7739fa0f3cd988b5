"""Checks of a config's values, before anything is read or built; errors name the field, its value and what is allowed."""

import dataclasses
import math
from typing import NamedTuple

from mc3_jax import phases as phases_lib
from mc3_jax.config import (
    CLASSIFIER,
    MODALITIES,
    PAIRS,
    Config,
    ConsensusConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    SaveConfig,
    TextConfig,
    ValidationConfig,
    VideoConfig,
)


class Range(NamedTuple):
    """The range of values that a number may have: finite, from `low` to `high`.

    Attributes:
      says: The range in words, for the error message.
      low, high: Ends of the range.
      without_low, without_high: Whether the end itself is excluded.
    """

    says: str
    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return abs(value) < math.inf and above and below  # not math.isfinite: an int may be too large for a float


_POSITIVE = Range("must be positive", 0, without_low=True)
_NOT_NEGATIVE = Range("must not be negative", 0)
_AT_LEAST_1 = Range("must be at least 1", 1)
_SHARE = Range("must be from 0 to 1", 0, 1)
_BELOW_1 = Range("must be from 0 to below 1", 0, 1, without_high=True)
# Ranges of fields that don't depend on others. Sizes of towers, and fields that do, are checked below.
RANGES: dict[type, dict[str, Range]] = {
    Config: {
        "seed": Range("must be from 0 to 2**32 - 1", 0, 2**32 - 1),  # JAX makes keys from 32 bits
        "fsdp": _AT_LEAST_1,
        "loss_block_rows": Range("must not be negative; 0 holds the whole matrix at once", 0),
        "heartbeat_timeout_s": Range("must be at least 5", 5),
    },
    VideoConfig: {"flip_probability": _SHARE},
    TextConfig: {
        "num_tokens": Range("must be at least 3: the first and the last token are not part of the narration", 3),
        "dropout": _BELOW_1,
    },
    DataConfig: {
        "num_samples": _NOT_NEGATIVE,
        "silence_db": _NOT_NEGATIVE,
        "batch_size": Range("must be at least 2: a clip is contrasted with the others of its batch", 2),
        "clips_per_video": _AT_LEAST_1,
        "num_threads": _NOT_NEGATIVE,
        "num_workers": _NOT_NEGATIVE,
        "prefetch": _NOT_NEGATIVE,
    },
    PhaseConfig: {
        "epochs": _POSITIVE,
        "temperature": _POSITIVE,
        "contrastive_weight": _NOT_NEGATIVE,
        "consensus_weight": _NOT_NEGATIVE,
        "classification_weight": _NOT_NEGATIVE,
        "mixup": _NOT_NEGATIVE,
    },
    MemoryConfig: {"pool_size": _NOT_NEGATIVE, "dictionary_size": _NOT_NEGATIVE, "momentum": _BELOW_1},
    # An exponent of 0 or below would make min K ignore that modality, or, if all are negative, take the best agreeing one.
    ConsensusConfig: {"alpha_audio": _POSITIVE, "alpha_video": _POSITIVE, "alpha_text": _POSITIVE},
    OptimizerConfig: {
        "learning_rate": _POSITIVE,
        "b1": _BELOW_1,
        "b2": _BELOW_1,
        "eps": _POSITIVE,
        "weight_decay": _NOT_NEGATIVE,
        "clip_norm": Range("must not be negative; 0 turns clipping off", 0),
        "final_scale": _SHARE,
        "hold_share": _BELOW_1,
        "warmup_steps": _NOT_NEGATIVE,
    },
    ValidationConfig: {"every_steps": Range("must be at least 0", 0), "num_batches": _AT_LEAST_1},
    SaveConfig: {"every_steps": _AT_LEAST_1, "keep": _AT_LEAST_1},
    EvalConfig: {
        "hop_samples": _NOT_NEGATIVE,
        "batch_size": _AT_LEAST_1,
        "num_bootstrap": _AT_LEAST_1,
        "instance_pool": _NOT_NEGATIVE,
        "num_examples": _NOT_NEGATIVE,
        "num_clusters": _AT_LEAST_1,
        "num_cluster_examples": _AT_LEAST_1,
        "seed": _NOT_NEGATIVE,
    },
    LogConfig: {"every_steps": _AT_LEAST_1},
}


def _require(holds: bool, field: str, value, fix: str) -> None:
    if not holds:
        raise ValueError(f"config.{field} = {value!r}: {fix}")


def _check_ranges(holder, where: str) -> None:
    """Checks the ranges of a dataclass's numbers and of nested dataclasses; `where` is its name and a dot, or ""."""
    for name, allowed in RANGES.get(type(holder), {}).items():
        value = getattr(holder, name)
        _require(allowed.holds(value), f"{where}{name}", value, allowed.says)
    for field in dataclasses.fields(holder):
        value = getattr(holder, field.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{where}{field.name}.")


def validate(config: Config) -> None:
    """Checks a config before anything is read or built.

    Raises:
      ValueError: A value is not allowed; the message names the field, its value and what is allowed.
    """
    _check_ranges(config, "")
    for i, phase in enumerate(config.phases):
        _check_ranges(phase, f"phases[{i}].")
    value = config.data.accumulate_steps
    fix = (
        "must be 1: gradient accumulation would leave fewer negatives and so change the contrastive loss; to save memory set "
        "config.data.chunk_size, which embeds the batch in parts and is exact"
    )
    _require(value == 1, "data.accumulate_steps", value, fix)
    value, fix = config.data.chunk_size, f"must be 0 or a divisor of data.batch_size = {config.data.batch_size}"
    _require(value == 0 or (value > 0 and config.data.batch_size % value == 0), "data.chunk_size", value, fix)
    value = config.hang_timeout_s
    _require(value == 0 or value >= 30, "hang_timeout_s", value, "must be at least 30, or 0 to wait for ever")
    validate_model(config.model)
    names = [phase.name for phase in config.phases]
    _require(len(set(names)) == len(names), "phases", names, "must have different names")
    learned = {phase.temperature for phase in config.phases if phase.learn_scale}
    fix = "phases that learn their scale share it: give them the same temperature"
    _require(len(learned) <= 1, "phases[...].temperature", sorted(learned), fix)
    for i, phase in enumerate(config.phases):
        _validate_phase(f"phases[{i}]", phase)
        _validate_memory(f"phases[{i}]", phase, config.data, config.model.num_classes)
        _validate_classification(f"phases[{i}]", phase, config)
    _validate_classifier(config)
    value, fix = config.eval.hop_samples, "is used with a classifier, model.num_classes above 0, only: set 0"
    _require(value == 0 or config.model.num_classes > 0, "eval.hop_samples", value, fix)
    known = config.init.temporal in ("zeros", "linear")
    _require(known, "init.temporal", config.init.temporal, "must be zeros or linear")


def validate_model(model: ModelConfig) -> None:
    """Checks the sizes of a model; they may come from an untrusted file.

    Raises:
      ValueError: A value is not allowed; the message names the field, its value and what is allowed.
    """
    _check_ranges(model, "model.")
    _require(model.dtype in ("float32", "bfloat16"), "model.dtype", model.dtype, "must be float32 or bfloat16")
    _require(model.remat in ("none", "dots", "full"), "model.remat", model.remat, "must be none, dots or full")
    known = ("auto", "einsum", "cudnn")
    _require(model.attention in known, "model.attention", model.attention, "must be auto, einsum or cudnn")
    fits = model.attention != "cudnn" or model.dtype == "bfloat16"
    _require(fits, "model.attention", model.attention, "needs model.dtype = 'bfloat16': set that, or auto here")
    _require(model.embed_dim >= 1, "model.embed_dim", model.embed_dim, "must be at least 1")
    fix = "must be at least 2, or 0 for no classifier"
    _require(model.num_classes == 0 or model.num_classes >= 2, "model.num_classes", model.num_classes, fix)
    for name in MODALITIES:
        tower = getattr(model, name)
        for field in dataclasses.fields(tower):
            value = getattr(tower, field.name)
            least = 0 if field.name.endswith("_mask") else 1
            fix = f"must be at least {least}"
            _require(field.type is not int or value >= least, f"model.{name}.{field.name}", value, fix)
        # Blocks are traced one by one: a million of them would take hours.
        _require(tower.depth <= 1000, f"model.{name}.depth", tower.depth, "must be at most 1000")
        fix = f"must be a multiple of num_heads = {tower.num_heads}"
        _require(tower.width % tower.num_heads == 0, f"model.{name}.width", tower.width, fix)
    video, text, audio = model.video, model.text, model.audio
    fix = f"must be a multiple of patch_px = {video.patch_px}"
    _require(video.image_size_px % video.patch_px == 0, "model.video.image_size_px", video.image_size_px, fix)
    fix = f"must be at least num_frames = {video.num_frames}"
    _require(video.num_positions >= video.num_frames, "model.video.num_positions", video.num_positions, fix)
    fix = f"must be at least image_size_px = {video.image_size_px}"
    _require(video.resize_px >= video.image_size_px, "model.video.resize_px", video.resize_px, fix)
    known = video.time_init in ("zeros", "random")
    _require(known, "model.video.time_init", video.time_init, "must be zeros or random")
    known = len(video.crop_scale) == 2 and 0 < video.crop_scale[0] <= video.crop_scale[1] <= 1
    _require(known, "model.video.crop_scale", video.crop_scale, "must be (low, high) with 0 < low <= high <= 1")
    fix = f"must be at most num_positions = {text.num_positions}"
    _require(text.num_tokens <= text.num_positions, "model.text.num_tokens", text.num_tokens, fix)
    fix = f"must be at least patch_px = {audio.patch_px}"
    for field in ("num_mel", "num_time_frames"):
        value = getattr(audio, field)
        _require(value >= audio.patch_px, f"model.audio.{field}", value, fix)
    for field, size in (("max_time_mask", audio.num_time_frames), ("max_mel_mask", audio.num_mel)):
        value = getattr(audio, field)
        _require(value <= size, f"model.audio.{field}", value, f"must be at most {size}, the size of the spectrogram")


def _validate_phase(where: str, phase: PhaseConfig) -> None:
    fix = "must be at least 0.01 if the scale, 1/temperature, is learned, since that is at most 100"
    _require(phase.temperature >= 0.01 or not phase.learn_scale, f"{where}.temperature", phase.temperature, fix)
    fits = set(phase.pairs) <= set(PAIRS) and len(set(phase.pairs)) == len(phase.pairs)
    _require(fits, f"{where}.pairs", phase.pairs, f"must hold only {PAIRS}, each at most once")
    known = (*MODALITIES, CLASSIFIER)
    fits = set(phase.trainable) <= set(known) and len(phase.trainable) > 0
    _require(fits, f"{where}.trainable", phase.trainable, f"must name at least one of {known} and nothing else")
    some = (phase.contrastive_weight > 0 and len(phase.pairs) > 0) or phase.consensus_weight > 0
    some = some or phase.classification_weight > 0
    fix = "the phase has no loss: set one of its weights above 0 (a contrastive loss also needs pairs)"
    _require(some, f"{where}.contrastive_weight", phase.contrastive_weight, fix)
    used = (*phases_lib.modalities(phase), *([CLASSIFIER] if phase.classification_weight > 0 else []))
    fix = f"nothing would be trained, since the phase's loss uses only {', '.join(used)}: name one or more of these"
    _require(not set(used).isdisjoint(phase.trainable), f"{where}.trainable", phase.trainable, fix)
    if phase.mask_same_text:
        contrasts = phase.contrastive_weight > 0 and len(phase.pairs) > 0 and not phase.memory.pool_size
        fix = "needs a contrastive loss whose negatives all come from the batch: set False"
        _require(contrasts, f"{where}.mask_same_text", True, fix)
        fix = "compares narrations, which no loss of this phase uses: set False"
        _require("text" in used, f"{where}.mask_same_text", True, fix)
    consensus, optimizer = phase.consensus, phase.optimizer
    _require(consensus.anchor in MODALITIES, f"{where}.consensus.anchor", consensus.anchor, f"must be one of {MODALITIES}")
    known = consensus.inverse in ("argmin", "linear", "per_modality")
    _require(known, f"{where}.consensus.inverse", consensus.inverse, "must be argmin, linear or per_modality")
    known = optimizer.schedule in ("constant", "cosine")
    _require(known, f"{where}.optimizer.schedule", optimizer.schedule, "must be constant or cosine")
    for field in ("final_scale", "hold_share"):
        value = getattr(optimizer, field)
        fits = value == 0 or optimizer.schedule == "cosine"
        _require(fits, f"{where}.optimizer.{field}", value, "is used with schedule = 'cosine' only: set 0")


def _validate_classification(where: str, phase: PhaseConfig, config: Config) -> None:
    value, fix = config.model.num_classes, f"must be the data's number of classes, since {where} classifies"
    _require(value > 1 or phase.classification_weight == 0, "model.num_classes", value, fix)
    fix = f"must not name {CLASSIFIER!r}, since model.num_classes is 0"
    _require(value > 1 or CLASSIFIER not in phase.trainable, f"{where}.trainable", phase.trainable, fix)
    if phase.mixup == 0:
        return
    alone = phase.classification_weight > 0 and phase.contrastive_weight == phase.consensus_weight == 0
    _require(alone, f"{where}.mixup", phase.mixup, "is for phases whose only loss is classification: set 0")
    value = config.data.chunk_size
    _require(value == 0, "data.chunk_size", value, f"must be 0, since {where}.mixup mixes rows of the whole batch")


def _validate_classifier(config: Config) -> None:
    """Checks that a classifier is trained before anything is fitted to it or measured with it."""
    classifying = [(i, phase) for i, phase in enumerate(config.phases) if phase.classification_weight > 0]
    value, fix = config.model.num_classes, "no phase classifies: set 0, or classification_weight of a phase above 0"
    _require(value == 0 or not config.phases or len(classifying) > 0, "model.num_classes", value, fix)
    # The classifier starts at random, whatever config.init names, so the first phase that uses it has to train it.
    for i, phase in classifying[:1]:
        fix = f"must name {CLASSIFIER!r}, since the phase classifies and no phase before it has trained the classifier"
        _require(CLASSIFIER in phase.trainable, f"phases[{i}].trainable", phase.trainable, fix)


def _validate_memory(where: str, phase: PhaseConfig, data: DataConfig, num_classes: int) -> None:
    memory = phase.memory
    if not memory.pool_size:
        for field in ("dictionary_size", "momentum"):
            value, unused = getattr(memory, field), getattr(MemoryConfig(), field)
            fix = f"is used with a memory.pool_size above 0 only: set {unused}"
            _require(value == unused, f"{where}.memory.{field}", value, fix)
        return
    fix = f"must be a multiple of data.batch_size = {data.batch_size}"
    for field in ("pool_size", "dictionary_size"):
        value = getattr(memory, field)
        _require(value > 0 and value % data.batch_size == 0, f"{where}.memory.{field}", value, fix)
    needed = phase.contrastive_weight > 0 and len(phase.pairs) > 0
    _require(needed, f"{where}.memory.pool_size", memory.pool_size, "is used by the contrastive term only: set 0")
    fix = "holds keys of the towers, not of a classifier: set 0, or model.num_classes = 0"
    _require(num_classes == 0, f"{where}.memory.pool_size", memory.pool_size, fix)
