"""Checkpoints by Orbax, sealed: written aside, digested, renamed; and verified whenever they are read.

`WORKDIR/checkpoints/500` is the state after 500 steps, whole and with a manifest (`mc3_jax.integrity`), or it isn't there.
What is being written is `500.saving`, what is being deleted `500.deleting`; what was found damaged is moved to
`500.damaged` and left alone.
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
_NUM_TRIES = 5  # at the newest checkpoint of a run that goes on and deletes it meanwhile
_PASSING = (".saving", ".saving.orbax-checkpoint-tmp", ".deleting")


class CheckpointError(Exception):
    """A checkpoint can't be written, or what is there isn't this model's."""


class MisfitError(ValueError):
    """Parameters don't fit the model's sizes."""


class PrunedError(ValueError):
    """A checkpoint is gone: training has deleted it since it was listed, as newer ones were there."""


def checkpoint_dir(workdir: str) -> pathlib.Path:
    """Returns where a run's checkpoints lie, absolute."""
    return pathlib.Path(workdir).absolute() / "checkpoints"


def steps_of(workdir: str) -> list[int]:
    """Returns the steps a run has checkpoints of, in order; [] where there is no run."""
    folder = checkpoint_dir(workdir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


def newest_step(workdir: str) -> int:
    """Returns the newest step a run has a checkpoint of, by process 0; 0 where there is none. Called by every process."""
    return job_lib.from_process_0(max(steps_of(workdir), default=0))


class Checkpoints:
    """Writes a run's checkpoints in the background; use as a context, by every process of the run.

    Attributes:
      preempted: Whether the machine is about to go, as of the last `is_due`.
    """

    def __init__(
        self, workdir: str, *, every_steps: int, keep: int, keep_steps: list[int],
        tell: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        """Deletes what a killed run left half done.

        Args:
          workdir: Folder of the run, locked.
          every_steps: Interval.
          keep: Newest checkpoints kept.
          keep_steps: Steps written and kept for good: the ends of phases.
          tell: Gets a line for every checkpoint that is there, on process 0 and by a thread.

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
            self._thread.join()  # of several processes, one that is lost would make it wait for ever

    def prepare(self, state) -> None:
        """Compiles what saving needs: the first save may be one that is told to hurry.

        Args:
          state: As it will be saved.
        """
        jax.block_until_ready(integrity.checksums(state)[1])

    def is_due(self, step: int) -> bool:
        """Returns whether the state after a step is to be saved; asked after every step, by every process.

        Raises:
          CheckpointError: The last one could not be written. Several processes don't all know yet: there, `save` raises it.
        """
        if self._fault is not None and jax.process_count() == 1:
            raise self._fault
        self._num_asked += 1
        self.preempted = job_lib.preempted(self._num_asked)
        return self.preempted or step % self._every_steps == 0 or step in self._keep_steps

    def save(self, step: int, state) -> None:
        """Takes the state after a step and begins to write it.

        Args:
          step: Steps done.
          state: On the devices; may be donated as soon as this returns.

        Raises:
          CheckpointError: This or the last one could not be written.
        """
        self.wait()
        aside = self._folder / f"{step}.saving"
        begin, sums = time.monotonic(), integrity.checksums(state)
        try:
            written = ocp.save_async(aside, state)
        except Exception as error:  # whatever Orbax and TensorStore raise
            raise self._error(step, error) from error
        self._thread = threading.Thread(target=self._commit, args=(step, aside, written, sums, begin), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns once all that was begun is on disk; called by every process.

        Raises:
          CheckpointError: It could not be written; on every process, for process 0 alone seals.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if message := job_lib.first_message(str(self._fault or "")):
            raise CheckpointError(message) from self._fault

    def _commit(self, step: int, aside: pathlib.Path, written, sums, begin: float) -> None:
        """Waits until all processes have written their parts; process 0 seals them and gives the folder its name."""
        try:
            written.result()
            if jax.process_index() == 0:
                integrity.seal(aside, step, integrity.to_hex(*sums))
                aside.rename(self._folder / str(step))
                integrity.sync_folder(self._folder)
                self._tell(f"saved step {step} in {time.monotonic() - begin:.1f} s")
                self._prune()
        except Exception as error:  # told by the next `save` or `wait`
            self._fault = self._error(step, error)

    def _error(self, step: int, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:600]
        made = CheckpointError(
            f"the checkpoint of step {step} can't be written to {self._folder}: {reason}; checkpoints before it are "
            "untouched: mend the disk and start again to go on"
        )
        made.__cause__ = error
        return made

    def _prune(self) -> None:
        steps = steps_of(self._workdir)
        for step in steps[: -self._keep]:
            if step not in self._keep_steps:
                going = self._folder / f"{step}.deleting"
                (self._folder / str(step)).rename(going)  # at once, so that no half of it is taken for a checkpoint
                _delete(going)

    def _clean(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if path.name.split(".")[0].isdecimal() and path.name.endswith(_PASSING):
                _delete(path)


def _delete(path: pathlib.Path) -> None:
    """Deletes a folder, or says that it can't: on NFS, files that another process reads stay. The next start tries again."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        print(f"warning: {path} can't be deleted yet: {error}", file=sys.stderr, flush=True)


def restore(workdir: str, step: int, abstract_state):
    """Returns the state written after `step` steps, every file and array of it checked; called by every process.

    Args:
      workdir: Folder of the run.
      step: Of an existing checkpoint.
      abstract_state: `jax.ShapeDtypeStruct`s with shardings on any mesh.

    Raises:
      DamagedError: Its files or arrays are not those that were written; on every process.
      CheckpointError: It holds other names or shapes.
      OSError: A process can't read it.
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
            f"checkpoint {path} can't be restored, its state is not that of this config: {reason}; where an earlier version "
            f"has written it, begin another run from it: --config.init.audio={workdir}, .video and .text"
        ) from error
    _check_arrays(path, state, manifest)
    return state


def restore_newest(workdir: str, plan: Callable[[int], Any]) -> tuple[int, Any]:
    """Returns (step, state) of the newest intact checkpoint, or (0, None); called by every process of a locked workdir.

    A damaged one costs a warning and is moved to `STEP.damaged`, so that the step can be written again.

    Args:
      workdir: Folder of the run.
      plan: The abstract state of a step.

    Raises:
      CheckpointError: The newest intact one holds other names or shapes, or a process does not see it.
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
            job_lib.on_process_0(functools.partial(_set_aside, checkpoint_dir(workdir) / str(step), error))
    return 0, None


def restore_params(workdir: str, step: int, abstract_params):
    """Returns the parameters alone of the state written after `step` steps, checked; no optimizer is read.

    Args:
      workdir: Folder of the run.
      step: Of an existing checkpoint.
      abstract_params: `jax.ShapeDtypeStruct`s with shardings on any mesh.

    Raises:
      PrunedError: There is none of that step, or no more.
      ValueError: It holds other names or shapes, or it is damaged.
      OSError: It can't be read.
    """
    path = checkpoint_dir(workdir) / str(step)
    if not path.is_dir():
        raise PrunedError(f"{workdir} has no checkpoint of step {step}, only of {steps_of(workdir)}")
    try:
        return _restore_params(path, step, abstract_params)
    except Exception as error:  # half of it is gone: whatever Orbax makes of that
        if job_lib.from_process_0(path.is_dir()):
            raise
        raise PrunedError(
            f"checkpoint {path} was deleted while it was read, as training goes on: only {steps_of(workdir)} are left"
        ) from error


def restore_newest_params(workdir: str, abstract_params) -> tuple[int, Any]:
    """Returns (step, parameters) of the newest checkpoint, as `restore_params`; called by every process.

    A run that is trained meanwhile may delete what was the newest when it was looked for; then it is looked for again.

    Args:
      workdir: Folder of the run.
      abstract_params: `jax.ShapeDtypeStruct`s with shardings on any mesh.

    Raises:
      ValueError: As `restore_params`, or there is no checkpoint.
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


def _restore_params(path: pathlib.Path, step: int, abstract_params):
    manifest = _verify(path, step)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # A partial load passes over what the checkpoint lacks without a word: names and shapes are compared first.
    saved = ocp.metadata(path).metadata["params"]
    saved = {name: saved[name] for name in saved if name != "loss"}  # what a loss has learned for itself
    check_shapes(flatten(saved), flatten(abstract_params), f"checkpoint {path}")
    try:
        with context:
            params = ocp.load(path, {"params": abstract_params})["params"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:600]
        raise ValueError(f"checkpoint {path} can't be restored: {reason}") from error
    _check_arrays(path, {"params": params}, manifest)
    return params


def _verify(path: pathlib.Path, step: int) -> dict:
    """Returns the manifest of a checkpoint whose files are intact; processes share the reading.

    Raises:
      DamagedError: They are not; on every process.
      OSError: A process can't read one that may well be; on every process.
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
            "see that it can; the checkpoint stays as it is"
        )
    if blocked := job_lib.first_message(blocked):
        raise OSError(blocked)
    _agree(path, problem)
    return manifest


def _check_arrays(path: pathlib.Path, tree, manifest: dict) -> None:
    problem = ""
    try:
        integrity.check_arrays(tree, manifest["arrays"])
    except DamagedError as error:
        problem = str(error)
    _agree(path, problem)


def _agree(path: pathlib.Path, problem: str) -> None:
    if problem := job_lib.first_message(problem):
        raise DamagedError(
            f"checkpoint {path} is damaged: {problem}; training, when started, goes back to the newest intact one"
        )


def _set_aside(path: pathlib.Path, error: DamagedError) -> None:
    """Moves a damaged checkpoint to a name that is free, and says so."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    print(f"warning: {error}; it was moved to {aside.name}", file=sys.stderr, flush=True)


def flatten(tree) -> dict:
    """Returns nested dictionaries as {"audio/encoder/norm/scale": leaf}."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict) -> dict:
    """Returns the nested dictionaries that `flatten` took apart."""
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

    Raises:
      MisfitError: They don't; a list of - missing, + unexpected and ! of another shape.
    """
    missing = [f"- {name} {list(leaf.shape)}" for name, leaf in expected.items() if name not in found]
    unexpected = [f"+ {name} {list(leaf.shape)}" for name, leaf in found.items() if name not in expected]
    other = [
        f"! {name} {list(found[name].shape)}, the model's is {list(leaf.shape)}"
        for name, leaf in expected.items()
        if name in found and tuple(found[name].shape) != tuple(leaf.shape)
    ]
    shown = []
    for kind in (missing, unexpected, other):
        shown += kind[:10] + ([f"{kind[0][0]} {len(kind) - 10} more"] if len(kind) > 10 else [])
    if shown:
        raise MisfitError(f"{where} doesn't fit the model (- missing, + unexpected, ! other shape): {'; '.join(shown)}")
