"""The processes of a job: how they find, tell, ask and wait for each other, and end together."""

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
from jax._src import distributed  # the client of the job; Orbax takes it from there too
from jax.experimental import multihost_utils

LOST = 76  # exit status of a process that has lost another one of its job
_MESSAGE_BYTES = 2000
_ADDRESS = "JAX_COORDINATOR_ADDRESS"  # JAX reads it by itself, these it does not
_JOB = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
_HANDLERS: list = []  # C calls them; Python must not free them
_ALONE_S = 10**6  # nobody is lost where a process is alone, but JAX ends it where it was stopped for longer than this
_ARRIVAL_S = 900  # until all processes of a job have started: images are pulled, nodes replaced
_SILENT_S = 5  # of a wait for them that is not worth a line


def initialize(heartbeat_timeout_s: int, *, preemptible: bool = False) -> None:
    """Joins the processes of a job: Slurm, Open MPI, TPU pods and Kubernetes are recognised.

    Under Slurm and Open MPI a process takes the device of its number on its node, but all of them where it is the only one
    there. A step of Slurm's with one task, such as an interactive session, is no job of several. Elsewhere the environment
    tells: `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Call once, before
    anything else of JAX. A process that loses another one ends with status `LOST`: at once where it is process 0 that died,
    else once its heartbeat has been missing for `heartbeat_timeout_s`.

    Args:
      heartbeat_timeout_s: Time after which a silent process counts as lost.
      preemptible: SIGTERM does not end the process; `preempted` tells of it. It is done for a single process too.

    Raises:
      ValueError: There is an address and nothing that tells the number of processes or which this one is.
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
            raise ValueError("nobody to join")  # SLURM_NTASKS may be the whole job's
        if _has_node_alone() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            options["local_device_ids"] = []  # else JAX takes the one device of SLURM_LOCALID
        with _telling_of_a_wait():
            jax.distributed.initialize(**options, **{name: int(number) for name, number in told.items()})
    except ValueError as error:  # no cluster around: JAX asks for what is missing
        if address:
            raise ValueError(
                f"{_ADDRESS} is {address}, but this is no cluster that JAX knows: set {' and '.join(_JOB.values())} as well"
            ) from error
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        options |= {"heartbeat_timeout_seconds": _ALONE_S, "cluster_detection_method": "deactivate"}
        jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0, **options)
    if distributed.global_state.num_processes == 1:
        # Else the devices of a CPU talk by gloo, as if they were processes, and reduce-scatters may come out wrong
        # (jax-ml/jax#40830).
        jax.config.update("jax_cpu_collectives_implementation", None)
        ctypes.CDLL(None).signal(signal.SIGABRT, None)  # the default: there is nobody to lose
        return
    process, count = distributed.global_state.process_id, distributed.global_state.num_processes
    last_words.value = (
        f"error: process {process} of {count} ends because another one has ended or was silent for {heartbeat_timeout_s} s "
        "(its log says why), if the lines above name no other cause; start all again to go on from the last checkpoint\n"
    ).encode()


def _step_tasks() -> int:
    """Returns how many processes Slurm has started together with this one; 0 where it is none of Slurm's."""
    count = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    return int(count) if "SLURM_STEP_NODELIST" in os.environ and count.isdecimal() else 0


def _has_node_alone() -> bool:
    """Returns whether this process of a job is the only one of its node, as Slurm or Open MPI have it."""
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", "")
    one_each = nodes.isdecimal() and 0 < _step_tasks() <= int(nodes)
    return one_each or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


@contextlib.contextmanager
def _telling_of_a_wait() -> Iterator[None]:
    """Says for whom the block waits, if it does: a job whose other processes never come would be silent for long."""

    def tell():
        job = distributed.global_state
        line = f"process {job.process_id} of {job.num_processes} waits for the others at {job.coordinator_address}"
        print(f"{line}, {_ARRIVAL_S} s at most", file=sys.stderr, flush=True)

    timer = threading.Timer(_SILENT_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_as_lost_on_abort():
    """Makes abort() end the process with status `LOST` and the words in the buffer that is returned.

    Abort is how JAX ends a process that has lost another, with a stack trace. JAX takes a callback instead, but jaxlib 0.10
    can't pass Python ones their argument, and Python's own signal handlers run too late: a C handler that comes back lets
    the process abort. Nothing of JAX may be asked by then.
    """
    line = (
        f"error: this process of a job ends because not all of them have come within {_ARRIVAL_S} s or one has ended, if the "
        "lines above name no other cause; start all again\n"
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
    """Makes an error in the block end this process of a job soon, so that no other waits for it for ever.

    One process that has ended makes the collectives of the others fail or hang. Those that fail give JAX the time to find
    out that this is why: then the process ends as lost, with status `LOST`, not with a traceback.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):  # gloo's may come as ValueError
            line = str(error).splitlines()[0]
            print(f"{line}\nwaiting to hear whether another process was lost", file=sys.stderr, flush=True)
            time.sleep(2 * heartbeat_timeout_s)
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        end_together(error.code if isinstance(error, SystemExit) else 1)


def end_together(status: int) -> NoReturn:
    """Ends this process of a job, together with the others if they do the same, else soon.

    Where all have the same error, each shall end with its own status, not as one that lost the others. At a normal exit JAX
    would wait minutes for those that go on.
    """
    sys.stdout.flush()
    if jax.process_count() > 1:
        wait_for_others("mc3_jax ends", 10)
        time.sleep(1 if jax.process_index() == 0 else 0)
    os._exit(status)


def wait_for_others(name: str, limit_s: float) -> None:
    """Waits until all processes of the job wait under this name, but no longer than `limit_s`. From any thread."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier(name, round(1000 * limit_s))


def publish(key: str, value: str) -> None:
    """Tells all processes of the job something, in place of what was told before. From any thread."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.key_value_set(key, value, allow_overwrite=True)


def published(key: str) -> list[tuple[str, str]]:
    """Returns what the processes have told under keys that begin so, as (key, value). From any thread."""
    try:
        return distributed.global_state.client.key_value_dir_get(key)
    except jax.errors.JaxRuntimeError:  # the process that keeps it has ended
        return []


def preempted(asked: int) -> bool:
    """Returns whether SIGTERM has reached a process of the job and this is where all of them stop.

    Every process asks after every step. It takes about a second until they have agreed on one.

    Args:
      asked: How often it has been asked, this time included: JAX counts from 1 and stops at none that it has not come by.
    """
    return multihost_utils.reached_preemption_sync_point(asked)


def from_process_0(value: int) -> int:
    """Returns the value that process 0 has."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def first_message(message: str) -> str:
    """Returns the message of the first process that has one, the same on all of them; "" where none has."""
    if jax.process_count() == 1:
        return message
    row = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = message.encode()[:_MESSAGE_BYTES]
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(row)
    return next((row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows if row[0]), "")


class Process0Error(ValueError):
    """What process 0 was to do for all could not be done."""


def on_process_0(action: Callable[[], None]) -> None:
    """Does something on process 0 alone; the others wait for it.

    Raises:
      Process0Error: On all processes, where it raised ValueError or OSError.
    """
    message = ""
    try:
        if jax.process_index() == 0:
            action()
    except (ValueError, OSError) as error:
        message = str(error) or type(error).__name__
    if message := first_message(message):
        raise Process0Error(message)
