"""Batches of clips from ArrayRecord shards, by Grain's threads.

A training batch is a pure function of (seed, step): row r of step t is sample t * B + r of an endless stream that is
shuffled anew each epoch. Processes read contiguous blocks of rows. So a resumed run needs the step alone, and the number
of processes and threads may change.
"""

import os
from collections.abc import Iterator

import grain.python as grain
import numpy as np

from mc3_jax.data import records, transforms
from mc3_jax.data.transforms import Tokenize

Batch = dict[str, np.ndarray]


class ClipSource:
    """Random access to the clips of a split.

    Attributes:
      info: What `clips.json` says.
      split: Name.
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
        expected = self.info.splits[split].num_clips
        if len(self._records) != expected:
            # The raw reader takes a truncated shard for an empty one.
            raise ValueError(
                f"{folder}: the shards of split {split!r} hold {len(self._records)} clips, {records.CLIPS_FILE} says "
                f"{expected}: a shard is damaged; convert again"
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


def train_batches(
    source: ClipSource,
    tokenize: Tokenize,
    *,
    batch_size: int,
    seed: int,
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

    def load(clip: records.Clip, rng: np.random.Generator) -> Batch:
        return transforms.make_sample(clip, source.info, tokenize, rng)

    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None).random_map(load)
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
