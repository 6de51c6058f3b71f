"""What an HTTP client of the gateway may take: bytes, seconds, connections. A client that goes beyond is cut off, nobody else is.

`Limits` are the numbers. `Guard` counts what is open and makes uvicorn's connections keep to their time, which by itself it does
not before a request and while a response is not being read. `read_body` bounds what is sent, whatever its Content-Length says.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from registry.sglang import MAX_TENSORS

_SLICE_NBYTES = 256 << 10


@dataclass(frozen=True)
class Limits:
    body_nbytes: int = 64 << 20  # of one request
    bodies_nbytes: int = 256 << 20  # of all that are being read
    tensors: int = MAX_TENSORS
    connections: int = 500
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
    """A body is handed on as its client takes it: what many slow ones have not taken yet would fill the memory."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), _SLICE_NBYTES):
            part = self.body[start : start + _SLICE_NBYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Guard:
    """Of one server, in its event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._connections: dict[object, Connection] = {}  # by the client's address
        self._reading_nbytes = 0

    def protocol(self) -> type[H11Protocol]:
        """For uvicorn, which makes one a connection."""
        return type("GuardedConnection", (Connection,), {"guard": self})

    def watching(self, app: ASGIApp) -> ASGIApp:
        """The app, each request of which counts against its connection's time."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            connection = self._connections.get(scope.get("client")) if scope["type"] == "http" else None
            if connection is None:
                await app(scope, receive, send)
                return
            connection.limit(self.limits.request_s)
            try:
                await app(scope, receive, send)
            finally:
                connection.limit(self.limits.head_s)

        return watched

    def enter(self, connection: Connection) -> bool:
        """False where there is no room for it."""
        if len(self._connections) >= self.limits.connections:
            return False
        self._connections[connection.client] = connection
        return True

    def leave(self, connection: Connection) -> None:
        if self._connections.get(connection.client) is connection:
            del self._connections[connection.client]

    def abort_all(self) -> None:
        for connection in list(self._connections.values()):
            connection.transport.abort()

    async def read_body(self, request: Request) -> bytes:
        """TooLarge, TooSlow, Busy, or ClientDisconnect."""
        try:
            return await asyncio.wait_for(self._read(request), self.limits.body_s)
        except asyncio.TimeoutError as exc:
            raise TooSlow(f"the body has not come within {self.limits.body_s:g} s") from exc

    async def _read(self, request: Request) -> bytes:
        limit = self.limits.body_nbytes
        length = request.headers.get("content-length", "")
        error: Exception | None = TooLarge() if length.isdecimal() and int(length) > limit else None
        chunks: list[bytes] = []
        nbytes = held = 0
        try:
            async for chunk in request.stream():
                nbytes += len(chunk)
                if nbytes > limit and error is None:
                    error = TooLarge()
                if self._reading_nbytes + len(chunk) > self.limits.bodies_nbytes and error is None:
                    error = Busy("too much is being sent at once: try again")
                if error is not None:
                    # Most clients read no answer before they have sent all: the rest is taken and thrown away, up to a point.
                    chunks.clear()
                    self._reading_nbytes -= held
                    held = 0
                    if nbytes > 4 * limit:
                        break
                else:
                    chunks.append(chunk)
                    self._reading_nbytes += len(chunk)
                    held += len(chunk)
        finally:
            self._reading_nbytes -= held
        if isinstance(error, TooLarge):
            raise TooLarge(f"the body is larger than {limit} bytes")
        if error is not None:
            raise error
        return b"".join(chunks)


class Connection(H11Protocol):
    """One that is aborted when its time is over. Only what asyncio itself calls is overridden."""

    guard: Guard
    _lost = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if self.guard.enter(self):
            self.limit(self.guard.limits.head_s)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.leave(self)
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def limit(self, seconds: float) -> None:
        """From now on."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if self._lost else self.loop.call_later(seconds, self.transport.abort)


__all__ = ["Busy", "ClientDisconnect", "Guard", "Limits", "SlicedResponse", "TooLarge", "TooSlow"]
