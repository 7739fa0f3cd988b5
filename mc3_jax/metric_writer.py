"""Writes a run's metrics: to a progress bar on a terminal, `metrics.jsonl`, TensorBoard and, on request, W&B."""

import contextlib
import io
import json
import os
import pathlib
import secrets
import sys
import time

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from mc3_jax import progress, whole_file

METRICS_FILE, CLIPS_FILE, STARTS_FILE = "metrics.jsonl", "clips.jsonl", "starts.jsonl"
_WANDB_FILE = "wandb_id.txt"
TIMES = (
    "clips_per_s",
    "step_s",
    "input_wait_s",
    "mfu",
    "goodput",
    "elapsed_s",
)  # columns in which two runs of the same config differ
_SHOWN = ("loss", "contrastive", "consensus")  # in the progress bar


def read_metrics(workdir: str) -> list[dict]:
    """Returns the rows of metrics written so far, in order of steps; lines cut short by a crash are skipped."""
    return _read_rows(pathlib.Path(workdir) / METRICS_FILE)


def read_clips(workdir: str, process_index: int = 0) -> list[dict]:
    """Returns for each step, in order, {"step", "clips"}: the indices in the training split of the clips a process read."""
    return _read_rows(_clips_path(workdir, process_index))


def note_start(workdir: str, step: int, facts: dict, ago_s: float) -> float:
    """Records a start of the run and returns how many seconds ago its first start was; on processes but 0, just `ago_s`.

    Args:
      workdir: Folder of the run.
      step: Number of steps done at this start.
      facts: Further facts to record, plain values.
      ago_s: How many seconds ago this start was.
    """
    if jax.process_index() != 0:
        return ago_s
    path, began = pathlib.Path(workdir) / STARTS_FILE, time.time() - ago_s
    first = next((row["time"] for row in _read_rows(path) if isinstance(row.get("time"), float)), began)
    with path.open("ab", buffering=0) as file:
        _append(file, {"time": began, "step": step, **facts})
    # Not less than the rows say: the clock may have been set back since the first start, or be that of another machine.
    told = [row["elapsed_s"] for row in read_metrics(workdir) if isinstance(row.get("elapsed_s"), float)]
    return max([began - first, 0.0, *told]) + ago_s


def _clips_path(workdir: str, process_index: int) -> pathlib.Path:
    path = pathlib.Path(workdir) / CLIPS_FILE
    return path.with_stem(f"{path.stem}-{process_index}") if process_index else path


def _read_rows(path: pathlib.Path) -> list[dict]:
    """Returns the rows of a file; lines that a crash or a disk has damaged are skipped."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def _go_on(path: pathlib.Path, start_step: int) -> io.FileIO:
    """Returns a file of rows opened to append, unbuffered; rows of steps that will be repeated are removed from it."""
    with whole_file.writing(path) as aside:  # a kill, a full disk or a power failure must not lose the earlier rows
        aside.write_text("".join(json.dumps(row) + "\n" for row in _read_rows(path) if row["step"] <= start_step))
    return path.open("ab", buffering=0)


def _append(file: io.FileIO, row: dict) -> None:
    line = (json.dumps(row) + "\n").encode()
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:  # e.g. a full disk; Python's error doesn't name the file
        raise OSError(error.errno, error.strerror, file.name) from error


def start_wandb(workdir: str, project: str, name: str, config: dict, *, resumed: bool):
    """Returns W&B's run of a workdir, or None without a project; to be called on process 0 only.

    All starts of a workdir are one run of W&B. Its id lies in the workdir, so training anew in an emptied folder, or in a
    folder of the same name on another machine, is another run.

    Args:
      workdir: Folder of the run.
      project: Weights & Biases project; "" for none.
      name: Name of the run.
      config: Config that W&B shows, plain values.
      resumed: Whether the run has been trained already. Then a failure of W&B is only a warning, and None is returned.

    Raises:
      ValueError: The run is new, and W&B isn't installed, can't be reached or doesn't know the user.
      OSError: The id can't be read or written.
    """
    if not project:
        return None
    run_id = _wandb_id(pathlib.Path(workdir))
    try:
        import wandb

        return wandb.init(
            project=project, name=name, config=config, dir=workdir, id=run_id, resume="allow", allow_val_change=True
        )
    except Exception as error:  # a broken install or the network: W&B may raise anything
        fix = "`pip install mc3_jax[wandb]`" if isinstance(error, ImportError) else "`wandb login`, or WANDB_MODE=offline"
        problem = f"log.wandb_project = {project!r}: W&B can't be started ({_one_line(error)})"
        if not resumed:
            raise ValueError(f"{problem}: {fix}, or leave it empty") from error
        print(f"warning: {problem}, continuing without it; {fix}", file=sys.stderr, flush=True)
        return None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _wandb_id(workdir: pathlib.Path) -> str:
    """Returns W&B's id of the run: drawn at random at its first start with W&B, and kept in the workdir for the others."""
    path = workdir / _WANDB_FILE
    known = path.read_text().strip() if path.is_file() else ""
    if not known:
        known = secrets.token_hex(8)
        with whole_file.writing(path) as aside:
            aside.write_text(f"{known}\n")
    return known


class ClipWriter:
    """Writes which clips each step uses; every process writes those of its own rows. Use as a context."""

    def __init__(self, workdir: str, *, start_step: int, active: bool):
        """Opens the file. Rows after `start_step` are dropped, since those steps will be repeated.

        Args:
          workdir: Folder of the run.
          start_step: Number of steps done.
          active: Whether to write anything.
        """
        self._file = _go_on(_clips_path(workdir, jax.process_index()), start_step) if active else None
        index = jax.process_count()
        while active and jax.process_index() == 0 and _clips_path(workdir, index).is_file():
            _go_on(_clips_path(workdir, index), start_step).close()  # of an earlier start with more processes
            index += 1

    def __enter__(self) -> "ClipWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()

    def sync(self) -> None:
        """Returns once the rows written so far would survive a power failure."""
        if self._file:
            os.fsync(self._file.fileno())

    def write(self, step: int, clips: Int[np.ndarray, " b"]) -> None:
        """Writes one row.

        Args:
          step: Number of steps done after the step with these clips.
          clips: Index of each clip in the training split.
        """
        if self._file:
            _append(self._file, {"step": step, "clips": clips.tolist()})


class MetricWriter:
    """Writes scalars, on process 0 only. Use as a context."""

    def __init__(
        self, workdir: str, *, total_steps: int, start_step: int, batch_size: int, tensorboard: bool, num_clips: int = 0,
        wandb=None,
    ):  # fmt: skip
        """Opens the files. Rows after `start_step` are dropped, since those steps will be repeated.

        Args:
          workdir: Folder of the run.
          total_steps: Number of steps in the whole run.
          start_step: Number of steps done.
          batch_size: Clips per step, for clips/s.
          tensorboard: Whether to write event files to `WORKDIR/tensorboard`.
          num_clips: Number of clips in the training split, for the epoch in log lines; 0 if unknown.
          wandb: Result of `start_wandb`; this writer finishes it.
        """
        self._active = jax.process_index() == 0
        self._batch_size, self._step = batch_size, start_step
        self._total_steps, self._num_clips = total_steps, num_clips
        self._jsonl = self._tensorboard = None
        self._wandb = wandb
        if not self._active:
            return
        path = pathlib.Path(workdir)
        path.mkdir(parents=True, exist_ok=True)
        self._jsonl = _go_on(path / METRICS_FILE, start_step)
        if tensorboard:
            from mc3_jax import event_file  # imports torch if installed, which takes a second

            self._tensorboard = event_file.EventFile(path / "tensorboard", start_step + 1)
        # A terminal that doesn't know its size, as in containers, reports 0 columns, and tqdm would draw nothing.
        terminal = sys.stderr.isatty()
        known = terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        size = {"dynamic_ncols": True} if known else {"ncols": 100, "nrows": 40}
        self._bar = tqdm(
            total=total_steps * batch_size, initial=start_step * batch_size, unit="clip", unit_scale=True,
            disable=not terminal, **size,
        )  # fmt: skip

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        if not self._active:
            return
        with contextlib.ExitStack() as stack:  # each is closed, even if closing another fails
            if self._wandb:
                stack.callback(self._ask_wandb, "finish")
            if self._tensorboard:
                stack.callback(self._tensorboard.close)
            stack.callback(self._jsonl.close)
            stack.callback(self._bar.close)

    def advance(self, step: int, phase: str) -> None:
        """Moves the progress bar to `step` steps done."""
        if self._active:
            self._bar.set_description(phase, refresh=False)
            self._bar.update((step - self._step) * self._batch_size)
            self._step = step

    def sync(self) -> None:
        """Returns once the rows written so far would survive a power failure."""
        if self._active:
            os.fsync(self._jsonl.fileno())

    def write(self, step: int, phase: str, scalars: dict[str, float]) -> None:
        """Writes one row and a log line: the scalars of the step after which `step` steps are done."""
        if not self._active:
            return
        scalars = {name: float(value) for name, value in scalars.items()}
        _append(self._jsonl, {"step": step, "phase": phase, **scalars})
        if self._tensorboard:
            self._tensorboard.write(step, scalars)
        if self._wandb:
            self._ask_wandb("log", scalars, step=step)
        self._bar.set_postfix({name: f"{scalars[name]:.3f}" for name in _SHOWN if name in scalars}, refresh=False)
        sizes = {"batch_size": self._batch_size, "num_clips": self._num_clips}
        progress.say(progress.row(step, self._total_steps, phase, scalars, **sizes))

    def _ask_wandb(self, what: str, *args, **options) -> None:
        try:
            getattr(self._wandb, what)(*args, **options)
        except Exception as error:  # whatever it is: no row is lost, the files have them
            print(f"warning: W&B gets no more rows: {_one_line(error)}", file=sys.stderr, flush=True)
            self._wandb = None
