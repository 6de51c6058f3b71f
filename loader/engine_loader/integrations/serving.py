"""The models of this process whose weights peers can copy. Each is withdrawn when it is collected,
and all of them at exit.
"""

from __future__ import annotations

import _thread
import atexit
import weakref
from typing import Protocol

from torch import nn


class Served(Protocol):
    """As a `ModelStart`. `discarded`: the engine has thrown the weights away while it sleeps.
    `left`: the process ends by an error, and its keeper holds the weights.
    """

    discarded: bool
    left: bool

    @property
    def serves(self) -> bool: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def republish(self) -> None: ...
    def close(self) -> None: ...


_SERVED: weakref.WeakKeyDictionary[nn.Module, Served] = weakref.WeakKeyDictionary()


def serve(module: nn.Module, served: Served) -> None:
    """Until the module is collected. `served` holds on to no module."""
    _SERVED[module] = served
    weakref.finalize(module, _close_soon, served).atexit = False  # `_close_all` does it


def served_models() -> list[Served]:
    """Those that serve, or that have paused."""
    return [served for served in list(_SERVED.values()) if served.serves]


@atexit.register
def _close_all() -> None:
    for served in list(_SERVED.values()):
        _close(served)


def _close_soon(served: Served) -> None:
    """The collector may run at any line of any thread, so no lock is taken here."""
    _thread.start_new_thread(_close, (served,))


def _close(served: Served) -> None:
    if not served.left:
        served.close()
