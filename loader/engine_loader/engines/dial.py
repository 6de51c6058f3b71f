"""Connections between engines over TCP: to listen for them, to accept one, and to make one.

A forked child has none of them.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from engine_loader.errors import EngineUnavailable, ReadFailed
from engine_registry.errors import InvalidField
from engine_registry.forks import closed_in_child, prevented
from engine_registry.schema.address import parse_session

_LIMIT_S = 10.0  # of making a connection
_LOOK_S = 0.02


def listening(host: str) -> socket.socket:
    """At any port of that address; EngineUnavailable where nothing can listen there."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as undo:
            listener = undo.enter_context(_socket(family, kind, number))
            listener.bind(address)
            listener.listen(4096)
            undo.pop_all()
    except OSError as exc:
        raise EngineUnavailable(
            f"nothing can listen at {host} ({exc})", "give an address of this machine"
        ) from exc
    return listener


def accept(listener: socket.socket) -> socket.socket:
    """The next connection that waits. BlockingIOError where none does; OSError."""
    with prevented():
        return closed_in_child(listener.accept()[0], socket.socket.close)


def dial(session_id: str, given_up: Callable[[], bool]) -> socket.socket:
    """A connection to the engine, which does not block; ReadFailed where there is none, or it was
    given up meanwhile.
    """
    try:
        host, port = parse_session(session_id)
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]
    except (InvalidField, OSError, UnicodeError) as exc:
        raise failed(session_id, "that is no host:port") from exc
    connection = _socket(family, kind, number)
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
        raise failed(session_id, "its process has ended, or no way leads there") from exc
    except BaseException:
        connection.close()
        raise
    return connection


def failed(session_id: str, why: str) -> ReadFailed:
    return ReadFailed(f"cannot read from {session_id}: {why}", session_id=session_id)


def _socket(family: int, kind: int, number: int) -> socket.socket:
    with prevented():
        return closed_in_child(socket.socket(family, kind, number), socket.socket.close)
