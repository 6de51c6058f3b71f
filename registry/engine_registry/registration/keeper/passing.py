"""How a rank passes file descriptors of its memory on to its keeper, which hands them out.

They go over a pair of sockets that the keeper inherits, in packets. Each of these has an answer, so
that few descriptors are on their way at a time:

    begin       4 bytes "ERD1", 32 bytes of the place, how many follow in 32 bits; those that the
                keeper had are closed
    some        one byte "+", with 128 descriptors at most
    answer      "+"; or "-" and why, in words: then the keeper has none

Used by `keeper.process`; `keeper.desk` is the other end. Starts no thread.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import time

from engine_registry.errors import KeeperFailed
from engine_registry.registration.descriptors import (
    MAGIC,
    MOST_AT_ONCE,
    PLACE_NBYTES,
    DescriptorPlace,
    Descriptors,
)

BEGIN = struct.Struct(f"<4s{PLACE_NBYTES}sI")
WHY_NBYTES = 512
_RETRY_S = 0.01  # while as many descriptors are on their way as may be


def pair() -> tuple[socket.socket, socket.socket]:
    """The ends of the rank and of its keeper."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def pass_on(
    rank: socket.socket, given: Descriptors | None, patience_s: float, look_s: float
) -> bool:
    """Makes the keeper hand these out, and nothing else.

    Args:
        rank: The rank's end.
        given: What to hand out; None for nothing.
        patience_s: How many seconds the keeper may be silent, counted in looks.
        look_s: The seconds of a look.

    Returns:
        False where the keeper was silent for so long. That it has ended is for others to find.

    Raises:
        KeeperFailed: It cannot have as many.
    """
    count = len(given) if given is not None else 0
    place = given.place if given is not None else DescriptorPlace(bytes(16), bytes(16))
    try:
        rank.send(BEGIN.pack(MAGIC, place.encode(), count), socket.MSG_NOSIGNAL)
        if not _is_taken(rank, patience_s, look_s):
            return False
        for first in range(0, count, MOST_AT_ONCE):
            if given is not None:
                _send(given, rank, first, patience_s)
            if not _is_taken(rank, patience_s, look_s):
                return False
    except OSError:
        return True
    return True


def _send(given: Descriptors, rank: socket.socket, first: int, patience_s: float) -> None:
    """Waits while as many are on their way, of all processes of the user, as may be."""
    waited_s = 0.0
    while True:
        try:
            given.send(rank, first, MOST_AT_ONCE)
            return
        except OSError as exc:
            if exc.errno != errno.ETOOMANYREFS:
                raise
            if waited_s >= patience_s:
                raise KeeperFailed(
                    f"the descriptors of the memory cannot be sent to the keeper: {exc}",
                    "raise the limit of descriptors (ulimit -n)",
                ) from exc
        time.sleep(_RETRY_S)
        waited_s += _RETRY_S


def _is_taken(rank: socket.socket, patience_s: float, look_s: float) -> bool:
    poll = select.poll()
    poll.register(rank, select.POLLIN)
    silent_s = 0.0
    while not poll.poll(1000 * look_s):
        silent_s += look_s
        if silent_s >= patience_s:
            return False
    answer = rank.recv(WHY_NBYTES)
    if answer[:1] == b"-":
        raise KeeperFailed(
            f"the keeper cannot hold the descriptors of the memory: {answer[1:].decode()}",
            "raise the limit of descriptors (ulimit -Hn), or serve memory of fewer allocations",
        )
    return True
