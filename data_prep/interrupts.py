"""Ctrl-C in a command that works in several processes: it reaches this one alone, which ends the others."""

import concurrent.futures
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


def block() -> None:
    """Makes this thread, and the processes that it starts, deaf to Ctrl-C, which a terminal sends to all of them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds Ctrl-C back meanwhile; processes started inside never get it. Submitting to a pool starts its processes."""
    resource_tracker.ensure_running()  # before the signal is blocked: its start unblocks it again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ending_children(pool: concurrent.futures.Executor) -> Iterator[None]:
    """Ends all processes of this one after Ctrl-C. Otherwise the pool would first do all that it was given."""
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
        raise
