"""The transfer engine's sockets, found among this process's own descriptors.

The library has no call for what is done to them here. Whatever a descriptor's number stands for
may change at any time, so each is looked at and used by way of a copy.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import struct
import sys
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

Way = tuple[Sequence[str], int]  # to a peer: its addresses, and its port
_TIMEVAL = struct.Struct("ll")
_TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
_INET = (socket.AF_INET, socket.AF_INET6)


@contextmanager
def listening_at(port: int) -> Iterator[socket.socket | None]:
    """The socket that listens at the port; None if there is none."""
    with closing(_copies()) as copies:
        yield next((found for found in copies if _listens_at(port, found)), None)


def _listens_at(port: int, found: socket.socket) -> bool:
    if found.family not in _INET or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    return bool(found.getsockname()[1] == port)


def look_up_every(seconds: float, listener: socket.socket) -> None:
    """Has the thread that listens there wake up so often.

    It looks at its orders only when a wait for a connection is over: one that is under way lasts a
    second, so it is ended by a connection that is closed at once.
    """
    whole = int(seconds)
    listener.setsockopt(
        socket.SOL_SOCKET,
        socket.SO_RCVTIMEO,
        _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)),
    )
    host = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    with suppress(OSError), socket.create_connection((host, listener.getsockname()[1]), 1):
        pass


def cut(addresses: Sequence[str], port: int) -> None:
    """Shuts down every connection of this process to that port, those that are being made included.

    A thread that waits there for an answer gets none, at once.
    """
    inodes = _inodes_of({_in_table(address, port) for address in addresses})
    for found in _copies(inodes) if inodes else ():
        with suppress(OSError):  # it is closed already
            found.shutdown(socket.SHUT_RDWR)


def _copies(inodes: Collection[int] | None = None) -> Generator[socket.socket, None, None]:
    """Of our sockets, or of those with these inodes. Each is closed when the next is asked for."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:  # no descriptor is left for the list
        return
    for name in names:
        try:
            if not _is_wanted(os.fstat(int(name)), inodes):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if _is_wanted(os.fstat(found.fileno()), inodes):
                    yield found
        except OSError:  # gone meanwhile
            continue


def _is_wanted(status: os.stat_result, inodes: Collection[int] | None) -> bool:
    return stat.S_ISSOCK(status.st_mode) and (inodes is None or status.st_ino in inodes)


def _inodes_of(remote: Collection[str]) -> set[int]:
    """Of the sockets that lead there, as the kernel lists them."""
    inodes = set()
    for table in _TABLES:
        try:
            rows = Path(table).read_text().splitlines()
        except OSError:  # a kernel without IPv6 has one table only
            continue
        inodes |= {int(row[9]) for row in map(str.split, rows[1:]) if row[2] in remote}
    return inodes


def _in_table(address: str, port: int) -> str:
    """As the kernel writes it: words of 32 bits in the order of the machine."""
    packed = ipaddress.ip_address(address.partition("%")[0]).packed
    words = [packed[at : at + 4] for at in range(0, len(packed), 4)]
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{port:04X}"
