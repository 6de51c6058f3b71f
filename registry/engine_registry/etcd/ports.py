"""A free port of this machine, for a server that is started next."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_FIRST_PORT = 20_000  # above those of well-known servers and of transfer engines
_given: set[int] = set()  # by this process: a server may not listen there yet


def free_port(host: str = "127.0.0.1") -> int:
    """A port that no server listens on now, another one for each call.

    It is none that the kernel gives by itself, for a connection or to a server that asks for any:
    those are taken again at once.
    """
    ports = _ports()
    for port in random.sample(ports, min(100, len(ports))):
        if port not in _given and is_free(port, host):
            _given.add(port)
            return port
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_free(port: int, host: str) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(_family(host)) as probe, contextlib.suppress(OSError):
        probe.bind((host, port))
        return True
    return False


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _ports() -> range:
    """Those below the first that the kernel gives by itself."""
    try:
        first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return range(0)
    return range(_FIRST_PORT, first_given)
