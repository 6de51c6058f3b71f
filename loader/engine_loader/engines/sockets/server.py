"""The source's end: a thread that accepts connections, and one for each that answers questions.

The threads wait in the kernel, and need the GIL for a moment of each answer only.
"""

from __future__ import annotations

import logging
import secrets
import selectors
import socket
import ssl
import threading
import time
from contextlib import suppress

import numpy as np

from engine_loader.engines.dial import accept, listening
from engine_loader.engines.sockets import wire
from engine_loader.engines.sockets.credentials import SocketCredentials, secured
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
_SILENCE_S = 60.0  # between two warnings of readers of one host


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
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._warned: dict[str, float] = {}  # when, by the host of a reader
        self._closed = False
        threading.Thread(target=self._accept, name="accepts readers", daemon=True).start()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                selector.select()
                with suppress(BlockingIOError):
                    try:
                        self._take(accept(self._listener))
                    except BlockingIOError:
                        raise
                    except (OSError, RuntimeError):  # no descriptor is left, or no thread
                        time.sleep(_LOOK_S)

    def _take(self, accepted: socket.socket) -> None:
        """OSError or RuntimeError where there is no thread for it."""
        with self._changed:
            if self._closed or not self._has_room():
                accepted.close()
                return
            connection = _Connection(self, accepted)
            self._connections[connection] = None
        try:
            threading.Thread(target=connection.run, name="answers a reader", daemon=True).start()
        except BaseException:
            connection.end()
            raise

    def _has_room(self) -> bool:
        """Whoever has not said yet that it may read makes room for others, the oldest first."""
        if len(self._connections) < _MOST_CONNECTIONS:
            return True
        for connection in self._connections:
            if not connection.may_read:
                connection.stream.cut()
                del self._connections[connection]  # it sends nothing that is waited for
                return True
        return False

    def wait_until_unused(self, region: Region) -> None:
        """Nothing of it is being sent any more when this returns. It is not offered any more."""
        with self._changed:
            sending = [(one, one.sending) for one in self._connections if one.sends(region)]
            for connection, _ in sending:
                connection.stream.cut()
            self._changed.wait_for(lambda: all(one.sending is not what for one, what in sending))

    def close(self) -> None:
        """Any number of times. Nothing is being sent any more when this returns."""
        with self._changed:
            self._closed = True
            with suppress(OSError):  # wakes the thread
                self._listener.shutdown(socket.SHUT_RDWR)
            for connection in self._connections:
                connection.stream.cut()
            self._changed.wait_for(lambda: not self._connections)

    def _warn_of(self, host: str, why: str) -> None:
        """Once in a while for each host, so that nobody fills the log."""
        now = time.monotonic()
        with self._changed:
            if host in self._warned and now - self._warned[host] < _SILENCE_S:
                return
            if len(self._warned) >= _MOST_CONNECTIONS:
                self._warned.clear()
            self._warned[host] = now
        log.warning(
            "a reader at %s is refused: %s", host, why, extra=fields("reader_refused", host=host)
        )


class _Connection:
    """One reader's, and its thread."""

    def __init__(self, server: Server, accepted: socket.socket) -> None:
        self._server = server
        self._accepted = accepted
        self.stream = Stream(accepted)
        self.sending: Pieces | None = None
        self.may_read = False

    def sends(self, region: Region) -> bool:
        sending = self.sending
        if sending is None:
            return False
        begins_before = sending[:, 0] < np.uint64(region.end)
        ends_behind = sending.sum(axis=1) > np.uint64(region.addr)
        return bool((begins_before & ends_behind).any())

    def run(self) -> None:
        try:
            if self._greet():
                self.stream.go_on()
                while True:
                    self._answer()
        except (OSError, ValueError, wire.NotOurs):
            pass  # it has gone, or is no engine
        finally:
            self.end()

    def end(self) -> None:
        with self._server._changed:
            self.stream.close()
            self.sending = None
            self._server._connections.pop(self, None)
            self._server._changed.notify_all()

    def _greet(self) -> bool:
        """Whether this reader may read. OSError, NotOurs."""
        server = self._server
        host = self._accepted.getpeername()[0]
        try:
            token, context = server._credentials.token(), server._credentials.context(server=True)
        except (OSError, ValueError) as exc:
            log.warning(
                "nobody can read: the credentials of this engine cannot be used (%s)",
                exc,
                extra=fields("credentials_unusable"),
            )
            return False
        with server._changed:
            self.stream = Stream(secured(self._accepted, context))
            if self not in server._connections or server._closed:
                return False
        try:
            self.stream.begin(_HANDSHAKE_S)
        except ssl.SSLError as exc:
            server._warn_of(host, f"there is no TLS with it ({exc})")
            return False
        welcome = self._prove(token, host)
        with server._changed:  # before its reader knows: it makes room for nobody then
            if self not in server._connections:
                return False
            self.may_read = welcome.taken
        self.stream.say(welcome.packed())
        return welcome.taken

    def _prove(self, token: bytes, host: str) -> wire.Welcome:
        """Whether it has the token, and that we have it."""
        challenge = secrets.token_bytes(wire.CHALLENGE_NBYTES)
        self.stream.say(wire.Hello(bool(token), challenge).packed())
        wire.check(self.stream.hear(len(wire.MAGIC)))
        theirs = wire.Answer.read(self.stream.hear(wire.ANSWER_NBYTES))
        welcome = wire.Welcome(True, place=self._server._place)
        if token:
            contact = wire.Contact(self._server.session_id, challenge, theirs.challenge)
            if contact.proves(token, b"reader", theirs.proof):
                welcome = welcome._replace(proof=contact.proof(token, b"source"))
            else:
                welcome = wire.Welcome(False)
                self._server._warn_of(host, "it does not have the token of this engine")
        return welcome

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
            self.sending = wanted[offered]
        head = np.frombuffer(wire.COUNT.pack(int(offered.sum())) + offered.tobytes(), np.uint8)
        try:
            stream.send(np.concatenate([pieces_of(head), self.sending]))
        finally:
            with server._changed:
                self.sending = None
                server._changed.notify_all()
