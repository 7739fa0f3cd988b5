"""Ctrl-C as a preemption: the first saves and ends, as SIGTERM does; the second ends at once."""

import os
import signal
import sys
import threading

AT_ONCE = 130  # exit status after the second, a shell's for SIGINT; nothing was saved


class Interrupt:
    """Whether Ctrl-C was pressed. Made by the main thread, where SIGTERM has a handler.

    A thread looks at it: Python's own handlers would run no sooner than a compilation ends. Where SIGINT is ignored (in the
    background of a shell) or handled already, nothing is changed.
    """

    def __init__(self):
        """Begins to listen."""
        self.came = False
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGINT, lambda *_: None)  # else KeyboardInterrupt
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="interrupt", daemon=True).start()

    def _listen(self, reader: int) -> None:
        while True:
            if os.read(reader, 1)[0] != signal.SIGINT:
                continue
            if self.came:
                os._exit(AT_ONCE)
            self.came = True
            print("interrupted: saving after the next step; again to end at once", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
