"""Active contrastive coding: negatives out of a memory, chosen so that their gradients differ.

After Ma et al., "Active Contrastive Learning of Audio-Visual Video Representations" (ICLR 2021, CM-ACC). Embeddings ask keys,
which a momentum copy of the encoders makes. Keys of past batches lie in a pool for each modality. Every step, as many as the
batch has rows are chosen of the pool, by k-means++ seeding over the gradients that they would get, and go into a dictionary.
Negatives are the batch's other keys and the dictionary's.

Differs from the paper's public code (yunyikristy/CM-ACC, no licence; facts only). There the batch's own keys may be chosen as
well, and nearly always are: their gradients hold the pull of their positives and lie far apart from the pool's. They come
from the trained encoders there, k-means runs on to its end and takes the member next to each centre, distances are weighted
unsquared, and pools are filled before training; here what is not filled yet is left out.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mc3_jax.losses.contrastive import MODALITY_OF_LETTER


def init_memory(names: list[str], pool_size: int, dictionary_size: int, dim: int) -> dict:
    """Returns empty pools and dictionaries: {"pool": {name: float32 [n, d]}, "dictionary": {name: ...}, "steps": 0}."""
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
      queries: Row t asks for candidate t.
      candidates: The batch's keys, then the pool.
      valid: Which count; the batch's do.
      temperature: τ.
    """
    logits = jnp.matmul(queries, candidates.T, precision=jax.lax.Precision.HIGHEST) / temperature
    p = jax.nn.softmax(jnp.where(valid, logits, -jnp.inf), axis=1)
    residual = p - jnp.eye(*p.shape, dtype=p.dtype)
    return jnp.matmul(residual.T, queries, precision=jax.lax.Precision.HIGHEST) / (len(queries) * temperature)


def kmeans_plus_plus(
    points: Float[Array, "n d"], valid: Bool[Array, " n"], uniforms: Float[Array, " k"]
) -> Int[Array, " k"]:
    """Returns k places of points by k-means++ seeding: each next with probability ∝ its squared distance to those chosen.

    Args:
      points: Of which to choose; at least k are valid.
      valid: Which may be chosen.
      uniforms: A random number in [0, 1) for each choice.

    Implements the seeding of Arthur and Vassilvitskii, "k-means++" (SODA 2007). Where all valid points that are left lie on
    chosen ones, any valid point is chosen.
    """
    weights = valid.astype(points.dtype)

    def choose(i, state):
        chosen, nearest = state
        weight = jnp.where(i == 0, weights, nearest * weights)
        weight = jnp.where(jnp.sum(weight) > 0, weight, weights)
        total = jnp.cumsum(weight)
        place = jnp.searchsorted(total, uniforms[i] * total[-1], side="right")
        place = jnp.minimum(place, jnp.max(jnp.where(weight > 0, jnp.arange(len(points)), 0)))  # u · total rounded up
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
    """Returns the sum over pairs and directions of InfoNCE against the dictionary, each pair's share, and the new memory.

    Args:
      embeddings: L2-normalised, of the modalities of `pairs`; they ask.
      keys: By the momentum encoders, L2-normalised; row t of one modality answers row t of another.
      memory: Of `init_memory`.
      temperature: τ.
      pairs: Two letters each of a, v, l.
      rng: Key of the step.
    """
    batch_size = len(next(iter(keys.values())))
    asks: dict[str, list] = {}  # by the modality that answers, who asks
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
        # In the first step there is nothing to choose: what it puts is not counted, and overwritten before it would be.
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
    """Returns the ring with its oldest rows replaced; its length is a multiple of theirs."""
    begin = (steps * len(rows)) % len(ring)
    return jax.lax.dynamic_update_slice(ring, rows, (begin, jnp.zeros((), begin.dtype)))
