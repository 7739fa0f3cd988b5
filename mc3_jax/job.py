"""The processes of a job: how they join, exchange messages, wait for each other and end together."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
from jax._src import distributed  # private, but holds the client of the job; Orbax takes it from there too
from jax.experimental import multihost_utils

LOST = 76  # exit status of a process that has lost another process of its job
_MESSAGE_BYTES = 2000
_ADDRESS = "JAX_COORDINATOR_ADDRESS"  # JAX reads it by itself, but not the two in _JOB
_JOB = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
_HANDLERS: list = []  # called from C: this reference keeps Python from freeing them
_ALONE_S = 10**6  # heartbeat timeout of a single process: JAX would end it if it was stopped (SIGSTOP) for longer
_DONE_S = 10**6  # limit for processes that are done to wait for one that still writes; a lost one ends the wait
_ARRIVAL_S = 900  # limit until all processes have started; pulling images and replacing nodes takes time
_SILENT_S = 5  # a shorter wait for the other processes prints nothing


def initialize(heartbeat_timeout_s: int, *, preemptible: bool = False) -> None:
    """Joins the processes of a job; Slurm, Open MPI, TPU pods and Kubernetes are recognised.

    Call it once, before anything else of JAX. Under Slurm and Open MPI a process takes the device with its local rank on the
    node, or all devices if it is the only process there. A Slurm step with one task, such as an interactive session, is a
    single process. Elsewhere the environment defines the job: `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    A process that loses another one ends with status `LOST`: at once if process 0 died, otherwise after the heartbeat of the
    lost process has been missing for `heartbeat_timeout_s`.

    Args:
      heartbeat_timeout_s: Time in seconds after which a silent process counts as lost.
      preemptible: Whether SIGTERM is only reported by `preempted` instead of ending the process; also for a single process.

    Raises:
      ValueError: There is an address, but not the number of processes or the id of this one, or these are not numbers.
    """
    jax.config.update("jax_enable_preemption_service", preemptible)
    options = {"heartbeat_timeout_seconds": heartbeat_timeout_s, "initialization_timeout": _ARRIVAL_S}
    last_words = _end_as_lost_on_abort()
    address = os.environ.get(_ADDRESS)
    told = {name: os.environ[key] for name, key in _JOB.items() if address and key in os.environ}
    if not all(number.isdecimal() for number in told.values()):
        raise ValueError(f"{' and '.join(_JOB.values())} must be numbers, got {', '.join(told.values())}")
    try:
        if not address and _step_tasks() == 1:
            raise ValueError("nobody to join")  # else JAX would read SLURM_NTASKS, which may be the whole job's
        if _has_node_alone() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            options["local_device_ids"] = []  # all; else JAX takes only the device SLURM_LOCALID
        with _telling_of_a_wait():
            jax.distributed.initialize(**options, **{name: int(number) for name, number in told.items()})
    except ValueError as error:  # JAX found no cluster, so an argument is missing
        if address:
            raise ValueError(
                f"{_ADDRESS} is {address}, but JAX does not recognise the cluster: set {' and '.join(_JOB.values())} as well"
            ) from error
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        options |= {"heartbeat_timeout_seconds": _ALONE_S, "cluster_detection_method": "deactivate"}
        jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0, **options)
    if distributed.global_state.num_processes == 1:
        # Otherwise the devices of a CPU communicate by gloo, as if they were processes, and reduce-scatter may give wrong
        # results (jax-ml/jax#40830).
        jax.config.update("jax_cpu_collectives_implementation", None)
        ctypes.CDLL(None).signal(signal.SIGABRT, None)  # the default handler: there is no other process to lose
        return
    process, count = distributed.global_state.process_id, distributed.global_state.num_processes
    last_words.value = (
        f"error: process {process} of {count} ends because another process ended or was silent for {heartbeat_timeout_s} s "
        "(see its log), unless the lines above name another cause; start all again to resume from the last checkpoint\n"
    ).encode()


def _step_tasks() -> int:
    """Returns the number of processes in this process's Slurm step; 0 if Slurm has not started it."""
    count = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    return int(count) if "SLURM_STEP_NODELIST" in os.environ and count.isdecimal() else 0


def _has_node_alone() -> bool:
    """Returns whether this process is the only one of its job on its node, according to Slurm or Open MPI."""
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", "")
    one_each = nodes.isdecimal() and 0 < _step_tasks() <= int(nodes)
    return one_each or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


@contextlib.contextmanager
def _telling_of_a_wait() -> Iterator[None]:
    """Prints what the block waits for if it takes long: a job whose other processes never start would otherwise be silent."""

    def tell():
        job = distributed.global_state
        line = f"process {job.process_id} of {job.num_processes} waits for the others at {job.coordinator_address}"
        print(f"{line}, for at most {_ARRIVAL_S} s", file=sys.stderr, flush=True)

    timer = threading.Timer(_SILENT_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_as_lost_on_abort():
    """Makes abort() end the process with status `LOST`; returns the buffer with the line that is printed then.

    JAX ends a process that has lost another one by abort(), with a stack trace. JAX would accept a callback instead, but
    jaxlib 0.10 can't pass its argument to a Python one. Python's own signal handlers run too late, since the process aborts
    as soon as the C handler returns. The handler must not call JAX.
    """
    line = (
        f"error: this process ends because not all processes of the job started within {_ARRIVAL_S} s or one of them ended, "
        "unless the lines above name another cause; start all again\n"
    )
    words = ctypes.create_string_buffer(line.encode(), 1000)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_):
        os.write(2, words.value)
        os._exit(LOST)

    _HANDLERS.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    return words


@contextlib.contextmanager
def ending_together(heartbeat_timeout_s: int) -> Iterator[None]:
    """Ends this process of a job soon after an error in the block, so that no other process waits for it for ever.

    When one process ends, the collectives of the others fail or hang. A process whose collective fails waits until JAX has
    had time to find out that another process was lost: then it ends with status `LOST`, not with a traceback.

    Without an error the block ends when all processes have come to its end. Otherwise JAX would end all of them as lost if
    one, such as the one that writes a report, needs five minutes longer than another.
    """
    try:
        yield
        if jax.process_count() > 1:
            wait_for_others("mc3_jax is done", _DONE_S)
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):  # gloo's may come as ValueError
            line = str(error).splitlines()[0]
            print(f"{line}\nwaiting to find out whether another process was lost", file=sys.stderr, flush=True)
            time.sleep(2 * heartbeat_timeout_s)
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        end_together(error.code if isinstance(error, SystemExit) else 1)


def end_together(status: int) -> NoReturn:
    """Ends this process of a job, together with the others if they call this too, otherwise within seconds.

    If all processes meet the same error, each ends with its own status, not with `LOST` because another ended first. In a
    normal exit JAX would wait for minutes for processes that go on.
    """
    sys.stdout.flush()
    if jax.process_count() > 1:
        wait_for_others("mc3_jax ends", 10)
        time.sleep(1 if jax.process_index() == 0 else 0)
    os._exit(status)


def wait_for_others(name: str, limit_s: float) -> None:
    """Waits until all processes of the job wait under this name, but at most `limit_s`. May be called from any thread."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier(name, round(1000 * limit_s))


def publish(key: str, value: str) -> None:
    """Publishes a value to all processes of the job, replacing an earlier one. May be called from any thread."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.key_value_set(key, value, allow_overwrite=True)


def published(key: str) -> list[tuple[str, str]]:
    """Returns the published (key, value) pairs in the directory `key`. May be called from any thread."""
    try:
        return distributed.global_state.client.key_value_dir_get(key)
    except jax.errors.JaxRuntimeError:  # process 0, which keeps the values, has ended
        return []


def preempted(asked: int) -> bool:
    """Returns whether all processes stop now, because SIGTERM has reached one of them.

    Every process must call it after every step. The processes take about a second to agree on the step to stop after.

    Args:
      asked: Number of calls so far in this process, including this one. JAX counts from 1, and stops at no count that was
        skipped.
    """
    return multihost_utils.reached_preemption_sync_point(asked)


def from_process_0(value: int) -> int:
    """Returns the `value` of process 0, on every process; called by every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def list_from_process_0(values: list[int]) -> list[int]:
    """Returns the values that process 0 has; the other processes may have another number of them."""
    if jax.process_count() == 1:
        return values
    row = np.zeros(from_process_0(len(values)), np.int32)
    row[:] = values if jax.process_index() == 0 else 0
    return multihost_utils.broadcast_one_to_all(row).tolist() if len(row) else []


def first_message(message: str) -> str:
    """Returns the message of the first process whose message isn't empty, on every process; "" if none; called by all."""
    if jax.process_count() == 1:
        return message
    row = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = message.encode()[:_MESSAGE_BYTES]
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(row)
    return next((row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows if row[0]), "")


class Process0Error(ValueError):
    """An action that process 0 was to do for all processes has failed."""


def on_process_0(action: Callable[[], None]) -> None:
    """Calls `action` on process 0 alone, while the others wait for it; called by every process.

    Raises:
      Process0Error: On all processes, if `action` raised ValueError or OSError.
    """
    message = ""
    try:
        if jax.process_index() == 0:
            action()
    except (ValueError, OSError) as error:
        message = str(error) or type(error).__name__
    if message := first_message(message):
        raise Process0Error(message)
