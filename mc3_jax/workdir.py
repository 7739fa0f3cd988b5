"""The folder of a run: checks that it belongs to this run and to no other, and a lock against two jobs at once."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator

import jax

from mc3_jax import checkpoint, config as config_lib, job as job_lib, whole_file

CONFIG_FILE, DATA_FILE, LOCK_FILE = "config.json", "data.json", ".lock"
_WAIT_S = 120  # how long to retry a lock that another machine holds: it may be gone
_UNSEEN_S = 90  # how long to wait for a file of process 0: NFS clients may cache for 60 s that a file is missing
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
_POD = "POD_UID"  # set in Kubernetes by the pod's manifest (`launch/gke_jobset.yaml`)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Fields that may differ between two starts of a run: how it is read, watched and evaluated, not what is computed.
_FREE = (
    "fsdp", "loss_block_rows", "heartbeat_timeout_s", "hang_timeout_s", "model.scan_layers", "model.remat", "model.attention",
    "data.chunk_size", "data.dir", "data.tokenizer", "data.num_threads", "data.num_workers", "data.prefetch", "save",
    "validation", "eval", "log",
)  # fmt: skip


class WorkdirError(ValueError):
    """A workdir that this run can't use."""


def _flatten_config(value, prefix: str = "") -> dict:
    """Returns a nested config as {name of the override: value}, with the number of phases under "phases"."""
    is_list = isinstance(value, list) and any(isinstance(child, dict) for child in value)
    if not is_list and not isinstance(value, dict):
        return {prefix: value}
    flat = {prefix: len(value)} if is_list else {}
    for key, child in enumerate(value) if is_list else value.items():
        name = f"{prefix}[{key}]" if is_list else f"{prefix}.{key}" if prefix else key
        flat |= _flatten_config(child, name)
    return flat


def _read_config(workdir: str) -> config_lib.Config | None:
    """Returns the config of the run in a workdir, None if process 0 sees no run. Called by every process.

    Fields newer than the run get their defaults.

    Raises:
      WorkdirError: A process can't read it, or it is damaged or of another version; on every process.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not job_lib.from_process_0(path.is_file()):
        return None
    saved, problem = {}, ""
    try:
        saved = json.loads(_read_of_process_0(path))
    except OSError as error:
        problem = _unseen(path, error)
    except ValueError as error:
        problem = f"{path} is damaged ({error}): choose another workdir"
    if problem := job_lib.first_message(problem):
        raise WorkdirError(problem)
    return config_lib.from_dict(config_lib.Config, saved, str(path))  # the same on every process, as the text is


def as_begun(workdir: str, config: config_lib.Config) -> tuple[config_lib.Config, list[str]]:
    """Returns `config` with the `init` that the run in a workdir began with, and options that lead from `config` to it.

    Once there is a checkpoint, the files that `init` names are not read again. Called by every process.

    Args:
      workdir: Folder of a run, for which `check_workdir` accepts the config.
      config: Config of the command line.

    Raises:
      ValueError: The run's config is damaged or of another version.
    """
    made = dataclasses.replace(config, init=_read_config(workdir).init)
    return made, _overrides(*(_flatten_config(config_lib.to_dict(each)) for each in (made, config)), ())


def as_trained(workdir: str, config: config_lib.Config, given: Iterable[str]) -> tuple[config_lib.Config, list[str]]:
    """Returns the config to evaluate a run with, and options of the command line that lead from `config` to it.

    Fields that evaluation can't choose are taken from the run, so that its overrides need not be given again. Fields that are
    overridden on the command line stay as they are; `check_workdir` refuses them if the run was trained with other values. A
    config with another name or number of phases may belong to another run and is returned unchanged; `check_workdir` refuses
    it. Called by every process.

    Args:
      workdir: Folder of the run; if it holds no run, `config` is returned unchanged.
      config: Config of the command line: file and overrides.
      given: Names of the fields that were overridden.

    Raises:
      ValueError: The run's config is damaged or of another version.
    """
    saved = _read_config(workdir)
    if saved is None or saved.name != config.name or len(saved.phases) != len(config.phases):
        return config, []
    return keep_fields(saved, config, (*_FREE, *given))


def keep_fields(
    saved: config_lib.Config, config: config_lib.Config, names: Iterable[str]
) -> tuple[config_lib.Config, list[str]]:
    """Returns `saved` with the named fields of `config`, and options of the command line that lead from `config` to it."""
    made, here = config_lib.to_dict(saved), config_lib.to_dict(config)
    for name in names:
        _put(made, name, here)
    made = config_lib.from_dict(config_lib.Config, made)
    return made, _overrides(_flatten_config(config_lib.to_dict(made)), _flatten_config(here), ())


def _put(values: dict, name: str, source: dict) -> None:
    """Sets the field `name` of `values`, such as "phases[0].epochs", to its value in `source`, another nested config."""
    *inner, last = [int(key) if re.fullmatch(r"-?\d+", key) else key for key in re.findall(r"[^.\[\]]+", name)]
    for key in inner:
        values, source = values[key], source[key]
    values[last] = source[last]


def _overrides(there: dict, here: dict, free: tuple[str, ...]) -> list[str]:
    """Returns command-line options that turn the flat config `here` into `there`, except for fields that may differ."""
    names = [name for name in there if not name.startswith(free) and here.get(name) != there[name] and name != "phases"]
    return [f"--config.{name}={shlex.quote(_literal(there[name]))}" for name in names]


def _literal(value) -> str:
    if isinstance(value, list):
        return f"({','.join(map(json.dumps, value))}{',' if len(value) == 1 else ''})"
    return str(value)


def check_workdir(workdir: str, config: config_lib.Config, *, must_exist: bool = False) -> None:
    """Checks that a workdir holds no run or this one. Called by every process.

    Fields newer than the run count as having their defaults.

    Args:
      workdir: Folder of the run.
      config: Config of the run.
      must_exist: Whether the run must be there already, as for an evaluation.

    Raises:
      WorkdirError: It holds a run with another config (the message names the first field that differs, and the options that
        the run was trained with), no run although one must exist, or checkpoints of an unknown run. All
        processes raise it.
    """
    problem = ""
    # A start from a checkpoint takes `init` from the run, see `as_begun`; an evaluation tells by it what is untrained.
    free = (*_FREE, "init") if checkpoint.newest_step(workdir) and not must_exist else _FREE
    try:
        _compare(workdir, _read_config(workdir), config, free, must_exist=must_exist)
    except ValueError as error:
        problem = str(error)
    if problem := job_lib.first_message(problem):
        raise WorkdirError(problem)


def _compare(
    workdir: str, saved: config_lib.Config | None, config: config_lib.Config, free: tuple[str, ...], *, must_exist: bool
) -> None:
    if saved is None:
        if must_exist:
            raise WorkdirError(
                f"{workdir} holds no run: train it first with `python -m mc3_jax.train --workdir={workdir}`, or name weights "
                "by --config.checkpoint"
            )
        if jax.process_index() == 0 and checkpoint.checkpoint_dir(workdir).is_dir():
            raise WorkdirError(f"{workdir} holds checkpoints but no {CONFIG_FILE}: choose another workdir")
        return
    there, here = (_flatten_config(config_lib.to_dict(each)) for each in (saved, config))
    for name in dict.fromkeys([*here, *there]):
        if name.startswith(free) or there.get(name) == here.get(name):
            continue
        raise WorkdirError(
            f"{workdir} holds a different run: config.{name} is {there.get(name)!r} there and {here.get(name)!r} here; "
            + _advise(workdir, there, here, free)
            + ("" if must_exist else "; choose another workdir for another run")
        )


def _advise(workdir: str, there: dict, here: dict, free: tuple[str, ...]) -> str:
    """Returns advice on how to change the command so that its config is that of the run in the workdir."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    if there["phases"] != here["phases"]:
        return f"name the --config that it was trained with, see {path}"
    if there["name"] != here["name"]:  # a name of the command line, or another config: its other fields would tell nothing
        option = f"--config.name={shlex.quote(there['name'])}"
        return f"if this is the --config that it was trained with, add {option}, otherwise name that one, see {path}"
    return f"it was trained with {' '.join(_overrides(there, here, free))}: give the same options"


def claim_workdir(workdir: str, config: config_lib.Config, digests: dict[str, str], facts: dict | None = None) -> None:
    """Writes the config and the digests of the data into a workdir that lacks them; called by every process.

    Args:
      workdir: Folder of the run.
      config: Config of the run.
      digests: Digest of the data that each field of the config names, by field.
      facts: Facts about these data that an evaluation on other data needs; see `trained_on`.

    Raises:
      WorkdirError: They can't be written, or the processes see different data; on every process.
    """

    def claim():
        fresh = not (pathlib.Path(workdir) / CONFIG_FILE).is_file()  # then a data file there belongs to no run
        for name, values in ((DATA_FILE, digests | (facts or {})), (CONFIG_FILE, config_lib.to_dict(config))):
            if fresh or not (pathlib.Path(workdir) / name).is_file():
                _write(pathlib.Path(workdir) / name, values)

    problem = ""
    for field, digest in digests.items():
        if job_lib.from_process_0(int(digest[:7], 16)) != int(digest[:7], 16):
            problem = problem or (
                f"config.{field} names other data for process {jax.process_index()} on {socket.gethostname()} than for "
                "process 0: make them the same"
            )
    if problem := job_lib.first_message(problem):
        raise WorkdirError(problem)

    try:
        job_lib.on_process_0(claim)
    except job_lib.Process0Error as error:
        raise WorkdirError(
            f"{workdir} can't be written to ({error}): free some space there, or name another --workdir"
        ) from error


def check_data(workdir: str, digests: dict[str, str]) -> None:
    """Checks that the run in a workdir is trained on these data, even if they have moved; called by every process.

    Args:
      workdir: Folder of the run, claimed.
      digests: Digest of the data that each field of the config names for this process, by field.

    Raises:
      WorkdirError: The run is trained on other data, a process sees other data, or can't read the digests; on every process.
    """
    path, problem = pathlib.Path(workdir) / DATA_FILE, ""
    try:
        there = json.loads(_read_of_process_0(path))
        others = [field for field, digest in digests.items() if there[field] != digest]
        if others:
            problem = (
                f"config.{others[0]} names other data than the run in {workdir} is trained on, as seen by process "
                f"{jax.process_index()}: name those, or choose another workdir"
            )
    except OSError as error:
        problem = _unseen(path, error)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{path} is damaged ({error}): choose another workdir"
    if problem := job_lib.first_message(problem):
        raise WorkdirError(problem)


def _unseen(path: pathlib.Path, error: OSError) -> str:
    who = f"process {jax.process_index()} on {socket.gethostname()}"
    return f"{who} can't read {path} ({error.strerror}): make sure that every process sees the workdir"


def _read_of_process_0(path: pathlib.Path) -> str:
    """Returns the text of a file that process 0 has already written; other processes wait until it appears for them.

    Raises:
      OSError: The file can't be read, or has not appeared after `_UNSEEN_S`.
    """
    deadline = time.monotonic() + (_UNSEEN_S if jax.process_index() else 0)
    while True:
        try:
            return path.read_text()
        except FileNotFoundError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)


def trained_on(workdir: str) -> dict:
    """Returns what is known of the data that a run is trained on: digests by field of the config, `num_clips`, `classes`,
    and `num_samples` of every sound.

    For runs of earlier versions some or all of these are missing.

    Raises:
      WorkdirError: The file exists but is damaged.
    """
    path = pathlib.Path(workdir) / DATA_FILE
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged ({error}): choose another workdir") from error
    if not isinstance(found, dict):
        raise WorkdirError(f"{path} is damaged (not a JSON object): choose another workdir")
    return found


def _write(path: pathlib.Path, values: dict) -> None:
    with whole_file.writing(path) as aside:
        aside.write_text(json.dumps(values, indent=1) + "\n")


@contextlib.contextmanager
def lock_workdir(workdir: str) -> Iterator[None]:
    """Locks a workdir against every other run, and creates it if missing. Process 0 holds the lock on behalf of its job.

    The lock is made by flock(2): the kernel releases it when the process ends, however it ends. If another machine, another
    boot of this machine or another pod holds it, it is tried again for `_WAIT_S`: a file server may keep a lock for a while
    because it has not noticed that the machine is lost. Between machines the lock works if the file system passes flock on
    to its server: NFS as Linux mounts it (not with `local_lock`), Lustre with `-o flock`, GPFS, CephFS. If the file system
    has no locks at all, one line warns of it.

    Raises:
      WorkdirError: Another run holds the lock, or the workdir can't be written to; on every process.
    """
    handle = []
    try:
        job_lib.on_process_0(lambda: handle.append(_take_lock(workdir)))
    except ValueError as error:
        raise WorkdirError(str(error)) from error
    try:
        yield
    finally:
        for descriptor in handle:
            os.close(descriptor)


def _take_lock(workdir: str) -> int:
    """Returns the descriptor of the lock file, locked and with this process's name in it; not locked if there are no locks.

    Raises:
      WorkdirError: Another run holds the lock, or the workdir can't be written to.
      OSError: The file can't be locked for another reason.
    """
    path = pathlib.Path(workdir) / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise WorkdirError(f"{workdir} can't be written to ({error.strerror}): name another --workdir") from error
    deadline, told = time.monotonic() + _WAIT_S, False
    while (error := _try_lock(descriptor)) is not None:
        if error.errno in _NO_LOCKS:
            print(
                f"warning: {path} can't be locked ({error.strerror}): make sure that no other run starts there",
                file=sys.stderr,
            )
            return descriptor
        holder, elsewhere = _read_holder(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES) and elsewhere and time.monotonic() < deadline:
            if not told:
                print(f"{workdir} is in use by {holder}: trying again for {_WAIT_S} s", file=sys.stderr, flush=True)
            told = True
            time.sleep(5)  # a file server keeps the lock of a lost machine for a while
            continue
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise error
        gone = f"; if that machine is gone, delete {path}" if elsewhere else ""
        raise WorkdirError(
            f"{workdir} is in use by {holder or 'another run'}: wait until it has ended, or name another --workdir{gone}"
        ) from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n{_machine()}\n".encode(), 0)
    except OSError as error:
        os.close(descriptor)
        raise WorkdirError(f"{workdir} can't be written to ({error.strerror}): free some space there") from error
    return descriptor


def _machine() -> str:
    """Returns an id of this boot and pod, unlike any other; a host name is not enough, as a pod's successor inherits it."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else "unknown"
    return f"boot {boot} pod {os.environ.get(_POD, '')}".strip()


def _read_holder(descriptor: int) -> tuple[str, bool]:
    """Returns who holds a lock, and whether the holder is no living process of this machine.

    It may live elsewhere, or be gone without the file server knowing it yet.
    """
    first, *rest = os.pread(descriptor, 500, 0).decode(errors="replace").splitlines() or [""]
    found = re.fullmatch(r"process (\d{1,9}) on (.*)", first.strip())
    if not found:
        return first.strip(), first.strip() != ""
    # Earlier versions wrote only the first line.
    here = rest[0].strip() == _machine() if rest else found[2] == socket.gethostname()
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        here = False
    except PermissionError:
        pass  # it lives, but belongs to another user
    return first.strip(), not here


def _try_lock(descriptor: int) -> OSError | None:
    """Returns the error that kept us from taking the lock, None if we have it now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None
