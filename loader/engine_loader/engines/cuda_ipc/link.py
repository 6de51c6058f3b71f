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
from collections.abc import Callable
from contextlib import suppress

from engine_loader.errors import EngineUnavailable, ReadFailed
from engine_registry.errors import InvalidField
from engine_registry.schema.address import join, parse_session

_LIMIT_S = 10.0  # of making a connection, which takes no more than the kernel of this host
_LOOK_S = 0.02
# of which each takes a descriptor. Those that came first are cut: they may make new ones.
_MOST_READERS = 512


class Listener:
    """The source's end of the connections."""

    def __init__(self, host: str) -> None:
        """EngineUnavailable where nothing can listen at that address."""
        try:
            family, kind, number, _, address = socket.getaddrinfo(
                host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._socket = socket.socket(family, kind, number)
            self._socket.bind(address)
            self._socket.listen(4096)
        except OSError as exc:
            raise EngineUnavailable(
                f"nothing can listen at {host} ({exc})", "give an address of this machine"
            ) from exc
        self.session_id = join(host, self._socket.getsockname()[1])
        self._lock = threading.Lock()
        self._readers: list[socket.socket] = []
        threading.Thread(
            target=_accept, args=(self._socket, self._readers, self._lock), daemon=True
        ).start()

    def cut(self) -> None:
        """Ends all connections. Readers that go on make new ones."""
        with self._lock:
            for reader in self._readers:
                reader.close()
            self._readers.clear()

    def close(self) -> None:
        """Any number of times."""
        with suppress(OSError):  # ends the thread's wait
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.cut()


def _accept(listener: socket.socket, readers: list[socket.socket], lock: threading.Lock) -> None:
    while True:
        try:
            reader, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0 or not _listens(listener):
                return
            time.sleep(_LOOK_S)  # no descriptor is left
            continue
        with lock:
            there = [one for one in readers if not ended(one)]
            kept = there[-_MOST_READERS + 1 :]
            for one in {*readers} - {*kept}:
                one.close()
            readers[:] = [*kept, reader]


def _listens(listener: socket.socket) -> bool:
    try:
        return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def ended(connection: socket.socket) -> bool:
    """Whether the other end is gone, or is no engine, as it sends something. Never waits."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def connect(session_id: str, given_up: Callable[[], bool]) -> socket.socket:
    """A connection to the source; ReadFailed where there is none, or it was given up meanwhile."""
    try:
        host, port = parse_session(session_id)
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]
    except (InvalidField, OSError, UnicodeError) as exc:
        raise failed(session_id, "that is no host:port of this machine") from exc
    connection = socket.socket(family, kind, number)
    try:
        connection.setblocking(False)
        until = time.monotonic() + _LIMIT_S
        with suppress(BlockingIOError):
            connection.connect(address)
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_WRITE)
            while not selector.select(_LOOK_S):
                if given_up():
                    raise failed(session_id, "the contact was broken off")
                if time.monotonic() > until:
                    raise failed(session_id, "it does not answer")
        if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, "no connection")
    except OSError as exc:
        connection.close()
        raise failed(session_id, "its process has ended") from exc
    except BaseException:
        connection.close()
        raise
    return connection


def failed(session_id: str, why: str) -> ReadFailed:
    return ReadFailed(f"cannot read from {session_id}: {why}", session_id=session_id)
