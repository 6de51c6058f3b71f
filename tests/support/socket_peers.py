"""Both ends of the protocol `socket` by hand, for tests of what an engine does with a bad one."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from engine_loader.engines.sockets import wire
from engine_loader.engines.sockets.wire import COUNT, Answer, Hello, Welcome
from engine_registry.schema.address import parse_session

Behaviour = Callable[[socket.socket], None]
CHALLENGE = b"c" * 32


class BareReader:
    """Asks a source for whatever it likes."""

    def __init__(self, session_id: str, context: ssl.SSLContext | None = None) -> None:
        host, port = parse_session(session_id)
        self.socket = socket.create_connection((host, port), timeout=60)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_hostname=host)

    def greet(self) -> BareReader:
        """To a source without a token."""
        self.socket.sendall(wire.MAGIC)
        Hello.read(self.hear(wire.HELLO_NBYTES))
        self.socket.sendall(Answer(CHALLENGE, wire.NO_PROOF).packed())
        assert Welcome.read(self.hear(wire.WELCOME_NBYTES)).taken
        return self

    def ask(self, *pieces: tuple[int, int], count: int | None = None) -> None:
        words = b"".join(
            word.to_bytes(8, "little", signed=False) for piece in pieces for word in piece
        )
        self.socket.sendall(COUNT.pack(len(pieces) if count is None else count) + words)

    def hear(self, nbytes: int) -> bytes:
        heard = b""
        while len(heard) < nbytes and (some := self.socket.recv(nbytes - len(heard))):
            heard += some
        return heard

    def hear_all(self) -> bytes:
        """Up to the end."""
        heard = bytearray()
        with suppress(ConnectionResetError, ssl.SSLError):
            while some := self.socket.recv(1 << 20):
                heard += some
        return bytes(heard)

    @property
    def ended(self) -> bool:
        """Waits for the end of what comes."""
        return self.hear_all() == b""

    def __enter__(self) -> BareReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.socket.close()


class BareSource:
    """Listens, and does with each connection what it is told."""

    def __init__(self, behave: Behaviour) -> None:
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.session_id = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            self._behave(connection)

    def __enter__(self) -> BareSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for one in (self._listener, *self._connections):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def says(some: bytes) -> Behaviour:
    return lambda connection: connection.sendall(some)


def keeps_still(connection: socket.socket) -> None:
    """Until the reader has enough."""
    while connection.recv(1 << 16):
        pass


def greets(welcome: Welcome, answer: Behaviour) -> Behaviour:
    """As an engine without a token does, then answers."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(Hello(False, CHALLENGE).packed())
        connection.recv(len(wire.MAGIC) + wire.ANSWER_NBYTES, socket.MSG_WAITALL)
        connection.sendall(welcome.packed())
        answer(connection)

    return behave


def answers(some: bytes) -> Behaviour:
    """The first question, which is of one piece; then it ends."""

    def answer(connection: socket.socket) -> None:
        connection.recv(COUNT.size + 16, socket.MSG_WAITALL)
        connection.sendall(some)

    return answer
