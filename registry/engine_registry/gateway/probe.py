"""Whether something listens at an address: one TCP connection, made and closed.

For the event loop, thousands at a time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any

from engine_registry.errors import InvalidField
from engine_registry.schema.address import parse_session


class Answer(str, Enum):
    """What to make of the process at an address."""

    LISTENS = "listens"  # it lives
    REFUSES = "refuses"  # its machine answers that nobody listens: it has gone
    SILENT = "silent"  # nothing is known: the machine, the network or a firewall is in the way


Probe = Callable[[str], Awaitable[Answer]]


async def probe(session_id: str, timeout_s: float = 1.0) -> Answer:
    """A connection to `host:port`.

    Closed in order: a transfer engine logs an error when one is reset.
    """
    try:
        host, port = parse_session(session_id)
        await asyncio.wait_for(_connect(host, port), timeout_s)
    except ConnectionRefusedError:
        return Answer.REFUSES
    except (OSError, UnicodeError, InvalidField, asyncio.TimeoutError):
        return Answer.SILENT
    return Answer.LISTENS


async def _connect(host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    error: OSError | None = None
    for family, address in await _addresses(host, port):
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, address)
                if sock.getsockname() != sock.getpeername():
                    return
                # A free port of our own that was given to this very connection, which then met
                # itself.
                error = error or ConnectionRefusedError()
            except ConnectionRefusedError as exc:
                error = error or exc
            except OSError as exc:
                error = exc
    raise error or OSError(f"{host} has no address")


async def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(info[0], info[4]) for info in infos]
    return [(socket.AF_INET6 if version == 6 else socket.AF_INET, (host, port))]
