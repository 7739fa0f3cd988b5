"""Memory that is reused, within a process and between two."""

import gc
import mmap
import multiprocessing
import os
import pickle
from unittest import mock

import jax
import numpy as np
import pytest

from mc3_jax.data import memory as memory_lib

SHAPE = (3, 5, 7)


def test_memory_is_reused_once_nobody_holds_a_part_of_it():
    memory = memory_lib.Memory()
    first = memory.take(SHAPE, np.uint8)
    place, part = first.ctypes.data, first[1, 2:]
    part[:] = 7
    del first
    gc.collect()
    second = memory.take(SHAPE, np.uint8)
    second[:] = 1
    assert (part == 7).all()
    del part
    gc.collect()
    with mock.patch.object(np, "empty", side_effect=AssertionError("new memory")):
        third = memory.take(SHAPE, np.uint8)
    assert third.ctypes.data == place
    assert second.shape == third.shape == SHAPE
    assert second.ctypes.data % 64 == place % 64 == 0


@pytest.mark.parametrize("make", [memory_lib.Memory, memory_lib.SharedMemory])
def test_memory_holds_arrays_of_several_sizes_at_once(make):
    memory = make()
    wanted = [((2, 3), np.int16), ((4,), np.float32), ((2, 3), np.int16), ((12,), np.uint8)]
    arrays = [memory.take(shape, dtype) for shape, dtype in wanted]
    for i, array in enumerate(arrays):
        array[:] = i
    for i, (array, (shape, dtype)) in enumerate(zip(arrays, wanted, strict=True)):
        assert (array.shape, array.dtype) == (shape, dtype)
        assert (array == i).all()
        assert array.ctypes.data % 64 == 0


def send(batch):
    return pickle.loads(pickle.dumps(batch))


def test_a_block_that_comes_again_lies_where_it_lay():
    shared, borrowed = memory_lib.SharedMemory(), memory_lib.Borrowed()
    places, others = set(), []
    for _ in range(3):
        handed = shared.hand_over({"own": shared.take(SHAPE, np.int16)})
        there = borrowed.take_over(send(handed))
        places.add(there["own"].ctypes.data)
        del handed, there
        gc.collect()
        others.append(mmap.mmap(-1, mmap.PAGESIZE))  # would lie where a mapping had just been given back
    assert len(places) == 1


def test_what_is_handed_over_is_the_same_memory_and_free_once_nobody_holds_a_part_of_it():
    shared, borrowed = memory_lib.SharedMemory(), memory_lib.Borrowed()
    own = shared.take(SHAPE, np.int16)
    own[:] = np.arange(105).reshape(SHAPE)
    small = np.arange(3)
    handed = shared.hand_over({"own": own, "small": small})
    assert isinstance(handed["own"], memory_lib.Sent)
    assert handed["small"] is small
    there = borrowed.take_over(send(handed))
    np.testing.assert_array_equal(there["small"], small)
    np.testing.assert_array_equal(there["own"], own)
    assert there["own"].ctypes.data % 64 == 0
    own[0, 0, 0] = -1
    assert there["own"][0, 0, 0] == -1

    part = there["own"][2]
    del there
    gc.collect()
    other = shared.take(SHAPE, np.int16)
    other[:] = 5
    assert part[0, 0] == 70
    del part
    gc.collect()
    assert shared.take(SHAPE, np.int16).ctypes.data == own.ctypes.data
    assert shared.take(SHAPE, np.int16).ctypes.data not in (own.ctypes.data, other.ctypes.data)


def test_memory_that_jax_holds_is_not_reused():
    shared, borrowed = memory_lib.SharedMemory(), memory_lib.Borrowed()
    own = shared.take((1000,), np.int32)
    own[:] = 3
    held = jax.device_put(borrowed.take_over(send(shared.hand_over({"own": own})))["own"], jax.devices("cpu")[0])
    gc.collect()
    assert shared.take((1000,), np.int32).ctypes.data != own.ctypes.data
    assert (np.asarray(held) == 3).all()
    del held
    gc.collect()
    assert shared.take((1000,), np.int32).ctypes.data == own.ctypes.data


@pytest.mark.filterwarnings("ignore:.*fork")  # the child needs none of JAX's threads
def test_a_fork_frees_nothing_that_its_parent_holds():
    shared, borrowed = memory_lib.SharedMemory(), memory_lib.Borrowed()
    own = shared.take(SHAPE, np.int16)
    there = borrowed.take_over(send(shared.hand_over({"own": own})))
    child = os.fork()
    if not child:
        del there
        os._exit(0)
    os.waitpid(child, 0)
    assert shared.take(SHAPE, np.int16).ctypes.data != own.ctypes.data
    assert there["own"].shape == SHAPE


def hand_over(pipe) -> None:
    shared = memory_lib.SharedMemory()
    for value in range(3):
        array = shared.take((1 << 16,), np.uint8)
        array[:] = value
        pipe.send(shared.hand_over({"array": array}))
    pipe.recv()


def test_memory_of_another_process_outlives_it_once_its_message_is_read():
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hand_over, args=(other,))
    process.start()
    borrowed = memory_lib.Borrowed()
    first, second = pipe.recv(), pipe.recv()
    assert pipe.poll(10)  # the third has arrived, but is not read
    process.kill()
    process.join()
    for value, batch in enumerate((first, second)):
        assert (borrowed.take_over(batch)["array"] == value).all()
    with pytest.raises(FileNotFoundError):
        borrowed.take_over(pipe.recv())
