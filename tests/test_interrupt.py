"""Ctrl-C saves as SIGTERM does, and a second one ends at once, even while no Python code can run."""

import signal
import subprocess
import sys

from mc3_jax import interrupt
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
        assert process.wait(10) == interrupt.AT_ONCE
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
