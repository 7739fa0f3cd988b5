"""Beam's local runner hides only Beam's own messages, and does not wait for a worker that has ended."""

import io
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings

import pytest
from absl import logging as absl_logging

from data_prep import local_runner, quiet
from tests import world
from tests.data_prep import test_shards
from tests.data_prep.test_shards import make_small, small_tasks, workers_find_this_module  # noqa: F401

SAID = ("printed", "logged", "logged by absl", "warned of")


def make_and_speak(item: dict, settings: dict):
    print("printed", file=sys.stderr)
    logging.getLogger("a.library").warning("logged")
    absl_logging.warning("logged by absl")
    warnings.warn("warned of", stacklevel=1)
    yield from make_small(item, settings)


def make_and_end(item: dict, settings: dict):
    if settings["signal"]:
        os.kill(os.getpid(), settings["signal"])
        time.sleep(60)
    os._exit(3)
    yield


def make_too_large(item: dict, settings: dict):
    if settings["told"]:
        raise MemoryError(settings["told"])
    raise MemoryError
    yield


# In a process of its own, for messages at import and a log that no test framework has set up.
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [pytest.param(make_small, marks=pytest.mark.large), make_and_speak])
def test_stderr_has_what_others_say_and_nothing_of_beam(tmp_path, num_workers, make):
    program = (
        "import pathlib, sys; from tests.data_prep import test_local_runner as here; _, folder, num, make = sys.argv; "
        "here.test_shards.run(here.small_tasks(), pathlib.Path(folder), {}, int(num), getattr(here, make))"
    )
    command = [sys.executable, "-c", program, tmp_path, str(num_workers), make.__name__]
    done = subprocess.run(command, cwd=world.ROOT, capture_output=True, text=True, check=True)
    said = SAID if make is make_and_speak else ()
    assert done.stdout == ""
    for words in said:
        assert words in done.stderr
    # Two workers may write at once: then one line's end may follow another's, which leaves an empty line.
    told = [line for line in done.stderr.splitlines() if line and not any(words in line for words in SAID)]
    assert not told


def test_help_prints_nothing_but_the_help():
    done = world.run("data_prep.ego4d", "--help")
    assert done.stdout.startswith("usage: python -m data_prep.ego4d")
    assert done.stderr == ""


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.large), signal.SIGKILL])
def test_a_worker_that_dies_ends_the_run(tmp_path, capfd, number):
    words = "was killed, perhaps because memory ran out" if number else "ended with status 3"
    with pytest.raises(local_runner.WorkerError, match=f"^a worker {words}"):
        test_shards.run(small_tasks(), tmp_path, {"signal": int(number)}, 2, make_and_end)
    assert capfd.readouterr().err == ""
    assert len(test_shards.run(small_tasks(), tmp_path, {})) == 3


def test_a_crash_is_reported_by_the_name_of_its_signal_and_used_up_cpu_time_by_its_limit():
    for status, words in ((-11, "crashed (SIGSEGV)"), (-24, "used up its CPU time: use `ulimit -t unlimited`")):
        assert words in local_runner._failure(f"Worker subprocess exited with return code {status}")


@pytest.mark.parametrize(("hard", "words"), [(resource.RLIM_INFINITY, ""), (300, "; or because it used up its CPU time: .*")])
def test_a_killed_worker_may_have_used_up_its_cpu_time_if_the_machine_limits_that(monkeypatch, hard, words):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (hard, hard))
    told = local_runner._failure("Worker subprocess exited with return code -9")
    assert re.search(rf"because memory ran out: .*a smaller --memory_limit{words}\. Run", told)


def test_a_worker_that_does_not_start_ends_the_run_and_says_why(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local_runner, "_MODULE", "data_prep.no_such_module")
    with pytest.raises(local_runner.WorkerError, match="status 1; see its output above"):
        test_shards.run(small_tasks(), tmp_path, {}, 2)
    # Python writes a message and its line's end separately, so messages of two workers may be on one line.
    told, words = capfd.readouterr().err, f"{sys.executable}: No module named data_prep.no_such_module"
    assert words in told
    assert told.replace(words, "").strip() == ""


@pytest.mark.parametrize(
    ("num_workers", "told", "words"),
    [
        (1, "no 9 GiB", "no 9 GiB"),
        (1, "", "MemoryError"),
        pytest.param(2, "", "MemoryError", marks=pytest.mark.slow),
    ],
)
def test_too_little_memory_is_one_line(tmp_path, capfd, num_workers, told, words):
    with pytest.raises(ValueError, match=rf"^a worker had too little memory \({words}\): use fewer --num_workers$"):
        test_shards.run(small_tasks(), tmp_path, {"told": told}, num_workers, make_too_large)
    assert capfd.readouterr().err == ""


def test_beams_loggers_keep_what_is_no_noise(caplog):
    with quiet.beam():
        with quiet.beam():  # as when a module is imported while Beam works
            pass
        for name, noise in (
            ("root", "apitools not found, and so on"),
            ("apache_beam.runners.common", "bad\nvalue [while running 'Write']"),
        ):
            logging.getLogger(name if name != "root" else None).warning(noise)
            logging.getLogger(name if name != "root" else None).warning("of %s", name)
    logging.getLogger("apache_beam.runners.common").warning("later [while running 'Write']")
    assert [r.getMessage() for r in caplog.records] == [
        "of root", "of apache_beam.runners.common", "later [while running 'Write']",
    ]  # fmt: skip


def test_only_tracebacks_that_beams_worker_prints_are_dropped():
    def traceback_of(file: str, function: str) -> str:
        return f'Traceback (most recent call last):\n  File "{file}", line 310, in {function}\n    f()\nValueError: no\n'

    told = io.StringIO()
    stream = quiet.Stream(told)
    ours = traceback_of("/home/me/data_prep/frames.py", "cut")
    print("before", file=stream)
    print(traceback_of("/lib/apache_beam/runners/worker/sdk_worker.py", "_execute"), file=stream)
    print(ours, file=stream)
    print(file=stream)
    assert told.getvalue() == f"before\n{ours}\n\n"
