"""The loss of a phase: Eq. 4 of the paper and the losses it is compared with, with their parameters and memory."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mc3_jax import config as config_lib
from mc3_jax.losses import active, classification, consensus, contrastive

MAX_SCALE = 100.0  # upper limit of a learned scale, as in CLIP and CLAP


def init_params(config: config_lib.Config) -> dict:
    """Returns the losses' own parameters: {"loss": {"log_scale": scalar}}, or {} if no phase of the run learns its scale."""
    scales = [1 / phase.temperature for phase in config.phases if phase.learn_scale]
    return {"loss": {"log_scale": jnp.log(jnp.float32(scales[0]))}} if scales else {}


def limit(params: dict) -> dict:
    """Returns the parameters with a learned scale clipped to `MAX_SCALE`; to be called after each update."""
    if "loss" not in params:
        return params
    return params | {"loss": {"log_scale": jnp.minimum(params["loss"]["log_scale"], jnp.log(jnp.float32(MAX_SCALE)))}}


def init_memory(config: config_lib.Config, phase: config_lib.PhaseConfig, params):
    """Returns the memory a phase begins with: empty pools and dictionaries, and copies of its pairs' towers; or ()."""
    sizes = phase.memory
    if not sizes.pool_size:
        return ()
    letters = {letter for pair in phase.pairs for letter in pair}
    names = sorted(contrastive.MODALITY_OF_LETTER[letter] for letter in letters)
    memory = active.init_memory(names, sizes.pool_size, sizes.dictionary_size, config.model.embed_dim)
    return memory | {"momentum": {name: jax.tree.map(jnp.copy, params[name]) for name in names}}


def phase_loss(
    embeddings: Mapping[str, Array],
    phase: config_lib.PhaseConfig,
    *,
    loss_params: Mapping[str, Array] | None = None,
    targets: Array | None = None,
    groups: Array | None = None,
    keys: Mapping[str, Array] | None = None,
    memory=(),
    rng: PRNGKeyArray | None = None,
    block_rows: int = 0,
) -> tuple[Array, tuple[dict[str, Array], Any]]:
    """Returns the phase's loss of the global batch (Eq. 4), its terms and the new memory.

    Args:
      embeddings: Embeddings of the phase's modalities, each L2-normalised [b, d]; "logits" [b, c] if the phase classifies.
      phase: Weights, pairs, temperature and the details of the consensus.
      loss_params: {"log_scale"}, if the phase learns it.
      targets: Share of each class, [b, c], if the phase classifies.
      groups: Id of each row's narration, [b], if clips with equal narrations are left out of the negatives.
      keys: Embeddings by the momentum encoders, if the phase has a memory.
      memory: Memory made by `init_memory`, or returned for the step before.
      rng: Random key of the step, if the phase has a memory.
      block_rows: Rows of a similarity matrix held at once; 0 is all.
    """
    terms = {}
    loss = jnp.zeros((), jnp.float32)
    if phase.contrastive_weight > 0 and phase.pairs:
        temperature = jnp.float32(phase.temperature)
        if phase.learn_scale:
            temperature = jnp.exp(-loss_params["log_scale"])
        if phase.memory.pool_size:
            value, per_pair, rings = active.active_contrastive_loss(
                embeddings, keys, memory, temperature, phase.pairs, rng
            )
            memory = memory | rings
        else:
            value, per_pair = contrastive.contrastive_loss(embeddings, temperature, phase.pairs, block_rows, groups)
        terms |= {"contrastive": value} | {f"contrastive_{pair}": v for pair, v in per_pair.items()}
        terms["temperature"] = temperature
        loss += phase.contrastive_weight * value
    if phase.consensus_weight > 0:
        detail = phase.consensus
        alphas = {"audio": detail.alpha_audio, "video": detail.alpha_video, "text": detail.alpha_text}
        value, aux = consensus.consensus_loss(
            embeddings,
            anchor=detail.anchor,
            alphas={name: a for name, a in alphas.items() if name != detail.anchor},
            inverse=detail.inverse,
            stop_gradient=detail.stop_gradient,
        )
        terms |= {"consensus": value} | aux
        loss += phase.consensus_weight * value
    if phase.classification_weight > 0:
        value, aux = classification.cross_entropy(embeddings["logits"], targets)
        terms |= {"cross_entropy": value} | aux
        loss += phase.classification_weight * value
    return loss, ({"loss": loss} | terms, memory)
