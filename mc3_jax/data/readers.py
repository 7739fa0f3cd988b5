"""Makes batches ahead of time, in Grain's threads or worker processes."""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import sys
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
Rows = Callable[[int], transforms.Sample]  # makes a row from its number, counted through all batches

_LARGE = 1 << 16  # bytes; arrays of at least this size are placed in buffers that are reused
# Rows that a worker reads before it decodes their frames, so that the code of each task stays in the processor's cache.
# Threads gain nothing from it, since reading holds Python's lock.
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

    A thread makes a whole batch and decodes video frames straight into the batch's array. This array is not copied again on
    a CPU, and once, to the device, elsewhere. The same holds for worker processes, which share their memory with this one.

    Args:
      rows: Makes a row from its number: row r of step t has number t * `batch_size` + r.
      video_shape: Shape (t, h, w, 3) of a row's video frames; None makes batches without frames.
      steps: Steps whose batches are made.
      batch_size: Global batch size; a multiple of `process_count`.
      process_index, process_count: This process's index and the number of processes, which share out the rows.
      num_threads: Threads that make batches.
      num_workers: If above 0, this many processes make the batches instead.
      prefetch: Batches made ahead; at least one per thread or worker.

    Raises:
      ValueError: The batch can't be divided evenly among the processes, or workers are requested on a system that is not
        Linux.
      DataError: While iterating, a frame can't be decoded, or `rows` raises it.
      ChildProcessError: While iterating, a worker died or its memory can't be opened.
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
    _check_not_started_by_import()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags of its own, which no command parses: they keep their defaults
    shared = memory_lib.SharedMemory()
    batches = numbers.map(dataclasses.replace(make, at_once=_AT_ONCE, memory=shared)).map(shared.hand_over)
    one_by_one = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # Arrays that are not in shared memory by now are small: Grain should pickle them, not put them into its own.
    small = grain_experimental.DatasetOptions(min_shm_size=_LARGE)
    one_by_one = grain_experimental.WithOptionsIterDataset(one_by_one, small)
    each = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=max(prefetch // num_workers, 1))
    return _of_workers(one_by_one.mp_prefetch(each, worker_init_fn=_begin_worker))


def _check_not_started_by_import() -> None:
    """Ends this process in one line if it is itself a worker, which imports the script that started it and so came here."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing looks at, to raise its error
        sys.exit("error: a worker runs this script once more: put what it does under `if __name__ == '__main__':`")


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """Makes rows `first` to `first + local - 1` of a step's batch, reading `at_once` rows before it decodes their frames."""

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
            return np.array(values)  # for scalars takes a tenth of the time of np.stack
        return np.stack(values, out=self.memory.take((len(values), *values[0].shape), values[0].dtype))


def _of_workers(dataset: grain.IterDataset) -> Iterator[Batch]:
    """Yields the batches of a dataset that runs in workers, and ends the workers after the last or when it is closed.

    Raises:
      ChildProcessError: A worker died, or its memory can't be opened.
    """
    borrowed, batches = memory_lib.Borrowed(), None
    try:
        with _signals_wait():  # the first `next` starts the workers
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
    borrowed: memory_lib.Borrowed, batch: dict[str, np.ndarray | memory_lib.Received], workers: dict[int, BaseProcess]
) -> Batch:
    try:
        return borrowed.take_over(batch)
    except OSError as error:
        process = next(value.process for value in batch.values() if isinstance(value, memory_lib.Received))
        worker = workers.get(process)
        if worker is None:  # it ended while the first batch was made, before `workers` was filled
            raise _died(None) from None
        worker.join(timeout=1)  # its exit code is known only after it has ended, which may be about to happen
        if worker.exitcode is not None:
            raise _died(worker.exitcode) from None
        raise ChildProcessError(
            f"the memory of a worker that reads clips can't be opened ({error}): use fewer --config.data.num_workers, or 0 "
            "for threads"
        ) from None


def _died(status: int | None) -> ChildProcessError:
    how = "exit status unknown" if status is None else f"signal {-status}" if status < 0 else f"status {status}"
    fix = ": if there is too little memory, use fewer --config.data.num_workers" if status in (None, -signal.SIGKILL) else ""
    return ChildProcessError(f"a worker that reads clips died ({how}){fix}")


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back meanwhile. Processes started inside never get them.

    These signals go to all processes of a job at once, and only the parent is to decide when the workers end.
    """
    resource_tracker.ensure_running()  # before the signals are blocked: its start unblocks them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_index: int, _count: int) -> None:
    """Makes a worker keep the memory that it frees, and end when its parent ends, for whatever reason."""
    memory_lib.keep_freed()

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
