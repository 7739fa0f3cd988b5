"""Clusters of embeddings, each with its most typical clips (Fig. 6 of the paper: 20 clusters of videos, 8 examples each)."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import AgglomerativeClustering

MAX_MERGED = 5000  # clips: their pairwise distances take 100 MB


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Contents of one cluster.

    Attributes:
      size: Number of clips in the cluster.
      sounding: Mean label of these clips: the share that sounds, where all are labelled.
      verbs: (verb id, number of clips) of the commonest verbs, the commonest first; unknown verbs are skipped.
      examples: Rows of the clips nearest to the cluster's mean, the nearest first.
    """

    size: int
    sounding: float
    verbs: list[tuple[int, int]]
    examples: list[int]


def _means(embeddings: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Returns the mean direction of each cluster, L2-normalised [c, d]."""
    sums = np.stack([embeddings[clusters == c].sum(0) for c in range(clusters.max() + 1)])
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def cluster(embeddings: Float[np.ndarray, "n d"], num_clusters: int, seed: int) -> Int[np.ndarray, " n"]:
    """Returns the cluster of each clip, numbered from the largest cluster, 0, to the smallest.

    The clustering is agglomerative, with Ward's linkage. On the unit sphere the squared distance is 2 - 2 cos, so Ward's
    linkage keeps the cosines within a cluster high. The paper says only that its clustering is agglomerative. With 603 videos
    of SoundWorld in 20 clusters, average linkage gave one cluster of 218 and two of a single video; Ward's have 5 to 71.

    The memory of merging grows with the square of the clips. Above `MAX_MERGED` clips, a random sample of that many is
    merged, and every other clip joins the cluster with the nearest mean.

    Args:
      embeddings: L2-normalised embeddings.
      num_clusters: At least 1; with fewer clips there are as many clusters as clips.
      seed: Seed of the random sample.

    Raises:
      ValueError: No clips, or `num_clusters` below 1.
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
    """Returns the contents of each cluster, in the clusters' order.

    Args:
      clusters: Cluster of each clip, as `cluster` returns it.
      embeddings: The embeddings that were clustered.
      labels: 0 or 1, or all -1 where no clip is labelled.
      verb_ids: Verb of each clip, -1 where unknown.
      num_examples: Maximum number of clips listed as examples of a cluster.
      num_verbs: Maximum number of verbs listed for a cluster.
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
