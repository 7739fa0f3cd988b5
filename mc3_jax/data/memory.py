"""Memory for the large arrays of batches, taken again once nobody holds what was in it.

Pages of its own for every batch would have to be cleared by the kernel: for threads a tenth of the time of decoding, for
worker processes, whose batches would be copied through pages as new, as much again as decoding takes.
"""

import collections
import ctypes
import dataclasses
import math
import mmap
import os
import weakref
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64  # JAX takes over an array on a CPU without copying it where it begins at a multiple of this
# Parameters of glibc's mallopt and what they are set to, in bytes: at most so much of what is freed is kept, and all up to
# the largest size that glibc takes comes from what is kept.
_M_TRIM_THRESHOLD, _KEPT = -1, 1 << 30
_M_MMAP_THRESHOLD, _LARGEST = -3, 32 << 20
_FREE, _IN_USE = 0, 1  # first byte of a shared block, whose array begins at `ALIGNMENT`


class Memory:
    """Of this process."""

    def __init__(self):
        self._free: dict[int, list[np.ndarray]] = {}  # blocks by the size of what was in them

    def __reduce__(self):
        return type(self), ()  # another process has memory of its own

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Returns an array of whatever values that begins at a multiple of `ALIGNMENT`."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(size + ALIGNMENT, np.uint8)
        return _lend(block, -block.ctypes.data % ALIGNMENT, shape, dtype, lambda: free.append(block))


class SharedMemory:
    """Of a worker process, whose arrays another process gets without a copy, as `Borrowed`.

    Each block is a file in memory that has no name (Linux's `memfd_create`): of these nothing is left however the processes
    end, and they are not in /dev/shm, which containers keep small. A block is lent until the other process frees it, and
    stays open as long as this one lives.
    """

    def __init__(self):
        self._blocks: dict[int, list[mmap.mmap]] = collections.defaultdict(list)  # by the size of what is in them
        self._descriptors: dict[int, int] = {}  # of the files, by where arrays begin

    def __reduce__(self):
        return type(self), ()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Returns an array of whatever values, to be handed over."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        block = next((block for block in self._blocks[size] if block[0] == _FREE), None) or self._make(size)
        block[0] = _IN_USE
        return np.frombuffer(block, np.uint8, size, ALIGNMENT).view(dtype).reshape(shape)

    def _make(self, size: int) -> mmap.mmap:
        descriptor = os.memfd_create("mc3_jax")  # stays open: so the other process finds it
        os.ftruncate(descriptor, size + ALIGNMENT)
        block = mmap.mmap(descriptor, 0)
        self._blocks[size].append(block)
        self._descriptors[_address(np.frombuffer(block, np.uint8, offset=ALIGNMENT))] = descriptor
        return block

    def hand_over(self, batch: dict[str, np.ndarray]) -> "dict[str, np.ndarray | Place]":
        """Returns the batch with places instead of those arrays that were taken here, to be pickled."""

        def place(array: np.ndarray) -> "np.ndarray | Place":
            descriptor = self._descriptors.get(_address(array))
            return array if descriptor is None else Place(os.getpid(), descriptor, array.shape, array.dtype)

        return {name: place(array) for name, array in batch.items()}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array lies in the `SharedMemory` of a process, which has the file of the block open."""

    process: int
    descriptor: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __reduce__(self):
        return Arrival.of, (self.process, self.descriptor, self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """What a `Place` becomes where it is unpickled: at once, since the process that sent it may end as soon as it is read.

    Attributes:
      process: That sent it.
      inode: Of the file of the block.
      block: Or why the file can't be opened, which is said to who wants the array, not to who reads the message.
    """

    process: int
    inode: int
    block: mmap.mmap | OSError
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, process: int, descriptor: int, shape: tuple[int, ...], dtype: np.dtype) -> "Arrival":
        try:
            with open(f"/proc/{process}/fd/{descriptor}", "r+b") as file:
                return cls(process, os.fstat(file.fileno()).st_ino, mmap.mmap(file.fileno(), 0), shape, dtype)
        except OSError as error:
            return cls(process, 0, error, shape, dtype)


class Borrowed:
    """What other processes have in their `SharedMemory`."""

    def __init__(self):
        self._blocks: dict[int, mmap.mmap] = {}  # by their inodes: the pages of a new mapping have to be found again

    def take_over(self, batch: dict[str, np.ndarray | Arrival]) -> dict[str, np.ndarray]:
        """Returns what was handed over, as arrays that are freed once nobody holds a part of them.

        Raises:
          OSError: The other process had ended before its message was read, or its files must not be opened.
        """
        return {name: self._find(value) if isinstance(value, Arrival) else value for name, value in batch.items()}

    def _find(self, arrival: Arrival) -> np.ndarray:
        if isinstance(arrival.block, OSError):
            raise arrival.block
        block, own = self._blocks.setdefault(arrival.inode, arrival.block), os.getpid()

        def free() -> None:
            if os.getpid() == own:  # not in a fork, which holds what its parent does
                block[0] = _FREE

        return _lend(block, ALIGNMENT, arrival.shape, arrival.dtype, free)


def keep_freed() -> None:
    """Has this process keep what it frees, for what it allocates next; nothing where the C library isn't glibc.

    Else the records of a batch, freed together, go back to the kernel, which clears as many pages for those of the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)


def _lend(
    block: np.ndarray | mmap.mmap, offset: int, shape: tuple[int, ...], dtype: DTypeLike, give_back: Callable[[], None]
) -> np.ndarray:
    """Returns an array that lies in a block, and has a function called once nobody holds a part of it."""
    # A part of an array refers to the array's owner, not to the array: what tells that all parts are gone is the end of an
    # owner that is no array. JAX, which takes an array over on a CPU, holds it as well.
    owner = (ctypes.c_uint8 * (math.prod(shape) * np.dtype(dtype).itemsize)).from_buffer(block, offset)
    weakref.finalize(owner, give_back).atexit = False
    return np.frombuffer(owner, dtype).reshape(shape)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
