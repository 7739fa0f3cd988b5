"""InfoNCE between pairs of modalities: Eq. 1 of the paper.

The denominator of Eq. 1 as printed lacks a modality. Here it runs over the other modality's embeddings of the whole batch, as
in every source that the paper builds on. The paper gives no temperature (open: 0.05, EgoVLP's).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mc3_jax.losses import streaming

MODALITY_OF_LETTER = {"a": "audio", "v": "video", "l": "text"}


def _logits(x: Float[Array, "b d"], y: Float[Array, "b d"], temperature) -> Float[Array, "b b"]:
    wide = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    product = jnp.matmul(x.astype(wide), y.astype(wide).T, precision=jax.lax.Precision.HIGHEST)
    return product / temperature


def same_rows(ids: Int[Array, "b n"]) -> Int[Array, " b"]:
    """Returns an id for each row; two rows have the same id if and only if they are equal."""
    return jnp.unique(ids, axis=0, size=len(ids), return_inverse=True)[1].reshape(-1)


def contrastive_loss(
    embeddings: Mapping[str, Float[Array, "b d"]],
    temperature: float | Float[Array, ""],
    pairs: Sequence[str] = ("av", "al", "vl"),
    block_rows: int = 0,
    groups: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the sum over pairs of InfoNCE in both directions, and each pair's share of it.

    With queries x and keys y, InfoNCE is the mean over t of -log softmax(x_t Yᵀ / τ)_t, Eq. (1) of the paper for one ordered
    pair. A pair's logits are computed once: one direction is the softmax along rows, the other along columns.

    Args:
      embeddings: {"audio", "video", "text"}, each L2-normalised; only those of `pairs` are read.
      temperature: τ, positive.
      pairs: Pairs of modalities, each two of the letters a (audio), v (video), l (language, i.e. text).
      block_rows: Rows of a pair's similarity matrix that are held at once, by `streaming.pair_nce`; 0 is all of them.
      groups: Group of each row, as from `same_rows`; rows of one group are not negatives of each other. None, as in the
        paper: all rows are negatives of each other.

    Raises:
      ValueError: There are no pairs, or one is not two different modalities that have embeddings.

    Implements L_contrastive, the sum of Eq. (1) over ordered pairs.
    """
    if not pairs:
        raise ValueError("pairs is empty: name at least one of av, al, vl")
    per_pair = {}
    for pair in pairs:
        names = [MODALITY_OF_LETTER.get(letter) for letter in pair]
        if len(set(names)) != 2 or not set(names) <= set(embeddings):
            given = f"there are embeddings of {', '.join(embeddings)}"
            raise ValueError(f"pair {pair!r}: must be two different letters of a, v, l with embeddings; {given}")
        x, y = (embeddings[name] for name in names)
        if 0 < block_rows < len(x):
            wide = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
            scale = 1 / jnp.asarray(temperature, wide)
            per_pair[pair] = streaming.pair_nce(x.astype(wide), y.astype(wide), scale, block_rows, groups)
            continue
        logits = streaming.leave_out_groups(_logits(x, y, temperature), jnp.arange(len(x)), groups)
        normalizers = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
        per_pair[pair] = jnp.mean(normalizers - 2 * jnp.diagonal(logits))
    return sum(per_pair.values()), per_pair
