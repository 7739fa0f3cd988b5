"""Command lines of the entry points: `--config` with overrides, and one clear line for every mistake of the user.

Exit statuses: 0 done; 1 any other error, with a traceback; 2 bad input, with one line that says what to mend; 75 preempted,
with the state saved; 76 a process of the job was lost or hangs (`job.LOST`); 77 Ctrl-C, with the state saved; 130 Ctrl-C,
with nothing saved. After 75 and 76, start the same command again.
"""

import contextlib
import dataclasses
import difflib
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

from absl import app, flags, logging
from ml_collections import config_flags

from mc3_jax import config as config_lib, terminal, validation

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 77  # differs from SIGTERM's: after Ctrl-C no launch file should start the run again
_HELP = ("help", "helpshort", "helpfull", "helpxml", "?")


def _define_flags(among: flags.FlagValues = flags.FLAGS) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Defines `--config` and `--workdir`."""
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "File in configs/ whose get_config() returns an mc3_jax.config.Config; override fields by --config.FIELD=VALUE.",
        flag_values=among,
    )
    parser = among["config"].parser
    load = parser.parse
    parser.parse = lambda path: _read_config(load, path)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, results.", among)
    for name in ("config", "workdir"):  # --help shows what the main module defines
        among.register_key_flag_for_module(sys.argv[0], among[name])
    return config, workdir


def _read_config(load: Callable, path: str):
    """Returns what config_flags loads from a file; a `Config` is rebuilt from its values, since overrides change it in place.

    The copy shares no parts: overriding one phase's optimizer leaves the others alone, even if the file gave all phases the
    same object. Rebuilding also gives every field its declared type.

    Raises:
      ValueError: A field has a value of another type, or the file can't be read.
      OSError: There is no such file.
    """
    file = path.partition(":")[0]
    if not pathlib.Path(file).is_file():
        raise OSError(f"no config file {file}: name a .py file such as configs/mc3_ego4d.py")
    try:
        loaded = load(path)
    except LookupError as error:  # caught here: outside, a LookupError means an unknown field
        raise ValueError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    is_config = type(loaded) is config_lib.Config
    return config_lib.from_dict(config_lib.Config, dataclasses.asdict(loaded)) if is_config else loaded


@contextlib.contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Ends the process with one line and status 2 if the block raises an error that the user has to mend.

    Args:
      kinds: Exceptions that count as such. The default is meant for set-up (config, data, workdir, mesh); the training
        loop is outside of it, so that a ValueError there keeps its traceback.
    """
    try:
        yield
    except kinds as error:
        if "Gloo" in str(error):  # a process was lost, see `job.ending_together`
            raise
        terminal.fail(error)


def _missing_field(config, override: str) -> str | None:
    """Returns a line on the first part of an override, such as "config.phases[7].epochs", that `config` lacks, or None."""
    here, path = config, "config"
    for part in re.findall(r"\w+", override)[1:]:
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                written = f"write {path}[0] to [{len(here) - 1}]" if here else "which no option can change"
                return f"no config field {override}: {path} has {len(here)} entries, {written}"
            here, path = here[int(part)], f"{path}[{part}]"
        else:
            names = [field.name for field in dataclasses.fields(here)] if dataclasses.is_dataclass(here) else []
            if part not in names:
                near = difflib.get_close_matches(part, names, 1)
                fix = f"did you mean {path}.{near[0]}?" if near else f"{path} has {', '.join(names) or 'no fields'}"
                return f"no config field {override}: {fix}"
            here, path = getattr(here, part), f"{path}.{part}"
    return None


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; errors of absl and config_flags become one line and status 2."""
    config = next((a for a in argv if a.lstrip("-").startswith("config=")), "--config")
    try:
        return flags.FLAGS(argv)
    except SystemExit as error:
        asks_for_help = any(a.lstrip("-") in _HELP for a in argv[1:])
        sys.exit(0 if asks_for_help else error.code)  # absl ends --help with status 1, as if it had failed
    except (flags.Error, LookupError, ValueError, TypeError, OSError) as error:
        text = str(error)
        if isinstance(error, LookupError) or text.startswith("list indices must be"):
            # config_flags passes on the lookup's own exception, without the flag.
            overrides = [a.split("=")[0].lstrip("-") for a in argv if a.lstrip("-").startswith("config.")]
            named = re.findall(r"(?m)^--?config(?:=|\n)(.+)", "\n".join(argv))  # "--config=FILE", or two words
            loaded = flags.FLAGS["config"].parser.parse(named[-1])
            missing = next(filter(None, (_missing_field(loaded, name) for name in overrides)), None)
            terminal.fail(missing or f"no such config field in {', '.join(overrides)}: {error.args[0]!s}")
        if "Traceback (most" in text:  # config_flags puts the config file's whole traceback into the message
            raised = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception)?: ", line)]
            terminal.fail(f"{config} can't be read: {raised[-1] if raised else text.splitlines()[-1]}")
        if "not supported for overriding" in text or "as instance of <class 'mc3_jax" in text:
            field = re.search(r"--(config\.[^=\s]+)|field (config\.\S+)", text)
            whole = field[1] or field[2] if field else "a part of the config"
            fix = f"set its fields, e.g. --config.phases[0].epochs=2, or change {config}"
            terminal.fail(f"{whole} can't be set as a whole: {fix}")
        terminal.fail(text)
    except Exception as error:  # a config file is code: any error in it is the user's to mend
        terminal.fail(f"{config} can't be read: {type(error).__name__}: {error}")
    return argv


def _typed(config: config_lib.Config) -> config_lib.Config:
    """Returns a config after checking the types inside tuples, which config_flags does not; `--config.x=` is an empty tuple.

    Raises:
      ValueError: A value has another type than its field; the message names it.
    """

    def emptied(value):
        if isinstance(value, dict):
            return {name: emptied(each) for name, each in value.items()}
        if isinstance(value, list):
            return [emptied(each) for each in value]
        return () if value == ("",) else value

    try:
        return config_lib.from_dict(config_lib.Config, emptied(dataclasses.asdict(config)))
    except ValueError as error:
        is_of_tuple = re.match(r"\S+\[\d+\] = ", str(error))
        raise ValueError(f"{error}{', several values are written as (1,2)' if is_of_tuple else ''}") from error


def overridden() -> list[str]:
    """Returns the names of the config fields that the command line sets, such as "phases[0].epochs"."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


def run(
    main: Callable[[config_lib.Config, str], None], *, needs_workdir: bool = True,
    missing: str = "--workdir is missing: name a folder for checkpoints, logs and results",
) -> None:  # fmt: skip
    """Parses the command line, validates the config and calls `main(config, workdir)`.

    Args:
      main: Main function of the entry point.
      needs_workdir: Whether a missing `--workdir` is an error.
      missing: Message of that error.
    """
    config_flag, workdir_flag = _define_flags()

    def start(words: list[str]):
        logging.set_verbosity(logging.WARNING)  # Orbax reports every step of every write
        with user_errors():
            if words[1:]:  # absl stops at the first word that is no flag and would silently ignore what follows
                raise ValueError(f"{words[1]!r} is not a flag: write --config.x=value, without spaces")
            if config_flag.value is None:
                raise ValueError("--config is missing: pass a file such as --config=configs/demo.py")
            if not isinstance(config_flag.value, config_lib.Config):
                kind = type(config_flag.value).__name__
                raise ValueError(f"get_config() must return mc3_jax.config.Config, got {kind}")
            config = _typed(config_flag.value)
            validation.validate(config)
            workdir = workdir_flag.value
            if not workdir and (config.checkpoint or not config.phases):
                workdir = f"runs/{config.name}"  # weights are evaluated without a run
            if not workdir and needs_workdir:
                raise ValueError(missing)
        with terminal.interrupts():  # training has its own handler, see `mc3_jax.interrupt`
            main(config, workdir or "")

    app.run(start, flags_parser=_parse)
