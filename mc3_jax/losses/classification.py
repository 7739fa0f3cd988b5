"""Cross entropy of the classes of sounds: the supervised phases of Table 4."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cross_entropy(
    logits: Float[Array, "b c"], targets: Float[Array, "b c"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean over the rows that have a class, and {"accuracy"}: how many get their greatest target right.

    Args:
      logits: Of each class.
      targets: Share of each class, 1 in all; zeros where nobody knows the class.
    """
    known = targets.sum(axis=1)
    count = jnp.maximum(known.sum(), 1)
    value = -(targets * jax.nn.log_softmax(logits)).sum() / count
    right = (jnp.argmax(logits, axis=1) == jnp.argmax(targets, axis=1)) * known
    return value, {"accuracy": right.sum() / count}
