"""A step is compiled while its caller goes on, and only what was begun is taken for finished."""

import contextlib
import re
import threading
import time
import types

import jax
import pytest

from mc3_jax import config as config_lib, phases as phases_lib
from mc3_jax.step_compiler import StepCompiler

ALIGN, REFINE = (
    phases_lib.Phase(config_lib.PhaseConfig(name=name), start, start + 10) for start, name in ((0, "align"), (10, "refine"))
)


@pytest.fixture
def compiler():
    """(compiler, names of the phases lowered, event that lets compilations end); "compiled" is the phase's name."""
    lowered, may_end = [], threading.Event()

    def lower(phase):
        lowered.append(phase.config.name)
        assert threading.current_thread() is threading.main_thread()  # where the mesh is set
        return types.SimpleNamespace(compile=lambda: may_end.wait(60) and (lambda: phase.config.name))

    with StepCompiler(lower) as made:
        yield made, lowered, may_end
        may_end.set()


def test_the_caller_goes_on_while_a_step_is_compiled_and_waits_for_it_at_the_end(compiler, capsys):
    compiler, lowered, may_end = compiler
    compiler.begin(ALIGN)  # returns, though the compilation can't end yet
    assert lowered == ["align"]
    threading.Timer(0.2, may_end.set).start()
    assert compiler.finish(ALIGN, 3)() == "align"
    assert may_end.is_set()
    assert lowered == ["align"]
    begun, done = capsys.readouterr().out.splitlines()
    assert begun.endswith("  align  compiling")
    assert float(re.search(r"  align  compiled in ([0-9.]+) s, to run from step 3 to 10$", done)[1]) >= 0.2


def test_the_time_it_took_is_that_of_compiling_not_until_the_step_was_asked_for(compiler, capsys):
    compiler, _, may_end = compiler
    may_end.set()
    compiler.begin(ALIGN)
    time.sleep(1)
    compiler.finish(ALIGN, 0)
    assert float(re.search(r"compiled in ([0-9.]+) s", capsys.readouterr().out)[1]) < 0.5


def test_a_step_that_was_not_begun_is_compiled_when_it_is_asked_for(compiler):
    compiler, lowered, may_end = compiler
    may_end.set()
    assert compiler.finish(ALIGN, 0)() == "align"
    assert compiler.finish(REFINE, 10)() == "refine"
    assert lowered == ["align", "refine"]


def test_a_step_of_another_phase_than_the_one_begun_is_not_taken_for_it(compiler, capsys):
    compiler, lowered, may_end = compiler
    compiler.begin(REFINE)  # as after the newest checkpoint, which then proves damaged
    threading.Timer(1, may_end.set).start()
    assert compiler.finish(ALIGN, 7)() == "align"
    assert float(re.search(r"align  compiled in ([0-9.]+) s", capsys.readouterr().out)[1]) < 0.5  # not refine's
    assert compiler.finish(REFINE, 10)() == "refine"
    assert lowered == ["refine", "align", "refine"]


def test_an_error_of_the_compiler_is_raised_where_the_step_is_asked_for():
    def fail():
        raise MemoryError("too large")

    with StepCompiler(lambda phase: types.SimpleNamespace(compile=fail)) as failing:
        failing.begin(ALIGN)
        with pytest.raises(MemoryError, match="too large"):
            failing.finish(ALIGN, 0)


@pytest.fixture
def leave(compiler, monkeypatch, capsys):
    """A function that leaves the context while a step is compiled and returns what is printed to standard error."""

    def leave(*, error: bool = True, is_compiled: bool = False, num_processes: int = 1) -> str:
        monkeypatch.setattr(jax, "process_count", lambda: num_processes)
        made, _, may_end = compiler
        if is_compiled:
            may_end.set()
        with contextlib.suppress(OSError), made:
            made.begin(ALIGN)
            if is_compiled:
                made.finish(ALIGN, 0)
            if error:
                raise OSError("no such checkpoint")
        return capsys.readouterr().err

    return leave


def test_a_process_that_fails_while_a_step_is_compiled_says_why_it_does_not_end(leave):
    assert leave() == "this process ends when XLA, which can't be stopped, has compiled the step\n"


@pytest.mark.parametrize("how", [{"error": False}, {"is_compiled": True}, {"num_processes": 2}])
def test_it_says_nothing_where_it_does_not_wait_or_has_not_failed(leave, how):
    assert leave(**how) == ""
