"""uvicorn as the gateway and the dashboard run it: with the limits of connections, silent, and
without a look at who is in front of it. Starts one thread, with an event loop.
"""

from __future__ import annotations

import asyncio
import socket
import threading

import uvicorn
from starlette.types import ASGIApp

from engine_registry.gateway.limits import ConnectionLimiter
from engine_registry.gateway.listener import BACKLOG

_ACCEPTS = 16  # at a time; then it reads them, before a head that has come counts as missing
_JOIN_S = 10.0
_GRACE_S = 2  # for requests that are being answered when it closes


class HttpServer:
    """Answers on a socket, in a thread with an event loop, from `start` to `close`."""

    def __init__(
        self, app: ASGIApp, limiter: ConnectionLimiter, listener: socket.socket, name: str
    ) -> None:
        """`listener` is for this server alone, which closes it. `name` is the thread's."""
        self._limiter = limiter
        self._socket = listener
        self._server = _Server(app, limiter)
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it has ended by `stop` or `close`, or by itself, which raises why; False where the
        time is over first.
        """
        if not self._ended.wait(timeout_s):
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def stop(self) -> None:
        """From any thread: `wait` returns when it has ended."""
        self._server.should_exit = True

    def fail(self, error: BaseException | None) -> None:
        """As `stop`, and `wait` raises the error, unless another came before."""
        self._failure = self._failure or error
        self.stop()

    def close(self) -> None:
        """Any number of times. Answers what it is being asked, for up to 2 s."""
        self.stop()
        self._thread.join(_JOIN_S)
        self._socket.close()

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._serve())
        except BaseException as exc:  # noqa: BLE001  raised again in `wait`: a thread has no caller above it
            self._failure = self._failure or exc
        finally:
            loop.close()
            self._ended.set()

    async def _serve(self) -> None:
        await self._server.serve(sockets=[self._socket])
        self._limiter.abort_all()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


class _Server(uvicorn.Server):
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
