"""Retrieval of sounding actions, which needs labels, and of a clip by another of its modalities, which needs none.

Retrieval of sounding actions (Sec. 5.2): among clips that sound, do the nearest show the query's verb and noun? The paper's
"Recall@K" can't be one quantity: its Random row fits hits / relevant, its models' rows fit the mean number of hits. So three
are reported: hit@K (whether any of the first K matches), recall@K (hits / relevant) and mean_hits@K.
"""

import dataclasses
from collections.abc import Mapping
from math import lgamma

import numpy as np
from jaxtyping import Float, Int

DIRECTION_MODALITIES = {  # (modality of the query, modality of the pool)
    "v2a": ("video", "audio"), "a2v": ("audio", "video"), "l2a": ("text", "audio"), "a2l": ("audio", "text")
}  # fmt: skip
INSTANCE_DIRECTION_MODALITIES = DIRECTION_MODALITIES | {"v2l": ("video", "text"), "l2v": ("text", "video")}
RANKS = (1, 5, 10)
_BLOCK_BYTES = 64 << 20  # of similarities in memory at a time


def split_groups(groups: Int[np.ndarray, " n"], seed: int) -> tuple[Int[np.ndarray, " q"], Int[np.ndarray, " p"]]:
    """Returns the indices of the queries and of the pool: each group of three or more clips is split in half at random.

    Smaller groups are skipped. Of an odd number of clips, the queries get one more. The pool is in random order.

    Args:
      groups: Verb-noun pair of each clip, as a number.
      seed: Seed of the split and of the pool's order.
    """
    rng = np.random.default_rng(seed)
    queries, pool = [], []
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        if len(members) > 2:
            half = (len(members) + 1) // 2
            queries.append(members[:half])
            pool.append(members[half:])
    empty = np.zeros(0, np.int64)
    # Ties are broken by position in the pool. If it were sorted by group, embeddings that are all alike would retrieve only
    # the first group; in random order they score at chance.
    return (np.concatenate(queries), rng.permutation(np.concatenate(pool))) if queries else (empty, empty)


def named_groups(
    labels: Int[np.ndarray, " n"], verb_ids: Int[np.ndarray, " n"], noun_ids: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Returns the indices of the clips that sound and have a known verb and noun, and the verb-noun pair of each.

    Args:
      labels: 1 for clips that sound.
      verb_ids, noun_ids: Verb and noun of each clip, -1 where unknown.
    """
    rows = np.flatnonzero((labels == 1) & (verb_ids >= 0) & (noun_ids >= 0))
    pairs = np.unique(np.stack([verb_ids, noun_ids], 1), axis=0, return_inverse=True)[1].reshape(-1)
    return rows, pairs[rows]


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def chance_levels(num_relevant: Int[np.ndarray, " q"], pool_size: int) -> dict[str, float]:
    """Returns the exact expected value of each metric for a random order of the pool (hypergeometric).

    Args:
      num_relevant: Number of matching clips in the pool for each query.
      pool_size: Number of clips in the pool.
    """
    counts, queries = np.unique(num_relevant, return_counts=True)
    levels = {}
    for k in RANKS:
        k_here = min(k, pool_size)
        misses = [
            np.exp(_log_choose(pool_size - r, k_here) - _log_choose(pool_size, k_here))
            if pool_size - r >= k_here
            else 0.0
            for r in map(int, counts)
        ]
        levels[f"hit@{k}"] = float(1 - np.average(misses, weights=queries))
        levels[f"recall@{k}"] = k_here / pool_size
        levels[f"mean_hits@{k}"] = float(np.mean(num_relevant) * k_here / pool_size)
    return levels


def nearest(asked: Float[np.ndarray, "q d"], answered: Float[np.ndarray, "p d"], num: int) -> Int[np.ndarray, "q k"]:
    """Returns for each query the indices of the k = min(num, p) most similar rows of the pool, best first.

    Ties are broken by position: the earlier row comes first. Queries are processed in blocks, so that beside the inputs the
    similarities take about `_BLOCK_BYTES` of memory, even for 30,000 queries and a pool of 30,000.

    Args:
      asked, answered: L2-normalised embeddings of the queries and of the pool.
      num: Number of rows to retrieve; all p if there are fewer.
    """
    pool = len(answered)
    num = min(num, pool)
    block = max(_BLOCK_BYTES // (4 * pool), 1)
    found = np.empty((len(asked), num), np.int64)
    for start in range(0, len(asked), block):
        scores = asked[start : start + block] @ answered.T
        least = np.partition(scores, pool - num, axis=1)[:, pool - num, None]
        rows, places = np.nonzero(scores >= least)  # a few more than `num` where there are ties
        order = np.lexsort((places, -scores[rows, places], rows))
        first = np.searchsorted(rows, np.arange(len(scores)))
        found[start : start + block] = places[order][first[:, None] + np.arange(num)]
    return found


def retrieve(
    embeddings: Mapping[str, Float[np.ndarray, "n d"]], groups: Int[np.ndarray, " n"], seed: int
) -> dict[str, dict]:
    """Returns direction → metrics with chance levels and counts; {} if no group has three clips.

    Args:
      embeddings: {"audio", "video", "text"}, L2-normalised, of the clips that sound.
      groups: Verb-noun pair of each of these clips, as a number from 0 on.
      seed: Seed of the split into queries and pool.
    """
    queries, pool = split_groups(groups, seed)
    if not len(queries):
        return {}
    relevant = np.bincount(groups[pool], minlength=groups.max() + 1)[groups[queries]]
    chance = chance_levels(relevant, len(pool))
    results = {}
    for name, (asked, answered) in DIRECTION_MODALITIES.items():
        places = nearest(embeddings[asked][queries], embeddings[answered][pool], max(RANKS))
        ranked = groups[pool][places] == groups[queries][:, None]
        result: dict[str, object] = {}
        for k in RANKS:
            hits = ranked[:, :k].sum(1)
            result[f"hit@{k}"] = float((hits > 0).mean())
            result[f"recall@{k}"] = float((hits / relevant).mean())
            result[f"mean_hits@{k}"] = float(hits.mean())
        counts = {"num_queries": len(queries), "pool_size": len(pool), "num_groups": len(np.unique(groups[queries]))}
        results[name] = {**result, "chance": chance, **counts}
    return results


def retrieve_instances(
    embeddings: Mapping[str, Float[np.ndarray, "n d"]], *, pool_size: int, seed: int
) -> dict[str, dict]:
    """Returns direction → how well each clip retrieves itself in another modality, with chance levels.

    This is the usual measure of cross-modal retrieval. Each clip of the pool is a query in one modality and is ranked among
    all clips of the pool in the other one. recall@K is the share of clips that rank among the first K, median_rank the median
    rank, from 1. Ties count as if in random order: recall@K gets the probability of being among the first K, and the rank is
    the mean over the tied ones.

    Args:
      embeddings: {"audio", "video", "text"}, L2-normalised, of one clip or more.
      pool_size: Number of clips to draw for the pool; 0 takes all, as does any number above n.
      seed: Seed of the draw.
    """
    num = len(embeddings["audio"])
    pool = np.arange(num)
    if 0 < pool_size < num:
        pool = np.sort(np.random.default_rng(seed).choice(num, pool_size, replace=False))
    size = len(pool)
    chance = {f"recall@{k}": min(k, size) / size for k in RANKS} | {"median_rank": (size + 1) / 2}
    found = {}
    for name, (asked, answered) in INSTANCE_DIRECTION_MODALITIES.items():
        num_above, num_equal = _count_above(embeddings[asked][pool], embeddings[answered][pool])
        result = {f"recall@{k}": float(np.clip((k - num_above) / num_equal, 0, 1).mean()) for k in RANKS}
        result["median_rank"] = float(np.median(num_above + (num_equal + 1) / 2))
        found[name] = {**result, "chance": chance, "pool_size": size}
    return found


def _count_above(asked: np.ndarray, answered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each query how many rows of the pool are nearer to it than its own row, and how many are as near.

    A query's own row has the same index in `answered` as the query in `asked`; it is among those that are as near.
    """
    size = len(asked)
    block = max(_BLOCK_BYTES // (4 * size), 1)
    num_above, num_equal = np.empty(size, np.int64), np.empty(size, np.int64)
    for start in range(0, size, block):
        scores = asked[start : start + block] @ answered.T
        own = scores[np.arange(len(scores)), start + np.arange(len(scores))][:, None]
        num_above[start : start + block] = (scores > own).sum(1)
        num_equal[start : start + block] = (scores == own).sum(1)
    return num_above, num_equal


@dataclasses.dataclass(frozen=True)
class Query:
    """A query and the clips that it retrieves.

    Attributes:
      query: Index of the query clip.
      retrieved: Indices of the nearest clips of the pool, the nearest first.
      matches: Whether each of these has the query's verb and noun.
      first_match: Rank of the first match in the whole pool, from 1.
      pool_size: Number of clips in the pool.
    """

    query: int
    retrieved: list[int]
    matches: list[bool]
    first_match: int
    pool_size: int


def draw_queries(
    embeddings: Mapping[str, Float[np.ndarray, "n d"]],
    groups: Int[np.ndarray, " n"],
    direction: str,
    seed: int,
    *,
    num_queries: int,
    num_retrieved: int = 5,
) -> list[Query]:
    """Returns a few queries of a direction with their nearest clips; queries are drawn at random, not by their results.

    Queries and pool are those of `retrieve`; [] if no group has three clips.

    Args:
      embeddings, groups: As for `retrieve`.
      direction: One of `DIRECTION_MODALITIES`.
      seed: Seed of the split into queries and pool, and of the draw of queries.
      num_queries: Maximum number of queries.
      num_retrieved: Maximum number of retrieved clips of each query.
    """
    asked, answered = DIRECTION_MODALITIES[direction]
    queries, pool = split_groups(groups, seed)
    drawn = np.random.default_rng(seed).permutation(len(queries))[:num_queries]
    found = []
    for query in queries[drawn]:
        order = pool[np.argsort(-(embeddings[answered][pool] @ embeddings[asked][query]), kind="stable")]
        same = groups[order] == groups[query]
        found.append(
            Query(int(query), order[:num_retrieved].tolist(), same[:num_retrieved].tolist(), int(np.argmax(same)) + 1,
                  len(pool))
        )  # fmt: skip
    return found
