"""Cross entropy of sound classes, the loss of the supervised phases of Table 4."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cross_entropy(
    logits: Float[Array, "b c"], targets: Float[Array, "b c"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the cross entropy, and {"accuracy"}, both means over the rows whose class is known.

    Accuracy is the share of rows whose largest logit is that of the largest target.

    Args:
      logits: Logit of each class.
      targets: Share of each class, summing to 1; zeros if the class of a row is unknown.
    """
    known = targets.sum(axis=1)
    count = jnp.maximum(known.sum(), 1)
    value = -(targets * jax.nn.log_softmax(logits)).sum() / count
    right = (jnp.argmax(logits, axis=1) == jnp.argmax(targets, axis=1)) * known
    return value, {"accuracy": right.sum() / count}
