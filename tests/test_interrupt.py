"""Ctrl-C saves as SIGTERM does, and a second one ends at once, even while no Python code can run."""

import re
import signal
import subprocess
import sys

import pytest

from data_prep import inspect, verify, vocabulary
from data_prep.soundworld import __main__ as soundworld
from mc3_jax import convert, search, terminal
from tests import world

BUSY = """
import ctypes, signal, sys
from mc3_jax import interrupt
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # instead of JAX's, which waits for a step
handlers = {"heard": signal.default_int_handler, "ignored": signal.SIG_IGN}  # tests may run where it is ignored
signal.signal(signal.SIGINT, handlers[sys.argv[1]])
listener = interrupt.Interrupt()
print("busy", flush=True)
for _ in range(int(sys.argv[2])):
    ctypes.CDLL(None).poll(None, 0, 1000)  # no bytecode is run meanwhile, as in a compilation
print(listener.came)
"""


def start(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-c", BUSY, *words]
    process = subprocess.Popen(command, cwd=world.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "busy\n"
    return process


def test_the_first_interrupt_is_reported_and_the_second_ends_the_process_at_once():
    with start("heard", "60") as process:
        process.send_signal(signal.SIGINT)
        said = "interrupted: saving after the next step; press Ctrl-C again to end at once without saving\n"
        assert process.stderr.readline() == said
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == terminal.AT_ONCE
        assert process.communicate() == ("", "")


def test_a_single_interrupt_raises_nothing():
    with start("heard", "2") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[0] == "True\n"
        assert process.returncode == 0


def test_an_ignored_interrupt_stays_ignored():
    with start("ignored", "1") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("False\n", "")
        assert process.returncode == 0


COMMANDS = {
    "verify": (verify, "verify", ["clips"]),
    "inspect": (inspect, "_show_drawn", ["clips"]),
    "vocabulary": (vocabulary, "read_texts", ["--clips", "clips", "--out", "words"]),
    "soundworld": (soundworld, "make", ["--out", "world"]),
    "convert": (convert, "export_weights", ["export", "--to", "pth", "--out", "o.pth", "run"]),
    "search": (search, "search", ["--model", "run", "--clips", "clips", "--out", "found"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_where_nothing_is_to_be_saved_an_interrupt_ends_the_process_with_one_line(monkeypatch, capsys, name):
    module, function, words = COMMANDS[name]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupted)
    with pytest.raises(SystemExit) as ended:
        module.main(words)
    assert ended.value.code == terminal.AT_ONCE
    assert re.fullmatch("interrupted(: run the same command again.*)?\n", capsys.readouterr().err)


EVALUATE = """
import sys
from mc3_jax import cli
def main(config, workdir):
    raise KeyboardInterrupt
sys.argv = ["evaluate.py", "--config=configs/demo.py", "--workdir=w"]
cli.run(main)
"""


def test_so_do_the_commands_that_take_a_config():
    found = subprocess.run([sys.executable, "-c", EVALUATE], cwd=world.ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (terminal.AT_ONCE, "interrupted\n")


COMPILE = """
import ctypes, signal, sys
from mc3_jax import cli, compile as compile_lib
def busy(*_, **__):
    print("busy", flush=True)
    ctypes.CDLL(None).poll(None, 0, 60_000)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
compile_lib.compile_step = busy
compile_lib._define_flags()
sys.argv = ["compile.py", "--config=configs/mc3_ego4d.py", "--topology=cpu:1"]
cli.run(compile_lib.main, needs_workdir=False)
"""


def test_compiling_for_a_machine_is_ended_by_the_signal_itself_for_which_xla_need_not_be_done():
    command = [sys.executable, "-c", COMPILE]
    with subprocess.Popen(command, cwd=world.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT
