"""Connections by which the readers of a source know that its memory is still offered.

Nothing is sent. A source accepts connections and keeps them; the kernel closes them when its
process ends, and the source itself when it takes memory back. So a reader knows at once that what
it has mapped is to be let go, also of a process that is stopped or holds the GIL.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress

from engine_loader.engines.dial import accept, listening
from engine_registry.schema.address import join

_LOOK_S = 0.02
# of which each takes a descriptor. Those that came first are cut: they may make new ones.
_MOST_READERS = 512


class Listener:
    """The source's end of the connections."""

    def __init__(self, host: str) -> None:
        """EngineUnavailable where nothing can listen at that address."""
        listener = listening(host)
        self.session_id = join(host, listener.getsockname()[1])
        self._readers = _Readers(listener)
        threading.Thread(target=self._readers.run, name="readers' connections", daemon=True).start()

    def cut(self) -> None:
        """Ends all connections. Readers that go on make new ones."""
        self._readers.cut()

    def close(self) -> None:
        """Any number of times."""
        self._readers.close()


class _Readers:
    """Their connections, which a thread accepts. It ends, and closes all, after `close`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        listener.setblocking(False)
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._closed = False

    def run(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                selector.select()
                with self._lock:
                    accepted = self._accept()
                if not accepted:
                    time.sleep(_LOOK_S)  # no descriptor is left
            self.cut()

    def _accept(self) -> bool:
        """All that wait; whether that was all. Forgets those that are gone."""
        found: list[socket.socket] = []
        try:
            while True:
                found.append(accept(self._listener))
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            some = self._connections + found
            kept = [one for one in some if not ended(one)][-_MOST_READERS:]
            for one in {*some} - {*kept}:
                one.close()
            self._connections = kept

    def cut(self) -> None:
        with self._lock:
            self._accept()  # also those that have been made, and not been seen yet
            for one in self._connections:
                one.close()
            self._connections = []

    def close(self) -> None:
        with suppress(OSError):  # wakes the thread
            self._listener.shutdown(socket.SHUT_RDWR)
        self._closed = True
        self.cut()


def ended(connection: socket.socket) -> bool:
    """Whether the other end is gone, or is no engine, as it sends something. Never waits."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
