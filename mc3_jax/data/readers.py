"""Makes batches ahead of those who take them, by Grain's threads or worker processes."""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import grain.experimental as grain_experimental
import grain.python as grain
import numpy as np
from absl import flags

from mc3_jax.data import damage, memory as memory_lib, transforms

Batch = dict[str, np.ndarray]
Rows = Callable[[int], transforms.Sample]  # of the number of a row in all batches in a line

_LARGE = 1 << 16  # bytes from which on an array comes into memory that is taken again
# Rows that a worker reads before it decodes their pictures: each kind of work finds its code in the processor's cache.
# Threads gain nothing by it: reading holds Python's lock.
_AT_ONCE = 64


def read(
    rows: Rows,
    video_shape: tuple[int, ...] | None,
    steps: range,
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    num_threads: int,
    num_workers: int,
    prefetch: int,
) -> Iterator[Batch]:
    """Yields this process's rows of the batches of `steps`.

    A thread makes a batch and decodes its pictures to where they stay: they are copied nowhere on a CPU, and once, to the
    device, elsewhere. So does a worker: its memory is this process's as well.

    Args:
      rows: Makes a row.
      video_shape: Of a row's pictures; None where none are wanted.
      steps: Numbers of the batches.
      batch_size: Global; a multiple of `process_count`.
      process_index, process_count: Which rows.
      num_threads: That make batches.
      num_workers: Processes that do it instead, if more than 0.
      prefetch: Batches made ahead; at least one a thread or worker.

    Raises:
      ValueError: The batch does not spread evenly over the processes, or workers are asked for on a system that is not
        Linux.
      DataError: On the way, a picture can't be decoded, or what `rows` raises.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of the {process_count} processes, got {batch_size}")
    local = batch_size // process_count
    make = _MakeBatch(rows, video_shape, batch_size, process_index * local, local, 1, memory_lib.Memory())
    numbers = grain.MapDataset.range(steps.start, steps.stop)
    if not num_workers:
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads))
        return iter(numbers.map(make).to_iter_dataset(options))
    if not hasattr(os, "memfd_create"):
        raise ValueError(f"config.data.num_workers = {num_workers}: worker processes need Linux, set it to 0")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # no command has, and Grain asks flags of its own: they keep their defaults
    shared = memory_lib.SharedMemory()
    batches = numbers.map(dataclasses.replace(make, at_once=_AT_ONCE, memory=shared)).map(shared.hand_over)
    one_by_one = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # What is not in shared memory by now is small: Grain is to send it as it is.
    small = grain_experimental.DatasetOptions(min_shm_size=_LARGE)
    one_by_one = grain_experimental.WithOptionsIterDataset(one_by_one, small)
    each = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=max(prefetch // num_workers, 1))
    return _of_workers(one_by_one.mp_prefetch(each, worker_init_fn=_begin_worker))


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """Makes the `local` rows of a step from row `first` on, of which `at_once` are read before they are decoded."""

    rows: Rows
    video_shape: tuple[int, ...] | None
    batch_size: int
    first: int
    local: int
    at_once: int
    memory: memory_lib.Memory | memory_lib.SharedMemory

    def __call__(self, step: int) -> Batch:
        first = int(step) * self.batch_size + self.first
        video = None
        if self.video_shape is not None:
            video = self.memory.take((self.local, *self.video_shape), np.uint8)
        rows: list[Batch] = []
        for start in range(0, self.local, self.at_once):
            for sample in [self.rows(first + i) for i in range(start, min(start + self.at_once, self.local))]:
                if video is not None:
                    with damage.blaming(sample.place):
                        size = transforms.decode_frames(sample.jpegs, video[len(rows)], sample.clip_id)
                    sample.arrays["video_size"] = size
                rows.append(sample.arrays)
        batch = {name: self._stack([row[name] for row in rows]) for name in rows[0]}
        return batch if video is None else batch | {"video": video}

    def _stack(self, values: list[np.ndarray | np.generic]) -> np.ndarray:
        if len(values) * values[0].nbytes < _LARGE:
            return np.array(values)  # of numbers, in a tenth of the time of np.stack
        return np.stack(values, out=self.memory.take((len(values), *values[0].shape), values[0].dtype))


def _of_workers(dataset: grain.IterDataset) -> Iterator[Batch]:
    """Yields the batches, and ends the workers with them."""
    borrowed, batches = memory_lib.Borrowed(), None
    try:
        with _signals_wait():  # workers begin here
            batches = iter(dataset)
            batch = next(batches, None)
        workers = {child.pid: child for child in multiprocessing.active_children()}
        while batch is not None:
            yield _take_over(borrowed, batch, workers)
            batch = next(batches, None)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise _died(int(re.search(r"exit code (-?\d+)", str(error))[1])) from None
    finally:
        if batches is not None:
            batches.close()


def _take_over(
    borrowed: memory_lib.Borrowed, batch: dict[str, np.ndarray | memory_lib.Arrival], workers: dict[int, BaseProcess]
) -> Batch:
    try:
        return borrowed.take_over(batch)
    except OSError as error:
        process = next(value.process for value in batch.values() if isinstance(value, memory_lib.Arrival))
        worker = workers.get(process)
        if worker is None:  # it ended while the first batch was made
            raise _died(None) from None
        worker.join(timeout=1)  # where it is about to end
        if worker.exitcode is not None:
            raise _died(worker.exitcode) from None
        raise ChildProcessError(
            f"the memory of a worker that reads clips can't be opened ({error}): take fewer --config.data.num_workers, 0 for "
            "threads"
        ) from None


def _died(status: int | None) -> ChildProcessError:
    how = "how is not known" if status is None else f"signal {-status}" if status < 0 else f"status {status}"
    fix = ": if there is too little memory, take fewer --config.data.num_workers" if status in (None, -signal.SIGKILL) else ""
    return ChildProcessError(f"a worker that reads clips died ({how}){fix}")


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Has signals to end wait. Processes begun meanwhile never get them: a whole job is sent them, and its parent decides."""
    resource_tracker.ensure_running()  # as it starts it has these signals come through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_index: int, _count: int) -> None:
    """Has a worker keep the memory that it frees, and end when its parent ends, however it does."""
    memory_lib.keep_freed()

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
