"""The multimodal consensus: Eq. 2 and 3 of the paper.

For each sample, the score of a modality compares its embedding with the anchor's; the exponents α make the scores of
different modalities comparable. The least agreeing modality sets the consensus c, towards which all scores are pushed. How K
is inverted and whether a gradient flows through c are arguments, since neither the paper nor public code settles them.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Least p that is raised to a power: for α < 1 the gradient of p^α is infinite at 0.
MIN_P = 1e-6
INVERSES = ("argmin", "linear", "per_modality")


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
      anchor: Modality a that the others are compared with.
      alphas: Exponent of each non-anchor modality that takes part; positive.
      inverse: "argmin" inverts K with the exponent of the modality that attained the minimum: c is exactly that modality's
        score, so it adds nothing to the loss. "linear" inverts as if α were 1: c = 2 min K - 1. With either, c may lie above
        a score, which is then raised. "per_modality" inverts with each modality's own exponent, p = (min K)^(1/α_i), so
        that the consensus c_i is never above the score of modality i.
      stop_gradient: Whether c is a fixed target, through which no gradient flows.

    Returns:
      The loss and {"consensus_score": mean of c over samples, and over modalities if each has its own,
      "bottleneck_<modality>": share of samples in which this modality attains the minimum}. Ties count for the modality that
      is first in `alphas`.

    Raises:
      ValueError: If `alphas` is empty or holds the anchor, a modality has no embeddings, or `inverse` is unknown.

    Implements Eq. (2) and (3) of the paper; scores are scalars, so the norm of Eq. (3) is an absolute value.
    """
    _check(embeddings, anchor, alphas, inverse)
    wide = jnp.promote_types(embeddings[anchor].dtype, jnp.float32)
    anchor_embedding = embeddings[anchor].astype(wide)
    scores = [jnp.sum(embeddings[name].astype(wide) * anchor_embedding, axis=-1) for name in alphas]
    p = (jnp.stack(scores) + 1) / 2
    # For α = 1, x itself and not x**1: a rounding error in a distance that should be 0 would give a gradient of random sign.
    scaled = [jnp.maximum(x, MIN_P) ** alpha if alpha != 1 else x for x, alpha in zip(p, alphas.values(), strict=True)]
    scaled = jnp.stack(scaled)
    bottleneck = jnp.argmin(scaled, axis=0)
    least = scaled if inverse == "linear" else p
    consensus = jnp.take_along_axis(least, bottleneck[None], axis=0)[0]
    if inverse == "per_modality":
        consensus = jnp.minimum(_invert_each(consensus, bottleneck, list(alphas.values())), p)  # rounding may exceed p
    consensus = jax.lax.stop_gradient(consensus) if stop_gradient else consensus
    loss = jnp.mean(jnp.sum(2 * _abs(p - consensus), axis=0))
    shares = {f"bottleneck_{name}": jnp.mean(bottleneck == i, dtype=wide) for i, name in enumerate(alphas)}
    return loss, {"consensus_score": jnp.mean(2 * consensus - 1)} | shares


def _invert_each(least: Float[Array, " b"], bottleneck: Int[Array, " b"], alphas: list[float]) -> Float[Array, "i b"]:
    """Returns (min K)^(1/α_i) of every modality i, where min K is the power α of the bottleneck's p, `least`.

    It is computed as one power, p^(α / α_i), and as p itself if α = α_i: for the bottleneck the result is its p, bit for bit.
    """

    def powers(alpha):
        return jnp.stack([least if a == alpha else jnp.maximum(least, MIN_P) ** (a / alpha) for a in alphas])

    return jnp.stack([jnp.take_along_axis(powers(alpha), bottleneck[None], axis=0)[0] for alpha in alphas])


def _abs(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns |x| with gradient 0 at 0, as in PyTorch; that of `jnp.abs` is 1, which would push the bottleneck off c."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def _check(embeddings: Mapping[str, Array], anchor: str, alphas: Mapping[str, float], inverse: str) -> None:
    if inverse not in INVERSES:
        raise ValueError(f"inverse {inverse!r} is unknown: choose one of {', '.join(INVERSES)}")
    if not alphas or anchor in alphas:
        raise ValueError(f"alphas {dict(alphas)}: must name modalities other than the anchor {anchor!r}")
    missing = {anchor, *alphas} - set(embeddings)
    if missing:
        raise ValueError(f"no embeddings of {sorted(missing)}: got {sorted(embeddings)}")
