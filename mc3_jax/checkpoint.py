"""Checkpoints, written by Orbax and verified whenever they are read.

A checkpoint is written under another name, gets a manifest with digests (`mc3_jax.integrity`) and is then renamed. So
`WORKDIR/checkpoints/500` is the whole state after 500 steps, or it doesn't exist. `500.saving` is being written,
`500.deleting` is being deleted; a damaged checkpoint is moved to `500.damaged` and left alone.
"""

import functools
import pathlib
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mc3_jax import integrity, job as job_lib

DamagedError = integrity.DamagedError
_NUM_TRIES = 5  # attempts to read the newest checkpoint of a run that is being trained and may delete it meanwhile
_FAULTS = "mc3_jax/checkpoint/faults"  # key under which processes tell each other that they can't write
_PASSING = (".saving", ".saving.orbax-checkpoint-tmp", ".deleting")


class CheckpointError(Exception):
    """A checkpoint can't be written, or the one there doesn't fit this model."""


class MisfitError(ValueError):
    """Parameters don't fit the model's sizes."""


class PrunedError(ValueError):
    """A checkpoint is missing: training has deleted it since it was listed, because there are newer ones."""


def checkpoint_dir(workdir: str) -> pathlib.Path:
    """Returns the absolute path of the folder of a run's checkpoints."""
    return pathlib.Path(workdir).absolute() / "checkpoints"


def steps_of(workdir: str) -> list[int]:
    """Returns the steps that a run has checkpoints of, ascending; [] if there is no run."""
    folder = checkpoint_dir(workdir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


def agreed_steps(workdir: str) -> list[int]:
    """Returns the steps that a run has checkpoints of according to process 0, in order. Called by every process."""
    return job_lib.list_from_process_0(steps_of(workdir))


def newest_step(workdir: str) -> int:
    """Returns the newest step that a run has a checkpoint of, as process 0 sees it; 0 if none. Called by every process."""
    return job_lib.from_process_0(max(steps_of(workdir), default=0))


class Checkpoints:
    """Writes a run's checkpoints in the background. Every process of the run uses it, as a context manager.

    Attributes:
      preempted: Whether the job is being preempted, as of the last call of `is_due`.
    """

    def __init__(
        self, workdir: str, *, every_steps: int, keep: int, keep_steps: list[int],
        tell: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        """Creates the folder, and deletes the half-written or half-deleted checkpoints of a killed run.

        Args:
          workdir: Folder of the run, locked.
          every_steps: Interval between checkpoints, in steps.
          keep: Number of newest checkpoints kept.
          keep_steps: Steps that are always saved and never deleted: the ends of phases.
          tell: Called with a line of text for every checkpoint once it is complete; on process 0, from another thread.

        Raises:
          CheckpointError: The folder can't be written to.
        """
        self._folder, self._workdir = checkpoint_dir(workdir), workdir
        self._every_steps, self._keep, self._keep_steps, self._tell = every_steps, keep, keep_steps, tell
        self._thread: threading.Thread | None = None
        self._fault: CheckpointError | None = None
        self._num_asked = 0
        self.preempted = False
        try:
            job_lib.on_process_0(self._clean)
        except ValueError as error:
            raise CheckpointError(f"{self._folder} can't be written to: {error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None and jax.process_count() == 1:
            self._thread.join()  # not with several processes: if one is lost, this would wait for ever

    def prepare(self, state) -> None:
        """Compiles the checksums that saving needs, as the first save may come from a preemption, with little time.

        Args:
          state: State with the shapes and shardings that will be saved.
        """
        jax.block_until_ready(integrity.checksums(state)[1])

    def is_due(self, step: int) -> bool:
        """Returns whether the state after `step` steps is to be saved; to be called after every step, by every process.

        Raises:
          CheckpointError: The last checkpoint could not be written. With several processes, only `save` and `wait` raise it,
            since the others don't know yet.
        """
        if self._fault is not None and jax.process_count() == 1:
            raise self._fault
        self._num_asked += 1
        self.preempted = job_lib.preempted(self._num_asked)
        return self.preempted or step % self._every_steps == 0 or step in self._keep_steps

    def save(self, step: int, state) -> None:
        """Begins to write a checkpoint in the background, after waiting until the last one is written.

        Args:
          step: Number of steps done.
          state: State on the devices; it may be donated as soon as this returns.

        Raises:
          CheckpointError: This checkpoint or the last one could not be written.
        """
        self.wait()
        aside = self._folder / f"{step}.saving"
        begin, sums = time.monotonic(), integrity.checksums(state)
        try:
            written = ocp.save_async(aside, state)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._error(step, error) from error
        self._thread = threading.Thread(target=self._commit, args=(step, aside, written, sums, begin), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on disk; called by every process.

        Raises:
          CheckpointError: It could not be written; on every process, even if only one of them has met the error.
        """
        if self._thread is None:
            return
        while self._thread.is_alive() and not _has_failed_elsewhere():
            self._thread.join(1)
        self._thread = None
        if message := job_lib.first_message(str(self._fault or "")):
            raise CheckpointError(message) from self._fault

    def _commit(self, step: int, aside: pathlib.Path, written, sums, begin: float) -> None:
        """Waits until all processes have written their parts; then process 0 writes the manifest and renames the folder."""
        try:
            written.result()
            if jax.process_index() == 0:
                integrity.seal(aside, step, integrity.to_hex(*sums))
                aside.rename(self._folder / str(step))
                integrity.sync_folder(self._folder)
                self._tell(f"saved step {step} in {time.monotonic() - begin:.1f} s")
                self._prune()
        except Exception as error:  # raised by the next `save` or `wait`
            self._fault = self._error(step, error)
            if jax.process_count() > 1:
                job_lib.publish(f"{_FAULTS}/{jax.process_index()}", str(self._fault))

    def _error(self, step: int, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:600]
        made = CheckpointError(
            f"the checkpoint of step {step} can't be written to {self._folder}: {reason}; earlier checkpoints are "
            "untouched: fix the disk and start again to resume"
        )
        made.__cause__ = error
        return made

    def _prune(self) -> None:
        steps = steps_of(self._workdir)
        for step in steps[: -self._keep]:
            if step not in self._keep_steps:
                going = self._folder / f"{step}.deleting"
                (self._folder / str(step)).rename(going)  # else a half-deleted folder would pass for a checkpoint
                _delete(going)

    def _clean(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if path.name.split(".")[0].isdecimal() and path.name.endswith(_PASSING):
                _delete(path)


def _has_failed_elsewhere() -> bool:
    """Returns whether one of several processes can't write. Orbax would let the others wait for it for 20 minutes."""
    return jax.process_count() > 1 and bool(job_lib.published(_FAULTS))


def _delete(path: pathlib.Path) -> None:
    """Deletes a folder, or warns that it can't: on NFS, files being read by another process stay. The next start retries."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        print(f"warning: {path} can't be deleted yet: {error}", file=sys.stderr, flush=True)


def restore(workdir: str, step: int, abstract_state):
    """Returns the state saved after `step` steps, with every file and array verified; called by every process.

    Args:
      workdir: Folder of the run.
      step: Step of an existing checkpoint.
      abstract_state: The state as `jax.ShapeDtypeStruct`s, with shardings on any mesh.

    Raises:
      DamagedError: Files or arrays differ from those that were written; on every process.
      CheckpointError: The checkpoint has other names or shapes than `abstract_state`, or Orbax can't read it.
      OSError: A process can't read one of its files, for instance for lack of permission.
    """
    path = checkpoint_dir(workdir) / str(step)
    manifest = _verify(path, step)
    try:
        state = ocp.load(path, abstract_state)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} can't be restored: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:600]
        raise CheckpointError(
            f"checkpoint {path} can't be restored: its state doesn't match this config: {reason}; if an earlier version "
            f"wrote it, start a new run from its towers: --config.init.audio={workdir}, .video and .text"
        ) from error
    _check_arrays(path, state, manifest)
    return state


def restore_newest(workdir: str, plan: Callable[[int], Any]) -> tuple[int, Any]:
    """Returns (step, state) of the newest intact checkpoint, or (0, None) if there is none.

    Called by every process, with the workdir locked. A damaged checkpoint causes a warning and is moved to `STEP.damaged`,
    so that the step can be written again.

    Args:
      workdir: Folder of the run.
      plan: Function from a step to its abstract state; see `restore`.

    Raises:
      CheckpointError: As for `restore`, or a process does not see the newest checkpoint.
      OSError: A process can't read it.
    """
    while step := newest_step(workdir):
        path, problem = checkpoint_dir(workdir) / str(step), ""
        if not path.is_dir():
            problem = f"process {jax.process_index()} on {socket.gethostname()} does not see {path}: mount it there"
        if problem := job_lib.first_message(problem):
            raise CheckpointError(problem)
        try:
            return step, restore(workdir, step, plan(step))
        except DamagedError as error:
            job_lib.on_process_0(functools.partial(_set_aside, path, error))
    return 0, None


def restore_params(workdir: str, step: int, abstract_params):
    """Returns only the parameters of the state saved after `step` steps, verified; the optimizer state is not read.

    Called by every process.

    Args:
      workdir: Folder of the run.
      step: Step of an existing checkpoint.
      abstract_params: The parameters as `jax.ShapeDtypeStruct`s, with shardings on any mesh.

    Raises:
      PrunedError: There is no checkpoint of that step, or it was deleted while it was read; on every process.
      ValueError: The checkpoint has other names or shapes, or it is damaged. Or one of several processes found it deleted
        while it read the arrays.
      OSError: It can't be read.
    """
    path = checkpoint_dir(workdir) / str(step)
    if job_lib.from_process_0(not path.is_dir()):
        raise PrunedError(f"{workdir} has no checkpoint of step {step}, only of steps {steps_of(workdir)}")
    gone = f"checkpoint {path} was deleted by the running training while being read: only steps"
    try:
        manifest = _verify(path, step)
    except (ValueError, OSError) as error:
        if job_lib.from_process_0(path.is_dir()):
            raise
        raise PrunedError(f"{gone} {steps_of(workdir)} are left") from error
    try:
        params = _load_params(path, abstract_params)
    except Exception as error:  # of any kind: Orbax may find it half deleted
        if path.is_dir():
            raise
        if jax.process_count() > 1:  # no collective: the other processes may still be reading
            raise ValueError(f"{gone} {steps_of(workdir)} are left; start again") from error
        raise PrunedError(f"{gone} {steps_of(workdir)} are left") from error
    try:
        _check_arrays(path, {"params": params}, manifest)
    except DamagedError as error:  # on every process
        if job_lib.from_process_0(path.is_dir()):
            raise
        raise PrunedError(f"{gone} {steps_of(workdir)} are left") from error
    return params


def restore_newest_params(workdir: str, abstract_params) -> tuple[int, Any]:
    """Returns (step, parameters) of the newest checkpoint, read by `restore_params`; called by every process.

    If the run is being trained, it may delete that checkpoint before it is read; then the newest one is looked up again.

    Args:
      workdir: Folder of the run.
      abstract_params: The parameters as `jax.ShapeDtypeStruct`s, with shardings on any mesh.

    Raises:
      ValueError: As for `restore_params`, or there is no checkpoint.
      OSError: It can't be read.
    """
    for tries in range(_NUM_TRIES):
        step = newest_step(workdir)
        if not step:
            break
        try:
            return step, restore_params(workdir, step, abstract_params)
        except PrunedError:
            if tries == _NUM_TRIES - 1:
                raise
    raise ValueError(f"{workdir} holds no checkpoint yet: train it first")


def _load_params(path: pathlib.Path, abstract_params):
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # A partial load silently skips arrays that the checkpoint lacks, so names and shapes are compared first.
    saved = ocp.metadata(path).metadata["params"]
    saved = {name: saved[name] for name in saved if name != "loss"}  # the loss's own parameters
    check_shapes(flatten(saved), flatten(abstract_params), f"checkpoint {path}")
    try:
        with context:
            return ocp.load(path, {"params": abstract_params})["params"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:600]
        raise ValueError(f"checkpoint {path} can't be restored: {reason}") from error


def _verify(path: pathlib.Path, step: int) -> dict:
    """Returns the manifest of a checkpoint after checking its files, each process a share of them.

    Raises:
      DamagedError: A file is not intact; on every process.
      OSError: A process can't read a file that may well be intact; on every process.
    """
    problem, blocked, manifest = "", "", {}
    try:
        manifest = integrity.read_manifest(path, step)
        integrity.check_files(path, manifest, jax.process_index(), jax.process_count())
    except DamagedError as error:
        problem = str(error)
    except OSError as error:
        blocked = (
            f"process {jax.process_index()} on {socket.gethostname()} can't read {error.filename} ({error.strerror}): "
            "make the file readable there; the checkpoint is left as it is"
        )
    if blocked := job_lib.first_message(blocked):
        raise OSError(blocked)
    _raise_if_damaged(path, problem)
    return manifest


def _check_arrays(path: pathlib.Path, tree, manifest: dict) -> None:
    problem = ""
    try:
        integrity.check_arrays(tree, manifest["arrays"])
    except DamagedError as error:
        problem = str(error)
    _raise_if_damaged(path, problem)


def _raise_if_damaged(path: pathlib.Path, problem: str) -> None:
    """Raises DamagedError on every process if any has found a problem; called by every process."""
    if problem := job_lib.first_message(problem):
        raise DamagedError(
            f"checkpoint {path} is damaged: {problem}; training, if started again, resumes from the newest intact one"
        )


def _set_aside(path: pathlib.Path, error: DamagedError) -> None:
    """Moves a damaged checkpoint to a name that is free, and prints a warning."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    print(f"warning: {error}; it was moved to {aside.name}", file=sys.stderr, flush=True)


def flatten(tree) -> dict:
    """Returns nested dictionaries as a flat one: {"audio/encoder/norm/scale": leaf}."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict) -> dict:
    """Returns a flat dictionary as nested ones, the inverse of `flatten`."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def check_shapes(found: dict, expected: dict, where: str) -> None:
    """Checks that two flat trees have the same names and shapes.

    Args:
      found: The tree to check.
      expected: The tree of the model.
      where: Where the tree comes from, for the error message.

    Raises:
      MisfitError: They differ; the message lists - missing names, + unexpected names and ! other shapes.
    """
    missing = [f"- {name} {list(leaf.shape)}" for name, leaf in expected.items() if name not in found]
    unexpected = [f"+ {name} {list(leaf.shape)}" for name, leaf in found.items() if name not in expected]
    other = [
        f"! {name} {list(found[name].shape)}, the model needs {list(leaf.shape)}"
        for name, leaf in expected.items()
        if name in found and tuple(found[name].shape) != tuple(leaf.shape)
    ]
    shown = []
    for kind in (missing, unexpected, other):
        shown += kind[:10] + ([f"{kind[0][0]} {len(kind) - 10} more"] if len(kind) > 10 else [])
    if shown:
        raise MisfitError(f"{where} doesn't fit the model (- missing, + unexpected, ! other shape): {'; '.join(shown)}")
