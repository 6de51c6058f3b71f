"""Work that makes very many small objects, all of which stay, without Python's collector, which
would look for garbage among them, and among all else in the process, again and again: with torch
imported, a tenth of a second each time.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def collector_paused(work: Callable[P, T]) -> Callable[P, T]:
    """For the length of a call.

    Calls may be nested, or overlap in several threads: the call that found it running
    starts it again.
    """

    @functools.wraps(work)
    def paused(*args: P.args, **kwargs: P.kwargs) -> T:
        running = gc.isenabled()
        gc.disable()
        try:
            return work(*args, **kwargs)
        finally:
            if running:
                gc.enable()

    return paused
