"""The transfer engine's sockets, found among this process's own descriptors.

The library has no call for what is done to them here. Whatever a descriptor's number stands for
may change at any time, so each is looked at and used by way of a copy.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress

_TIMEVAL = struct.Struct("ll")
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


def _copies() -> Generator[socket.socket, None, None]:
    """Of our sockets; each is closed when the next one is asked for."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                yield found
        except OSError:  # gone meanwhile
            continue
