"""Buffers for the large arrays of batches, reused once nobody holds an array in them.

With fresh memory for every batch, the kernel would have to clear its pages first. That takes a tenth of the decoding time
with threads, and as long as decoding itself with worker processes, whose batches would be copied through fresh pages too.
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

ALIGNMENT = 64  # bytes; JAX on a CPU uses an array without a copy if its address is a multiple of this
# Parameters of glibc's mallopt and the values for them, in bytes. Up to `_KEPT` of freed memory is kept by the process, and
# allocations up to `_LARGEST`, the highest threshold that glibc accepts, are served from it.
_M_TRIM_THRESHOLD, _KEPT = -1, 1 << 30
_M_MMAP_THRESHOLD, _LARGEST = -3, 32 << 20
_FREE, _IN_USE = 0, 1  # state of a shared block, kept in its first byte; its array begins at byte `ALIGNMENT`


class Memory:
    """Buffers of this process, reused once nobody holds the array in them."""

    def __init__(self):
        self._free: dict[int, list[np.ndarray]] = {}  # free blocks by the size in bytes of the array they held

    def __reduce__(self):
        return type(self), ()  # unpickled in another process, it begins without blocks

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Returns an uninitialised array whose address is a multiple of `ALIGNMENT`."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(size + ALIGNMENT, np.uint8)
        return _lend(block, -block.ctypes.data % ALIGNMENT, shape, dtype, lambda: free.append(block))


class SharedMemory:
    """Buffers of a worker process whose arrays another process reads without a copy, through `Borrowed`.

    Each block is an unnamed file in memory (Linux's `memfd_create`). Such files vanish with the processes however those
    end, and they do not count against /dev/shm, which containers keep small. A block is in use until the other process
    frees it, and its file stays open as long as the worker lives.
    """

    def __init__(self):
        self._blocks: dict[int, list[mmap.mmap]] = collections.defaultdict(list)  # by the size in bytes of their array
        self._descriptors: dict[int, int] = {}  # file descriptor of a block by the address of its array

    def __reduce__(self):
        return type(self), ()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Returns an uninitialised array that `hand_over` can pass to another process."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        block = next((block for block in self._blocks[size] if block[0] == _FREE), None) or self._make(size)
        block[0] = _IN_USE
        return np.frombuffer(block, np.uint8, size, ALIGNMENT).view(dtype).reshape(shape)

    def _make(self, size: int) -> mmap.mmap:
        descriptor = os.memfd_create("mc3_jax")  # stays open, so that the other process can open it under /proc
        os.ftruncate(descriptor, size + ALIGNMENT)
        block = mmap.mmap(descriptor, 0)
        self._blocks[size].append(block)
        self._descriptors[_address(np.frombuffer(block, np.uint8, offset=ALIGNMENT))] = descriptor
        return block

    def hand_over(self, batch: dict[str, np.ndarray]) -> "dict[str, np.ndarray | Sent]":
        """Returns the batch, ready to be pickled: each array from `take` is replaced by its `Sent`."""

        def send(array: np.ndarray) -> "np.ndarray | Sent":
            descriptor = self._descriptors.get(_address(array))
            return array if descriptor is None else Sent(os.getpid(), descriptor, array.shape, array.dtype)

        return {name: send(array) for name, array in batch.items()}


@dataclasses.dataclass(frozen=True)
class Sent:
    """Where an array lies in the `SharedMemory` of a process: the process id and its file descriptor of the block."""

    process: int
    descriptor: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __reduce__(self):
        return Received.of, (self.process, self.descriptor, self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Received:
    """A `Sent` after unpickling, with its block mapped at once: the sender may end as soon as its message is read.

    Attributes:
      process: Id of the process that sent the array.
      inode: Inode of the block's file, which identifies it; 0 if it can't be opened.
      block: The mapped block, or the error on opening it, which `Borrowed` raises: raised on unpickling, it would reach
        whoever reads the message, not whoever wants the array.
    """

    process: int
    inode: int
    block: mmap.mmap | OSError
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, process: int, descriptor: int, shape: tuple[int, ...], dtype: np.dtype) -> "Received":
        try:
            with open(f"/proc/{process}/fd/{descriptor}", "r+b") as file:
                return cls(process, os.fstat(file.fileno()).st_ino, mmap.mmap(file.fileno(), 0), shape, dtype)
        except OSError as error:
            return cls(process, 0, error, shape, dtype)


class Borrowed:
    """Arrays in the `SharedMemory` of other processes, used here without a copy."""

    def __init__(self):
        self._blocks: dict[int, mmap.mmap] = {}  # by inode; kept because every page of a new mapping faults once more

    def take_over(self, batch: dict[str, np.ndarray | Received]) -> dict[str, np.ndarray]:
        """Returns the batch from `SharedMemory.hand_over` as arrays; a block is freed once nobody holds a part of its array.

        Raises:
          OSError: The other process ended before its message was read, or this one may not open its files.
        """
        return {name: self._find(value) if isinstance(value, Received) else value for name, value in batch.items()}

    def _find(self, received: Received) -> np.ndarray:
        if isinstance(received.block, OSError):
            raise received.block
        block, own = self._blocks.setdefault(received.inode, received.block), os.getpid()

        def free() -> None:
            if os.getpid() == own:  # a fork must not free what its parent still holds
                block[0] = _FREE

        return _lend(block, ALIGNMENT, received.shape, received.dtype, free)


def keep_freed() -> None:
    """Makes this process keep freed memory for its next allocations; does nothing if the C library isn't glibc.

    Otherwise the records of a batch, freed together, return to the kernel, which clears as many pages for the next batch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)


def _lend(
    block: np.ndarray | mmap.mmap, offset: int, shape: tuple[int, ...], dtype: DTypeLike, give_back: Callable[[], None]
) -> np.ndarray:
    """Returns an array that lies in a block, and calls `give_back` once nobody holds the array or a view of it."""
    # NumPy views refer to the object that owns the memory, not to the array they are taken from. So the owner is a ctypes
    # object: it dies with the last view, and JAX on a CPU, which uses the array without a copy, keeps it alive as well.
    owner = (ctypes.c_uint8 * (math.prod(shape) * np.dtype(dtype).itemsize)).from_buffer(block, offset)
    weakref.finalize(owner, give_back).atexit = False
    return np.frombuffer(owner, dtype).reshape(shape)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
