"""Which processes are connected to a server on this machine, as the kernel says."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def connections(pid: int, endpoint: str) -> int:
    """How many the process has to the port."""
    links = _links(pid)
    return sum(f"socket:[{socket}]" in links for socket in _sockets(endpoint))


def all_connections(endpoint: str) -> int:
    """How many all processes have to the port."""
    return len(_sockets(endpoint))


def _links(pid: int) -> set[str]:
    links = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it is ours, of the listing
            links.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return links


def _sockets(endpoint: str) -> list[str]:
    port = int(endpoint.rpartition(":")[2])
    tables = [Path(f"/proc/net/{family}").read_text() for family in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return [row[9] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"]
