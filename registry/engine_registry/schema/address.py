"""Hosts and ports as records and people write them: `host:port`, `[address of IPv6]:port`. Pure."""

from __future__ import annotations

import ipaddress
import re
import socket
from ipaddress import IPv4Address, IPv6Address

from engine_registry.errors import InvalidField

_SESSION = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,64})\]|([A-Za-z0-9._-]{1,253})):([0-9]{1,5})")
_BROADCAST = IPv4Address("255.255.255.255")


def join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_session(session_id: str) -> tuple[str, int]:
    """Host and port of a transfer engine; InvalidField where it is not `host:port`.

    Addresses of IPv6 are in brackets.
    """
    match = _SESSION.fullmatch(session_id)
    if match is None or not 0 < int(match[3]) < 65536:
        raise InvalidField(
            f"session_id {session_id[:300]!r} is not valid: it is host:port of the transfer engine",
            field="session_id",
        )
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Whether the host is another machine on every machine."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def host_of(session_id: str) -> str:
    """Empty where it is not `host:port`, as the sessions of engines within a process are."""
    try:
        return parse_session(session_id)[0]
    except InvalidField:
        return ""


def family_of(host: str) -> str:
    """IPv4 or IPv6 where the host is an address; empty where it is a name."""
    address = _address(host)
    return "" if address is None else f"IPv{address.version}"


def why_not_advertised(host: str) -> str:
    """Why no peer can find a machine by that host, as far as the host itself shows; or empty."""
    if "%" in host:
        return f"{host} names a network interface of this machine, which means nothing to others"
    address = _address(host)
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    if address is None:
        return ""
    if address.is_unspecified:
        return f"{host} stands for all addresses of a machine, and leads others to themselves"
    if address.is_multicast:
        return f"{host} is a multicast address"
    return f"{host} is the broadcast address" if address == _BROADCAST else ""


def _address(host: str) -> IPv4Address | IPv6Address | None:
    """None where it is a name. `0` and `127.1` are addresses, as they are to the system."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None
