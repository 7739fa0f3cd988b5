"""InfoNCE of a pair in both directions without the whole similarity matrix, which is computed a block of rows at a time.

The softmax over rows and over columns needs the normaliser of each row and of each column. In the forward pass, a row's
normaliser is known once its block is computed, and the columns' are accumulated over the blocks (the running maximum and sum
of Milakov and Gimelshein, arXiv:1805.02867). Only these two vectors are kept. In the backward pass, each block is computed
again, and gives the gradient of both directions. So memory holds the embeddings, their gradients and one block [rows, b],
and the loss is exact.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logit of a pair that is left out: beside any other logit its exponential is 0. Not -inf, since -inf - (-inf) is NaN.
LEFT_OUT = -1e30

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def pair_nce(
    x: Float[Array, "b d"],
    y: Float[Array, "b d"],
    scale: float | Float[Array, ""],
    block_rows: int,
    groups: Int[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Returns the sum of InfoNCE in both directions: mean_t of -log softmax(s x_t Yᵀ)_t - log softmax(s y_t Xᵀ)_t.

    Args:
      x, y: Embeddings, float32 or wider; row t of `x` and row t of `y` are a positive pair.
      scale: s, one over the temperature.
      block_rows: Rows of the similarity matrix computed at a time.
      groups: Group of each row; rows of one group are not negatives of each other. None: all rows are.

    Implements Eq. (1) of the paper for one pair, as `contrastive.contrastive_loss` does with the whole matrix.
    """
    return _forward(x, y, scale, block_rows, groups)[0]


def leave_out_groups(
    logits: Float[Array, "rows b"], places: Int[Array, " rows"], groups: Int[Array, " b"] | None
) -> Float[Array, "rows b"]:
    """Returns the logits, with `LEFT_OUT` for pairs of two different rows of one group.

    Args:
      logits: Some rows of the similarity matrix.
      places: Index of each of these rows in the batch.
      groups: Group of each row of the batch; None leaves nothing out.
    """
    if groups is None:
        return logits
    others = (groups[places][:, None] == groups) & (places[:, None] != jnp.arange(len(groups)))
    return jnp.where(others, LEFT_OUT, logits)


def _forward(x, y, scale, block_rows, groups):
    def block(carry, rows_and_places):
        top, total = carry
        rows, places = rows_and_places
        logits = leave_out_groups(_matmul(rows, y.T) * scale, places, groups)
        higher = jnp.maximum(top, jnp.max(logits, axis=0))
        total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(logits - higher), axis=0)
        return (higher, total), jax.nn.logsumexp(logits, axis=1)

    start = jnp.full(len(y), -jnp.inf, x.dtype), jnp.zeros(len(y), x.dtype)
    (top, total), of_rows = _scan(block, start, (x, jnp.arange(len(x))), block_rows)
    of_columns = top + jnp.log(total)
    loss = jnp.mean(of_rows + of_columns - 2 * scale * jnp.sum(x * y, axis=1))
    return loss, (x, y, scale, groups, of_rows, of_columns)


def _backward(block_rows, residuals, gradient):
    x, y, scale, groups, of_rows, of_columns = residuals

    def block(to_y, rows_and_normalizers):
        rows, places, normalizers = rows_and_normalizers
        logits = leave_out_groups(_matmul(rows, y.T) * scale, places, groups)
        shares = jnp.exp(logits - normalizers[:, None]) + jnp.exp(logits - of_columns)
        return to_y + _matmul(shares.T, rows), _matmul(shares, y)

    to_y, to_x = _scan(block, jnp.zeros_like(y), (x, jnp.arange(len(x)), of_rows), block_rows)
    to_x, to_y = to_x - 2 * y, to_y - 2 * x
    each = gradient / len(x)
    return each * scale * to_x, each * scale * to_y, each * jnp.sum(to_x * x), None


def _scan(step, carry, rows, block_rows: int):
    """Returns (carry, results) of `jax.lax.scan` over blocks of rows, results concatenated; the last block may be smaller."""
    num = len(jax.tree.leaves(rows)[0])
    whole = num // block_rows * block_rows
    parts = []
    if whole:
        blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, block_rows, *x.shape[1:]), rows)
        carry, out = jax.lax.scan(step, carry, blocks)
        parts.append(out.reshape(whole, *out.shape[2:]))
    if whole < num:
        carry, out = step(carry, jax.tree.map(lambda x: x[whole:], rows))
        parts.append(out)
    return carry, jnp.concatenate(parts)


pair_nce.defvjp(_forward, _backward)
