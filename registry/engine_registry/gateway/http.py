"""uvicorn as the gateway and the dashboard run it: with the limits of connections, silent, and
without a look at who is in front of it.
"""

from __future__ import annotations

import socket

import uvicorn
from starlette.types import ASGIApp

from engine_registry.gateway.limits import ConnectionLimiter
from engine_registry.gateway.listener import BACKLOG

_ACCEPTS = 16  # at a time; then it reads them, before a head that has come counts as missing
_GRACE_S = 2  # for requests that are being answered when it closes


class HttpServer(uvicorn.Server):
    """Its `backlog` is how many connections it accepts at a time, not how many may wait for it."""

    def __init__(self, app: ASGIApp, limiter: ConnectionLimiter) -> None:
        super().__init__(
            uvicorn.Config(
                limiter.watching(app),
                http=limiter.protocol(),
                ws="none",
                lifespan="on",
                interface="asgi3",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_ACCEPTS,
                timeout_keep_alive=int(limiter.limits.head_s),
                timeout_graceful_shutdown=_GRACE_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(BACKLOG)
