"""Shows what is in a clips data set: `python -m data_prep.inspect CLIPS --out DIR`.

Prints and writes counts (clips, hours, verbs, nouns). Draws the long tail of verbs and nouns (Fig. 4 of the paper), how often
each verb sounds (Table 1), and a contact sheet with frames, waveform, log-mel and caption of randomly chosen clips. For data
sets of sounds it counts classes, folds and durations instead. With `--clip_id ID`, which may be repeated, it shows only those
clips, in `chosen_clips.png`, and counts nothing.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence

import grain.python as grain
import librosa
import matplotlib
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from matplotlib import figure

from mc3_jax import terminal
from mc3_jax.data import records

_PERCENTILES = (0, 5, 50, 95, 99, 100)
_MAX_FRAME_PX = 1 << 26  # twice as many as an 8K picture has
_MIN_LABELLED = 5  # labelled clips of a verb; with fewer, its sounding rate is noise


@dataclasses.dataclass
class Statistics:
    """Counts of one split.

    Attributes:
      num_clips, num_videos: Number of clips and of videos in the split.
      hours: Total duration of the clips; where clips overlap, it counts twice.
      num_labelled, num_positive: Number of clips with a label, and with label 1.
      verbs, nouns: Verb or noun → number of clips, most frequent first; without clips whose verb or noun is unknown.
      num_pairs: Number of different pairs of verb and noun.
      sounding_rates: Verb → (share of positive clips, number of labelled clips), for verbs with at least 5 labelled clips,
        highest share first.
      classes: Class → number of clips, most frequent first; without clips whose class is unknown.
      folds: Fold → number of clips; empty if there are no folds.
      durations_s: Percentile → duration of the audio, seconds; empty if all clips have the same length.
    """

    num_clips: int
    num_videos: int
    hours: float
    num_labelled: int
    num_positive: int
    verbs: dict[str, int]
    nouns: dict[str, int]
    num_pairs: int
    sounding_rates: dict[str, tuple[float, int]]
    classes: dict[str, int] = dataclasses.field(default_factory=dict)
    folds: dict[int, int] = dataclasses.field(default_factory=dict)
    durations_s: dict[int, float] = dataclasses.field(default_factory=dict)


def open_split(folder: pathlib.Path, info: records.ClipsInfo, split: str) -> grain.ArrayRecordDataSource:
    """Returns the records of a split.

    Raises:
      ValueError: The split does not exist or has no shards.
    """
    return grain.ArrayRecordDataSource(info.shard_paths(folder, split))


def count(source: grain.ArrayRecordDataSource, info: records.ClipsInfo) -> Statistics:
    """Returns a split's statistics; reads all its records.

    Raises:
      ValueError: A record can't be read, or its verb, noun or class id is not in this data set.
    """
    videos, verbs, nouns, pairs = set(), collections.Counter(), collections.Counter(), set()
    labelled, positive = collections.Counter(), collections.Counter()
    classes, folds, durations = collections.Counter(), collections.Counter(), []
    seconds = 0.0
    for i in range(len(source)):
        clip = records.decode(source[i])
        if clip.verb_id >= len(info.verbs) or clip.noun_id >= len(info.nouns):
            raise ValueError(
                f"clip {clip.clip_id} has verb {clip.verb_id} and noun {clip.noun_id}, but there are {len(info.verbs)} verbs "
                f"and {len(info.nouns)} nouns: run data_prep.verify"
            )
        if clip.class_id >= len(info.classes):
            raise ValueError(
                f"clip {clip.clip_id} has class {clip.class_id}, but there are {len(info.classes)} classes: run "
                "data_prep.verify"
            )
        if clip.class_id >= 0:
            classes[info.classes[clip.class_id]] += 1
        if clip.fold != records.UNKNOWN:
            folds[clip.fold] += 1
        durations.append(len(clip.audio) / info.sample_rate_hz)
        verb = info.verbs[clip.verb_id] if clip.verb_id >= 0 else None
        noun = info.nouns[clip.noun_id] if clip.noun_id >= 0 else None
        videos.add(clip.video_uid)
        seconds += (clip.stop_us - clip.start_us) / 1e6
        verbs[verb] += 1
        nouns[noun] += 1
        if verb is not None and noun is not None:
            pairs.add((verb, noun))
        if clip.label != records.UNKNOWN:
            labelled[verb] += 1
            positive[verb] += clip.label == 1
    rates = {v: (positive[v] / n, n) for v, n in labelled.items() if v is not None and n >= _MIN_LABELLED}
    return Statistics(
        num_clips=len(source),
        num_videos=len(videos),
        hours=seconds / 3600,
        num_labelled=labelled.total(),
        num_positive=positive.total(),
        verbs={name: n for name, n in verbs.most_common() if name is not None},
        nouns={name: n for name, n in nouns.most_common() if name is not None},
        num_pairs=len(pairs),
        sounding_rates=dict(sorted(rates.items(), key=lambda item: -item[1][0])),
        classes=dict(classes.most_common()),
        folds=dict(sorted(folds.items())),
        durations_s={q: float(np.percentile(durations, q)) for q in _PERCENTILES} if info.max_samples and durations else {},
    )


def find(sources: Mapping[str, grain.ArrayRecordDataSource], clip_ids: Sequence[str]) -> dict[str, tuple[str, records.Clip]]:
    """Returns clip id → (split, clip), in the order of `clip_ids`; reads the splits until all are found.

    Args:
      sources: Split → its records.
      clip_ids: Ids of the clips wanted; duplicates are ignored.

    Raises:
      ValueError: A clip is in none of the splits, or a record can't be read.
    """
    found, missing = {}, set(clip_ids)
    for split, source in sources.items():
        for i in range(len(source) if missing else 0):
            clip = records.decode(source[i])
            if clip.clip_id in missing:
                found[clip.clip_id] = split, clip
                missing.remove(clip.clip_id)
                if not missing:
                    break
    if missing:
        wanted = ", ".join(map(repr, sorted(missing)))
        raise ValueError(
            f"no clip {wanted} in {', '.join(sources)}: clip ids are in a run's embeddings.npz and clips.jsonl, rejected "
            f"narrations in {records.REJECTED_FILE}"
        )
    return {clip_id: found[clip_id] for clip_id in dict.fromkeys(clip_ids)}


def _short(label: str) -> str:
    """Returns a printable taxonomy label without its list of forms: "wash" for "wash_(wash,_rinse)"."""
    return terminal.printable(label.split("_(")[0])


def describe(split: str, found: Statistics) -> str:
    """Returns the statistics of a split as lines of text."""
    what = f"{len(found.verbs)} verbs, {len(found.nouns)} nouns, {found.num_pairs} pairs"
    if found.classes:
        what = f"{len(found.classes)} classes"
    lines = [f"{split}: {found.num_clips:,} clips of {found.num_videos:,} videos, {found.hours:.2f} h; {what}"]
    if found.durations_s:
        percentiles = ", ".join(f"{value:.3g} ({q} %)" for q, value in found.durations_s.items())
        lines.append(f"  percentiles of seconds: {percentiles}")
    if found.folds:
        lines.append("  clips by fold: " + ", ".join(f"{n} in {fold}" for fold, n in found.folds.items()))
    for kind, counts in (("verbs", found.verbs), ("nouns", found.nouns), ("classes", found.classes)):
        if counts:
            common = ", ".join(f"{_short(name)} {n}" for name, n in list(counts.items())[:8])
            fifth = sum(list(counts.values())[: max(len(counts) // 5, 1)]) / sum(counts.values())
            lines.append(f"  {kind}: {common}, ...; the most frequent fifth makes up {fifth:.0%} of all")
    if found.num_labelled:
        share = found.num_positive / found.num_labelled
        lines.append(f"  labelled: {found.num_labelled:,}, {share:.1%} of them positive")
        rates = [f"{_short(name)} {rate:.2f} (n = {n})" for name, (rate, n) in found.sounding_rates.items()]
        if rates:
            lines.append("  sounding rates: " + "; ".join(rates if len(rates) <= 10 else [*rates[:5], "...", *rates[-5:]]))
    return "\n".join(lines)


def draw_statistics(found: dict[str, Statistics]) -> figure.Figure:
    """Returns a figure of the number of clips of each verb and noun over its rank, and of the sounding rate of each verb."""
    sheet = figure.Figure(figsize=(12, 7.5), layout="constrained")
    verbs, nouns, rates = sheet.subplot_mosaic([["verbs", "nouns"], ["rates", "rates"]]).values()
    for axes, kind in ((verbs, "verbs"), (nouns, "nouns")):
        for split, statistics in found.items():
            counts = list(getattr(statistics, kind).values())
            axes.loglog(np.arange(1, len(counts) + 1), counts, ".-", label=split)
        axes.set_xlabel(f"{kind} by frequency")
        axes.set_ylabel("clips")
        axes.legend()
    labelled = max(found.values(), key=lambda statistics: statistics.num_labelled)
    names = list(labelled.sounding_rates)
    rates.bar(range(len(names)), [labelled.sounding_rates[name][0] for name in names])
    rates.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, fontsize=8, parse_math=False)
    rates.set_ylabel("share of clips that sound")
    rates.set_ylim(0, 1)
    return sheet


def draw_classes(found: dict[str, Statistics], info: records.ClipsInfo) -> figure.Figure:
    """Returns a figure of the number of clips of each class in each split."""
    sheet = figure.Figure(figsize=(12, 5), layout="constrained")
    axes = sheet.subplots()
    width = 0.8 / len(found)
    for i, (split, statistics) in enumerate(found.items()):
        counts = [statistics.classes.get(name, 0) for name in info.classes]
        axes.bar(np.arange(len(counts)) + (i + 0.5) * width - 0.4, counts, width, label=split)
    names = [terminal.printable(name) for name in info.classes]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylabel("clips")
    axes.legend()
    return sheet


def _picture(clip: records.Clip, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a frame as RGB.

    Raises:
      ValueError: It can't be decoded, its size is not what the record says, or it has more than `_MAX_FRAME_PX` pixels.
    """
    try:
        size, said = simplejpeg.decode_jpeg_header(clip.frames[index])[:2], (clip.frame_height, clip.frame_width)
        # Checked before decoding, since a forged size would take gigabytes.
        if size != said:
            raise ValueError(f"it has {size} px, the record says {said}")
        if size[0] * size[1] > _MAX_FRAME_PX:
            raise ValueError(f"it has {size} px, more than {_MAX_FRAME_PX:,} in all")
        return simplejpeg.decode_jpeg(clip.frames[index], "RGB")
    except ValueError as error:
        raise ValueError(f"clip {clip.clip_id}: frame {index} can't be decoded: {error}") from error


def _caption(clip: records.Clip, info: records.ClipsInfo) -> str:
    """Returns a clip's narration, its label or class, and its time and video, as one line of text."""
    labels = {records.UNKNOWN: "no label", 0: "does not sound", 1: "sounds"}
    kind = labels.get(clip.label, clip.label)
    if 0 <= clip.class_id < len(info.classes):
        kind = info.classes[clip.class_id] + (f", fold {clip.fold}" if clip.fold >= 0 else "")
    return terminal.printable(f"{clip.narration}   [{kind}, {clip.time_us / 1e6:.1f} s of {clip.video_uid}]")


def draw_contact_sheet(clips: list[records.Clip], info: records.ClipsInfo) -> figure.Figure:
    """Returns a figure with a row for every clip: a frame of each interval, the waveform, the log-mel and the caption.

    Raises:
      ValueError: A frame can't be decoded, or a clip does not fit the data set's description.
    """
    columns = info.num_intervals + 2
    sheet = figure.Figure(figsize=(max(2.1 * columns, 9), 1.75 * len(clips)), layout="constrained")
    grid = sheet.subplots(len(clips), columns, squeeze=False)
    for row, clip in zip(grid, clips, strict=True):
        records.check(clip, info)
        for t, axes in enumerate(row[:-2]):
            axes.imshow(_picture(clip, t * info.num_candidates + info.num_candidates // 2))
            axes.axis("off")
        wave = clip.audio / np.float32(32768)
        times = np.arange(len(wave)) / info.sample_rate_hz
        row[-2].plot(times, wave, linewidth=0.4)
        row[-2].set_ylim(-1, 1)
        mel = librosa.feature.melspectrogram(y=wave, sr=info.sample_rate_hz, n_fft=400, hop_length=160, n_mels=64)
        extent = (0, len(wave) / info.sample_rate_hz, 0, 64)
        row[-1].imshow(librosa.power_to_db(mel), origin="lower", aspect="auto", extent=extent)
        for axes in row[-2:]:
            axes.tick_params(labelsize=6)
        caption = _caption(clip, info)  # untrusted text, in which a dollar sign must not start a formula
        if clip.frames:
            place = {"x": 0, "y": 1.06, "transform": row[0].transAxes, "in_layout": False}
            row[0].text(s=caption[:150], fontsize=8, parse_math=False, **place)
        else:
            row[0].set_title(caption[:80], fontsize=8, loc="left", parse_math=False)
        row[-1].set_ylabel("mel band", fontsize=6)
    for axes in grid[-1, -2:]:
        axes.set_xlabel("s", fontsize=6)
    return sheet


def _open(args: argparse.Namespace) -> tuple[records.ClipsInfo, dict[str, grain.ArrayRecordDataSource]]:
    """Returns the description of the command line's data set, and the records of each split that holds any.

    Raises:
      ValueError: The data set can't be read, holds no clips, or none in the split that is named.
    """
    info = records.ClipsInfo.load(args.clips)
    if not any(split.num_clips for split in info.splits.values()):
        raise ValueError(f"{args.clips} holds no clips")
    sources = {name: open_split(args.clips, info, name) for name, split in info.splits.items() if split.num_clips}
    if args.split and args.split not in sources:
        raise ValueError(f"{args.clips} has no clips in the split {args.split!r}, only in {', '.join(sources)}")
    return info, sources


def _show_named(args: argparse.Namespace) -> str:
    """Prints and draws the clips of `--clip_id`, and returns the name of the file written."""
    info, sources = _open(args)
    args.out.mkdir(parents=True, exist_ok=True)
    found = find({args.split: sources[args.split]} if args.split else sources, args.clip_id)
    for clip_id, (split, clip) in found.items():
        print(f"{split}: {terminal.printable(clip_id)}: {_caption(clip, info)}")
    _save(args.out, chosen_clips=draw_contact_sheet([clip for _, clip in found.values()], info))
    return "chosen_clips.png"


def _show_drawn(args: argparse.Namespace) -> str:
    """Counts all clips, draws some of one split, and returns the names of the files written."""
    info, sources = _open(args)
    args.out.mkdir(parents=True, exist_ok=True)  # early, so that a failure does not come after everything was read
    found = {name: count(source, info) for name, source in sources.items()}
    for name, statistics in found.items():
        print(describe(name, statistics))
    split = args.split or max(found, key=lambda name: (found[name].num_labelled, found[name].num_clips))
    chosen = np.random.default_rng(args.seed).permutation(len(sources[split]))[: args.num_clips]
    clips = [records.decode(sources[split][int(i)]) for i in np.sort(chosen)]
    statistics = draw_classes(found, info) if info.classes else draw_statistics(found)
    _save(args.out, statistics=statistics, contact_sheet=draw_contact_sheet(clips, info))
    content = {name: dataclasses.asdict(statistics) for name, statistics in found.items()}
    (args.out / "statistics.json").write_text(json.dumps(content, indent=1) + "\n")
    return f"contact_sheet.png ({split}), statistics.png, statistics.json"


def _save(folder: pathlib.Path, **figures: figure.Figure) -> None:
    with matplotlib.rc_context({"axes.unicode_minus": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # of a name in Chinese, drawn as a box
        for name, drawn in figures.items():
            drawn.savefig(folder / f"{name}.png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Inspects a data set; after an error the process ends with one line and status 2, after Ctrl-C with 130."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("clips", type=pathlib.Path, help="folder of a data set")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("inspect"), help="folder for the pictures")
    parser.add_argument(
        "--split", choices=records.SPLITS,
        help="split to draw clips from; default: the one with the most labels, or all with --clip_id",
    )
    parser.add_argument(
        "--clip_id", action="append", default=[],
        help="show only this clip; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--num_clips", type=int, default=12, help="number of clips on the contact sheet")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice of clips for the contact sheet")
    args = parser.parse_args(argv)
    if not 1 <= args.num_clips <= 100:
        parser.error(f"--num_clips must be from 1 to 100, got {args.num_clips}")
    if len(args.clip_id) > 100:
        parser.error(f"--clip_id must be given at most 100 times, got {len(args.clip_id)}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    with terminal.errors_in_one_line(RuntimeError), terminal.interrupts():
        written = _show_named(args) if args.clip_id else _show_drawn(args)
    print(f"written to {args.out}: {written}")


if __name__ == "__main__":
    main()
