"""Makes the runs of a suite by the public commands, each in a folder of its own; runs that are done are skipped."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from configs.tables import shared
from mc3_jax import terminal, whole_file
from mc3_jax.data import records

ROOT = pathlib.Path(__file__).parents[1]
# Larger than the demo's, so that intervals are narrower, and with a seed on which no choice was based.
WORLD = {"videos": 320, "seed": 20}
OWN_CLIPS = "--config.data.dir=./clips"  # word in `TOOK` of runs on the clips of the suite's own world
MEASURED = ("validation", "test")  # splits: settings are chosen on the first, results are reported on the second
READING = ("num_threads", "num_workers", "prefetch")  # fields of a config's `data` that don't change a run's result
EPILOG = "Overrides after -- go to every run; only those of how clips are read are allowed: -- --config.data.num_workers=16"
TOOK = "took.json"  # file in a run's folder, done or not: how it was called and how long it took


@dataclasses.dataclass(frozen=True)
class Suite:
    """What all runs of a suite have in common.

    Attributes:
      name: Name of the suite, which follows the name of a config file (`configs/tables/mc3.py:soundworld`).
      out: Folder for everything that is made.
      data: Overrides that name the clips and the tokenizer.
      reading: Overrides of how clips are read. They don't change a run's result, so a run may go on with others.
    """

    name: str
    out: pathlib.Path
    data: tuple[str, ...]
    reading: tuple[str, ...] = ()


class RunError(Exception):
    """A command of a run failed.

    Attributes:
      status: Exit status of the command.
      last: Last line that the command wrote to its log, "" if it wrote none.
    """

    def __init__(self, command: list[str], status: int, log: str, last: str = ""):
        ends = f", which ends with: {last}" if last else ""
        super().__init__(f"{' '.join(command)} ended with status {status}; see {log}{ends}")
        self.status, self.last = status, last


class DivergedError(RunError):
    """The loss or gradient of a run was not finite. Made again, the run would fail in the same way."""


def call(command: list[str], log) -> None:
    """Runs a command and appends its output to a log.

    Raises:
      RunError: The command ended with a status other than 0.
    """
    begin = os.path.getsize(log.name)  # the output of earlier commands ends here
    status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise RunError(command, status, log.name, _last_line(log.name, begin))


def _last_line(path: str, begin: int) -> str:
    """Returns the last line of a file that isn't blank, of those after byte `begin`; only the end of a very long line."""
    with open(path, "rb") as file:
        file.seek(max(begin, os.path.getsize(path) - 4000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return terminal.printable(lines[-1].strip()) if lines else ""


def run(suite: Suite, config: str, workdir: pathlib.Path, flags: list[str], *, trains: bool = True) -> dict:
    """Trains and evaluates a run unless it is done, and returns its results.

    They are the content of `results.json`, with `seconds` that the run took in all its starts, its `words` and `done`.

    Args:
      suite: Suite of the run.
      config: Path of a file in `configs/`, without the suite's name.
      workdir: Folder of the run.
      flags: Overrides.
      trains: Whether there is anything to train.

    Raises:
      DivergedError: The run diverged, now or before.
      RunError: A command ended with a status other than 0.
      ValueError: The run in `workdir` has another config, data or flags, or its `took.json` is damaged.
    """
    words = [f"--config={config}:{suite.name}", f"--workdir={workdir}", *suite.data, *flags]
    # Written relative to the suite's folder, which may be moved.
    said = [word.replace(str(suite.out), ".") for word in words]
    noted = workdir / TOOK
    try:
        took = json.loads(noted.read_text()) if noted.exists() else {"seconds": 0.0, "words": said, "done": False}
    except ValueError as error:
        raise ValueError(f"{noted} is damaged ({error}): remove {workdir} and run again") from error
    if took["words"] != said:
        odd = ", ".join(sorted(set(took["words"]) ^ set(said)))
        raise ValueError(f"{workdir} holds a run with other options ({odd}): remove it, or name another --out")
    if _diverged(workdir):
        raise DivergedError(words, terminal.USER_ERROR, f"{workdir}/log.txt")
    if not took["done"]:
        workdir.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        try:
            with (workdir / "log.txt").open("a") as log:
                for module in ("mc3_jax.train", "mc3_jax.evaluate")[0 if trains else 1 :]:
                    call([sys.executable, "-m", module, *words, *suite.reading], log)
            took["done"] = True
        except RunError as error:
            if error.status == terminal.USER_ERROR and _diverged(workdir):
                raise DivergedError(words, error.status, f"{workdir}/log.txt", error.last) from error
            raise
        finally:
            took["seconds"] = round(took["seconds"] + time.monotonic() - begin, 1)
            with whole_file.writing(noted) as aside:
                aside.write_text(json.dumps(took, indent=1) + "\n")
    return json.loads((workdir / "results.json").read_text()) | took


def _diverged(workdir: pathlib.Path) -> bool:
    return any(workdir.glob("diverged-*.json"))


def make_suite(
    name: str,
    out: pathlib.Path,
    clips: str | None,
    tokenizer: str | None,
    reading: list[str],
    splits: tuple[str, ...] = MEASURED,
) -> Suite:
    """Returns a suite; makes the clips of "soundworld" first, unless they exist or other clips are named.

    Args:
      name: Name of the suite.
      out: Folder of the suite, an absolute path.
      clips, tokenizer: Folders to use instead of the suite's own; None uses those.
      reading: Overrides of how clips are read, for every run.
      splits: Splits on which the runs are measured.

    Raises:
      RunError: The world could not be made.
      ValueError: The clips are missing, a split lacks clips of one of both labels, or `clips` replaces those of "soundworld"
        without a `tokenizer`. Or an override is not of how clips are read, or Slurm started this command several times.
    """
    _check_alone()
    for word in reading:
        if not re.fullmatch(rf"--config\.data\.({'|'.join(READING)})=\d+", word):
            raise ValueError(
                f"{word!r} can't follow --: only --config.data.{{{','.join(READING)}}}=N can, which say how clips "
                "are read; other options would change the runs and belong in configs/tables"
            )
    if name == "soundworld" and clips and not tokenizer:
        raise ValueError(f"--clips {clips}: the demo's vocabulary does not fit other clips: give their --tokenizer too")
    out.mkdir(parents=True, exist_ok=True)
    data: tuple[str, ...] = ()
    if name == "soundworld" and not clips:
        data = make_world(out)
    else:
        folder = clips or shared.suite(name)[0].data.dir
        _check_labels(os.path.join(ROOT, folder), splits)  # pathlib would spoil gs://
    data += (f"--config.data.dir={clips}",) if clips else ()
    data += (f"--config.data.tokenizer={tokenizer}",) if tokenizer else ()
    return Suite(name, out, data, tuple(reading))


def _check_alone() -> None:
    """Raises a ValueError if Slurm has started this command several times: all would make the same runs in one folder."""
    # Tasks of the step, not of the job (`SLURM_NTASKS`): a single process may well run in a job with eight tasks.
    count = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if count.isdecimal() and int(count) > 1:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS is {count}: that many copies would make the same runs in one folder; start one process, "
            "which takes all GPUs of its node: without srun, or by srun --ntasks=1"
        )


def _check_labels(clips: str, splits: tuple[str, ...]) -> None:
    """Raises a ValueError if a split lacks clips labelled as sounding or as not: it would give no result after training."""
    info = records.ClipsInfo.load(clips)
    for name in splits:
        split = info.splits[name]
        negative = split.num_labelled - split.num_positive
        if not split.num_positive or not negative:
            raise ValueError(
                f"split {name!r} of {clips} has {split.num_positive} clips labelled as sounding and {negative} as not: "
                "nothing to measure without both; convert with --labels, of both kinds for " + " and ".join(splits)
            )


def make_world(out: pathlib.Path) -> tuple[str, ...]:
    """Makes a SoundWorld's clips and vocabulary unless they exist, and returns the overrides that name them."""
    world, clips, vocabulary = out / "world", out / "clips", out / "vocabulary"
    sizes = [word for name, value in WORLD.items() for word in (f"--{name}", str(value))]
    commands = (
        (["data_prep.soundworld", "--out", str(world), *sizes], world / "truth.json"),
        (["data_prep.ego4d", "--root", str(world), "--out", str(clips), "--name", "soundworld", "--short_side", "72"],
         clips / "clips.json"),
        (["data_prep.vocabulary", "--clips", str(clips), "--out", str(vocabulary)], vocabulary / "tokenizer.json"),
    )  # fmt: skip
    with (out / "world.log").open("a") as log:
        for words, done in commands:
            if not done.exists():
                call([sys.executable, "-m", *words], log)
    return f"--config.data.dir={clips}", f"--config.data.tokenizer={vocabulary}"


def split_words(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """Returns (words before `--`, overrides after it) of a command line; None is this process's."""
    words = sys.argv[1:] if argv is None else argv
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


@contextlib.contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Ends the process with a one-line error if a run fails or input is bad; SIGTERM also ends the running command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except RunError as error:
        print(terminal.error_line(error), file=sys.stderr)
        sys.exit(error.status if error.status > 0 else 128 - error.status)
    except ValueError as error:
        terminal.fail(error)
