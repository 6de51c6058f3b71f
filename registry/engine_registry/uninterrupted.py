"""Work that Ctrl-C does not interrupt: it interrupts the wait for it. Used by
`registration.handle` and `etcd.local`.

Python raises KeyboardInterrupt between any two steps of the main thread, also while the one before
is being dealt with, and in no other thread. So what must not stop half-way is done in a thread of
its own, which this starts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def uninterrupted(work: Callable[[], T], name: str) -> T:
    """What the work returns or raises.

    Where the wait for it is interrupted, the work goes on; it may never have begun.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    outcome: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()

    def do() -> None:
        try:
            outcome.put(([work()], None))
        except BaseException as exc:  # noqa: BLE001  it is raised where it is waited for
            outcome.put(([], exc))

    try:
        threading.Thread(target=do, name=name, daemon=True).start()
    except RuntimeError:  # there are no more threads to be had
        return work()
    result, error = outcome.get()
    try:
        if error is not None:
            raise error
        return result[0]
    finally:
        del error  # its traceback refers to this frame
