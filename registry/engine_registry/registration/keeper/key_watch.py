"""Whether the key of a registration may have changed since its keeper saw it: a watch of the key.

Used by `keeper.holder`. Starts one thread for each stream, which ends with it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from engine_registry.errors import EtcdError
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.watch import WatchStream


class _Stream:
    """One watch, as its thread has left it."""

    def __init__(self, changes: WatchStream) -> None:
        self.changes = changes
        self.stands = True
        self.changed_at = 0  # the revision of the last change that has come


class KeyWatch:
    """Only tells when to look at the key. What it holds then, the keeper reads.

    All calls come from the thread of the keeper. A stream that breaks is not opened again until the
    keeper asks for that: it finds out at its next beat, and then looks at the key.
    """

    def __init__(self, etcd: Etcd, key: str, on_change: Callable[[], None]) -> None:
        """`on_change` is called in another thread, also for what the keeper itself has written."""
        self._etcd = etcd
        self._key = key
        self._on_change = on_change
        self._stream: _Stream | None = None

    def begin(self, revision: int) -> None:
        """Watches the key from that revision on, and no more with a stream before.

        Where no stream is to be had now, `stands` says so.
        """
        self.end()
        with contextlib.suppress(EtcdError):
            stream = _Stream(self._etcd.watch(self._key, revision, exact=True))
            thread = threading.Thread(
                target=_follow, args=(stream, self._on_change), name="key watch", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the process may have no more
                stream.changes.cancel()
            else:
                self._stream = stream

    @property
    def stands(self) -> bool:
        """The stream lives, as far as we know."""
        return self._stream is not None and self._stream.stands

    def is_quiet(self, revision: int) -> bool:
        """The key is as it was at that revision, as far as we know."""
        stream = self._stream
        return stream is not None and stream.stands and stream.changed_at <= revision

    def end(self) -> None:
        """Any number of times."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.changes.cancel()


def _follow(stream: _Stream, on_change: Callable[[], None]) -> None:
    try:
        with contextlib.suppress(EtcdError):
            for batch in stream.changes:
                if batch.changes:
                    stream.changed_at = batch.revision
                    on_change()
    finally:
        stream.stands = False
