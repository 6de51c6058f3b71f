"""What an HTTP client of the gateway may take: bytes, seconds, connections. A client that goes
beyond is cut off, and no other client is.

`Limits` are the numbers. `ConnectionLimiter` counts the connections and keeps them to their time.
Its `body` bounds what is sent, whatever its Content-Length says. This is not left to options of
uvicorn, because:

- `limit_concurrency` counts all connections together. One client could take all of them, and then
  the others get 503, for /health too. Half a request that never ends would keep its place.
- `timeout_keep_alive` runs from an answer to the next byte. It does not run before the first
  request, during half a head, during a body, or while an answer is not being read.
- There is no limit for a body, nor for all bodies together.

uvicorn's `h11_max_incomplete_event_size` bounds a head, 16 KiB by default, and `backlog` the
connections that it accepts at a time: both are in force.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine_registry.gateway.admission import Places, client_of
from engine_registry.gateway.sglang import MAX_TENSORS

_SLICE_NBYTES = 256 << 10


@dataclass(frozen=True)
class Limits:
    body_nbytes: int = 64 << 20  # of one request
    bodies_nbytes: int = 256 << 20  # of all that are being read or parsed
    tensors: int = MAX_TENSORS
    connections: int = 500  # and some that only wait, or ask /health, when all of these are busy
    connections_per_address: int = 250  # an IPv4 address, or a /64 of IPv6
    head_s: float = 10.0  # from the connection, or the answer before, until a request has begun
    body_s: float = 30.0
    request_s: float = 60.0  # in all, until its answer has been taken


class TooLarge(Exception):
    pass


class TooSlow(Exception):
    pass


class Busy(Exception):
    pass


class SlicedResponse(Response):
    """A body is handed on as its client takes it: what many slow ones have not taken yet would fill
    the memory.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        for start in range(0, len(self.body), _SLICE_NBYTES):
            part = self.body[start : start + _SLICE_NBYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ConnectionLimiter:
    """Of one server, in its event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._connections: dict[object, ClientConnection] = {}  # by the client's address and port
        self._places = Places[ClientConnection](limits.connections, limits.connections_per_address)
        self._held_nbytes = 0

    def protocol(self) -> type[H11Protocol]:
        """For uvicorn, which makes one a connection."""
        return type("LimitedConnection", (ClientConnection,), {"limiter": self})

    def watching(self, app: ASGIApp) -> ASGIApp:
        """The app, each request of which counts against its connection's time."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            connection = (
                self._connections.get(scope.get("client")) if scope["type"] == "http" else None
            )
            if connection is None:
                await app(scope, receive, send)
                return
            connection.limit(self.limits.request_s)
            try:
                await app(scope, receive, send)
            finally:
                self._wait(connection)

        return watched

    def enter(self, connection: ClientConnection) -> None:
        """Aborts another connection if there is no place for both."""
        self._connections[connection.client] = connection
        self._wait(connection)

    async def begin(self, request: Request) -> None:
        """The request keeps its connection's place until it is answered. Busy if it is put off."""
        connection = self._connections.get(request.scope.get("client"))
        if connection is not None and not self._places.begin(connection):
            await self.discard_body(request)
            raise Busy(
                "too many requests of your address, or of all clients, are under way: try again; "
                "if clients share an address, as behind a proxy, raise "
                "`connections_per_address` of the gateway"
            )

    def leave(self, connection: ClientConnection) -> None:
        self._places.leave(connection)
        if self._connections.get(connection.client) is connection:
            del self._connections[connection.client]

    def abort_all(self) -> None:
        for connection in list(self._connections.values()):
            connection.transport.abort()

    def _wait(self, connection: ClientConnection) -> None:
        """Until its next request begins."""
        if self._connections.get(connection.client) is not connection:
            return  # it has been aborted
        connection.limit(self.limits.head_s)
        client = client_of(connection.client[0]) if connection.client else ""
        for lost in self._places.wait(connection, client):
            self.leave(lost)
            lost.transport.abort()

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[Body]:
        """Counts as held until the end of the block.

        TooLarge, TooSlow, Busy, or ClientDisconnect.
        """
        body = Body()
        try:
            try:
                await asyncio.wait_for(self._read(request, body), self.limits.body_s)
            except asyncio.TimeoutError as exc:
                raise TooSlow(f"the body has not come within {self.limits.body_s:g} s") from exc
            yield body
        finally:
            self._held_nbytes -= body.nbytes
            body.close()

    async def discard_body(self, request: Request) -> None:
        """Most clients read no answer before they have sent all: what is not wanted is taken and
        thrown away, up to a point.
        """
        with suppress(asyncio.TimeoutError, Busy):
            await asyncio.wait_for(self._read(request, Body(), Busy()), self.limits.body_s)

    async def _read(self, request: Request, body: Body, error: Exception | None = None) -> None:
        """`error` is raised at the end; then, or once the body is too large, it is discarded."""
        limit = self.limits.body_nbytes
        too_large = TooLarge(f"the body is larger than {limit} bytes")
        length = request.headers.get("content-length", "")
        if error is None and length.isdecimal() and int(length[:20]) > limit:
            error = too_large
        nbytes = 0
        async for chunk in request.stream():
            nbytes += len(chunk)
            if error is None and nbytes > limit:
                error = too_large
            if error is None and self._held_nbytes + len(chunk) > self.limits.bodies_nbytes:
                error = Busy("too much is being sent at once: try again")
            if error is None:
                body.add(chunk)
                self._held_nbytes += len(chunk)
                continue
            self._held_nbytes -= body.nbytes
            body.close()
            if nbytes > 4 * limit:
                break
        if error is not None:
            raise error


class Body:
    """What a client has sent, in memory that is not the heap's: that would keep what many large
    ones took as they grew.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._memory: mmap.mmap | None = None

    def add(self, chunk: bytes) -> None:
        if self._memory is None:
            self._memory = mmap.mmap(-1, _SLICE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.nbytes += len(chunk)
        if self.nbytes > len(self._memory):
            self._memory.resize(max(2 * len(self._memory), self.nbytes))
        self._memory.write(chunk)

    def read(self) -> bytes:
        """A copy. Nothing once it is closed."""
        return self._memory[: self.nbytes] if self._memory is not None else b""

    def close(self) -> None:
        memory, self._memory, self.nbytes = self._memory, None, 0
        if memory is not None:
            memory.close()


class ClientConnection(H11Protocol):
    """One that is aborted when its time is over. Only what asyncio itself calls is overridden."""

    limiter: ConnectionLimiter
    _lost = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.limiter.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.limiter.leave(self)
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def limit(self, seconds: float) -> None:
        """From now on."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if self._lost else self.loop.call_later(seconds, self.transport.abort)


__all__ = [
    "Body",
    "Busy",
    "ClientDisconnect",
    "ConnectionLimiter",
    "Limits",
    "SlicedResponse",
    "TooLarge",
    "TooSlow",
]
