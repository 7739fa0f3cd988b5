"""The folder of a run: the guard that it belongs to one run, and the lock that one process at a time is at it."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
from collections.abc import Iterator

import jax

from mc3_jax import checkpoint, config as config_lib, mesh as mesh_lib

CONFIG_FILE, LOCK_FILE = "config.json", ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# What may differ between two starts of the same run: how it is read, watched and evaluated, not what is computed.
_FREE = (
    "fsdp", "heartbeat_timeout_s", "hang_timeout_s", "model.scan_layers", "model.remat", "data.chunk_size",
    "data.dir", "data.tokenizer", "data.num_threads", "data.prefetch", "save", "eval", "log",
)  # fmt: skip


class WorkdirError(ValueError):
    """A workdir that this run can't have."""


def _flatten_config(value, prefix: str = "") -> dict:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    flat = {prefix: len(value)} if isinstance(value, list) else {}
    for key, child in items:
        name = f"{prefix}[{key}]" if isinstance(value, list) else f"{prefix}.{key}" if prefix else key
        flat |= _flatten_config(child, name)
    return flat


def check_workdir(workdir: str, config: config_lib.Config, *, must_exist: bool = False) -> None:
    """Checks that a workdir is empty of runs or holds this one. Fields newer than the run count as their defaults.

    Args:
      workdir: Folder of the run.
      config: Of the run.
      must_exist: A run must be there already.

    Raises:
      WorkdirError: It holds a run with another config (the message names the first field that differs), none where one
        must be, or checkpoints of nobody knows which.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.is_file():
        if must_exist:
            raise WorkdirError(
                f"{workdir} holds no run: train it first with `python -m mc3_jax.train --workdir={workdir}`"
            )
        if checkpoint.checkpoint_dir(workdir).is_dir():
            raise WorkdirError(f"{workdir} holds checkpoints but no {CONFIG_FILE}: choose another workdir")
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged ({error}): choose another workdir") from error
    there = _flatten_config(config_lib.to_dict(config_lib.from_dict(config_lib.Config, saved, str(path))))
    here = _flatten_config(config_lib.to_dict(config))
    # What the towers started from is read no more once something is trained.
    free = (*_FREE, "init") if checkpoint.steps_of(workdir) else _FREE
    for name in dict.fromkeys([*here, *there]):
        if name.startswith(free) or there.get(name) == here.get(name):
            continue
        raise WorkdirError(
            f"{workdir} holds a different run: config.{name} is {there.get(name)!r} there and {here.get(name)!r} here; "
            "choose another workdir, or delete that run"
        )


def claim_workdir(workdir: str, config: config_lib.Config) -> None:
    """Writes the config into a workdir that has none, by one process."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    if jax.process_index() == 0 and not path.is_file():
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(config_lib.to_dict(config), indent=1) + "\n")
        aside.rename(path)


@contextlib.contextmanager
def lock_workdir(workdir: str) -> Iterator[None]:
    """Keeps every other run out of a workdir, which is made where missing. Process 0 holds the lock for all of its job.

    The lock is flock's: the kernel frees it when its process ends, however that ends. Between machines it holds where
    the file system takes flock to its server: NFS as Linux mounts it (not with `local_lock`), Lustre with `-o flock`, GPFS,
    CephFS. Where there are no locks at all, one line warns of it.

    Raises:
      WorkdirError: Another run holds it, or the workdir can't be written to; on every process.
    """
    handle = []
    try:
        mesh_lib.on_process_0(lambda: handle.append(_take_lock(workdir)))
    except ValueError as error:
        raise WorkdirError(str(error)) from error
    try:
        yield
    finally:
        for descriptor in handle:
            os.close(descriptor)


def _take_lock(workdir: str) -> int:
    """Returns the open, locked file, which says who holds it."""
    path = pathlib.Path(workdir) / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise WorkdirError(f"{workdir} can't be written to ({error.strerror}): name another --workdir") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            print(
                f"warning: {path} can't be locked ({error.strerror}): see that no other run starts there",
                file=sys.stderr,
            )
            return descriptor
        holder = " ".join(os.pread(descriptor, 200, 0).decode(errors="replace").split())
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise WorkdirError(
            f"{workdir} is in use by {holder or 'another run'}: wait until that has ended, or name another --workdir"
        ) from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        os.close(descriptor)
        raise WorkdirError(f"{workdir} can't be written to ({error.strerror}): make room there") from error
    return descriptor
