"""The multimodal consensus: Eq. 2 and 3 of the paper.

Each sample's modalities are compared with the anchor's embedding; the least agreeing one, after the exponents α make
their scores comparable, sets the consensus c that all scores are pushed towards. What neither the paper nor public code
settles is an argument: how K is inverted and whether a gradient flows through c.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The gradient of p^α, α < 1, is infinite at 0.
MIN_P = 1e-6


def consensus_loss(
    embeddings: Mapping[str, Float[Array, "b d"]],
    *,
    anchor: str,
    alphas: Mapping[str, float],
    inverse: str = "argmin",
    stop_gradient: bool = True,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns mean_t of Σ_i |e_i·e_a - c| over the non-anchor modalities i, and scalars that describe c.

    With p_i = (e_i·e_a + 1) / 2 and K_i(p) = p^α_i, c = K⁻¹(min_i K_i(p_i)).

    Args:
      embeddings: {"audio", "video", "text"}, each L2-normalised.
      anchor: Modality a that every other is compared with.
      alphas: Exponent of each non-anchor modality that takes part; positive.
      inverse: "argmin" inverts K with the exponent of the modality that attained the minimum: c is that one's score,
        taken as it is, so that it pays exactly nothing. "linear" maps min K back as if α were 1: c = 2 min K - 1.
      stop_gradient: Whether c is a fixed target.

    Returns:
      The loss and {"consensus_score": mean of c, "bottleneck_<modality>": share of samples whose c it sets}; of equals
      the first in `alphas` counts.

    Raises:
      ValueError: If `alphas` is empty or holds the anchor, a modality has no embeddings, or `inverse` is unknown.

    Implements Eq. (2) and (3) of the paper; scores are scalars, so the norm of Eq. (3) is an absolute value.
    """
    _check(embeddings, anchor, alphas, inverse)
    wide = jnp.promote_types(embeddings[anchor].dtype, jnp.float32)
    anchor_embedding = embeddings[anchor].astype(wide)
    scores = jnp.stack([jnp.sum(embeddings[name].astype(wide) * anchor_embedding, axis=-1) for name in alphas])
    exponents = jnp.asarray(list(alphas.values()), wide)[:, None]
    scaled = jnp.maximum((scores + 1) / 2, MIN_P) ** exponents
    bottleneck = jnp.argmin(scaled, axis=0)
    if inverse == "argmin":
        consensus = jnp.take_along_axis(scores, bottleneck[None], axis=0)[0]
    else:
        consensus = 2 * jnp.min(scaled, axis=0) - 1
    consensus = jax.lax.stop_gradient(consensus) if stop_gradient else consensus
    loss = jnp.mean(jnp.sum(jnp.abs(scores - consensus), axis=0))
    shares = {f"bottleneck_{name}": jnp.mean(bottleneck == i, dtype=wide) for i, name in enumerate(alphas)}
    return loss, {"consensus_score": jnp.mean(consensus)} | shares


def _check(embeddings: Mapping[str, Array], anchor: str, alphas: Mapping[str, float], inverse: str) -> None:
    if inverse not in ("argmin", "linear"):
        raise ValueError(f"inverse {inverse!r} is neither 'argmin' nor 'linear'")
    if not alphas or anchor in alphas:
        raise ValueError(f"alphas {dict(alphas)}: needs the modalities other than the anchor {anchor!r}")
    missing = {anchor, *alphas} - set(embeddings)
    if missing:
        raise ValueError(f"no embeddings of {sorted(missing)}: got {sorted(embeddings)}")
