"""Which actions a labelled split contains and how often they sound: Table 1 and Fig. 4 of the paper."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def statistics(
    labels: Int[np.ndarray, " n"],
    verb_ids: Int[np.ndarray, " n"],
    noun_ids: Int[np.ndarray, " n"],
    verbs: Sequence[str],
    nouns: Sequence[str],
) -> dict[str, object]:
    """Returns {"num_clips", "num_sounding", "verbs", "groups"} of the labelled clips.

    `verbs` lists {"verb", "num_clips", "sounding"}, where "sounding" is the share of the verb's clips that sound (Table 1).
    `groups` lists {"verb", "noun", "num_clips"} for the verb-noun pairs of the clips that sound (Fig. 4). Both start with the
    most frequent. Clips with an unknown verb are in neither, those with an unknown noun in no group.

    Args:
      labels: 0 or 1; clips with -1 are not counted.
      verb_ids, noun_ids: Indices into `verbs` and `nouns`, -1 where unknown.
      verbs, nouns: Names in the taxonomy.
    """
    labelled = labels >= 0
    labels, verb_ids, noun_ids = labels[labelled], verb_ids[labelled], noun_ids[labelled]
    of_verbs = []
    for verb in np.unique(verb_ids[verb_ids >= 0]):
        inside = verb_ids == verb
        of_verbs.append(
            {"verb": verbs[verb], "num_clips": int(inside.sum()), "sounding": float(labels[inside].mean())}
        )  # fmt: skip
    named = (labels == 1) & (verb_ids >= 0) & (noun_ids >= 0)
    pairs, counts = np.unique(np.stack([verb_ids, noun_ids], 1)[named], axis=0, return_counts=True)
    of_pairs = [
        {"verb": verbs[verb], "noun": nouns[noun], "num_clips": int(count)}
        for (verb, noun), count in zip(pairs, counts, strict=True)
    ]

    def by_count(entry: dict) -> tuple:
        return -entry["num_clips"], entry["verb"], entry.get("noun", "")

    return {
        "num_clips": len(labels), "num_sounding": int(labels.sum()),
        "verbs": sorted(of_verbs, key=by_count), "groups": sorted(of_pairs, key=by_count),
    }  # fmt: skip
