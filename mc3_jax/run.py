"""Prepares a run for training, and checks everything that a user can get wrong before the first step."""

import dataclasses
import sys
from collections.abc import Callable

import jax

from mc3_jax import (
    checkpoint,
    config as config_lib,
    job as job_lib,
    mesh as mesh_lib,
    metric_writer,
    model as model_lib,
    phases as phases_lib,
    progress,
    tower_tokenizer,
    train_step as step_lib,
    validation_loss,
    weights,
    workdir as workdir_lib,
)
from mc3_jax.data import loader, records, tokenizer as tokenizer_lib
from mc3_jax.models.mc3 import MC3


@dataclasses.dataclass
class Run:
    """A run that is ready for training, made by `set_up`.

    Attributes:
      config, workdir: As given to `set_up`, but of a run that has a checkpoint `config.init` is the one it began with.
      mesh: Mesh of all devices.
      model: The three towers.
      phases: Phases with their steps.
      source: Training clips.
      batch: Shapes of a global batch that the train step takes, with their shardings.
      tokenize: Function from text to token ids and mask.
      validation: Measures the loss on clips that are not trained on; None if the config asks for no validation.
      initial: Flat parameters of the towers that start from files; empty if the run has a checkpoint.
      wandb: Run of Weights & Biases; None if the config asks for none, and on all processes but process 0.
    """

    config: config_lib.Config
    workdir: str
    mesh: jax.sharding.Mesh
    model: MC3
    phases: list[phases_lib.Phase]
    source: loader.ClipSource
    batch: dict[str, jax.ShapeDtypeStruct]
    tokenize: Callable
    validation: validation_loss.ValidationLoss | None
    initial: weights.Flat
    wandb: object | None = None


def set_up(config: config_lib.Config, workdir: str) -> Run:
    """Returns a run ready for training: reads and checks all that it needs, and claims its workdir.

    Args:
      config: A validated config.
      workdir: Folder of the run.

    Raises:
      ValueError: The data, the workdir or the devices don't fit the config; one line says how.
    """
    if config.checkpoint:
        raise ValueError("config.checkpoint is for evaluation only: name the files that the towers start from in config.init")
    if not config.phases:
        raise ValueError(
            "config.phases is empty: there is nothing to train; to evaluate untrained towers run mc3_jax.evaluate"
        )
    workdir_lib.check_workdir(workdir, config)
    model_lib.check_attention(config.model)
    mesh = mesh_lib.make_mesh(fsdp=config.fsdp)
    mesh_lib.check_batch_size(mesh, config.data.batch_size, "data.batch_size")
    mesh_lib.check_batch_size(mesh, config.data.chunk_size, "data.chunk_size")
    is_trained = checkpoint.newest_step(workdir) > 0  # the same on all processes; if not, all read the initial weights
    if is_trained:
        config, own = workdir_lib.as_begun(workdir, config)
        _tell_of_init(own)
    looked_at = phases_lib.all_modalities(config.phases)
    num_frames = config.model.video.num_frames if "video" in looked_at else 0
    source = loader.open_split(config.data.dir, config.data.split, num_frames, config.data.folds)
    _check_classes(config, source)
    text, digests = config.model.text, {"data.dir": source.digest}
    tokenize = tokenizer_lib.blank(text.num_tokens)
    if "text" in looked_at:
        tokenizer = tower_tokenizer.name_for_training(workdir, config.data.tokenizer)
        if not is_trained:
            _check_tokenizer(config.init.text, tokenizer)
        tokenize = tokenizer_lib.load_tokenizer(tokenizer, text.num_tokens, text.vocab_size)
        digests["data.tokenizer"] = tokenizer_lib.tokenizer_digest(tokenizer)
        _check_texts(config, source)
    phases = phases_lib.plan_phases(config.phases, len(source), config.data.batch_size)
    _check_negatives(config, source, phases)
    _tell_of_short_phases(phases)
    model = model_lib.make_model(config.model)
    num_samples = config.data.num_samples or source.info.num_samples
    batch = mesh_lib.abstract_batch(mesh, step_lib.batch_shapes(config, num_samples, source.info.canvas_px))
    with jax.set_mesh(mesh):  # as in training: JAX keeps traces by mesh, so training finds the initialisation traced
        shapes = step_lib.check_shapes(model, config, phases, batch)
    if "audio" in looked_at:
        _tell_of_padding(config, num_samples)
    validation = None
    if config.validation.every_steps:
        validation = validation_loss.ValidationLoss(config, mesh, model, tokenize, num_frames, source)
    with jax.set_mesh(mesh):  # the same trace gives the towers' shapes
        initial, notes = ({}, []) if is_trained else weights.read_initial(config)
    notes += [] if is_trained else _note_time_attention(config, initial)
    with workdir_lib.lock_workdir(workdir):
        workdir_lib.check_workdir(workdir, config)  # again: another run may have claimed it since the first check
        wandb = _start_wandb(config, workdir, is_trained)
        facts = {"num_clips": len(source), "classes": list(source.info.classes), "num_samples": num_samples}
        workdir_lib.claim_workdir(workdir, config, digests, facts)
        workdir_lib.check_data(workdir, digests)
        if "data.tokenizer" in digests:
            tower_tokenizer.keep(workdir, tokenizer)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    progress.notice(f"{len(source)} clips, {num_parameters:,} parameters, {phases[-1].stop} steps, {mesh.size} device(s)")
    for note in notes:
        progress.notice(note)
    return Run(config, workdir, mesh, model, phases, source, batch, tokenize, validation, initial, wandb)


def _tell_of_init(own: list[str]) -> None:
    """Warns if a run is resumed with another `init` than it began with; `own` are the options that differ."""
    if own:
        progress.notice(
            f"warning: config.init has no effect, since the run resumes from a checkpoint; it began with {' '.join(own)}",
            sys.stderr,
        )


def _start_wandb(config: config_lib.Config, workdir: str, is_trained: bool):
    """Returns the run of Weights & Biases on process 0, None on others or if the config asks for none.

    Raises:
      ValueError: It can't be started; on every process.
    """
    project, values, found = config.log.wandb_project, config_lib.to_dict(config), []

    def start():
        found.append(metric_writer.start_wandb(workdir, project, config.name, values, resumed=is_trained))

    job_lib.on_process_0(start)
    return found[0] if found else None


def _check_tokenizer(start: str, tokenizer: str) -> None:
    try:
        if start:
            tower_tokenizer.find(start, tokenizer)
    except ValueError as error:
        raise ValueError(f"config.data.tokenizer: {error}; config.init.text names that tower") from error


def _check_texts(config: config_lib.Config, source: loader.ClipSource) -> None:
    """Raises a ValueError unless the clips have texts, which a phase of the run uses."""
    if not source.has_texts():
        users = [f"phases[{i}]" for i, phase in enumerate(config.phases) if "text" in phases_lib.modalities(phase)]
        without = ", or set their pairs=('av',) and consensus_weight=0" if source.info.num_intervals else ""
        raise ValueError(
            f"the clips in split {source.split!r} of {config.data.dir} have no texts, which {' and '.join(users)} of config "
            f"use: convert with narrations{without}"
        )


def _check_classes(config: config_lib.Config, source: loader.ClipSource) -> None:
    found = len(source.info.classes)
    if any(phase.classification_weight > 0 for phase in config.phases) and found != config.model.num_classes:
        raise ValueError(
            f"config.model.num_classes = {config.model.num_classes}: {config.data.dir} has {found} classes"
            + (f", set it to {found}" if found else ", so there is nothing to classify")
        )


def _tell_of_padding(config: config_lib.Config, num_samples: int) -> None:
    """Warns of clips that last shorter than what the audio tower hears."""
    clip_s, heard_s = num_samples / records.SAMPLE_RATE_HZ, model_lib.heard_s(config.model)
    if clip_s < heard_s - 0.05:
        frames = config.model.audio.num_time_frames
        progress.notice(
            f"warning: each clip of {config.data.dir} gives {clip_s:g} s of sound, but config.model.audio.num_time_frames = "
            f"{frames} is for {heard_s:g} s: the rest is padding; set it to {round(100 * clip_s) - 1}, or convert with a "
            "longer --window",
            sys.stderr,
        )


def _note_time_attention(config: config_lib.Config, initial: weights.Flat) -> list[str]:
    """Returns a line if time attention is trained from zeros, see `mc3_jax.models.video`; otherwise no line."""
    trained = any("video" in phases_lib.modalities(phase) and "video" in phase.trainable for phase in config.phases)
    if not trained or config.model.video.time_init != "zeros" or any("/time_attention/" in name for name in initial):
        return []
    return [
        "no file holds time attention, so it starts as config.model.video.time_init = 'zeros' says: at first only rounding "
        "errors change it; with 'random' it learns from the first step, but a still gets other features at first"
    ]


def _tell_of_short_phases(phases: list[phases_lib.Phase]) -> None:
    """Warns about phases that have too few steps for their warm-up."""
    for phase in phases:
        steps, warmup = phase.stop - phase.start, phase.config.optimizer.warmup_steps
        if warmup >= steps:
            progress.notice(
                f"warning: phase {phase.config.name!r} has {steps} steps, too few for its warmup_steps = {warmup}: it warms "
                f"up faster; set warmup_steps below {steps}",
                sys.stderr,
            )


def _check_negatives(config: config_lib.Config, source: loader.ClipSource, phases: list[phases_lib.Phase]) -> None:
    """Checks that clips are not their own negatives, which happens if a batch holds a clip twice.

    Where there are fewer than ten batches of clips, it warns of the batches that go over the border of two epochs.

    Raises:
      ValueError: A batch is larger than the split, so that every batch holds clips twice.
    """
    data, num_clips = config.data, len(source)
    contrasting = [phase for phase in phases if phase.config.contrastive_weight > 0 and phase.config.pairs]
    if not contrasting or num_clips >= 10 * data.batch_size:
        return
    if num_clips < data.batch_size:
        raise ValueError(
            f"config.data.batch_size = {data.batch_size}: split {data.split!r} of {data.dir} has {num_clips} clips, so a "
            f"batch would hold some clips several times, as their own negatives; set it to at most {num_clips}"
        )
    exposed = [phase for phase in contrasting if not phase.config.mask_same_text]  # it masks a repeated clip as well
    steps = [step for phase in exposed for step in range(phase.start, phase.stop)]
    batches, rows = loader.count_repeats(
        source, steps, batch_size=data.batch_size, seed=config.seed, clips_per_video=data.clips_per_video
    )
    if rows:
        can_mask = all("text" in phases_lib.modalities(p.config) and not p.config.memory.pool_size for p in exposed)
        progress.notice(
            f"warning: {batches} of {len(steps)} batches span two epochs and hold clips twice, as their own negatives "
            f"({rows} rows in all), since there are only {num_clips} clips; a smaller config.data.batch_size makes them rarer"
            + (", and the phase's mask_same_text leaves them out of the negatives" if can_mask else ""),
            sys.stderr,
        )
