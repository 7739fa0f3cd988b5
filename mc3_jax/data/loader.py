"""Batches of clips from ArrayRecord shards, by Grain's threads.

A training batch is a pure function of (seed, step): row r of step t is sample t * B + r of an endless stream that is
shuffled anew each epoch (`epoch_order`). Processes read contiguous blocks of rows. So a resumed run needs the step alone,
and the number of processes and threads may change.
"""

import functools
import os
from collections.abc import Iterator, Sequence

import grain.python as grain
import numpy as np
from jaxtyping import Int

from mc3_jax.data import records, transforms
from mc3_jax.data.transforms import Tokenize

Batch = dict[str, np.ndarray]

# More samples than any run reads: grain's indices are 64 bit, and it multiplies some of them by the batch size.
_ENDLESS = 1 << 48


class ClipSource:
    """Random access to the clips of a split.

    Attributes:
      info: What `clips.json` says.
      split: Name.
      video_clips: Clips of each video, in the order of the clips.
    """

    def __init__(self, folder: str | os.PathLike, split: str):
        """Opens a split.

        Raises:
          ValueError: No such data, split or shards; see `records.ClipsInfo`. Or the shards hold another number of clips
            than `clips.json` says.
        """
        self.info = records.ClipsInfo.load(folder)
        self.split = split
        paths = self.info.shard_paths(folder, split)
        self._records = grain.ArrayRecordDataSource(paths)
        self.video_clips = [count for shard in self.info.splits[split].shards for count in shard.video_clips]
        expected = self.info.splits[split].num_clips
        if len(self._records) != expected:
            # The raw reader takes a truncated shard for an empty one.
            raise ValueError(
                f"{folder}: the shards of split {split!r} hold {len(self._records)} clips, {records.CLIPS_FILE} says "
                f"{expected}: a shard is damaged; convert again"
            )
        if sum(self.video_clips) != expected:
            raise ValueError(
                f"{folder}: by {records.CLIPS_FILE} the videos of split {split!r} have {sum(self.video_clips)} clips, its "
                f"shards {expected}: convert again"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> records.Clip:
        return records.decode(self._records[index])


def open_split(folder: str | os.PathLike, split: str, num_frames: int) -> ClipSource:
    """Returns a split whose clips have as many frames as the model takes.

    Args:
      folder: Of the data set.
      split: "train", "validation" or "test".
      num_frames: `config.model.video.num_frames`.

    Raises:
      ValueError: The data can't be read, are empty or were built for another frame count.
    """
    if not folder:
        raise ValueError("config.data.dir is empty: name the folder made by `python -m data_prep.ego4d`")
    source = ClipSource(folder, split)
    if source.info.num_intervals != num_frames:
        raise ValueError(
            f"{folder} was built with {source.info.num_intervals} frame intervals per clip but "
            f"config.model.video.num_frames is {num_frames}: set it, or convert with --num_intervals {num_frames}"
        )
    return source


def epoch_order(video_clips: Sequence[int], clips_per_video: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """Returns every clip once, in the order of an epoch.

    Args:
      video_clips: Clips of each video, in the order of the clips.
      clips_per_video: 1 shuffles the clips. Above, those of a video are shuffled among themselves and cut into groups of
        this many, the last of a video being smaller, and the groups are shuffled.
      seed, epoch: Of the shuffle.
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


def train_batches(
    source: ClipSource,
    tokenize: Tokenize,
    *,
    batch_size: int,
    seed: int,
    clips_per_video: int = 1,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 16,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Yields this process's rows of step `start_step`, `start_step + 1`, ... without end.

    Args:
      source: Training split.
      tokenize: Text to ids and mask.
      batch_size: Global; a multiple of `process_count`.
      seed: Of order and choice of frames.
      clips_per_video: See `epoch_order`.
      start_step: First step.
      process_index, process_count: Which rows.
      num_threads: That read and decode.
      prefetch: Batches read ahead.

    Yields:
      `audio` int16 [b, samples], `video` uint8 [b, t, h, w, 3], `video_size` int32 [b, 2], `text_ids`, `text_mask`
      int32 [b, l], `row` int32 [b].
    """
    local = batch_size // process_count
    rows = (process_index * local + np.arange(local)).astype(np.int32)

    @functools.lru_cache(maxsize=2)  # reading ahead crosses from one epoch to the next
    def order(epoch: int) -> np.ndarray:
        return epoch_order(source.video_clips, clips_per_video, seed, epoch)

    def load(sample: int) -> Batch:
        epoch, place = divmod(int(sample), len(source))
        clip = source[int(order(epoch)[place])]
        rng = np.random.default_rng([seed, epoch, 1 + place])  # a 0 at the end would be the stream of the epoch's order
        return transforms.make_sample(clip, source.info, tokenize, rng)

    dataset = grain.MapDataset.range(_ENDLESS).map(load)
    dataset = dataset.batch(local)[start_step * process_count + process_index :: process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return ({**batch, "row": rows} for batch in dataset.to_iter_dataset(options))


def eval_batches(
    source: ClipSource,
    tokenize: Tokenize,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 16,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Yields this process's rows of every clip in order, once; the last batch is filled up with rows not `valid`.

    Args:
      source: Any split.
      tokenize, batch_size, process_index, process_count, num_threads, prefetch: As for `train_batches`.

    Yields:
      As `train_batches`, and `index` int32 [b] in the split, `label`, `verb_id`, `noun_id` int32 [b], `valid` bool [b].
    """
    local = batch_size // process_count
    num_batches = -(-len(source) // batch_size)

    def load(i: int) -> Batch:
        index = min(int(i), len(source) - 1)
        clip = source[index]
        sample = transforms.make_sample(clip, source.info, tokenize, None)
        numbers = {"index": index, "label": clip.label, "verb_id": clip.verb_id, "noun_id": clip.noun_id}
        sample |= {name: np.int32(value) for name, value in numbers.items()}
        return sample | {"row": np.int32(i % batch_size), "valid": np.bool_(i < len(source))}

    dataset = grain.MapDataset.range(num_batches * batch_size).map(load)
    dataset = dataset.batch(local)[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))
