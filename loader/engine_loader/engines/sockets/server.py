"""The source's end: a thread that accepts connections, and one for each that answers questions.

The threads wait in the kernel, and need the GIL for a moment of each answer only.
"""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from contextlib import suppress

import numpy as np

from engine_loader.engines.dial import listening
from engine_loader.engines.sockets import wire
from engine_loader.engines.sockets.credentials import SocketCredentials
from engine_loader.engines.sockets.memory import Pieces, pieces_of
from engine_loader.engines.sockets.neighbour import Place
from engine_loader.engines.sockets.offers import Offers
from engine_loader.engines.sockets.stream import Stream
from engine_registry.schema.address import join
from engine_registry.schema.manifest import Region
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)

_HANDSHAKE_S = 10.0
_MOST_CONNECTIONS = 1024  # each takes a thread and a descriptor
_LOOK_S = 0.02


class Server:
    """Answers whoever connects, until it is closed."""

    def __init__(
        self, host: str, offers: Offers, credentials: SocketCredentials, place: Place | None
    ) -> None:
        """EngineUnavailable where nothing can listen at that address."""
        self._listener = listening(host)
        self._listener.setblocking(False)
        self.session_id = join(host, self._listener.getsockname()[1])
        self._offers = offers
        self._credentials = credentials
        self._place = place
        self._changed = threading.Condition()
        self._connections: set[_Connection] = set()
        self._closed = False
        _OPEN.add(self)
        threading.Thread(target=self._accept, name="accepts readers", daemon=True).start()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                selector.select()
                with suppress(BlockingIOError):
                    try:
                        self._take(self._listener.accept()[0])
                    except BlockingIOError:
                        raise
                    except OSError:  # no descriptor is left, or no thread
                        time.sleep(_LOOK_S)

    def _take(self, accepted: socket.socket) -> None:
        with self._changed:
            if self._closed or len(self._connections) >= _MOST_CONNECTIONS:
                accepted.close()
                return
            connection = _Connection(self, accepted)
            self._connections.add(connection)
        threading.Thread(target=connection.run, name="answers a reader", daemon=True).start()

    def wait_until_unused(self, region: Region) -> None:
        """Nothing of it is being sent any more when this returns. It is not offered any more."""
        with self._changed:
            for connection in self._connections:
                if connection.sends(region):
                    connection.stream.cut()
            self._changed.wait_for(
                lambda: not any(connection.sends(region) for connection in self._connections)
            )

    def close(self) -> None:
        """Any number of times. Nothing is being sent any more when this returns."""
        with self._changed:
            self._closed = True
            with suppress(OSError):  # wakes the thread
                self._listener.shutdown(socket.SHUT_RDWR)
            for connection in self._connections:
                connection.stream.cut()
            self._changed.wait_for(lambda: not self._connections)

    def _forget(self) -> None:
        """In a forked child, which must not keep them open when the source has ended."""
        self._listener.close()
        for connection in self._connections:
            connection.forget()


class _Connection:
    """One reader's, and its thread."""

    def __init__(self, server: Server, accepted: socket.socket) -> None:
        self._server = server
        self._accepted = accepted
        self.stream = Stream(accepted)
        self._sending: Pieces | None = None

    def sends(self, region: Region) -> bool:
        sending = self._sending
        if sending is None:
            return False
        begins_before = sending[:, 0] < np.uint64(region.end)
        ends_behind = sending.sum(axis=1) > np.uint64(region.addr)
        return bool((begins_before & ends_behind).any())

    def run(self) -> None:
        server = self._server
        try:
            self._accepted = server._credentials.secured(self._accepted)
            with server._changed:
                self.stream = Stream(self._accepted)
                if server._closed:
                    return
            self.stream.begin(_HANDSHAKE_S)
            if self._greet():
                self.stream.go_on()
                while True:
                    self._answer()
        except (OSError, ValueError, wire.NotOurs) as exc:
            log.debug("a reader has gone: %s", exc)
        finally:
            with server._changed:
                self.stream.close()
                self._sending = None
                server._connections.discard(self)
                server._changed.notify_all()

    def _greet(self) -> bool:
        """Whether this reader may read."""
        token = self._server._credentials.token()
        challenge = secrets.token_bytes(wire.CHALLENGE_NBYTES)
        self.stream.send_bytes(wire.Hello(bool(token), challenge).packed())
        theirs = wire.Answer.read(self.stream.receive_bytes(wire.ANSWER_NBYTES))
        welcome = wire.Welcome(True, place=self._server._place)
        if token:
            if wire.proves(token, b"reader", challenge, theirs.challenge, theirs.proof):
                welcome = welcome._replace(
                    proof=wire.proof(token, b"source", challenge, theirs.challenge)
                )
            else:
                welcome = wire.Welcome(False)
                log.warning(
                    "a reader at %s is refused: it does not have the token of this engine",
                    self._accepted.getpeername()[0],
                    extra=fields("reader_refused", host=self._accepted.getpeername()[0]),
                )
        self.stream.send_bytes(welcome.packed())
        return welcome.taken

    def _answer(self) -> None:
        """One question."""
        stream, server = self.stream, self._server
        (count,) = wire.COUNT.unpack(stream.receive_bytes(wire.COUNT.size))
        if not 0 < count <= wire.MOST_PIECES:
            raise wire.NotOurs(f"it asks for {count} pieces at once")
        wanted: Pieces = np.empty((count, 2), np.uint64)
        stream.receive(pieces_of(wanted))
        with server._changed:  # what is taken back from here on is waited for
            offered = server._offers.held().holds(wanted)
            self._sending = wanted[offered]
        head = np.frombuffer(wire.COUNT.pack(int(offered.sum())) + offered.tobytes(), np.uint8)
        try:
            stream.send(np.concatenate([pieces_of(head), self._sending]))
        finally:
            with server._changed:
                self._sending = None
                server._changed.notify_all()

    def forget(self) -> None:
        self._accepted.close()


_OPEN: weakref.WeakSet[Server] = weakref.WeakSet()


def _forget_all() -> None:
    for server in list(_OPEN):
        server._forget()


os.register_at_fork(after_in_child=_forget_all)
