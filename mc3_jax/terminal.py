"""What a command says when it ends early, and texts of others made printable. Imports nothing but the standard library."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

USER_ERROR = 2  # exit status for bad input, as in argparse
AT_ONCE = 130  # exit status after a Ctrl-C that saves nothing, a shell's for SIGINT


def printable(text: str) -> str:
    r"""Returns a text with invisible characters, line ends included, replaced by escapes such as `\x1b`.

    Names and texts come from files of others and must not control the terminal or forge a line. Characters that standard
    output can't write in its encoding are replaced in the same way.
    """
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return seen.encode(encoding, "backslashreplace").decode(encoding)


def error_line(error: Exception | str) -> str:
    """Returns the line that a command prints when it ends with an error."""
    return f"error: {printable(' '.join(str(error).split()))}"


def fail(error: Exception | str) -> NoReturn:
    """Ends the process with one line and status 2."""
    print(error_line(error), file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)


@contextlib.contextmanager
def errors_in_one_line(*more: type[Exception]) -> Iterator[None]:
    """Ends the process with one line and status 2 if the block raises a ValueError, an OSError or one of `more`."""
    try:
        yield
    except (ValueError, OSError, *more) as error:
        fail(error)


def interrupt_at_once() -> None:
    """Makes Ctrl-C end this process by the signal itself, unless it is ignored or handled already.

    Python's own handler runs only when C++ returns, be it a compilation or a wait for another process.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts(line: str = "interrupted") -> Iterator[None]:
    """Ends the process with one line and status 130 if Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        print(line, file=sys.stderr, flush=True)
        sys.exit(AT_ONCE)
