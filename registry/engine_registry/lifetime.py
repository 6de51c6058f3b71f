"""Resources that say so when they are forgotten, as open files do.

`Closable` is the base of every class of the package that is a context manager. A resource that is
collected while it is open is a ResourceWarning that names it, and is closed by a thread that starts
for that. A class that starts a thread gives it no strong reference to the resource: else the
resource could never be collected.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import sys
import threading
import warnings
from types import TracebackType
from typing import TypeVar

from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
T = TypeVar("T", bound="Closable")


class Closable:
    """A context manager with `close`, which may be called any number of times."""

    _open_in = 0  # the process that has to close it; 0 while there is nothing to close

    def close(self) -> None:
        """Any number of times."""
        raise NotImplementedError

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _mark_open(self) -> None:
        """From now on it is forgotten if it is collected."""
        self._open_in = os.getpid()

    def _mark_closed(self) -> None:
        self._open_in = 0

    @property
    def _is_open(self) -> bool:
        return self._open_in != 0

    def _label(self) -> str:
        """The words of the warning that say which of its class it is, such as `on port 80`."""
        return ""

    def _forgotten(self) -> None:
        """Frees what it holds. The collector may run at any line of any thread: so take no lock."""
        if sys.is_finalizing():  # no thread runs any more, and the system frees everything
            return
        with contextlib.suppress(RuntimeError):  # no thread is left
            _thread.start_new_thread(_close_in_thread, (self,))

    @staticmethod
    def _pid() -> int:
        """Of this process; -1 once the interpreter has taken away the names of this module, so that
        there is nothing to warn with.
        """
        return os.getpid() if os is not None and warnings is not None else -1

    def __del__(self) -> None:
        # a forked child's copy: the resource is the parent's
        if self._open_in != self._pid():
            return
        words = [type(self).__name__, self._label(), "was never closed"]
        try:
            warnings.warn(" ".join(filter(None, words)), ResourceWarning, source=self, stacklevel=2)
        finally:
            self._forgotten()


def _close_in_thread(forgotten: Closable) -> None:
    """To start a Thread takes locks of `threading`, which the line that was interrupted may hold.

    Here none of them is held. Without a Thread, `threading` would list this one for ever.
    """
    threading.Thread(
        target=_close, args=(forgotten,), name="registry closes what was forgotten", daemon=True
    ).start()


def _close(forgotten: Closable) -> None:
    try:
        forgotten.close()
    except Exception:
        name = type(forgotten).__name__
        log.exception("%s could not be closed", name, extra=fields("close_failed", kind=name))
