"""What a keeper hands out: file descriptors of its rank's memory. See `registration.descriptors`.

The rank passes them on over a pair of sockets that its keeper inherits, in packets. Each of these
has an answer, so that few descriptors are on their way at a time:

    begin       4 bytes "ERD1", 32 bytes of the place, how many follow in 32 bits; those that the
                keeper had are closed
    some        one byte "+", with 128 descriptors at most
    answer      "+"; or "-" and why, in words: then the keeper has none

The keeper's side starts one thread, which never waits for one peer alone. It needs neither etcd nor
the rank.
"""

from __future__ import annotations

import errno
import hmac
import math
import os
import resource
import select
import selectors
import socket
import struct
import threading
import time
from contextlib import suppress

from engine_registry.errors import KeeperFailed
from engine_registry.etcd.descriptors import explain
from engine_registry.registration.descriptors import (
    MAGIC,
    MOST_AT_ONCE,
    PLACE_NBYTES,
    REQUEST,
    DescriptorPlace,
    Descriptors,
    close_all,
    owner_of,
    receive_fds,
    send_fds,
)

_BEGIN = struct.Struct(f"<4s{PLACE_NBYTES}sI")
_WHY_NBYTES = 512
_MOST_READERS = 64  # others wait until they are connected
# After the end of a rank, whose keeper may try for minutes to reach an etcd that is away: the
# memory must be free when the rank is started anew.
_DEAD_S = 30.0
_READER_S = 5.0  # of one, with all that it asks for
_RETRY_S = 0.01  # of an answer that a reader, or the system, does not take yet


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
        rank.send(_BEGIN.pack(MAGIC, place.encode(), count), socket.MSG_NOSIGNAL)
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
    answer = rank.recv(_WHY_NBYTES)
    if answer[:1] == b"-":
        raise KeeperFailed(
            f"the keeper cannot hold the descriptors of the memory: {answer[1:].decode()}",
            "raise the limit of descriptors (ulimit -Hn), or serve memory of fewer allocations",
        )
    return True


class _Reader:
    """A connection. `waits`: for how many descriptors from which on, which it has not taken yet."""

    def __init__(self) -> None:
        self.until = time.monotonic() + _READER_S
        self.waits: tuple[int, int] | None = None


class Desk:
    """The keeper's side. Its thread alone touches the descriptors."""

    def __init__(self, rank: socket.socket) -> None:
        """`rank` is the keeper's end of the pair."""
        self._rank = rank
        self._place: DescriptorPlace | None = None
        self._coming = 0  # descriptors that the rank will pass on
        self._fds: list[int] = []
        self._listener: socket.socket | None = None
        self._listening = False  # to the listener: not while there are too many readers
        self._readers: dict[socket.socket, _Reader] = {}
        self._until = math.inf  # then all is closed, on the clock of time.monotonic
        self._woken, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in (rank, self._woken):
            self._selector.register(each, selectors.EVENT_READ)

    def start(self) -> None:
        threading.Thread(target=self._run, name="descriptors", daemon=True).start()

    def let_go(self) -> None:
        """Hands out nothing any more, soon. From any thread."""
        self._wake.send(b"-")

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._pause_s()):
                if key.fileobj is self._rank:
                    self._hear_rank()
                elif key.fileobj is self._woken:
                    self._woken.recv(64)
                    self._clear()
                elif key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._readers:
                    self._hear(key.fileobj)
            self._look_after_readers()
            if time.monotonic() >= self._until:
                self._clear()

    def _pause_s(self) -> float | None:
        """Until somebody has to be looked after, or all is closed."""
        if any(reader.waits for reader in self._readers.values()):
            return _RETRY_S
        until = min([self._until, *(reader.until for reader in self._readers.values())])
        return None if until == math.inf else max(0.0, until - time.monotonic())

    # -- the rank

    def _hear_rank(self) -> None:
        try:
            packet, fds = receive_fds(self._rank, MOST_AT_ONCE, _BEGIN.size)
            if not packet:  # it has ended
                self._selector.unregister(self._rank)
                self._until = time.monotonic() + _DEAD_S
                return
            self._fds += fds
            if packet != b"+":
                self._begin(packet)
            if self._place is not None and len(self._fds) == self._coming > 0:
                self._open(self._place)
            answer = b"+"
        except OSError as exc:
            self._clear()
            answer = b"-" + explain(exc)[0].encode()[: _WHY_NBYTES - 1]
        with suppress(OSError):
            self._rank.send(answer, socket.MSG_NOSIGNAL)

    def _begin(self, packet: bytes) -> None:
        _, place, count = _BEGIN.unpack(packet)
        self._clear()
        self._place, self._coming = DescriptorPlace.decode(place), count
        _make_room()

    def _open(self, place: DescriptorPlace) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(place.address)
        self._listener.listen(1024)
        self._listen(True)

    def _clear(self) -> None:
        for connection in list(self._readers):
            self._leave(connection)
        self._listen(False)
        if self._listener is not None:
            self._listener.close()
        self._listener = self._place = None
        self._until = math.inf
        close_all(self._fds)

    def _listen(self, wanted: bool) -> None:
        if self._listener is None or wanted == self._listening:
            return
        self._listening = wanted
        if wanted:
            self._selector.register(self._listener, selectors.EVENT_READ)
        else:
            self._selector.unregister(self._listener)

    # -- readers

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor is left: others may leave
            time.sleep(_RETRY_S)
            return
        if owner_of(connection) != os.geteuid():
            connection.close()
            return
        connection.setblocking(False)
        self._readers[connection] = _Reader()
        self._selector.register(connection, selectors.EVENT_READ)
        self._listen(len(self._readers) < _MOST_READERS)

    def _hear(self, connection: socket.socket) -> None:
        reader = self._readers[connection]
        try:
            packet = connection.recv(REQUEST.size + 1)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        asked = self._asked(packet)
        if asked is None or reader.waits is not None:
            self._leave(connection)
            return
        reader.waits = asked
        self._answer(connection, reader)

    def _asked(self, packet: bytes) -> tuple[int, int] | None:
        """None where it is no request for descriptors that there are."""
        if self._place is None or len(packet) != REQUEST.size:
            return None
        magic, secret, first, count = REQUEST.unpack(packet)
        if magic != MAGIC or not hmac.compare_digest(secret, self._place.secret):
            return None
        if not 0 < count <= MOST_AT_ONCE or first + count > len(self._fds):
            return None
        return first, count

    def _answer(self, connection: socket.socket, reader: _Reader) -> None:
        if reader.waits is None:
            return
        first, count = reader.waits
        # one that takes no answer, or as many as may be on their way, are, is tried again
        with suppress(OSError):
            send_fds(connection, self._fds[first : first + count])
            reader.waits = None

    def _look_after_readers(self) -> None:
        now = time.monotonic()
        for connection, reader in list(self._readers.items()):
            self._answer(connection, reader)
            if now >= reader.until:
                self._leave(connection)

    def _leave(self, connection: socket.socket) -> None:
        del self._readers[connection]
        self._selector.unregister(connection)
        connection.close()
        self._listen(True)


def _make_room() -> None:
    """As many descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
