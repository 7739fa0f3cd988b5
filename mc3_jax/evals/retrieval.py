"""Retrieval: of sounding actions, which need labels, and of a clip by another modality of itself, which needs none.

Of sounding actions (Sec. 5.2): among clips that sound, does the nearest show the same verb and noun? The paper's "Recall@K"
can't be one quantity: its Random row fits hits / relevant, its models' rows fit the mean number of hits. All three are
reported: hit@K, recall@K (hits / relevant) and mean_hits@K.
"""

import dataclasses
from collections.abc import Mapping
from math import lgamma

import numpy as np

DIRECTION_MODALITIES = {  # (asked with, answered by)
    "v2a": ("video", "audio"), "a2v": ("audio", "video"), "l2a": ("text", "audio"), "a2l": ("audio", "text")
}  # fmt: skip
INSTANCE_DIRECTION_MODALITIES = DIRECTION_MODALITIES | {"v2l": ("video", "text"), "l2v": ("text", "video")}
RANKS = (1, 5, 10)
_BLOCK_BYTES = 64 << 20  # of similarities held at a time


def split_groups(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices of queries and of the pool: each group of more than two is halved, the odd one to the queries.

    The pool is in random order.

    Args:
      groups: Of each clip, [n].
      seed: Of the halves.
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
    # Of equal similarities the earlier in the pool comes first: group by group, embeddings that are all alike would hit the
    # first group alone, and not as often as chance.
    return (np.concatenate(queries), rng.permutation(np.concatenate(pool))) if queries else (empty, empty)


def named_groups(labels: np.ndarray, verb_ids: np.ndarray, noun_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of the clips that sound and whose verb and noun are known, and the verb-noun pair of each.

    Args:
      labels: 0 or 1, [n].
      verb_ids, noun_ids: -1 where unknown, [n].
    """
    rows = np.flatnonzero((labels == 1) & (verb_ids >= 0) & (noun_ids >= 0))
    pairs = np.unique(np.stack([verb_ids, noun_ids], 1), axis=0, return_inverse=True)[1].reshape(-1)
    return rows, pairs[rows]


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def chance_levels(num_relevant: np.ndarray, pool_size: int) -> dict[str, float]:
    """Returns what a random order of the pool gets on average, exactly (hypergeometric).

    Args:
      num_relevant: Of each query, [q].
      pool_size: Clips in the pool.
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


def nearest(asked: np.ndarray, answered: np.ndarray, num: int) -> np.ndarray:
    """Returns the places of the `num` rows of `answered` most similar to each row of `asked`, best first, int64 [q, num].

    Of equal similarities the earlier row comes first. Queries are taken a block at a time: memory is that of the two inputs
    and `_BLOCK_BYTES`, also for 30,000 against 30,000.

    Args:
      asked, answered: L2-normalised [q, d] and [p, d].
      num: At most p are returned.
    """
    pool = len(answered)
    num = min(num, pool)
    block = max(_BLOCK_BYTES // (4 * pool), 1)
    found = np.empty((len(asked), num), np.int64)
    for start in range(0, len(asked), block):
        scores = asked[start : start + block] @ answered.T
        least = np.partition(scores, pool - num, axis=1)[:, pool - num, None]
        rows, places = np.nonzero(scores >= least)  # a few more than `num` where similarities are equal
        order = np.lexsort((places, -scores[rows, places], rows))
        first = np.searchsorted(rows, np.arange(len(scores)))
        found[start : start + block] = places[order][first[:, None] + np.arange(num)]
    return found


def retrieve(embeddings: Mapping[str, np.ndarray], groups: np.ndarray, seed: int) -> dict[str, dict]:
    """Returns the metrics of every direction, with chance levels and counts; {} where no group has three clips.

    Args:
      embeddings: {"audio", "video", "text"}: L2-normalised [n, d] of the clips that sound.
      groups: Number of each one's verb-noun pair, from 0 on, [n].
      seed: Of the halves.
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


def retrieve_instances(embeddings: Mapping[str, np.ndarray], *, pool_size: int, seed: int) -> dict[str, dict]:
    """Returns how well a clip is found by another modality of itself, the usual measure of cross-modal retrieval.

    Each clip of the pool asks with one modality, and the others of the pool compete with it in the other. recall@K is the
    share of clips that are among the first K, median_rank the median of their ranks, from 1. Where similarities are equal,
    every order of them is as likely: recall@K counts the chance to be among the first K, and the rank is the middle one.

    Args:
      embeddings: {"audio", "video", "text"}: L2-normalised [n, d], of one clip or more.
      pool_size: Clips drawn; all where there are fewer, or of 0.
      seed: Of the draw.
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
    """Returns, for each row of `asked`, how many rows of `answered` are nearer to it than its own, and how many as near.

    Its own is the row of the same place, which is one of the latter.
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
    """A query and what it retrieves.

    Attributes:
      query: Place of the clip asked with.
      retrieved: Places of the clips that come first, the nearest first.
      matches: Of each, whether verb and noun are the query's.
      first_match: Rank of the first of the pool that matches, from 1.
      pool_size: Clips in the pool.
    """

    query: int
    retrieved: list[int]
    matches: list[bool]
    first_match: int
    pool_size: int


def draw_queries(
    embeddings: Mapping[str, np.ndarray],
    groups: np.ndarray,
    direction: str,
    seed: int,
    *,
    num_queries: int,
    num_retrieved: int = 5,
) -> list[Query]:
    """Returns a few queries of a direction with what comes first, drawn at random and not by how well they do.

    Queries and pool are those of `retrieve`; [] where no group has three clips.

    Args:
      embeddings, groups: As for `retrieve`.
      direction: Of `DIRECTION_MODALITIES`.
      seed: Of the halves and of the queries.
      num_queries: At most.
      num_retrieved: Shown of the pool, at most.
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
