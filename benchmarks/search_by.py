"""What a text should be compared with in a search: `python -m benchmarks.search_by RUN [RUN ...]`.

A RUN is the workdir of a run that `python -m mc3_jax.evaluate` has measured on clips whose labels, verbs and nouns are known.
The narrations of clips that sound are the queries, if at least two other clips that sound have the same verb and noun. Each
query ranks all other clips by their sound, by their frames, and by the mean of both (`--by` of `mc3_jax.search`). The table
gives the share of relevant clips among the first five, averaged over queries; relevant are the clips that sound and have the
query's verb and noun.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping

import numpy as np

from benchmarks import record
from mc3_jax.evals import embeddings as embeddings_lib, moments, retrieval

NUM_HITS, NUM_OTHERS = 5, 2


def precision(embeddings: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray]) -> tuple[dict[str, float], int]:
    """Returns the mean share of relevant clips among the first `NUM_HITS` by score name, and the number of queries.

    "chance" is what a random order gets.

    Args:
      embeddings: {"audio", "video", "text"}, L2-normalised [n, d].
      known: {"label", "verb_id", "noun_id"} of each clip, [n].

    Raises:
      ValueError: No clip can be a query.
    """
    rows, pairs = retrieval.named_groups(known["label"], known["verb_id"], known["noun_id"])
    pair_of = np.full(len(known["label"]), -1)
    pair_of[rows] = pairs
    queries = rows[np.bincount(pairs, minlength=1)[pairs] > NUM_OTHERS]
    if not len(queries):
        raise ValueError(f"no clip that sounds has {NUM_OTHERS} others with its verb and noun")
    audio, video = (embeddings["text"][queries] @ embeddings[name].T for name in ("audio", "video"))
    scores = {"audio": audio, "video": video, "both": (audio + video) / 2}
    found = {}
    for name in moments.SCORES:
        score = scores[name].copy()
        score[np.arange(len(queries)), queries] = -np.inf  # the query's own clip is no hit
        first = np.argsort(-score, axis=1, kind="stable")[:, :NUM_HITS]
        found[name] = float(np.mean(pair_of[first] == pair_of[queries][:, None]))
    relevant = np.bincount(pairs)[pair_of[queries]] - 1
    found["chance"] = float(np.mean(relevant) / (len(pair_of) - 1))
    return found, len(queries)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_by", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="workdirs that hold embeddings.npz")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args()
    rows = []
    for run in args.runs:
        try:
            embeddings, known = embeddings_lib.load(run / embeddings_lib.FILE)
            found, num_queries = precision(embeddings, known)
        except ValueError as error:
            sys.exit(f"error: {run}: {error}")
        rows.append([run.name, *(f"{value:.3f}" for value in found.values()), num_queries, len(known["label"])])
    header = ["run", "sound", "frames", "mean of both", "chance", "queries", "clips"]
    record.append("What a text is compared with", record.markdown(header, rows), path=args.results)


if __name__ == "__main__":
    main()
