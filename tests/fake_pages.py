"""Made-up runs, suites and sounds for the tests of the HTML pages, with texts that would be markup if not escaped."""

import pathlib
import types

import numpy as np
import simplejpeg

from mc3_jax.data import records
from mc3_jax.evals import discovery, metrics, moments, report, sound_report, suite_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><b>&amp;\"'{{ 7 * 7 }}%{x}\u2028"
NUM_FRAMES, NUM_CANDIDATES = 4, 2


class Source:
    """Stands in for `loader.ClipSource` where pages read from it: clips with pictures and a tone, every text hostile."""

    def __init__(self, num_clips: int, pictures: bool = True):
        names = [f"{HOSTILE} {i}" for i in range(6)]
        self.info = types.SimpleNamespace(
            verbs=names, nouns=names, classes=names, num_candidates=NUM_CANDIDATES, sample_rate_hz=16_000
        )
        self.pictures = pictures
        self._num_clips = num_clips

    def __getitem__(self, index: int) -> records.Clip:
        assert 0 <= index < self._num_clips
        rng = np.random.default_rng(index)
        frames = [
            simplejpeg.encode_jpeg(np.full((72, 96, 3), rng.integers(0, 255, 3), np.uint8))
            for _ in range(NUM_FRAMES * NUM_CANDIDATES)
        ]
        tone = 8000 * np.sin(2 * np.pi * rng.uniform(200, 2000) * np.arange(24_000) / 16_000)
        frames = frames if self.pictures else []
        return records.Clip(
            clip_id=f"{index} {HOSTILE}", video_uid="v", narration=f"#C C says {HOSTILE} {index}", source="s", time_us=0,
            start_us=0, stop_us=1_500_000, frames=frames, frame_times_us=np.zeros(len(frames), np.int64), frame_height=72,
            frame_width=96, audio=tone.astype(np.int16),
        )  # fmt: skip


def run_page(
    folder: pathlib.Path, num_clips: int = 60, retrieval: bool = True, log: bool = True, labels: bool = True
) -> pathlib.Path:
    """Writes the page of a made-up run of two phases and returns its path.

    Args:
      folder: Folder to write the page to.
      num_clips: Number of clips evaluated.
      retrieval: Whether the clips' verbs and nouns are known.
      log: Whether the run has rows of metrics.
      labels: Whether the clips have labels.
    """
    rng = np.random.default_rng(0)
    known = {"index": np.arange(num_clips) + 3, "label": rng.integers(0, 2, num_clips) if labels else np.full(num_clips, -1)}
    for name in ("verb_id", "noun_id"):
        known[name] = rng.integers(0, 3, num_clips) if retrieval else np.full(num_clips, -1)
    embeddings, results = {}, {}
    for name in (f"align {HOSTILE}", "refine"):
        raw = {tower: rng.normal(size=(num_clips, 8)) for tower in ("audio", "video", "text")}
        embeddings[name] = {
            k: (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for k, v in raw.items()
        }
        pair = {
            "roc_auc": 0.6, "roc_auc_interval": [0.5, 0.7], "average_precision": 0.6, "pr_auc_trapezoid": 0.6,
            "within_verb_roc_auc": 0.5, "chance": {"average_precision": 0.5}, "num_clips": num_clips, "num_positive": 30,
        }  # fmt: skip
        measured = {"hit@1": 0.1, "hit@5": 0.2, "hit@10": 0.3, "recall@5": 0.1, "mean_hits@5": 0.2}
        direction = measured | {"chance": measured, "num_queries": 9, "pool_size": 8}
        found = {"recall@1": 0.1, "recall@5": 0.2, "recall@10": 0.3, "median_rank": 7.5}
        results[name] = {
            "discovery": {p: pair | {"roc_auc": 0.6 + 0.01 * i} for i, p in enumerate(discovery.PAIR_MODALITIES)},
            "retrieval": {"v2a": direction, "a2l": direction} if retrieval else {},
            "instance_retrieval": {"v2a": found | {"chance": found, "pool_size": num_clips}},
            "controls": {"loudness": 0.5, "verb_prior": 0.6 if retrieval else None},
            "margin": {
                "controls": ["loudness"], "best_control_roc_auc": 0.5, "margin": 0.1, "margin_interval": [0.0, 0.2]
            },
        }  # fmt: skip
        if not labels:
            results[name] |= {"discovery": {}, "retrieval": {}, "controls": {}, "margin": None}
    rows = [{"step": i, "phase": "align" if i < 5 else "refine", "loss": 1.0 / (i + 1), "contrastive_av": 1.0,
             "consensus": 0.1} for i in range(10)]  # fmt: skip
    return report.write(
        folder, title=f"run {HOSTILE}", facts=f"facts {HOSTILE}", results=results, embeddings=embeddings, known=known,
        metric_rows=rows if log else [], source=Source(num_clips + 3), sizes=report.Sizes(2, 5, 3, 0),
    )  # fmt: skip


def suite_content(titles=("Random", "CLAP", "MC3", HOSTILE), pairs=("av", "al")) -> dict:
    """Returns what `benchmarks.table_pages.collect` would return, but of made-up runs; MC3 leads the others."""
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 2
    rows, curves = {}, {pair: {} for pair in pairs}
    for i, title in enumerate(titles):
        own = ("al",) if title == "CLAP" else pairs
        row = {"file": f"file_{i}", "seeds": [0, 1], "pairs": own, "seconds": [60.0, 1.0]}
        for pair in own:
            scores = rng.normal(size=100) + 0.3 * i * labels
            recall, precision = metrics.pr_curve(labels, scores)
            curves[pair][title] = {"recall": recall.tolist(), "precision": precision.tolist()}
            for measure in ("roc_auc", "average_precision", "within_verb_roc_auc"):
                row[f"{pair}_{measure}"] = [0.5 + 0.05 * i, 0.01 if i else None]
        if title != "CLAP":
            for name in ("v2a_hit@5", "v2a_mean_hits@5", "v2a_mean_hits@10"):
                row |= {name: [0.1 * i, 0.01], f"{name}_chance": [0.05, 0.0]}
        rows[title] = row
    found = {"lead": 0.05, "interval": [0.01, 0.09]}
    measures = {"roc_auc": found, "average_precision": found, "roc_auc_region_III, drowned": found}
    leads = {p: {title: measures for title in curves[p] if title != "MC3"} for p in pairs if "MC3" in titles}
    chosen = {"temperature": 0.1, "learning_rate": 1.0}
    return {
        "data": HOSTILE, "split": "test", "test": {"clips": 100, "positive": 0.5, "controls": {"loudness": 0.5}},
        "regions": {"II": 10, "III, drowned": 5}, "rows": rows, "leads": leads, "interval_over": "videos",
        "pr_curves": curves,
        "sweep": {"file_2": {"chosen": chosen, "trials": [{"setting": chosen, "score": 0.6, "seconds": 1.0}]},
                  "file_3": {"chosen": chosen, "trials": [], "like": "file_2"}},
    }  # fmt: skip


def suite_page(folder: pathlib.Path) -> pathlib.Path:
    """Writes the page of a made-up suite in which one run has a page of its own, and returns the suite page's path."""
    link = folder / "runs" / "file_2" / "seed-1" / "report" / "index.html"
    link.parent.mkdir(parents=True)
    link.write_text("a page")
    return suite_report.write(folder, suite_content())


def sound_page(folder: pathlib.Path, pictures: bool = False) -> pathlib.Path:
    """Writes the page of a made-up run that classifies sounds into six classes and returns its path."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 5, 40)
    probabilities = rng.dirichlet(np.ones(6), 40)
    probabilities[np.arange(40), classes] += 0.2
    epochs = [
        {"step": i, "epoch": i, "phase": "classify", "top1": 40.0 + i, "top5": 80.0, "mean_class_accuracy": 0.4,
         "mAP": 0.3, "mAUC": 0.7} for i in (1, 2, 3)
    ]  # fmt: skip
    content = {
        "config": HOSTILE, "seed": 0, "split": "validation", "folds": [1], "data": HOSTILE, "num_clips": 40,
        "num_trained_on": 100, "num_seen": 3, "last": epochs[-1], "best": epochs[-1], "epochs": epochs,
    }  # fmt: skip
    source = Source(80, pictures)
    return sound_report.write(
        folder, content, probabilities.astype(np.float32), classes, source.info.classes, source=source,
        indices=2 * np.arange(40),
    )  # fmt: skip


def moments_page(folder: pathlib.Path) -> pathlib.Path:
    """Writes the page of moments found in made-up videos by two texts, and returns its path."""
    rng, num = np.random.default_rng(0), 20
    audio, video = (rng.normal(size=(num, 8)).astype(np.float32) for _ in range(2))
    starts = 1_500_000 * np.arange(num)
    names = np.array([f"{i} {HOSTILE}" for i in range(num)])
    made = moments.Moments(audio, video, names, names, starts, starts + 1_500_000)
    found = {text: moments.find(made, audio[i], "both", 5) for i, text in enumerate((f"#C C says {HOSTILE}", "#C C cuts"))}
    return moments.write_page(
        folder, made, found, title=f"found {HOSTILE}", facts=f"facts {HOSTILE}", by="both", source=Source(num)
    )
