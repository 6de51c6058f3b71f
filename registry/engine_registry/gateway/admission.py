"""Which of a gateway's connections stay open, and which requests begin, when there are too many.

Pure; used by `gateway.limits`. A connection waits for a request or is busy with one. Each new
connection is taken in: if no place is left, the one that has waited longest loses its own. So half
a request that never ends keeps nobody out. Only requests hold their places.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
_SPARE = 8  # one in so many places is for waiting connections: it is always possible to ask /health


def client_of(host: str) -> str:
    """The client behind an IP address: of IPv6 a network, because one machine has all of a /64."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


class Places(Generic[T]):
    """`T` is a connection. `total` places for all, at most `each` of them for one client."""

    def __init__(self, total: int, each: int) -> None:
        self._total = total
        self._each = each
        # The client of each connection. Those that wait are in the order in which they began to.
        self._waiting: dict[T, str] = {}
        self._busy: dict[T, str] = {}

    def wait(self, connection: T, client: str) -> list[T]:
        """From now on it waits for a request. Returns the connections that lose their places."""
        self.leave(connection)
        self._waiting[connection] = client
        own = [each for each, owner in self._waiting.items() if owner == client]
        lost = self._put_out(_beyond(self._each, own, self._requests_of(client)))
        return lost + self._put_out(_beyond(self._total, list(self._waiting), len(self._busy)))

    def begin(self, connection: T) -> bool:
        """Its request has come. False if that must be put off; the connection then waits on."""
        client = self._waiting[connection]
        if len(self._busy) >= self._total or self._requests_of(client) >= self._each:
            return False
        self._busy[connection] = self._waiting.pop(connection)
        return True

    def leave(self, connection: T) -> None:
        self._waiting.pop(connection, None)
        self._busy.pop(connection, None)

    def _put_out(self, connections: list[T]) -> list[T]:
        for connection in connections:
            self.leave(connection)
        return connections

    def _requests_of(self, client: str) -> int:
        return sum(owner == client for owner in self._busy.values())


def _beyond(limit: int, waiting: list[T], busy: int) -> list[T]:
    """Of those that wait, the first so many as there are too many."""
    places = max(limit - busy, limit // _SPARE, 1)
    return waiting[: max(0, len(waiting) - places)]
