"""A running dashboard: the event loop in which uvicorn answers browsers, and the page's feed.

Used by `engines dashboard`. Starts one thread with the event loop, one for calls to etcd, and the
feed's.
"""

from __future__ import annotations

import asyncio
import threading
from ipaddress import ip_address
from types import TracebackType

from engine_cli.dashboard.feed import Feed
from engine_cli.dashboard.routes import Routes
from engine_registry import Registry
from engine_registry.gateway.calls import Calls
from engine_registry.gateway.http import HttpServer
from engine_registry.gateway.limits import ConnectionLimiter, Limits
from engine_registry.gateway.listener import listen
from engine_registry.gateway.token import check_token

PORT = 6790
_STREAM_S = 3600.0  # then the page asks again: a browser that takes nothing is cut off
_JOIN_S = 10.0


class Dashboard:
    """Serves from the end of `__init__` to `close`, or the end of the `with` block."""

    def __init__(
        self,
        registry: Registry,
        *,
        host: str = "127.0.0.1",
        port: int = PORT,
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`port` 0 takes a free one. Raises InvalidField, or GatewayFailed where the port cannot be
        had.
        """
        check_token(token)
        self._socket = listen(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        loopback = ip_address(self.host).is_loopback
        self.open_to_others = not loopback and token is None
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._limiter = ConnectionLimiter(limits or Limits(request_s=_STREAM_S))
        self._calls = Calls(1, "dashboard reads")
        self.feed = Feed(registry, self._fail)
        names = frozenset({host.lower(), "localhost", "127.0.0.1", "[::1]"}) if loopback else ()
        routes = Routes(registry, self.feed, self._calls, self._limiter, token, frozenset(names))
        self._server = HttpServer(routes.app(), self._limiter)
        self._thread = threading.Thread(target=self._run, name="dashboard server", daemon=True)
        self._thread.start()
        self.feed.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

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
        self.feed.close()
        self._server.should_exit = True

    def close(self) -> None:
        """Any number of times. Ends the streams of all browsers, which then try again."""
        self.stop()
        self._thread.join(_JOIN_S)
        self._calls.close(wait=False)
        self._socket.close()

    def _fail(self, exc: BaseException) -> None:
        self._failure = self._failure or exc
        self._server.should_exit = True

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

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
