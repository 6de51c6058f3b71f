"""What a forked child must not keep open: a socket or a pipe in two processes does not end when one
of them does, and a peer would wait for the end of the other.

The child closes them before any of its code runs. A descriptor that is there before somebody knows
whose it is, as within `accept`, would be missed; so those are made while no fork can happen.
"""

from __future__ import annotations

import logging  # its own lock is taken before ours by a fork, so who has ours may log  # noqa: F401
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_FORKING = threading.RLock()
_CLOSED: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()


@contextmanager
def prevented() -> Iterator[None]:
    """No other thread forks inside the block, which must not wait for anything."""
    with _FORKING:
        yield


def closed_in_child(owner: T, close: Callable[[T], object]) -> T:
    """The owner of descriptors itself. A forked child calls `close` with it, which takes no lock:
    one may be held by a thread that the child does not have.

    To be called inside the block of `prevented` in which the descriptors were made.
    """
    _CLOSED[owner] = close
    return owner


def _after_in_child() -> None:
    for owner, close in list(_CLOSED.items()):
        close(owner)
    _CLOSED.clear()
    _FORKING.release()


os.register_at_fork(
    before=_FORKING.acquire, after_in_parent=_FORKING.release, after_in_child=_after_in_child
)
