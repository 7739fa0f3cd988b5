"""The numbers of Table 1 and Fig. 4 are those counted by hand."""

import numpy as np

from mc3_jax.evals import taxonomy


def test_verbs_and_groups_are_counted_and_the_unknown_left_out():
    labels = np.array([1, 1, 0, 1, 1, 0, 1])
    verbs = np.array([2, 2, 2, 0, 0, -1, -1])
    nouns = np.array([1, 1, 1, 0, -1, 0, 0])
    found = taxonomy.statistics(labels, verbs, nouns, ["cut", "lift", "wash"], ["onion", "plate"])
    assert (found["num_clips"], found["num_sounding"]) == (7, 5)
    assert found["verbs"] == [
        {"verb": "wash", "num_clips": 3, "sounding": 2 / 3}, {"verb": "cut", "num_clips": 2, "sounding": 1.0},
    ]  # fmt: skip
    assert found["groups"] == [
        {"verb": "wash", "noun": "plate", "num_clips": 2}, {"verb": "cut", "noun": "onion", "num_clips": 1},
    ]  # fmt: skip


def test_clips_nobody_could_name_give_empty_tables():
    unknown = np.array([-1, -1])
    found = taxonomy.statistics(np.array([0, 1]), unknown, unknown, [], [])
    assert found == {"num_clips": 2, "num_sounding": 1, "verbs": [], "groups": []}
