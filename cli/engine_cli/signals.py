"""The signals that end a command: Ctrl-C (SIGINT), SIGTERM, and SIGHUP, which a closed terminal
sends.

Used by commands that leave something behind if they just stop. `on_ending` starts one thread.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from engine_cli.exits import Exit


class Ended(BaseException):
    """A signal has asked the process to end.

    The exit code is 128 + `number`, as if it had done so at once.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def _ending() -> list[signal.Signals]:
    """Under nohup SIGHUP is ignored, and stays so."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def on_ending(call: Callable[[], object]) -> None:
    """From now on calls this for each of the signals.

    From a thread, woken through a pipe. Python runs a handler in the main thread, between two
    instructions: it would wait for ever for a lock that it interrupts the holder of, and it does
    not run at all while the main thread waits for something and another thread has got the signal,
    or it came just before the wait.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while os.read(reader, 1):
            call()

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _ending():
        # one of Python's own: the default ones do not write to the pipe
        signal.signal(number, lambda *_: None)


def stop_on_ending(
    stop: Callable[[], object], at_once: Callable[[], object] = lambda: None
) -> None:
    """From now on the first of the signals calls `stop`. Another one calls `at_once`, and ends the
    process.
    """
    ending = threading.Event()

    def end() -> None:
        if ending.is_set():
            at_once()
            os._exit(Exit.INTERRUPTED)
        ending.set()
        stop()

    on_ending(end)


@contextmanager
def raised() -> Iterator[Callable[[], None]]:
    """Within the block SIGTERM and SIGHUP raise Ended, as SIGINT raises KeyboardInterrupt.

    Only the first of them does, so that another does not cut short what is done to clean up. An
    exception that comes while an object is finalised is dropped, by Python or by gRPC: the function
    that the block gets raises it again, for work that takes long to call now and then. So does the
    end of the block.
    """
    before = {number: signal.getsignal(number) for number in _ending()}
    if before[signal.SIGINT] is signal.SIG_IGN:  # a shell's background job
        del before[signal.SIGINT]
    came: list[BaseException] = []

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            if each != signal.SIGINT:
                signal.signal(each, lambda *_: None)
        came.append(KeyboardInterrupt() if number == signal.SIGINT else Ended(number))
        raise came[-1]

    def raise_again() -> None:
        if came:
            raise came[0]

    for number in before:
        signal.signal(number, end)
    try:
        yield raise_again
        raise_again()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Within the block no signal raises; the first that would have does so at its end.

    For the import of torch, which swallows exceptions in places, KeyboardInterrupt too.
    """
    seen: list[int] = []
    before = {
        number: handler for number in _ending() if callable(handler := signal.getsignal(number))
    }
    for number in before:
        signal.signal(number, lambda number, _: seen.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if seen:
            signal.raise_signal(seen[0])
