"""This machine as its peers see it: its addresses and its identity."""

from __future__ import annotations

import socket
from pathlib import Path

from engine_loader.errors import EngineUnavailable
from engine_registry.schema.address import why_not_advertised


def this_host() -> str:
    """Also where containers of one machine have different names, or machines the same."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def check_host(host: str) -> str:
    """The family, IPv4 or IPv6, of the address that peers find this machine by.

    Mooncake takes any host, and peers then look for us at an address that leads elsewhere or
    nowhere: EngineUnavailable says why. A name that has addresses of both families is one of IPv4.
    """
    if problem := why_not_advertised(host):
        raise _refused(problem)
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        family, kind, number, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        if problem := why_not_advertised(str(address[0])):
            raise _refused(problem)
        with socket.socket(family, kind, number) as probe:
            probe.bind(address)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address[0], 1, *address[2:]))  # sends nothing
    except PermissionError as exc:
        raise _refused(f"{host} is the broadcast address of a network") from exc
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise _refused(f"{host!r} is no address of this machine ({reason})") from exc
    return "IPv6" if family == socket.AF_INET6 else "IPv4"


def addresses_of(host: str, family: str) -> list[str]:
    """The addresses of that family that a host leads to; none where it leads to none."""
    wanted = socket.AF_INET6 if family == "IPv6" else socket.AF_INET
    try:
        found = socket.getaddrinfo(host, 0, wanted, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(info[4][0]) for info in found]


def _refused(problem: str) -> EngineUnavailable:
    return EngineUnavailable(problem, "give an address of this machine that peers can reach")
