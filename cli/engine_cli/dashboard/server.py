"""A running dashboard: the event loop in which uvicorn answers browsers, and the page's feed.

Used by `engines dashboard`. Starts one thread with the event loop, one for calls to etcd, and the
feed's.
"""

from __future__ import annotations

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
        listener = listen(host, port)
        self.host, self.port = listener.getsockname()[:2]
        loopback = ip_address(self.host).is_loopback
        self.open_to_others = not loopback and token is None
        limiter = ConnectionLimiter(limits or Limits(request_s=_STREAM_S))
        self._calls = Calls(1, "dashboard reads")
        self.feed = Feed(registry, lambda why: self._server.fail(why))
        names = frozenset({host.lower(), "localhost", "127.0.0.1", "[::1]"}) if loopback else ()
        routes = Routes(registry, self.feed, self._calls, limiter, token, frozenset(names))
        self._server = HttpServer(routes.app(), limiter, listener, "dashboard server")
        self._server.start()
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
        return self._server.wait(timeout_s)

    def stop(self) -> None:
        """From any thread: `wait` returns when it has ended."""
        self.feed.close()
        self._server.stop()

    def close(self) -> None:
        """Any number of times. Ends the streams of all browsers, which then try again."""
        self.feed.close()
        self._server.close()
        self._calls.close(wait=False)

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
