"""The socket that a gateway or a dashboard listens on, or GatewayFailed with the reason."""

from __future__ import annotations

import errno
import socket

from engine_registry.errors import GatewayFailed

BACKLOG = 512  # connections that wait to be accepted


def listen(host: str, port: int, taken_by: str = "") -> socket.socket:
    """`taken_by` is a guess, for the message where the port is in use."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, number)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError, OverflowError) as exc:
        raise GatewayFailed(*_why_not(host, port, exc, taken_by)) from exc
    return sock


def _why_not(host: str, port: int, exc: Exception, taken_by: str) -> tuple[str, str]:
    """What has happened, and what to do."""
    number = exc.errno if isinstance(exc, OSError) and not isinstance(exc, socket.gaierror) else 0
    if number == errno.EADDRINUSE:
        what = f"port {port} on {host} is in use{taken_by and ', '}{taken_by}"
        return what, "choose another `port`, or end what listens there"
    if number == errno.EACCES:
        return f"port {port} is only for root", "choose a `port` above 1023"
    return (
        f"cannot listen at {host!r}, port {port}: {exc}",
        "give an address of this machine as `host`",
    )
