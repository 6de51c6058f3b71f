"""Over TCP connections of our own, and within a host without the network.

A source answers questions for pieces of registered memory; the kernel copies from there to the
socket, and at the reader from the socket to its place. Where the kernel lets a reader read the
source's memory, they need no connection after the first contact. Mooncake's tcp has neither tokens
nor encryption; this has both: see `credentials`.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import weakref
from collections.abc import Sequence

import numpy as np

from engine_loader.engines.base import ClosableEngine, session_of
from engine_loader.engines.dial import failed
from engine_loader.engines.lingering import Lingering
from engine_loader.engines.machine import check_host
from engine_loader.engines.region_book import RegionBook, Regions
from engine_loader.engines.sockets import memory
from engine_loader.engines.sockets.credentials import SocketCredentials
from engine_loader.engines.sockets.neighbour import let_processes_of_this_user_read, place_of
from engine_loader.engines.sockets.offers import Held, Offers
from engine_loader.engines.sockets.reader import PeerReader
from engine_loader.engines.sockets.reads import Read
from engine_loader.engines.sockets.server import Server
from engine_loader.errors import EngineFailed, EngineUnavailable
from engine_loader.planning.plan import ReadOp
from engine_registry.schema.location import Location
from engine_registry.schema.manifest import Export, Region

_MOST_READERS = 256  # each has a thread and a connection
_SAME_HOST = "ENGINES_SOCKET_SAME_HOST"


def _by_environment() -> bool:
    value = os.environ.get(_SAME_HOST, "")
    if value not in ("", "0", "1"):
        raise EngineUnavailable(f"{_SAME_HOST} is {value!r}", "say 0 or 1")
    return value != "0"


class SocketEngine(ClosableEngine):
    """Reads memory of hosts over TCP, with a token and TLS where it is given them.

    Readers of the same user and host read without the network.
    """

    def __init__(
        self,
        host: str,
        fabric: str = "",
        *,
        location: str = "",
        credentials: SocketCredentials | None = None,
        same_host: bool | None = None,
    ) -> None:
        """Starts the engine.

        Args:
            host: The address of this machine that peers connect to.
            fabric: A label of the network. Engines with equal labels reach each other.
            location: Where this machine stands, as for MooncakeEngine.
            credentials: Who may read, and how connections are encrypted. None: as the environment
                says, see `SocketCredentials.from_environment`.
            same_host: Whether processes of the same user and host read each other's memory without
                the network. None: unless ENGINES_SOCKET_SAME_HOST is 0.

        Raises:
            EngineUnavailable: Nothing can listen at that address, or the credentials cannot be
                used.
            InvalidField: The location is not valid.
        """
        check_host(host)
        self._fabric = fabric
        self._location = Location.parse(location)
        self._same_host = same_host = _by_environment() if same_host is None else same_host
        self._credentials = credentials or SocketCredentials.from_environment()
        self._credentials.check()
        self._offers = Offers()
        if same_host:
            let_processes_of_this_user_read()
        place = place_of(self._offers) if same_host else None
        self._served = RegionBook()
        self._lent = RegionBook()
        self._places: Held | None = None  # the same, until it changes
        self._lingering = Lingering()
        self._came = threading.Event()
        self._lock = threading.Lock()  # of what follows
        self._readers: dict[str, PeerReader] = {}  # by peer, the oldest first
        self._reads: dict[int, Read] = {}
        self._numbers = itertools.count(1)
        self._closed = False
        self._owner_pid = os.getpid()
        self._server = Server(host, self._offers, self._credentials, place)
        _OPEN.add(self)
        self._mark_open()

    @property
    def session_id(self) -> str:
        return self._server.session_id

    @property
    def protocol(self) -> str:
        return "socket"

    @property
    def fabric(self) -> str:
        return self._fabric

    @property
    def location(self) -> Location:
        return self._location

    @property
    def scatters(self) -> bool:
        return True

    # -- memory

    def register(self, region: Region) -> Regions:
        with self._served.lock:
            self._check(region)
            parts, new = self._served.begin(region)
            for one in new:
                self._offers.add(one)
            return parts

    def unregister(self, region: Region) -> None:
        with self._served.lock:
            unused = self._served.end(region)
            for one in unused:
                self._offers.remove(one)
        for one in unused:
            self._server.wait_until_unused(one)

    def lend(self, region: Region) -> Regions:
        with self._lent.lock:
            self._check(region)
            self._places = None
            return self._lent.begin(region).parts

    def take_back(self, region: Region) -> None:
        self._lingering.check(region.addr, region.nbytes)
        with self._lent.lock:
            self._places = None
            self._lent.end(region)

    def _check(self, region: Region) -> None:
        self._check_open()
        self._lingering.check(region.addr, region.nbytes)
        if not memory.is_ours(region.addr, region.nbytes):
            raise EngineFailed(
                f"{region.nbytes} bytes at {region.addr:#x} are not memory of this host",
                "use cuda_ipc within a host, rdma or tcp between hosts for memory of GPUs",
            )

    # -- reading

    def connect(self, peer: str, exports: Sequence[Export] = ()) -> None:
        with self._lock:
            self._check_open()
            reader = self._readers.get(peer)
            if reader is None or reader.over:
                reader = self._readers[peer] = PeerReader(
                    peer, self._credentials, self._same_host, self._came.set
                )
        reader.connect()
        self._forget_idle_readers()

    def start(self, peer: str, op: ReadOp) -> int:
        self._check_open()
        read = Read(peer, op)
        self._check_destination(read)
        self._lingering.check(op.dst_addr, op.dst_nbytes)
        with self._lock:
            reader = self._readers.get(peer)
        if reader is None:
            raise failed(session_of(peer), "it is not connected")
        reader.start(read)
        with self._lock:
            number = next(self._numbers)
            self._reads[number] = read
        return number

    def _check_destination(self, read: Read) -> None:
        with self._lent.lock:
            if not read.op.pieces:
                self._lent.check_destination(read.op)
                return
            if self._places is None:
                self._places = Held.of(np.array([*self._lent], np.uint64).reshape(-1, 2))
            lent = self._places.holds(read.local)
        if not lent.all():
            raise EngineFailed(
                f"{len(lent) - lent.sum()} of {len(lent)} pieces are not lent to the engine",
                "lend the destination first",
            )

    def done(self, number: int) -> bool:
        read = self._reads[number]
        if not read.over:
            return False
        with self._lock:
            del self._reads[number]
        if read.failure is not None:
            raise read.failure
        return True

    def wait(self, seconds: float) -> None:
        if self._came.wait(seconds):
            self._came.clear()

    def abandon(self, peer: str) -> None:
        with self._lock:
            reader = self._readers.get(peer)
            left = [read for read in self._reads.values() if read.peer == peer and not read.over]
            if reader is None or (reader.met and not left):
                return
            del self._readers[peer]
        self._give_up(reader, left)

    def _give_up(self, reader: PeerReader, reads: Sequence[Read]) -> None:
        for read in reads:
            self._lingering.add(read.peer, read.op, lambda read=read: read.over)  # type: ignore[misc]
        reader.give_up()

    def settled(self, peer: str) -> bool:
        return self._lingering.settled(peer)

    def reads_within_host(self, peer: str) -> bool:
        with self._lock:
            reader = self._readers.get(peer)
        return reader is not None and reader.near

    def _forget_idle_readers(self) -> None:
        """The ones that have been there longest, if there are too many."""
        with self._lock:
            in_use = {read.peer for read in self._reads.values()}
            idle = [one for one in self._readers.values() if one.met and one.peer not in in_use]
            surplus = idle[: max(0, len(self._readers) - _MOST_READERS)]
            for reader in surplus:
                del self._readers[reader.peer]
        for reader in surplus:
            self._give_up(reader, ())

    def _stop_reading(self) -> None:
        with self._lock:
            self._closed = True
            readers, self._readers = list(self._readers.values()), {}
        for reader in readers:
            self._give_up(reader, ())

    def close(self) -> None:
        if not self._is_ours:  # a forked child's copy: its threads are in the parent only
            return
        self._stop_reading()
        with self._served.lock, self._lent.lock:
            self._offers.end()
            self._served.clear()
            self._lent.clear()
        self._server.close()
        self._lingering.clear()
        self._mark_closed()

    @property
    def _is_ours(self) -> bool:
        return self._owner_pid == os.getpid()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineFailed("the transfer engine is closed")
        if not self._is_ours:
            raise EngineFailed("the transfer engine is that of the process that was forked")

    def _label(self) -> str:
        return f"at {self.session_id}"


_OPEN: weakref.WeakSet[SocketEngine] = weakref.WeakSet()


@atexit.register
def _stop_all_reading() -> None:
    for engine in list(_OPEN):
        if engine._is_ours:
            engine._stop_reading()
