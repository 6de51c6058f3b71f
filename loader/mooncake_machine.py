"""This machine, as far as reading from others and being read depends on it: its addresses, RDMA devices, and who it is."""

from __future__ import annotations

import socket
from pathlib import Path

from loader.errors import EngineUnavailable

_RDMA_DEVICES = Path("/sys/class/infiniband")


def this_host() -> str:
    """Also where containers of one machine have names of their own, or machines the same."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def rdma_devices() -> tuple[str, ...]:
    if not _RDMA_DEVICES.is_dir():
        return ()
    return tuple(sorted(path.name for path in _RDMA_DEVICES.iterdir()))


def check_host(host: str) -> None:
    """Mooncake takes any host, and peers then look for us at an address that leads elsewhere or nowhere: EngineUnavailable."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.bind(address)
    except OSError as exc:
        raise EngineUnavailable(
            f"{host!r} is no address of this machine ({exc.strerror or exc}): give one that peers can reach it by"
        ) from exc


def addresses_of(host: str) -> list[str]:
    """All addresses that a host leads to; none where it leads to none."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(info[4][0]) for info in found]
