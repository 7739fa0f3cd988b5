"""Retrieval: ranks are those of a full sort, with ties and in blocks; memory for thirty thousand clips."""

import subprocess
import sys

import numpy as np
import pytest

from mc3_jax.evals import retrieval
from tests import world


def unit(rng, n: int, d: int = 16) -> np.ndarray:
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
@pytest.mark.parametrize("num", [1, 5, 10, 500])
def test_the_nearest_are_those_of_a_full_stable_sort(monkeypatch, block_rows, num):
    rng = np.random.default_rng(0)
    asked, answered = unit(rng, 40), unit(rng, 90)
    answered[30:60] = answered[:30]  # each similarity to these occurs twice
    answered[60:80] = answered[60]
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", 4 * 90 * block_rows)
    # Rounded to eighths, similarities are exact: the same here and there, and equal ones stay equal in any block.
    asked, answered = np.round(asked * 8) / 8, np.round(answered * 8) / 8
    wanted = np.argsort(-(asked @ answered.T), axis=1, kind="stable")[:, :num]
    np.testing.assert_array_equal(retrieval.nearest(asked, answered, num), wanted)


def test_retrieval_is_what_counting_by_hand_gives():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(12), rng.integers(1, 9, 12))
    embeddings = {name: unit(rng, len(groups)) for name in ("audio", "video", "text")}
    found = retrieval.retrieve(embeddings, groups, seed=3)
    queries, pool = retrieval.split_groups(groups, 3)
    assert not set(queries) & set(pool)
    for direction, (asked, answered) in retrieval.DIRECTION_MODALITIES.items():
        for k in retrieval.RANKS:
            hits, share = [], []
            for query in queries:
                scores = embeddings[answered][pool] @ embeddings[asked][query]
                best = pool[np.argsort(-scores, kind="stable")[:k]]
                hits.append(int((groups[best] == groups[query]).sum()))
                share.append(hits[-1] / (groups[pool] == groups[query]).sum())
            result = found[direction]
            assert result[f"hit@{k}"] == pytest.approx(np.mean(np.array(hits) > 0))
            assert result[f"mean_hits@{k}"] == pytest.approx(np.mean(hits))
            assert result[f"recall@{k}"] == pytest.approx(np.mean(share))


def test_the_first_letter_of_a_direction_is_the_query_and_the_second_the_pool():
    groups = np.repeat(np.arange(20), 4)
    queries, pool = retrieval.split_groups(groups, 0)
    asking = {"v2a": "video", "a2v": "audio", "l2a": "text", "a2l": "audio"}
    for direction, asked in asking.items():
        answered = {"a": "audio", "v": "video", "l": "text"}[direction[-1]]
        # Only queries of the one modality and the pool of the other are right; everything else is random.
        embeddings = {name: unit(np.random.default_rng(0), len(groups), 20) for name in ("audio", "video", "text")}
        embeddings[asked][queries] = np.eye(20)[groups[queries]]
        embeddings[answered][pool] = np.eye(20)[groups[pool]]
        found = retrieval.retrieve(embeddings, groups, 0)
        assert [name for name, result in found.items() if result["hit@1"] == 1] == [direction]


def test_embeddings_that_are_all_alike_get_what_a_random_order_gets():
    groups = np.repeat(np.arange(10), [3, 3, 3, 3, 3, 3, 3, 3, 3, 30])
    alike = {name: np.ones((len(groups), 1), np.float32) for name in ("audio", "video", "text")}
    found = [retrieval.retrieve(alike, groups, seed)["v2a"] for seed in range(300)]
    for name in ("hit@1", "hit@5", "mean_hits@5"):
        values = [result[name] for result in found]
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - found[0]["chance"][name]) < 4 * error, name


def test_all_of_a_pool_smaller_than_k_is_found():
    groups = np.repeat(np.arange(2), 4)
    embeddings = {name: unit(np.random.default_rng(0), 8) for name in ("audio", "video", "text")}
    result = retrieval.retrieve(embeddings, groups, 0)["a2l"]
    assert result["recall@10"] == result["chance"]["recall@10"] == 1
    assert result["mean_hits@10"] == result["chance"]["mean_hits@10"] == 2


def test_chance_is_what_random_orders_get():
    groups = np.repeat(np.arange(10), [3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    found: dict[str, list] = {}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        embeddings = {name: unit(rng, len(groups)) for name in ("audio", "video", "text")}
        result = retrieval.retrieve(embeddings, groups, seed=0)["v2a"]
        for name in ("hit@1", "hit@5", "recall@10", "mean_hits@5"):
            found.setdefault(name, []).append(result[name])
    chance = result["chance"]
    for name, values in found.items():
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - chance[name]) < 4 * error, name


def test_the_own_clips_rank_is_that_of_a_sort():
    rng = np.random.default_rng(2)
    embeddings = {name: unit(rng, 40) for name in ("audio", "video", "text")}
    embeddings["audio"] += 0.3 * embeddings["video"]
    found = retrieval.retrieve_instances(embeddings, pool_size=0, seed=0)
    assert found.keys() == {"v2a", "a2v", "l2a", "a2l", "v2l", "l2v"}
    ranks = [np.argsort(-(embeddings["audio"] @ embeddings["video"][i])).tolist().index(i) + 1 for i in range(40)]
    for k in retrieval.RANKS:
        assert found["v2a"][f"recall@{k}"] == np.mean(np.array(ranks) <= k)
        assert found["v2a"]["chance"][f"recall@{k}"] == k / 40
    assert found["v2a"]["median_rank"] == np.median(ranks) < 15
    assert (found["v2a"]["chance"]["median_rank"], found["v2a"]["pool_size"]) == (20.5, 40)


def test_clips_that_are_equally_similar_share_their_ranks(monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", 4 * 6 * 4)  # four rows at a time
    corners = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 2]]
    embeddings = {"audio": corners, "video": corners, "text": np.ones_like(corners)}
    found = retrieval.retrieve_instances(embeddings, pool_size=9, seed=0)
    assert found["v2a"]["recall@1"] == pytest.approx((3 * 1 / 3 + 2 * 1 / 2 + 1) / 6)
    assert found["v2a"]["recall@5"] == 1
    assert found["v2a"]["median_rank"] == np.median([2, 2, 2, 1.5, 1.5, 1])
    for name in ("l2a", "a2l"):  # text says nothing: chance
        assert {k: found[name][k] for k in found[name]["chance"]} == pytest.approx(found[name]["chance"])


def test_the_pool_of_the_own_clip_is_drawn_by_the_seed():
    rng = np.random.default_rng(3)
    audio = unit(rng, 500)
    embeddings = {"audio": audio, "video": audio + 1.5 * unit(rng, 500), "text": unit(rng, 500)}
    every = retrieval.retrieve_instances(embeddings, pool_size=500, seed=0)["v2a"]
    some = [retrieval.retrieve_instances(embeddings, pool_size=50, seed=seed)["l2a"] for seed in (0, 0, 1)]
    assert every["pool_size"] == 500
    assert [found["pool_size"] for found in some] == [50] * 3
    assert some[0] == some[1] != some[2]
    few = retrieval.retrieve_instances(embeddings, pool_size=50, seed=0)["v2a"]
    assert few["recall@1"] > every["recall@1"] > 0.1  # pairs stay together, and fewer compete


def test_without_a_group_of_three_there_is_no_result():
    groups = np.array([0, 0, 1, 1])
    embeddings = {name: unit(np.random.default_rng(0), 4) for name in ("audio", "video", "text")}
    assert retrieval.retrieve(embeddings, groups, seed=0) == {}


LARGE = """
import numpy as np
from mc3_jax.evals import retrieval
rng = np.random.default_rng(0)
asked, answered = (rng.standard_normal((30_000, 256), np.float32) for _ in range(2))
found = retrieval.nearest(asked, answered, 10)
assert (found[123] == np.argsort(-(answered @ asked[123]), kind="stable")[:10]).all()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.large
def test_thirty_thousand_against_thirty_thousand_take_less_than_two_gigabytes():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=False, cwd=world.ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2_000_000  # KiB
