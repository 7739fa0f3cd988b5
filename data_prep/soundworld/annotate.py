"""Writes the annotations of a SoundWorld in Ego4D's layout: metadata, narrations, taxonomies, labels, splits.

The ground truth (regions, which actions sounded, what else was heard) goes to `truth.json` in the root folder. Nothing in
training reads that file.
"""

import csv
import dataclasses
import io
import json
import pathlib
import uuid

import numpy as np

from data_prep import storage
from data_prep.soundworld import plan, taxonomy

_TOOL_WORDS = {"sponge": "a sponge", "knife": "a knife", "spoon": "a spoon", "cloth": "a rag", "scraper": "a scraper",
               "hammer": "a hammer"}  # fmt: skip
_OTHERS = ("man X", "woman Y", "person A", "lady Z")


@dataclasses.dataclass
class Narration:
    """One narration of narration.json; `segment` is the index of the narrated action in `plan.Video.segments`."""

    annotation_uid: str
    narration_pass: int
    timestamp_s: float
    text: str
    segment: int


def _sentence(segment: plan.Segment, rng: np.random.Generator) -> str:
    """Returns a narration in the style of Ego4D's narrators, typos included: "#C C chops the carrot with a knife"."""
    verb, noun = taxonomy.VERBS[segment.verb], taxonomy.NOUNS[segment.noun]
    weights = np.array([0.65, 0.25, 0.10][: len(verb.forms)])
    form = str(rng.choice(verb.forms, p=weights / weights.sum()))
    thing = str(rng.choice(noun.forms, p=[0.75, 0.25]))
    words = [form, str(rng.choice(["the", "a", "the"])), thing]
    if verb.tool and rng.random() < 0.35:
        words += ["with", _TOOL_WORDS[verb.tool]]
    elif rng.random() < 0.15:
        words += [str(rng.choice(["on the surface", "with his right hand", "with both hands", "in front of her"]))]
    text = " ".join(words)
    if rng.random() < 0.04:
        cut = int(rng.integers(1, len(text) - 1))
        text = text[:cut] + text[cut + 1 :]  # a dropped letter
    if not segment.wearer:
        return f"#O {rng.choice(_OTHERS)} {text}"
    tag = "#C C" if rng.random() < 0.95 else str(rng.choice(["#c C", "#C  C", "# C C", "#C c"]))
    unsure = " #unsure" if rng.random() < 0.02 else ""
    return f"{tag} {text}{unsure}"


def narrate(video: plan.Video) -> list[Narration]:
    """Returns a video's narrations. Most actions are narrated in one of the two passes, one in fourteen in both."""
    rng = np.random.default_rng([video.seed, 1])
    lines = []
    for i, segment in enumerate(video.segments):
        chosen = rng.choice(3, p=[0.70, 0.23, 0.07])
        for number in ((1,), (2,), (1, 2))[chosen]:
            jitter = 0.0 if number == 1 else float(rng.normal(0.0, 0.08))
            uid = str(uuid.UUID(bytes=rng.bytes(16), version=4))
            lines.append(Narration(uid, number, segment.narration_s + jitter, _sentence(segment, rng), i))
    return lines


def _votes(segment: plan.Segment, rng: np.random.Generator) -> list[int]:
    """Returns three annotators' votes, 1 or 0, on whether the action is both seen and heard; quiet actions divide them."""
    truth = segment.region == "I"
    wrong = 0.06
    if segment.action_db is not None:
        # Actions far more than 6 dB below the usual level are missed one time in five. Actions that sound but are drowned or
        # out of view are voted for one time in ten.
        wrong += 0.14 / (1.0 + np.exp((segment.action_db + 6.0) / 1.5)) if truth else 0.04
    return [int(truth != (rng.random() < wrong)) for _ in range(3)]


def _write_json(path: pathlib.Path, value) -> None:
    storage.write(path, (json.dumps(value, indent=1) + "\n").encode())


def _write_csv(path: pathlib.Path, header: list[str], rows: list[list]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    storage.write(path, text.getvalue().encode())


def check_same_world(out: pathlib.Path, videos: list[plan.Video], seed: int, ambience: list[str]) -> None:
    """Checks that a world that exists under `out` is this one, because its videos will be kept as they are.

    Raises:
      ValueError: It has another seed, length, size or ambience, or is no SoundWorld.
    """
    path = out / "ego4d.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
        there = {entry["video_uid"]: entry for entry in found["videos"]}
        same = (found["seed"], found.get("ambience", [])) == (seed, ambience)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not belong to a SoundWorld: choose another folder") from error
    if not same or any(there.get(v.uid, _video_metadata(v)) != _video_metadata(v) for v in videos):
        raise ValueError(f"{out} holds a world with another seed, length, size or ambience: choose another folder")


def write_annotations(
    out: pathlib.Path, videos: list[plan.Video], seed: int, ambience: list[str] | None = None
) -> None:
    """Writes all files of a world under `out`, except the videos. If it fails, each file is the earlier one or a whole one.

    Args:
      out: Root of the data set; gets `ego4d.json`, `truth.json` and `v2/annotations/`.
      videos: Plans of all videos.
      seed: Seed of the world; recorded in `ego4d.json`.
      ambience: Names of the recordings mixed in; recorded in `ego4d.json` too.
    """
    annotations = out / "v2" / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    metadata, narrations, labels, truth = [], {}, [], {}
    for video in videos:
        lines = narrate(video)
        metadata.append(_video_metadata(video))
        narrations[video.uid] = _passes(lines)
        truth[video.uid] = {
            "split": video.split,
            "room": video.room,
            "segments": [dataclasses.asdict(s) for s in video.segments],
            "distractors": [dataclasses.asdict(d) for d in video.distractors],
            "narrations": {line.annotation_uid: line.segment for line in lines},
        }
        if video.split != "train":
            labels += label_rows(video, lines)
    _write_json(annotations / "narration.json", {"videos": narrations})
    _write_json(out / "truth.json", truth)
    for kind, entries in (("verb", taxonomy.VERBS), ("noun", taxonomy.NOUNS)):
        rows = [[f"{e.name}_({','.join(e.forms)})", str(_forms(e))] for e in entries]
        _write_csv(annotations / f"narration_{kind}_taxonomy.csv", ["label", "group"], rows)
    header = ["video_uid", "annotation_uid", "narration_pass", "timestamp_sec", "narration_text"]
    _write_csv(annotations / "sounding_labels.csv", header + ["vote_1", "vote_2", "vote_3"], labels)
    _write_csv(annotations / "splits.csv", ["video_uid", "split"], [[v.uid, v.split] for v in videos])
    # Last, since `check_same_world` takes a folder with this file for a world.
    _write_json(
        out / "ego4d.json", {"version": "soundworld-1", "seed": seed, "ambience": ambience or [], "videos": metadata}
    )


def _forms(entry: taxonomy.Verb | taxonomy.Noun) -> list[str]:
    """Returns the surface forms of a verb or noun, each once, the label itself first."""
    return list(dict.fromkeys((entry.name, *entry.forms)))


def _video_metadata(video: plan.Video) -> dict:
    """Returns the video's entry of ego4d.json; the audio fields are null where there is no audio."""
    audio = video.has_audio
    return {
        "video_uid": video.uid,
        "duration_sec": video.duration_s,
        "scenarios": [video.room],
        "video_metadata": {
            "fps": float(video.fps),
            "display_resolution_width": video.width_px,
            "display_resolution_height": video.height_px,
            "video_start_sec": 0.0,
            "video_duration_sec": video.duration_s,
            "audio_start_sec": video.audio_start_s if audio else None,
            "audio_duration_sec": video.duration_s - video.audio_start_s if audio else None,
            "audio_sample_rate": video.sample_rate_hz if audio else None,
        },
    }


def _passes(lines: list[Narration]) -> dict:
    """Returns a video's entry of narration.json. A pass without narrations is missing, as in Ego4D."""
    passes = {}
    for number in (1, 2):
        rows = [
            {
                "timestamp_sec": line.timestamp_s,
                "timestamp_frame": int(line.timestamp_s * 30.0),  # Ego4D's canonical 30 fps
                "narration_text": line.text,
                "annotation_uid": line.annotation_uid,
            }
            for line in sorted(lines, key=lambda line: line.timestamp_s)
            if line.narration_pass == number
        ]
        if rows:
            passes[f"narration_pass_{number}"] = {"narrations": rows, "summaries": []}
    return passes


def label_rows(video: plan.Video, lines: list[Narration]) -> list[list]:
    """Returns rows of sounding_labels.csv: one narration of each of the wearer's actions, so that none is labelled twice."""
    rng = np.random.default_rng([video.seed, 2])
    rows, seen = [], set()
    for line in lines:
        segment = video.segments[line.segment]
        if not segment.wearer or line.segment in seen:
            continue
        seen.add(line.segment)
        name = f"narration_pass_{line.narration_pass}"
        rows.append([video.uid, line.annotation_uid, name, line.timestamp_s, line.text, *_votes(segment, rng)])
    return rows
