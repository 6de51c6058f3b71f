"""A free port of this machine, for a server that is started next."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from itertools import chain
from pathlib import Path

_FIRST_PORT = 20_000  # above those of well-known servers and of transfer engines
_TRIES = 100
_given: set[int] = set()  # by this process: a server may not listen there yet


def free_port(host: str = "127.0.0.1") -> int:
    """A port that no server listens on now, another one for each call.

    It is none that the kernel gives by itself, for a connection or to a server that asks for any:
    those are taken again at once. Where no other is left, it is one of those.
    """
    ports = _ports()
    ours = (port for port in random.sample(ports, min(_TRIES, len(ports))) if is_free(port, host))
    others = (_port_of_the_kernel(host) for _ in range(_TRIES))
    for port in chain(ours, others):
        if port not in _given:
            _given.add(port)
            return port
    raise OSError(errno.EADDRINUSE, f"no port of {host} is left for another server")


def _port_of_the_kernel(host: str) -> int:
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
