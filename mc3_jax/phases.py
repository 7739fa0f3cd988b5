"""The phases of a run: each is a stretch of steps with its own loss weights, trained towers and optimizer.

The paper's phases (Sec. 4.1) are *align* (contrastive only) and *refine* (contrastive and consensus).
"""

import dataclasses

import jax
import optax

from mc3_jax.config import CLASSIFIER, MODALITIES, OptimizerConfig, PhaseConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase with its place in the run: steps [start, stop)."""

    config: PhaseConfig
    start: int
    stop: int


def plan_phases(phases: list[PhaseConfig], num_clips: int, batch_size: int) -> list[Phase]:
    """Returns the phases with the steps at which they start and stop.

    Args:
      phases: Phases of the config.
      num_clips: Number of clips in the training split.
      batch_size: Global batch size.

    Raises:
      ValueError: A phase would have no step, or the run more steps than an int32 can count.
    """
    placed, start = [], 0
    for phase in phases:
        if not start + phase.epochs * num_clips / batch_size < 2**31 - 1:  # steps are int32 on the devices
            raise ValueError(
                f"phase {phase.name!r}: {phase.epochs} epochs of {num_clips} clips are more than 2**31 steps of batch size "
                f"{batch_size}: choose fewer epochs"
            )
        steps = round(phase.epochs * num_clips / batch_size)
        if steps < 1:
            raise ValueError(
                f"phase {phase.name!r}: {phase.epochs} epochs of {num_clips} clips are less than one step of batch size "
                f"{batch_size}: choose more epochs or a smaller batch"
            )
        placed.append(Phase(phase, start, start + steps))
        start += steps
    return placed


def phase_at(phases: list[Phase], step: int) -> Phase:
    """Returns the phase that step `step` belongs to; steps at or beyond the end of the run belong to the last phase."""
    return next((phase for phase in phases if step < phase.stop), phases[-1])


def learning_rate(phase: Phase) -> optax.Schedule:
    """Returns the learning rate as a function of the run's step.

    It depends on the step, not on the optimizer's own count, so keeping the moments of the phase before can't shift it.
    """
    config: OptimizerConfig = phase.config.optimizer
    steps = phase.stop - phase.start
    warmup = min(config.warmup_steps, steps - 1)
    peak = config.learning_rate
    # Warm-up counts from 1: a first step at rate 0 would change nothing. Its last step is at the peak.
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    parts, begins = [rising, optax.constant_schedule(peak)], [warmup]
    if config.schedule == "cosine":
        held = max(round(config.hold_share * steps), warmup)
        parts.append(optax.cosine_decay_schedule(peak, max(steps - held, 1), config.final_scale))
        begins.append(held)
    schedule = optax.join_schedules(parts, begins)
    return lambda step: schedule(step - phase.start)


def _decayed(params):
    """Returns which parameters weight decay applies to: kernels; not biases, norms, class tokens and embedding tables."""

    def is_decayed(path, leaf):
        return leaf.ndim >= 2 and path[-1].key == "kernel"

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(phase: PhaseConfig, params) -> optax.GradientTransformation:
    """Returns the phase's gradient transformation, without the learning rate (see `learning_rate`).

    Towers that are not trainable, or that the phase's loss does not use, get zero updates and no optimizer state. A zero
    gradient alone would not keep them fixed: weight decay and the moments of the phase before would still move them.

    Args:
      phase: Phase whose optimizer, trainable towers and loss weights count.
      params: Parameters or their shapes, a dictionary of towers and, if a phase learns its scale, "loss".
    """
    config = phase.optimizer
    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    steps.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay > 0:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=_decayed))
    learns = optax.chain(*steps)
    looked_at = {*modalities(phase)} | ({CLASSIFIER} if phase.classification_weight > 0 else set())
    learning = looked_at & {*phase.trainable}
    if phase.learn_scale and phase.contrastive_weight > 0 and phase.pairs:
        learning.add("loss")
    if all(name in learning for name in params):
        return learns
    labels = {name: "learns" if name in learning else "frozen" for name in params}
    return optax.multi_transform({"learns": learns, "frozen": optax.set_to_zero()}, labels)


def modalities(phase: PhaseConfig) -> tuple[str, ...]:
    """Returns the modalities that a phase's loss uses, in the order audio, video, text."""
    letters = set("".join(phase.pairs)) if phase.contrastive_weight > 0 else set()
    letters |= set("avl") if phase.consensus_weight > 0 else set()
    letters |= set("a") if phase.classification_weight > 0 else set()
    return tuple(name for name, letter in zip(MODALITIES, "avl", strict=True) if letter in letters)


def all_modalities(phases: list[PhaseConfig]) -> tuple[str, ...]:
    """Returns the modalities that the loss of any of the phases uses, in the order audio, video, text."""
    found = {name for phase in phases for name in modalities(phase)}
    return tuple(name for name in MODALITIES if name in found)


def carry_moments(phase: PhaseConfig, tx: optax.GradientTransformation, params, opt_state):
    """Returns `opt_state`, the optimizer state of the phase before, in the form that the phase's own optimizer has.

    Adam's moments and count are all that a state holds. Where they stand in it depends on the optimizer's other steps,
    clipping and weight decay, in which the two phases may differ.

    Args:
      phase: The phase that begins.
      tx: Its gradient transformation.
      params: Parameters or their shapes.
      opt_state: Optimizer state at the end of the phase before.

    Raises:
      ValueError: The phase before has moments of other parameters, since other towers learn in it.
    """
    own = jax.eval_shape(tx.init, params)
    if _names_of_moments(own) != _names_of_moments(opt_state):
        raise ValueError(
            f"phase {phase.name!r} keeps the optimizer state of the previous phase, but trains other parameters (towers, a "
            f"classifier or a learned scale; its loss uses {', '.join(modalities(phase))}): set its reset_optimizer, for the "
            "second phase --config.phases[1].reset_optimizer=True"
        )
    return jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(opt_state))


def _names_of_moments(opt_state) -> list[tuple]:
    """Returns the path to each leaf of an optimizer state, without the positions in the chain of its steps."""
    paths = (path for path, _ in jax.tree.leaves_with_path(opt_state))
    return [tuple(key for key in path if not isinstance(key, jax.tree_util.SequenceKey)) for path in paths]
