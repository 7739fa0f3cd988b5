"""Makes clips of sounds with classes: assigns recordings to shards and cuts the clips.

Shared by `data_prep.epic_sounds` and `data_prep.esc50`. A sound is stored whole, up to `--max_audio_s`. Which part of it a
model hears, and in how many windows, is chosen when the data set is read. Only `data_prep.guard` opens media files.
"""

import argparse
import collections
import dataclasses
from collections.abc import Iterator

from data_prep import command, guard, media, shards, storage, video_files
from data_prep.windows import Window, frame_times, num_samples
from mc3_jax.data import records

_MAX_AUDIO_S = 600.0  # more would be too much for pieces of shards, for readers and for the decoder's memory
# Segments may be annotated up to the end of a video, but its sound may end a little earlier.
_MISSING_S = 0.1


@dataclasses.dataclass(frozen=True)
class Sound:
    """An annotated sound.

    Attributes:
      clip_id: Id that is unique in the data set.
      recording: Recording that the sound was cut from; all sounds of a recording are in the same split.
      text: Name or description of the sound, "" if there is none.
      source: Source of the annotation.
      split: "train", "validation" or "test".
      start_s, stop_s: Start and end in the recording, seconds; an end of None is that of the recording.
      class_id: Index of the class, -1 if it is unknown.
      fold: Fold of the data set's own cross-validation, -1 if it has none.
      file: File that holds the recording, relative to the folder of media.
      hdf5_name: Name of the data set inside an HDF5 file, "" for a media file.
      problem: Reason why the sound can't become a clip, "" if it can.
    """

    clip_id: str
    recording: str
    text: str
    source: str
    split: str
    start_s: float = 0.0
    stop_s: float | None = None
    class_id: int = records.UNKNOWN
    fold: int = records.UNKNOWN
    file: str = ""
    hdf5_name: str = ""
    problem: str = ""


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options of sounds and those that all commands share; `name` is the data set's default name."""
    command.add_options(parser, name)
    add = parser.add_argument
    add("--max_audio_s", type=float, default=60.0, help="store at most so many seconds of a sound (default %(default)s)")
    add("--window_s", type=float, default=1.5, help="seconds of a sound that the reader returns (default %(default)s)")


def check_options(args: argparse.Namespace, beam_args: list[str]) -> None:
    """Checks the options of `add_options`.

    Raises:
      ValueError: One of them is wrong, or Beam's job server or Docker does not answer.
    """
    command.check_options(args, beam_args)
    for name in ("max_audio_s", "window_s"):
        if not 0.01 <= getattr(args, name) <= _MAX_AUDIO_S:
            raise ValueError(f"--{name} must be from 0.01 to {_MAX_AUDIO_S:g} s, got {getattr(args, name):g}")


def make_clips(item: dict, settings: dict) -> Iterator[records.Clip | shards.Reject]:
    """Yields a clip or a reject for every sound of a file.

    Args:
      item: {"file", "hdf5_name", "sounds": [fields of `Sound`]}; made by `plan_tasks`.
      settings: Settings of the conversion, made by `write_clips`.
    """
    sounds = [Sound(**fields) for fields in item["sounds"]]
    windows = [_window(sound, settings) for sound in sounds]
    for i, cut in _cut(item, windows, settings):
        sound, window = sounds[i], windows[i]
        if isinstance(cut, str):
            yield shards.Reject(sound.clip_id, sound.recording, *video_files.reason_of(cut, item))
            continue
        stop_s = window.start_s + len(cut.audio) / records.SAMPLE_RATE_HZ
        missing_s = window.stop_s - stop_s
        if sound.stop_s is not None and missing_s > _MISSING_S:
            detail = f"the last {missing_s:.3f} of {window.stop_s - window.start_s:.3f} s are missing"
            yield shards.Reject(sound.clip_id, sound.recording, "audio does not cover the clip", detail)
            continue
        start_us = round(window.start_s * 1e6)
        yield records.Clip(
            clip_id=sound.clip_id, video_uid=sound.recording, narration=sound.text, source=sound.source,
            time_us=start_us, start_us=start_us, stop_us=max(round(stop_s * 1e6), start_us + 1), frames=cut.frames,
            frame_times_us=cut.frame_times_us, frame_height=cut.height, frame_width=cut.width, audio=cut.audio,
            class_id=sound.class_id, fold=sound.fold,
        )  # fmt: skip


def _cut(item: dict, windows: list[Window], settings: dict) -> Iterator[tuple[int, media.Cut | str]]:
    """Returns what `guard.cut_windows` yields for a file, which may be in a bucket.

    A media file in a bucket is copied while it is decoded. An HDF5 file holds all recordings and may be larger than the disk,
    so only the parts that hold the sounds are read.
    """
    folder = settings["media_dir"]
    if not item["hdf5_name"]:
        return video_files.cut_windows(folder, item["file"], windows, settings)
    path, size, remote = storage.as_path(folder) / item["file"], item["video_bytes"], None
    if storage.is_remote(folder):
        remote = guard.Remote(size, storage.reader(path, size))
    hdf5, limits = (item["hdf5_name"], settings["hdf5_rate_hz"]), video_files.limits_of(settings)
    return guard.cut_windows(path, windows, short_side_px=0, limits=limits, hdf5=hdf5, remote=remote)


def _window(sound: Sound, settings: dict) -> Window:
    """Returns the window to cut: the sound, at most `max_audio_s` of it, and the frames over it if the clips hold frames."""
    stop_s = sound.start_s + settings["max_audio_s"]
    if sound.stop_s is not None:
        stop_s = min(stop_s, sound.stop_s)
    times = ()
    if settings["num_intervals"]:
        times = frame_times(sound.start_s, stop_s, settings["num_intervals"], settings["num_candidates"])
    return Window(sound.start_s, stop_s, times, open_end=True)


def choose(found: list[Sound]) -> tuple[list[Sound], list[shards.Reject]]:
    """Returns the sounds to cut, and a reject for every other sound.

    Raises:
      ValueError: A recording has sounds in two splits or folds.
    """
    chosen, rejects = [], []
    seen: set[str] = set()
    homes: dict[str, tuple[str, int]] = {}
    for sound in found:
        home = homes.setdefault(sound.recording, (sound.split, sound.fold))
        if home != (sound.split, sound.fold):
            raise ValueError(
                f"recording {sound.recording} has sounds in {home[0]} (fold {home[1]}) and in {sound.split} (fold "
                f"{sound.fold}): put all sounds of a recording into one split and fold"
            )
        reason = "same annotation twice" if sound.clip_id in seen else sound.problem
        seen.add(sound.clip_id)
        if reason:
            reason, _, detail = reason.partition(": ")
            rejects.append(shards.Reject(sound.clip_id, sound.recording, reason, detail))
        else:
            chosen.append(sound)
    return chosen, rejects


def plan_tasks(chosen: list[Sound], num_shards: int, media_dir: storage.Path) -> list[shards.ShardTask]:
    """Returns the shards to write: about `num_shards` in all, distributed over the splits by their number of sounds.

    Each split that has sounds gets at least one shard. A shard's task holds size and version of its files, so a rerun with
    other files redoes their shards.
    """
    hdf5 = {sound.file for sound in chosen if sound.hdf5_name}
    # Only the HDF5 file itself is looked up: a bucket's folder may hold many other files, which would all be listed.
    facts = {file: video_files.facts_of(storage.stat(media_dir / file)) for file in hdf5}.get
    if not hdf5:
        facts = video_files.facts(media_dir)
    tasks = []
    for split in records.SPLITS:
        mine = [sound for sound in chosen if sound.split == split]
        by_file = collections.defaultdict(list)
        for sound in mine:
            by_file[sound.recording, sound.file, sound.hdf5_name].append(dataclasses.asdict(sound))
        count = max(round(num_shards * len(mine) / max(len(chosen), 1)), 1)
        groups = shards.assign_shards(list({sound.recording for sound in mine}), count)
        home = {recording: i for i, group in enumerate(groups) for recording in group}
        items: list[list[dict]] = [[] for _ in groups]
        for (recording, file, name), fields in sorted(by_file.items()):
            items[home[recording]].append(
                {"file": file, **facts(file), "hdf5_name": name, "sounds": fields}
            )
        for i, part in enumerate(items):
            count_in = sum(len(item["sounds"]) for item in part)
            tasks.append(shards.ShardTask(split, i, len(groups), tuple(part), count_in))
    return tasks


def write_clips(
    args: argparse.Namespace, beam_args: list[str], media_dir: storage.Path, found: list[Sound], classes: list[str], *,
    pictures: bool = False, hdf5_rate_hz: int = 0,
) -> records.ClipsInfo:  # fmt: skip
    """Writes the data set of the sounds; see `command.write`.

    Args:
      args: Parsed options, those of `add_options` among them; with `pictures` also those of `command.add_picture_options`.
      beam_args: Beam's own options.
      media_dir: Folder of the media, an absolute path or in a bucket.
      found: All sounds read.
      classes: Names of the classes, in the order of their ids.
      pictures: Whether to cut video frames as well.
      hdf5_rate_hz: Sample rate of HDF5 files, which do not hold it, Hz.

    Raises:
      ValueError: There is nothing to write, or records were lost.
    """
    chosen, rejects = choose(found)
    if rejects and all(reject.reason == video_files.MISSING for reject in rejects) and not chosen:
        first = rejects[0].detail or rejects[0].video_uid
        raise ValueError(f"{media_dir} has no file for any of {len(found)} sounds, such as {first}: name another folder")
    tasks = plan_tasks(chosen, command.num_shards(args, len(chosen)), media_dir)
    frames, quality = {"num_intervals": 0, "num_candidates": 0, "short_side_px": 0}, 0
    if pictures:
        frames = {
            "num_intervals": args.num_intervals, "num_candidates": args.num_candidates, "short_side_px": args.short_side
        }  # fmt: skip
        quality = args.jpeg_quality
    settings = {
        "cutting": media.VERSION, "media_dir": str(media_dir), "max_audio_s": args.max_audio_s,
        "hdf5_rate_hz": hdf5_rate_hz, **frames, "jpeg_quality": quality, "cpu_limit_s": list(args.cpu_limit),
        "memory_limit_mb": args.memory_limit,
    }  # fmt: skip
    most = num_samples(args.max_audio_s)
    info = records.ClipsInfo(
        name=args.name, window_s=(0.0, args.window_s), canvas_px=(frames["short_side_px"],) * 2, **frames,
        num_samples=num_samples(args.window_s), verbs=[], nouns=[], splits={}, classes=classes, max_samples=most,
    )  # fmt: skip
    long = sum(sound.stop_s is not None and sound.stop_s - sound.start_s > args.max_audio_s for sound in chosen)
    if long:
        print(f"{long} of {len(chosen)} sounds are longer than --max_audio_s {args.max_audio_s:g}: their rest is cut off")
    info = command.write(args, beam_args, tasks, make_clips, settings, info, rejects, len(found))
    full = sum(int((info.clip_samples(split) == most).sum()) for split in info.splits)
    if full > long:  # the length of a whole file is known only once it was read
        print(f"{full - long} more sounds have the full length of --max_audio_s {args.max_audio_s:g}: any rest is cut off")
    return info
