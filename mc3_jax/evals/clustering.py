"""Clusters of embeddings and the clips that stand for them (Fig. 6 of the paper: 20 clusters of videos, 8 examples each)."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import AgglomerativeClustering

MAX_MERGED = 5000  # clips: their distances to each other take 100 MB


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What a cluster holds.

    Attributes:
      size: Clips in it.
      sounding: Share of them whose label is 1.
      verbs: Its commonest verbs with their counts, the commonest first; unknown ones are left out.
      examples: Clips nearest to its mean, the nearest first.
    """

    size: int
    sounding: float
    verbs: list[tuple[int, int]]
    examples: list[int]


def _means(embeddings: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Returns the mean direction of each cluster, [c, d]."""
    sums = np.stack([embeddings[clusters == c].sum(0) for c in range(clusters.max() + 1)])
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def cluster(embeddings: Float[np.ndarray, "n d"], num_clusters: int, seed: int) -> Int[np.ndarray, " n"]:
    """Returns the cluster of each clip, 0 the largest.

    Agglomerative with Ward's linkage: on the unit sphere the squared distance is 2 - 2 cos, so what is kept small is the
    spread of the cosines within a cluster. The paper says only that it is agglomerative. Of 603 videos of SoundWorld, average
    linkage put 218 into one of 20 clusters and a single one into each of two; Ward's are of 5 to 71.

    Merging needs memory in the square of the clips. Above `MAX_MERGED` a sample of that many is merged, and each other clip
    joins the cluster whose mean is nearest.

    Args:
      embeddings: L2-normalised.
      num_clusters: At least 1; with fewer clips there are as many clusters as clips.
      seed: Of the sample.

    Raises:
      ValueError: No clips, or no clusters asked for.
    """
    n = len(embeddings)
    if n < 1 or num_clusters < 1:
        raise ValueError(f"{num_clusters} clusters of {n} clips: both must be at least 1")
    if n == 1:
        return np.zeros(1, np.int64)
    merged = np.arange(n)
    if n > MAX_MERGED:
        merged = np.sort(np.random.default_rng(seed).choice(n, MAX_MERGED, replace=False))
    method = AgglomerativeClustering(min(num_clusters, n), linkage="ward")
    found = method.fit_predict(embeddings[merged].astype(np.float64))
    clusters = np.argmax(embeddings @ _means(embeddings[merged], found).T, axis=1) if n > MAX_MERGED else found
    clusters[merged] = found
    by_size = np.argsort(-np.bincount(clusters), kind="stable")
    return np.argsort(by_size)[clusters].astype(np.int64)


def describe(
    clusters: Int[np.ndarray, " n"],
    embeddings: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    verb_ids: Int[np.ndarray, " n"],
    *,
    num_examples: int,
    num_verbs: int = 3,
) -> list[Cluster]:
    """Returns what each cluster holds, in order.

    Args:
      clusters: As `cluster` returns them.
      embeddings: Those it was given.
      labels: 0 or 1.
      verb_ids: -1 where unknown.
      num_examples: Clips that stand for a cluster, at most.
      num_verbs: Verbs named, at most.
    """
    nearness = np.einsum("nd,nd->n", embeddings, _means(embeddings, clusters)[clusters])
    found = []
    for c in range(clusters.max() + 1):
        members = np.flatnonzero(clusters == c)
        verbs, counts = np.unique(verb_ids[members][verb_ids[members] >= 0], return_counts=True)
        commonest = np.argsort(-counts, kind="stable")[:num_verbs]
        nearest = members[np.argsort(-nearness[members], kind="stable")][:num_examples]
        found.append(
            Cluster(len(members), float(labels[members].mean()), [(int(verbs[i]), int(counts[i])) for i in commonest],
                    nearest.tolist())
        )  # fmt: skip
    return found
