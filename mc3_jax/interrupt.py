"""Ctrl-C as a preemption: the first one saves and ends, as SIGTERM does; the second ends at once."""

import os
import signal
import sys
import threading

from mc3_jax import terminal


class Interrupt:
    """Whether Ctrl-C was pressed. Must be made in the main thread, after SIGTERM got a handler.

    A thread waits for the signal, since Python's own handlers would run only after a compilation has ended. If SIGINT is
    ignored (as in the background of a shell) or already handled, nothing is changed.

    Attributes:
      came: Whether Ctrl-C was pressed.
    """

    def __init__(self):
        """Begins to listen for SIGINT."""
        self.came = False
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGINT, lambda *_: None)  # instead of KeyboardInterrupt
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="interrupt", daemon=True).start()

    def _listen(self, reader: int) -> None:
        while True:
            if os.read(reader, 1)[0] != signal.SIGINT:
                continue
            if self.came:
                os._exit(terminal.AT_ONCE)
            self.came = True
            line = "interrupted: saving after the next step; press Ctrl-C again to end at once without saving"
            print(line, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
