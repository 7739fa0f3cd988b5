"""A map of embeddings: t-SNE (van der Maaten & Hinton 2008) by scikit-learn, from their principal components."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

PERPLEXITY = 30.0


def sample(n: int, count: int, seed: int) -> Int[np.ndarray, " m"]:
    """Returns `count` of `n` indices, drawn at random and sorted; all of them if `n` is no larger."""
    if n <= count:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, count, replace=False))


def project(embeddings: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    """Returns coordinates on a map for each embedding: neighbours stay neighbours, large distances mean little.

    Fewer than four embeddings, or embeddings that are all alike, get their principal components.

    Args:
      embeddings: L2-normalised embeddings, a few thousand at most: each thousand takes seconds.
      seed: Seed of t-SNE's gradient descent.
    """
    n = len(embeddings)
    centred = embeddings.astype(np.float64) - embeddings.mean(0)
    start = np.zeros((n, 2))
    # The threads of BLAS and OpenMP spin while they wait: with other work on the cores, two took 46 s where one takes 2.
    with threadpool_limits(1):
        left, spread, _ = np.linalg.svd(centred, full_matrices=False)
        start[:, : min(2, len(spread))] = (left * spread)[:, :2]
        if n < 4 or not start[:, 0].std() > 1e-9:  # too few for neighbours, or all alike
            return start
        start *= 1e-4 / start[:, 0].std()  # scikit-learn's own scale
        method = TSNE(perplexity=min(PERPLEXITY, (n - 1) / 3), init=start, random_state=seed)
        return method.fit_transform(embeddings.astype(np.float32)).astype(np.float64)
