"""Beam's local runner, by processes of ours: one that ends before its time ends the run, where Beam would wait for ever."""

import contextlib
import pathlib
import queue
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import grpc

from data_prep import quiet, storage

with quiet.beam():
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

# Beam's names for its threads that wait for a worker's process, and for what it says.
_WORKER_THREAD = "run_worker"
_READ_THREADS = ("beam_control_read", "read_grpc_client_inputs")
_END_S = 10.0
_MODULE = "data_prep.worker"
GOES_ON = "Started again, the same command goes on from the last finished video"


class WorkerError(ChildProcessError):
    """A worker crashed, was killed or did not start."""


def run(build: Callable[[beam.Pipeline], None], num_workers: int) -> None:
    """Builds a pipeline and runs it, in this process or by several.

    Args:
      build: Adds the steps.
      num_workers: Processes; 1 is this one.

    Raises:
      WorkerError: See there.
      Exception: Whatever a step raised, as Beam tells it.
    """
    # Named, because the default runner of recent Beams fetches a binary when it starts.
    with quiet.beam():
        if num_workers == 1:
            with storage.temporary_files():
                _run(build, FnApiRunner(), num_workers)
            return
        with _watching() as ended, storage.temporary_files() as folder:
            environment = SubprocessSDKEnvironment.from_command_string(_command(folder))
            _start(lambda: _run(build, FnApiRunner(environment), num_workers), ended)
            error = ended.get()
        if error is not None:
            raise error


def _run(build: Callable[[beam.Pipeline], None], runner: FnApiRunner, num_workers: int) -> None:
    with beam.Pipeline(runner, PipelineOptions([f"--direct_num_workers={num_workers}"])) as pipeline:
        build(pipeline)


def _command(folder: pathlib.Path) -> str:
    """Returns the worker's command line. Beam gives it to a shell, which makes way, so that the status is the worker's."""
    return "exec " + shlex.join([sys.executable, "-m", _MODULE, str(folder)])


def _start(work: Callable[[], None], ended: queue.SimpleQueue) -> None:
    """Works in a thread, which may wait for ever, and puts what came of it: None or what was raised."""

    def put() -> None:
        try:
            work()
            ended.put(None)
        except Exception as error:
            ended.put(error)

    threading.Thread(target=put, daemon=True).start()


@contextlib.contextmanager
def _watching() -> Iterator[queue.SimpleQueue]:
    """Yields a queue that gets an error when a worker's process fails. When the block ends, so have all of them."""
    ended, tell = queue.SimpleQueue(), threading.excepthook

    def look(args) -> None:
        name = args.thread.name if args.thread is not None else ""
        if name == _WORKER_THREAD:
            ended.put(WorkerError(_failure(str(args.exc_value))))
        elif not (name in _READ_THREADS and issubclass(args.exc_type, grpc.RpcError)):
            tell(args)

    threading.excepthook = look
    try:
        yield ended
    finally:
        # Those that end with the launcher's lock, which is no more, fail as well.
        for thread in threading.enumerate():
            if thread.name in (_WORKER_THREAD, *_READ_THREADS):
                thread.join(_END_S)
        threading.excepthook = tell


def _failure(told: str) -> str:
    """Returns what became of a worker, of what Beam says: its words and the exit status."""
    found = re.search(r"-?\d+$", told)
    status = int(found[0]) if found else 1
    if status == -signal.SIGKILL:
        how = "was killed, perhaps because memory ran out: take fewer --num_workers or a smaller --memory_limit"
    elif status < 0:
        how = f"crashed ({signal.Signals(-status).name})"
    else:
        how = f"ended with status {status}; what it said stands above"
    return f"a worker {how}. {GOES_ON}"
