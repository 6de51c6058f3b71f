"""Serves metrics over HTTP for `--metrics-port`.

Starts a thread, and one for each scrape that is going on.
"""

from __future__ import annotations

import errno
import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import click

from engine_registry.telemetry import metrics
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_HOST = "127.0.0.1"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that hangs up is no matter for the terminal."""
        log.debug("a scrape failed", exc_info=True, extra=fields("scrape_failed"))

    def server_bind(self) -> None:
        """Without the look-up of our own name, which may take long."""
        super(WSGIServer, self).server_bind()
        self.server_name, self.server_port = (
            str(self.server_address[0]),
            int(self.server_address[1]),
        )
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds for a client that sends nothing

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(port: int, host: str) -> Iterator[None]:
    """Counts, and serves what is counted, within the block.

    MetricsUnavailable where prometheus_client is not installed.
    """
    with metrics.counting():
        from prometheus_client import make_wsgi_app

        server = _listening(host, port)
        server.set_app(make_wsgi_app())
        thread = threading.Thread(
            target=server.serve_forever, args=(0.05,), name="metrics", daemon=True
        )
        thread.start()
        where = f"[{host}]" if ":" in host else host
        url = f"http://{where}:{server.server_port}/metrics"
        log.info(
            "metrics are at %s",
            url,
            extra=fields("metrics_served", url=url, port=server.server_port),
        )
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _listening(host: str, port: int) -> _Server:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        kind = type("_Server", (_Server,), {"address_family": family})
        server: _Server = kind(address[:2], _Handler)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise click.ClickException(
                f"port {port} on {host} is in use: choose another --metrics-port"
            ) from exc
        raise click.ClickException(
            f"metrics cannot be served on {host}, port {port}: {exc.strerror or exc}: check "
            "--metrics-host and --metrics-port"
        ) from exc
    return server


def metrics_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command gets `serve_metrics`, which makes a context of the options."""

    @functools.wraps(command)
    def wrapped(metrics_port: int | None, metrics_host: str | None, **kwargs: Any) -> Any:
        if metrics_port is None and metrics_host is not None:
            raise click.UsageError("--metrics-host goes with --metrics-port")
        if metrics_port is None:
            return command(serve_metrics=nullcontext, **kwargs)
        return command(
            serve_metrics=functools.partial(served, metrics_port, metrics_host or _HOST), **kwargs
        )

    port = click.option(
        "--metrics-port",
        type=click.IntRange(0, 65535),
        metavar="PORT",
        help=("Serve metrics for Prometheus here, under /metrics. 0: a free one, which is logged."),
    )
    host = click.option(
        "--metrics-host", metavar="HOST", help=f"Address to serve metrics on.  [default: {_HOST}]"
    )
    return port(host(wrapped))
