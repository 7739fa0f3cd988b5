"""Beam's local runner with our own worker processes: if one ends early, so does the run, where Beam would wait forever."""

import contextlib
import pathlib
import queue
import re
import resource
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

# Beam's names for its threads that wait for a worker process to end, and that read what it sends.
_WORKER_THREAD = "run_worker"
_READ_THREADS = ("beam_control_read", "read_grpc_client_inputs")
_END_S = 10.0
_MODULE = "data_prep.worker"
_USED_UP = "used up its CPU time: use `ulimit -t unlimited`, on Slurm `sbatch --propagate=NONE`"
GOES_ON = "Run the same command again to resume after the last finished video"


class WorkerError(ChildProcessError):
    """A worker crashed, was killed or did not start."""


def run(build: Callable[[beam.Pipeline], None], num_workers: int) -> None:
    """Builds a pipeline and runs it, in this process or in several worker processes.

    Args:
      build: Function that adds the steps to the pipeline.
      num_workers: Number of processes; 1 runs the pipeline in this process.

    Raises:
      WorkerError: A worker crashed, was killed or did not start.
      Exception: An error of a step, as Beam passes it on.
    """
    # The runner is given explicitly, since the default runner of recent Beams downloads a binary when it starts.
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
    """Returns the worker's command line. `exec` replaces the shell that Beam starts, so that the status is the worker's."""
    return "exec " + shlex.join([sys.executable, "-m", _MODULE, str(folder)])


def _start(work: Callable[[], None], ended: queue.SimpleQueue) -> None:
    """Starts work in a thread, which may wait forever; when it ends, puts None or its exception into the queue."""

    def put() -> None:
        try:
            work()
            ended.put(None)
        except Exception as error:
            ended.put(error)

    threading.Thread(target=put, daemon=True).start()


@contextlib.contextmanager
def _watching() -> Iterator[queue.SimpleQueue]:
    """Yields a queue that gets an error when a worker process fails. At the block's end, waits for the workers to end."""
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
        # Workers that end because the launcher's lock is gone fail too, and their errors must still go to `look`.
        for thread in threading.enumerate():
            if thread.name in (_WORKER_THREAD, *_READ_THREADS):
                thread.join(_END_S)
        threading.excepthook = tell


def _failure(told: str) -> str:
    """Returns a message about a worker that ended, from Beam's message, which ends with the exit status."""
    found = re.search(r"-?\d+$", told)
    status = int(found[0]) if found else 1
    if status == -signal.SIGKILL:
        how = "was killed, perhaps because memory ran out: use fewer --num_workers or a smaller --memory_limit"
        if resource.getrlimit(resource.RLIMIT_CPU)[1] != resource.RLIM_INFINITY:
            how += f"; or because it {_USED_UP}"
    elif status == -signal.SIGXCPU:
        how = _USED_UP
    elif status < 0:
        how = f"crashed ({signal.Signals(-status).name})"
    else:
        how = f"ended with status {status}; see its output above"
    return f"a worker {how}. {GOES_ON}"
