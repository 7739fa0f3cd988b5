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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process finds an array in the `SharedMemory` of another, which has the file of the block open."""

    process: int
    descriptor: int
    shape: tuple[int, ...]
    dtype: np.dtype


class SharedMemory:
    """Of a worker process, whose arrays another process gets without a copy, as `Borrowed`.

    Each block is a file in memory that has no name (Linux's `memfd_create`): of these nothing is left however the processes
    end, and they are not in /dev/shm, which containers keep small. A block is lent until the other process frees it.
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

    def hand_over(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray | Place]:
        """Returns the batch with places instead of those arrays that were taken here."""

        def place(array: np.ndarray) -> np.ndarray | Place:
            descriptor = self._descriptors.get(_address(array))
            return array if descriptor is None else Place(os.getpid(), descriptor, array.shape, array.dtype)

        return {name: place(array) for name, array in batch.items()}


class Borrowed:
    """What other processes have in their `SharedMemory`."""

    def __init__(self):
        self._blocks: dict[tuple[int, int], mmap.mmap] = {}

    def take_over(self, batch: dict[str, np.ndarray | Place]) -> dict[str, np.ndarray]:
        """Returns what was handed over, as arrays that are freed once nobody holds a part of them.

        Raises:
          OSError: The other process has ended, or its files must not be opened.
        """
        return {name: self._find(value) if isinstance(value, Place) else value for name, value in batch.items()}

    def _find(self, place: Place) -> np.ndarray:
        key = place.process, place.descriptor
        if key not in self._blocks:
            with open(f"/proc/{place.process}/fd/{place.descriptor}", "r+b") as file:
                self._blocks[key] = mmap.mmap(file.fileno(), 0)
        block = self._blocks[key]
        return _lend(block, ALIGNMENT, place.shape, place.dtype, lambda: block.__setitem__(0, _FREE))


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
