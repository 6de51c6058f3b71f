"""SIGINT and SIGTERM, told to a function by a thread of their own.

A handler would run in the main thread: not before that wakes up, where the system gave the signal to another thread, and perhaps
while it holds the very lock that the handler needs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def on_signals(obey: Callable[[], None]) -> None:
    """From now on each of the two signals calls `obey`. Once a process, from its main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer)

    def listen() -> None:
        while os.read(reader, 1):
            obey()

    threading.Thread(target=listen, name="signals", daemon=True).start()
