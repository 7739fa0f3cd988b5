"""What a phase minimises: Eq. 4 of the paper and what it is compared with; what such a loss keeps and learns."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mc3_jax import config as config_lib
from mc3_jax.losses import active, classification, consensus, contrastive

MAX_SCALE = 100.0  # of a scale that is learned: CLIP's and CLAP's


def init_params(config: config_lib.Config) -> dict:
    """Returns what the losses of a run learn: {"loss": {"log_scale": scalar}}, or {} where no phase learns its scale."""
    scales = [1 / phase.temperature for phase in config.phases if phase.learn_scale]
    return {"loss": {"log_scale": jnp.log(jnp.float32(scales[0]))}} if scales else {}


def limit(params: dict) -> dict:
    """Returns parameters after an update, a learned scale at most `MAX_SCALE`."""
    if "loss" not in params:
        return params
    return params | {"loss": {"log_scale": jnp.minimum(params["loss"]["log_scale"], jnp.log(jnp.float32(MAX_SCALE)))}}


def init_memory(config: config_lib.Config, phase: config_lib.PhaseConfig, params):
    """Returns what a phase's loss begins with: empty pools and a copy of the encoders that it asks, or ()."""
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
      embeddings: Of the phase's modalities, each L2-normalised [b, d]; "logits" [b, c] where the phase classifies.
      phase: Weights, pairs, temperature and the details of the consensus.
      loss_params: {"log_scale"} where the phase learns it.
      targets: Share of each class, [b, c], where the phase classifies.
      groups: Number of each row's narration, where the phase leaves those of the same out of the negatives.
      keys: Embeddings by the momentum encoders, where the phase has a memory.
      memory: Of `init_memory`.
      rng: Key of the step, where it has one.
      block_rows: Of the similarity matrices, at a time; 0 is all.
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
