"""Active contrastive coding: negatives from a memory, chosen so that their gradients differ.

After Ma et al., "Active Contrastive Learning of Audio-Visual Video Representations" (ICLR 2021, CM-ACC). Queries are the
embeddings of the trained encoders; keys are those of a momentum copy of the encoders. Each modality has a pool of keys of
past batches. At every step, as many keys as the batch has rows are chosen from the pool, by k-means++ seeding over the
gradients that they would get, and put into a dictionary. Negatives are the other keys of the batch and the dictionary's keys.

Differs from the paper's public code (yunyikristy/CM-ACC, no licence; facts only). In that code the keys of the batch may be
chosen as well, and nearly always are: their gradients include the pull of their positives and so lie far from those of the
pool. There, the keys of the batch come from the trained encoders, k-means runs to its end and takes the member nearest to
each centre, distances are weighted unsquared, and pools are filled before training. Here, rows not filled yet don't count.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mc3_jax.losses.contrastive import MODALITY_OF_LETTER


def init_memory(names: list[str], pool_size: int, dictionary_size: int, dim: int) -> dict:
    """Returns empty pools and dictionaries: {"pool": {name: float32 [n, d]}, "dictionary": {name: ...}, "steps": 0}.

    Args:
      names: Modalities.
      pool_size, dictionary_size: Rows for each modality.
      dim: Width d of an embedding.
    """
    return {
        "pool": {name: jnp.zeros((pool_size, dim), jnp.float32) for name in names},
        "dictionary": {name: jnp.zeros((dictionary_size, dim), jnp.float32) for name in names},
        "steps": jnp.zeros((), jnp.int32),
    }


def momentum_update(average, new, momentum: float):
    """Returns momentum · average + (1 - momentum) · new, leaf by leaf."""
    return jax.tree.map(lambda a, x: momentum * a + (1 - momentum) * x, average, new)


def gradient_embeddings(
    queries: Float[Array, "b d"], candidates: Float[Array, "n d"], valid: Bool[Array, " n"], temperature
) -> Float[Array, "n d"]:
    """Returns the gradient of InfoNCE with respect to each candidate: (1/b) Σ_t (p_tj - [t = j]) q_t / τ.

    Args:
      queries: Embeddings q_t, L2-normalised; the positive of row t is candidate t.
      candidates: Keys: those of the batch, then those of the pool.
      valid: Whether each candidate counts; those of the batch must.
      temperature: τ, positive.
    """
    logits = jnp.matmul(queries, candidates.T, precision=jax.lax.Precision.HIGHEST) / temperature
    p = jax.nn.softmax(jnp.where(valid, logits, -jnp.inf), axis=1)
    residual = p - jnp.eye(*p.shape, dtype=p.dtype)
    return jnp.matmul(residual.T, queries, precision=jax.lax.Precision.HIGHEST) / (len(queries) * temperature)


def kmeans_plus_plus(
    points: Float[Array, "n d"], valid: Bool[Array, " n"], uniforms: Float[Array, " k"]
) -> Int[Array, " k"]:
    """Returns the indices of k points chosen by k-means++ seeding.

    The first point is drawn uniformly. Each further one is drawn with a probability proportional to its squared distance to
    the nearest point chosen so far.

    Args:
      points: Points to choose from; at least k are valid.
      valid: Whether each point may be chosen.
      uniforms: Random numbers in [0, 1), one for each choice.

    Implements the seeding of Arthur and Vassilvitskii, "k-means++" (SODA 2007). If all valid points coincide with chosen
    ones, the next is drawn uniformly from all valid points.
    """
    weights = valid.astype(points.dtype)

    def choose(i, state):
        chosen, nearest = state
        weight = jnp.where(i == 0, weights, nearest * weights)
        weight = jnp.where(jnp.sum(weight) > 0, weight, weights)
        total = jnp.cumsum(weight)
        place = jnp.searchsorted(total, uniforms[i] * total[-1], side="right")
        place = jnp.minimum(place, jnp.max(jnp.where(weight > 0, jnp.arange(len(points)), 0)))  # u · total may round up
        distance = jnp.sum((points - points[place]) ** 2, axis=1).at[place].set(0)
        return chosen.at[i].set(place), jnp.minimum(nearest, distance)

    start = jnp.zeros(len(uniforms), jnp.int32), jnp.full(len(points), jnp.inf, points.dtype)
    return jax.lax.fori_loop(0, len(uniforms), choose, start)[0]


def active_contrastive_loss(
    embeddings: Mapping[str, Float[Array, "b d"]],
    keys: Mapping[str, Float[Array, "b d"]],
    memory: dict,
    temperature,
    pairs,
    rng,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], dict]:
    """Returns (loss, share of each pair, new memory); the loss is the sum of InfoNCE over pairs in both directions.

    Negatives of a query are the other keys of the batch and those of the dictionary.

    Args:
      embeddings: Queries: embeddings of the modalities of `pairs`, each L2-normalised.
      keys: Embeddings by the momentum encoders, each L2-normalised; the positive of row t is row t of the other modality.
      memory: Memory made by `init_memory`, or returned for the step before.
      temperature: τ, positive.
      pairs: Pairs of modalities, each two of the letters a (audio), v (video), l (language, i.e. text).
      rng: Random key of the step.
    """
    batch_size = len(next(iter(keys.values())))
    asks: dict[str, list] = {}  # by modality of the keys: (pair, modality of the queries)
    for pair in pairs:
        one, other = (MODALITY_OF_LETTER[letter] for letter in pair)
        asks.setdefault(other, []).append((pair, one))
        asks.setdefault(one, []).append((pair, other))
    steps, per_pair = memory["steps"], dict.fromkeys(pairs, jnp.float32(0))
    pool, dictionary = dict(memory["pool"]), dict(memory["dictionary"])
    mine = jnp.ones(batch_size, bool)
    for number, (name, queries) in enumerate(sorted(asks.items())):
        key = keys[name]
        pooled = jnp.arange(len(pool[name])) < steps * batch_size
        candidates, valid = jnp.concatenate([key, pool[name]]), jnp.concatenate([mine, pooled])
        asking = [jax.lax.stop_gradient(embeddings[query]) for _, query in queries]
        gradients = sum(gradient_embeddings(query, candidates, valid, temperature) for query in asking)[batch_size:]
        uniforms = jax.random.uniform(jax.random.fold_in(rng, number), (batch_size,))
        chosen = pool[name][kmeans_plus_plus(gradients, pooled, uniforms)]
        # In the first step the pool is empty: what is put then does not count, and is overwritten before it would.
        dictionary[name] = _put(dictionary[name], chosen, steps - 1)
        counts = jnp.concatenate([mine, jnp.arange(len(dictionary[name])) < steps * batch_size])
        answers = jnp.concatenate([key, dictionary[name]])
        for pair, query in queries:
            product = jnp.matmul(embeddings[query], answers.T, precision=jax.lax.Precision.HIGHEST)
            logits = jnp.where(counts, product / temperature, -jnp.inf)
            per_pair[pair] += jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits))
        pool[name] = _put(pool[name], key, steps)
    return sum(per_pair.values()), per_pair, {"pool": pool, "dictionary": dictionary, "steps": steps + 1}


def _put(ring: Float[Array, "n d"], rows: Float[Array, "b d"], steps) -> Float[Array, "n d"]:
    """Returns a ring buffer with its oldest rows replaced by `rows`; n must be a multiple of b."""
    begin = (steps * len(rows)) % len(ring)
    return jax.lax.dynamic_update_slice(ring, rows, (begin, jnp.zeros((), begin.dtype)))
