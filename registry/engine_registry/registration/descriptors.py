"""File descriptors of memory that the keeper of a rank hands out, and how other processes get them.

A descriptor keeps the memory that it stands for, and any process that has it can map that memory.
The keeper hands them out, not the rank: so they can be had while the rank is stopped, holds the
GIL, or has just died. `keeper.desk` is the keeper's side.

A process asks at an abstract unix socket, with packets of SOCK_SEQPACKET:

    request     4 bytes "ERD1", 16 bytes the secret, then two numbers of 32 bits, little-endian:
                the first descriptor, and how many, 128 at most
    answer      one byte "+", with the descriptors as SCM_RIGHTS; or the end of the connection

Name and secret are random, and stand in the rank's manifest. The name can be seen in
/proc/net/unix, too. Starts no thread.
"""

from __future__ import annotations

import array
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from engine_registry.errors import KeeperFailed
from engine_registry.etcd.descriptors import explain, out_of_descriptors
from engine_registry.forks import closed_in_child, prevented
from engine_registry.lifetime import Closable

PLACE_NBYTES = 32
MOST_AT_ONCE = 128  # the kernel takes 253 in one packet
REQUEST = struct.Struct("<4s16sII")
MAGIC = b"ERD1"
OWNER = struct.Struct("3i")  # of SO_PEERCRED: pid, uid, gid
REFUSED = (
    "the keeper does not hand out these descriptors: it is the keeper of another registration, or "
    "of another user, or has let them go"
)
PATIENCE_S = 5.0  # with a keeper; the machine may have too much to do


class DescriptorPlace(NamedTuple):
    """Where a keeper hands descriptors out."""

    name: bytes  # 16 bytes
    secret: bytes  # 16 bytes, which a process has to know as well

    @classmethod
    def new(cls) -> DescriptorPlace:
        return cls(secrets.token_bytes(16), secrets.token_bytes(16))

    @classmethod
    def decode(cls, packed: bytes) -> DescriptorPlace:
        """Of PLACE_NBYTES."""
        return cls(packed[:16], packed[16:PLACE_NBYTES])

    def encode(self) -> bytes:
        return self.name + self.secret

    @property
    def address(self) -> bytes:
        """Of the socket, which no file stands for."""
        return address_of(self.name)


def address_of(name: bytes) -> bytes:
    """Of the socket of the keeper that has this name."""
    return b"\0engine-registry/" + name.hex().encode()


class Descriptors(Closable):
    """Descriptors, and the place at which a keeper hands them out by their numbers, from 0.

    They belong to this object, which closes them; in a forked child they are closed at once.
    """

    def __init__(self, place: DescriptorPlace, fds: Sequence[int] = ()) -> None:
        self.place = place
        self._fds = list(fds)
        self._lock = threading.Lock()
        with prevented():
            closed_in_child(self, Descriptors._close_in_child)
        self._mark_open()

    def __len__(self) -> int:
        return len(self._fds)

    def add(self, make: Callable[[], int]) -> None:
        """One more, which `make` returns. No child is forked that keeps it."""
        with prevented():
            self._fds.append(make())

    def send(self, to: socket.socket, first: int, count: int) -> None:
        """In one packet. OSError, also where they have been closed."""
        with self._lock:
            if not self._fds:
                raise OSError("the descriptors have been closed")
            send_fds(to, self._fds[first : first + count])

    def close(self) -> None:
        with self._lock:
            self._mark_closed()
            close_all(self._fds)

    def _close_in_child(self) -> None:
        """The lock may be held by a thread that is not there."""
        close_all(self._fds)

    def _label(self) -> str:
        return f"of {len(self._fds)} allocations"


@contextmanager
def closed_on_error(descriptors: Descriptors | None) -> Iterator[None]:
    """Closes them where the block raises."""
    try:
        yield
    except BaseException:
        if descriptors is not None:
            descriptors.close()
        raise


def fetch(place: DescriptorPlace, first: int, count: int) -> list[int]:
    """So many of the descriptors that a keeper hands out there, which the caller closes.

    Raises:
        KeeperFailed: The keeper is gone, does not answer, or does not hand these out; or this
            process can have no more descriptors.
    """
    found: list[int] = []
    try:
        with said_as_ours(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as keeper:
            call(keeper, place.name)
            while len(found) < count:
                wanted = min(count - len(found), MOST_AT_ONCE)
                keeper.send(REQUEST.pack(MAGIC, place.secret, first + len(found), wanted))
                answer, fds = receive_fds(keeper, wanted)
                found += fds
                if answer != b"+" or len(fds) != wanted:
                    raise KeeperFailed(REFUSED)
    except BaseException:
        close_all(found)
        raise
    return found


def call(keeper: socket.socket, name: bytes, patience_s: float = PATIENCE_S) -> None:
    """Connects the socket to the keeper of this name. OSError, or KeeperFailed where a process of
    another user is there.
    """
    keeper.settimeout(patience_s)
    keeper.connect(address_of(name))
    if owner_of(keeper) != os.geteuid():
        raise KeeperFailed("a process of another user is where a keeper should be")


@contextmanager
def said_as_ours() -> Iterator[None]:
    """An OSError of a socket to a keeper becomes KeeperFailed."""
    try:
        yield
    except OSError as exc:
        raise _failed(exc) from exc


def _failed(exc: OSError) -> KeeperFailed:
    if isinstance(exc, ConnectionRefusedError):
        return KeeperFailed(
            "the keeper that hands out the memory has ended, or another one will take its place"
        )
    if isinstance(exc, ConnectionResetError | BrokenPipeError):
        return KeeperFailed(REFUSED)
    if isinstance(exc, TimeoutError):
        return KeeperFailed("the keeper that hands out the memory does not answer")
    why, remedy = explain(exc)
    return KeeperFailed(f"the memory cannot be had from its keeper: {why}", remedy)


def owner_of(connection: socket.socket) -> int:
    """The user of the process at the other end."""
    return peer_of(connection)[1]


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process at the other end, or 0 where it is in another namespace; and its user."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, OWNER.size)
    pid, uid, _ = OWNER.unpack(packed)
    return int(pid), int(uid)


def send_fds(to: socket.socket, fds: Sequence[int]) -> None:
    """With one byte, which is `+`. Never waits: OSError where the other end takes nothing now."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    to.sendmsg([b"+"], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive_fds(connection: socket.socket, most: int, nbytes: int = 64) -> tuple[bytes, list[int]]:
    """A packet, and the descriptors that came with it; no child inherits them.

    OSError, with none of them left open, where this process can have no more.
    """
    room = socket.CMSG_SPACE(most * array.array("i").itemsize)
    packet, ancillary, flags, _ = connection.recvmsg(nbytes, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_all(list(fds))
        raise out_of_descriptors()
    return packet, list(fds)


def close_all(fds: list[int]) -> None:
    """And forgets them."""
    while fds:
        with suppress(OSError):
            os.close(fds.pop())
