"""Reads clips from ArrayRecord shards, and decides which clips make up which batch.

A training batch is a pure function of (seed, step): row r of step t is sample t * B + r of an endless stream that is
shuffled anew each epoch (`epoch_order`). Each process reads a contiguous block of rows. So a run resumes from its step
number alone, and the number of processes, threads and workers may change between runs.
"""

import bisect
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain.python as grain
import numpy as np
from jaxtyping import Bool, Int

from mc3_jax.data import damage, readers, records, transforms
from mc3_jax.data.readers import Batch
from mc3_jax.data.transforms import Tokenize

_ENDLESS = 1 << 48  # more steps than any run takes; Grain's indices have 64 bits
_NUMBERS = ("label", "verb_id", "noun_id", "class_id", "fold")  # fields of a clip that evaluation batches hold as well


class ClipSource:
    """Random access to the clips of a split, or of some folds of it.

    Attributes:
      info: Content of `clips.json`.
      split: Name of the split, or several names joined by "+".
      video_clips: Number of clips of each video; clips of a video are consecutive, and videos in the order of the clips.
      clip_samples: Number of audio samples of each clip, [n].
      pictures: Whether batches hold video frames.
    """

    def __init__(
        self, folder: str | os.PathLike, split: str, folds: Sequence[int] = (), *, pictures: bool = True,
        option: str = "--config.data.split",
    ):  # fmt: skip
        """Opens a split.

        Args:
          folder: Folder of the data set.
          split: Name of the split. Several names joined by "+" are concatenated; some of them may be empty, not all.
          folds: Only clips of these folds are kept; empty keeps all. Finding the folds reads every record once.
          pictures: Whether batches hold video frames.
          option: Command-line option that names the split, for error messages.

        Raises:
          ValueError: The data set, the split or a shard is missing or damaged (see `records.ClipsInfo`), a split is named
            twice, or the split or the folds have no clips.
          DataError: A shard can't be opened, or holds another number of clips than `clips.json` says. With `folds`, also
            a record that can't be read.
        """
        self.info = records.ClipsInfo.load(folder)
        self.split = split
        self.pictures = pictures
        names = _filled(self.info, folder, split, option)
        self._paths = [path for name in names for path in self.info.shard_paths(folder, name)]
        shards = [shard for name in names for shard in self.info.splits[name].shards]
        self._ends = np.cumsum([shard.num_clips for shard in shards]).tolist()
        self._records = _open_shards(self._paths, shards)
        counts = [count for shard in shards for count in shard.video_clips]
        expected = sum(self.info.splits[name].num_clips for name in names)
        if sum(counts) != expected or self._ends[-1] != expected:
            raise ValueError(
                f"{folder}: {records.CLIPS_FILE} counts {expected} clips in split {split!r}, but {sum(counts)} in its videos "
                f"and {self._ends[-1]} in its shards: convert again"
            )
        self._places = np.arange(expected)
        if folds:
            found = np.array([self[i].fold for i in range(expected)])
            self._places = np.flatnonzero(np.isin(found, folds))
            if len(self._places) == 0:
                told = sorted({int(fold) for fold in found})
                raise ValueError(f"{folder}: split {split!r} has no clips of the fold(s) {list(folds)}, only of {told}")
            video = np.repeat(np.arange(len(counts)), counts)[self._places]
            counts = [int(count) for count in np.bincount(video) if count]
        self.video_clips = counts
        self.clip_samples = np.concatenate([self.info.clip_samples(name) for name in names])[self._places]

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the shards' own SHA-256 and of the indices of the clips that are kept."""
        shards = [shard.sha256 for name in self.split.split("+") for shard in self.info.splits[name].shards]
        return hashlib.sha256("\n".join(shards).encode() + self._places.astype("<i8").tobytes()).hexdigest()

    @property
    def video_shape(self) -> tuple[int, ...] | None:
        """Shape (t, h, w, 3) of a clip's video frames in a batch; None if batches hold no frames."""
        return (self.info.num_intervals, *self.info.canvas_px, 3) if self.pictures else None

    @property
    def videos(self) -> Int[np.ndarray, " n"]:
        """Index of each clip's video, counted from 0."""
        return np.repeat(np.arange(len(self.video_clips)), self.video_clips)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> records.Clip:
        with damage.blaming(self.place(index)):
            clip = records.decode(self._records[int(self._places[index])])
            records.check(clip, self.info)
            return clip

    def has_texts(self) -> bool:
        """Returns whether any of up to 64 clips, spread over all, has a text; windows of video without narrations have none.

        Raises:
          DataError: One of these clips can't be read.
        """
        some = np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))
        return any(self[int(index)].narration.strip() for index in some)

    def rows_of(self) -> dict[str, tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
        """Returns path of a shard → (indices of this source's clips that lie in it, indices of their records there)."""
        shards = np.searchsorted(self._ends, self._places, side="right")
        records_ = self._places - np.array([0, *self._ends])[shards]
        rows = {self._paths[shard]: np.flatnonzero(shards == shard) for shard in np.unique(shards)}
        return {path: (inside, records_[inside]) for path, inside in rows.items()}

    def place(self, index: int) -> damage.Place:
        """Returns the shard and the record in which a clip lies."""
        record = int(self._places[index])
        shard = bisect.bisect_right(self._ends, record)
        return damage.Place(self._paths[shard], record - (self._ends[shard - 1] if shard else 0))


def are_shared(one: ClipSource, other: ClipSource) -> Bool[np.ndarray, " n"]:
    """Returns which clips of `one` are also in `other`, that is, the same records of the same shards."""
    mine, theirs, shared = one.rows_of(), other.rows_of(), np.zeros(len(one), bool)
    for shard in mine.keys() & theirs.keys():
        rows, records_ = mine[shard]
        shared[rows] = np.isin(records_, theirs[shard][1])
    return shared


def _filled(info: records.ClipsInfo, folder: str | os.PathLike, split: str, option: str) -> list[str]:
    """Returns those of the names in `split`, where "+" joins them, whose splits have clips.

    Raises:
      ValueError: None of them has clips, one does not exist, or one is named twice.
    """
    names = split.split("+")
    for name in names:
        if name not in info.splits:
            raise ValueError(f"{folder} has no split {name!r}, only {sorted(info.splits)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{option}={split} names a split twice, whose clips would count twice: name each once")
    filled = [name for name in names if info.splits[name].num_clips]
    if not filled:
        others = [name for name, found in info.splits.items() if found.num_clips]
        set_it = f"set {option}={others[0]}" if others else "convert again"
        convert = "" if info.classes or not others else ", or convert with --splits CSV"
        raise ValueError(f"{folder} has no clips in {split!r} ({info.describe_splits()}): {set_it}{convert}")
    return filled


def _open_shards(paths: list[str], shards: list[records.Shard]) -> grain.ArrayRecordDataSource:
    """Returns the records of all shards, in order.

    Raises:
      DataError: A shard can't be opened, or holds another number of clips than `clips.json` says.
      ValueError: Each shard can be opened alone, but not all together.
    """
    # ArrayRecord does not say which file it failed to open, and reads a truncated file as an empty one without an error.
    # So if the total is wrong, each shard is opened by itself to find the one at fault.
    try:
        opened = grain.ArrayRecordDataSource(paths)
        if len(opened) == sum(shard.num_clips for shard in shards):
            return opened
        problem = f"they hold {len(opened)} clips"
    except RuntimeError as error:
        problem = str(error)
    for path, shard in zip(paths, shards, strict=True):
        with damage.blaming(damage.Place(path)):
            found = len(grain.ArrayRecordDataSource([path]))
            if found != shard.num_clips:
                raise ValueError(f"it holds {found} clips, {records.CLIPS_FILE} says {shard.num_clips}")
    raise ValueError(f"the {len(paths)} shards beginning with {paths[0]} can't be opened together: {problem}")


def open_split(
    folder: str | os.PathLike, split: str, num_frames: int, folds: Sequence[int] = (), *,
    option: str = "--config.data.split",
) -> ClipSource:  # fmt: skip
    """Returns a split, after checking that its clips have as many frames as the model takes.

    Args:
      folder: Folder of the data set.
      split: "train", "validation" or "test", or several joined by "+".
      num_frames: Frames per clip that the model takes, `config.model.video.num_frames`; 0 reads no frames, even if the
        data set has some.
      folds: Only clips of these folds are kept; empty keeps all.
      option: Command-line option that names the split, for error messages.

    Raises:
      ValueError: `folder` is empty, the data can't be read or have no clips (see `ClipSource`), they hold no frames though
        the model needs them, or they were built for another number of frames.
    """
    if not folder:
        raise ValueError("config.data.dir is empty: set it to the folder made by `python -m data_prep.ego4d`")
    source = ClipSource(folder, split, folds, pictures=num_frames > 0, option=option)
    if num_frames and source.info.num_intervals == 0:
        raise ValueError(f"{folder} holds sounds without video, but the model takes {num_frames} frames per clip")
    if num_frames and source.info.num_intervals != num_frames:
        raise ValueError(
            f"{folder} was built with {source.info.num_intervals} frame intervals per clip but "
            f"config.model.video.num_frames is {num_frames}: set it, or convert with --num_intervals {num_frames}"
        )
    return source


def epoch_order(video_clips: Sequence[int], clips_per_video: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """Returns a permutation of the clips' indices, the order in which an epoch visits them.

    Args:
      video_clips: Number of clips of each video, in the order of the clips.
      clips_per_video: 1 shuffles all clips. If larger, the clips of each video are shuffled and cut into groups of this
        size, the last group of a video possibly smaller. Then the groups are shuffled.
      seed, epoch: Together they seed the shuffle.
    """
    rng = np.random.default_rng([seed, epoch])
    counts = np.asarray(video_clips)
    order = rng.permutation(counts.sum())
    if clips_per_video == 1:
        return order
    video = np.repeat(np.arange(len(counts)), counts)
    order = order[np.argsort(video[order], kind="stable")]  # video by video, each shuffled
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    num_groups = -(-counts // clips_per_video)
    group = np.repeat(np.cumsum(num_groups) - num_groups, counts) + place // clips_per_video
    return order[np.argsort(rng.permutation(num_groups.sum())[group], kind="stable")]


def step_clips(
    source: ClipSource, step: int, *, batch_size: int, seed: int, clips_per_video: int = 1
) -> Int[np.ndarray, " b"]:
    """Returns the index in the split of each row's clip in a training batch; see `train_batches`."""
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), len(source))
    orders = {int(e): epoch_order(source.video_clips, clips_per_video, seed, int(e)) for e in np.unique(epochs)}
    return np.array([orders[e][place] for e, place in zip(epochs.tolist(), places.tolist(), strict=True)])


def count_repeats(
    source: ClipSource, steps: Iterable[int], *, batch_size: int, seed: int, clips_per_video: int = 1
) -> tuple[int, int]:
    """Returns how many training batches hold a clip more than once, and the number of repeated rows in all of them.

    A batch can repeat a clip only if it spans the border between two epochs or is larger than the split.

    Args:
      source: Training split.
      steps: Steps whose batches are looked at.
      batch_size, seed, clips_per_video: See `train_batches`.
    """
    across = [step for step in steps if step * batch_size % len(source) + batch_size > len(source)]
    detail = {"batch_size": batch_size, "seed": seed, "clips_per_video": clips_per_video}
    repeats = [batch_size - len(np.unique(step_clips(source, step, **detail))) for step in across]
    return sum(count > 0 for count in repeats), sum(repeats)


def train_batches(
    source: ClipSource,
    tokenize: Tokenize,
    *,
    batch_size: int,
    seed: int,
    clips_per_video: int = 1,
    num_samples: int | None = None,
    silence_db: float = 0.0,
    start_step: int = 0,
    num_steps: int = _ENDLESS,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 16,
    num_workers: int = 0,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Yields this process's rows of the batches of steps `start_step`, `start_step + 1`, ...

    Args:
      source: Training split.
      tokenize: Function text → (ids, mask).
      batch_size: Global batch size; a multiple of `process_count`.
      seed: Seed of the order of clips, the choice of frames and the crops of the sound.
      clips_per_video: See `epoch_order`.
      num_samples: Samples of audio per row, a random crop of clips that have more; None takes the data set's `num_samples`.
      silence_db: If above 0, these crops avoid silence; see `transforms.make_sample`.
      start_step: First step.
      num_steps: Number of batches; by default there is no end.
      process_index, process_count: This process's index and the number of processes, which share out the rows.
      num_threads: Threads that read and decode.
      num_workers: If above 0, this many processes read and decode instead: Python's lock lets threads use some five cores.
      prefetch: Batches read ahead. At least one per thread or worker is, since each makes a whole batch.

    Yields:
      Dict with this process's b rows: `audio` int16 [b, samples], `audio_start` int32 [b], the position of its first sample
      in the clip, `audio_length` int32 [b], how many samples are sound before zeros pad the rest, `text_ids` and `text_mask`
      int32 [b, l], `index` int32 [b] in the split and `row` int32 [b] in the global batch. If `source.pictures`, also
      `video` uint8 [b, t, h, w, 3] and `video_size` int32 [b, 2]. If the data set has classes, also `class_id` int32 [b].

    Raises:
      ValueError: The batch can't be divided evenly among the processes, or workers are requested on a system that is not
        Linux.
      DataError: While iterating, a clip can't be read or is not what `clips.json` promises.
    """

    order = functools.partial(epoch_order, source.video_clips, clips_per_video, seed)
    rows = _TrainRows(source, tokenize, batch_size, seed, num_samples, silence_db, _Remember(order, 2))
    steps = range(start_step, start_step + num_steps)
    return readers.read(
        rows, source.video_shape, steps, batch_size=batch_size, process_index=process_index,
        process_count=process_count, num_threads=num_threads, num_workers=num_workers, prefetch=prefetch,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _TrainRows:
    """Makes the row with a given number, counted through all batches; see `readers.read`.

    `order` maps an epoch to its `epoch_order`. It caches two epochs, since reading ahead crosses from one into the next.
    """

    source: ClipSource
    tokenize: Tokenize
    batch_size: int
    seed: int
    num_samples: int | None
    silence_db: float
    order: Callable[[int], np.ndarray]

    def __call__(self, number: int) -> transforms.Sample:
        epoch, place = divmod(number, len(self.source))
        index = int(self.order(epoch)[place])
        clip = self.source[index]
        # NumPy pads seeds with zeros, so [seed, epoch, 0] would give the random numbers that shuffle the epoch.
        rng = np.random.default_rng([self.seed, epoch, 1 + place])
        sample = transforms.make_sample(
            clip, self.source.info, self.tokenize, rng,
            pictures=self.source.pictures, num_samples=self.num_samples, silence_db=self.silence_db,
            place=self.source.place(index),
        )  # fmt: skip
        sample.arrays.update(index=np.int32(index), row=np.int32(number % self.batch_size))
        if self.source.info.classes:
            sample.arrays["class_id"] = np.int32(clip.class_id)
        return sample


def eval_batches(
    source: ClipSource,
    tokenize: Tokenize,
    *,
    batch_size: int,
    num_samples: int | None = None,
    hop_samples: int | None = None,
    silence_db: float = 0.0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 16,
    num_workers: int = 0,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Yields this process's rows of batches that hold every clip once, in order; rows that fill up the last are not `valid`.

    Args:
      source: Any split.
      num_samples: Samples of audio per row, the middle of clips that have more; None takes the data set's `num_samples`.
      hop_samples: If given, a clip has one row per window of `transforms.audio_windows` with this hop, not just its middle.
      silence_db: If above 0, windows that `transforms.loud_windows` finds silent are not `valid` either.
      tokenize, batch_size, process_index, process_count, num_threads, num_workers, prefetch: As in `train_batches`.

    Yields:
      Dict as from `train_batches`, and always `label`, `verb_id`, `noun_id`, `class_id`, `fold` int32 [b], `valid` bool [b].

    Raises:
      ValueError: The hop is below 1, the batch can't be divided evenly among the processes, or workers are requested on a
        system other than Linux.
      DataError: While iterating, a clip can't be read or is not what `clips.json` promises.
    """
    if hop_samples is not None and hop_samples < 1:
        raise ValueError(f"hop_samples must be at least 1, got {hop_samples}")
    size = source.info.num_samples if num_samples is None else num_samples
    windows = np.ones(len(source), np.int64)
    if hop_samples is not None:
        windows = transforms.num_windows(source.clip_samples, size, hop_samples)
    read = functools.partial(_read_windows, source, size, hop_samples, silence_db)
    # The windows of a clip are consecutive rows, so its record is decoded once if it stays cached.
    read = read if hop_samples is None else _Remember(read, 1 if num_workers else max(num_threads, 1))
    rows = _EvalRows(source, tokenize, batch_size, size, hop_samples, windows, np.cumsum(windows), read)
    steps = range(-(-int(windows.sum()) // batch_size))
    return readers.read(
        rows, source.video_shape, steps, batch_size=batch_size, process_index=process_index,
        process_count=process_count, num_threads=num_threads, num_workers=num_workers, prefetch=prefetch,
    )  # fmt: skip


def _read_windows(
    source: ClipSource, size: int, hop_samples: int | None, silence_db: float, index: int
) -> tuple[records.Clip, np.ndarray, np.ndarray]:
    """Returns (clip, first sample of each window [w], whether each counts as sound [w]).

    Without a hop there is one window, whose start is not used.
    """
    clip = source[index]
    if hop_samples is None:
        return clip, np.zeros(1, np.int64), np.ones(1, bool)
    if len(clip.audio) != source.clip_samples[index]:
        with damage.blaming(source.place(index)):
            raise ValueError(
                f"clip {clip.clip_id} holds {len(clip.audio)} samples, {records.CLIPS_FILE} counts "
                f"{source.clip_samples[index]}"
            )
    starts = transforms.audio_windows(len(clip.audio), size, hop_samples)
    if silence_db > 0:
        return clip, starts, transforms.loud_windows(clip.audio, size, starts, silence_db)
    return clip, starts, np.ones(len(starts), bool)


@dataclasses.dataclass(frozen=True)
class _EvalRows:
    """Makes the row with a given number, counted through all batches; numbers past the last row repeat it, not `valid`.

    Attributes:
      windows: Number of rows (windows) of each clip, [n].
      ends: Cumulative sum of `windows`: the rows of clip i end before row `ends[i]`.
      read: Maps the index of a clip to what `_read_windows` returns for it.
    """

    source: ClipSource
    tokenize: Tokenize
    batch_size: int
    size: int
    hop_samples: int | None
    windows: np.ndarray
    ends: np.ndarray
    read: Callable[[int], tuple]

    def __call__(self, number: int) -> transforms.Sample:
        num_rows = int(self.ends[-1])
        place = min(number, num_rows - 1)
        index = int(np.searchsorted(self.ends, place, side="right"))
        clip, starts, counted = self.read(index)
        window = place - self.ends[index] + self.windows[index]
        start = None if self.hop_samples is None else int(starts[window])
        sample = transforms.make_sample(
            clip, self.source.info, self.tokenize, None,
            pictures=self.source.pictures, num_samples=self.size, audio_start=start, place=self.source.place(index),
        )  # fmt: skip
        numbers = {"index": index, "row": number % self.batch_size} | {name: getattr(clip, name) for name in _NUMBERS}
        sample.arrays.update({name: np.int32(value) for name, value in numbers.items()})
        sample.arrays["valid"] = np.bool_(number < num_rows and counted[window])
        return sample


class _Remember:
    """Like `functools.lru_cache`, but can be pickled and sent to a worker, where it starts empty."""

    def __init__(self, function: Callable, maxsize: int):
        self._made_of = function, maxsize
        self._remember = functools.lru_cache(maxsize)(function)

    def __call__(self, *arguments):
        return self._remember(*arguments)

    def __reduce__(self):
        return _Remember, self._made_of
