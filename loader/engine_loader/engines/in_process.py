"""An engine that reads the memory of others of its class in the same process, with the same
refusals as the real one.

For tests and single-process uses. Its faults have names: `pause` and `resume` a peer, `delay_s` for
every read, and reads that cannot be ended, as over rdma.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import ClassVar

from engine_loader.engines.base import Engine, session_of
from engine_loader.engines.lingering import Lingering
from engine_loader.engines.region_book import RegionBook, Regions
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_registry.schema.location import Location
from engine_registry.schema.manifest import Export, Region

_LOOK_S = 0.005  # how often a contact that hangs looks whether it is wanted


@dataclass
class _Read:
    peer: str
    op: ReadOp
    due: float
    over: bool = False
    failed: bool = False
    given_up: bool = False


class InProcessEngine(Engine):
    """An engine for tests, which reads from other such engines of the same process.

    A read is carried out when `done` asks for it, or when its peer is resumed. Until then it is in
    flight.
    """

    _peers: ClassVar[weakref.WeakValueDictionary[str, InProcessEngine]] = (
        weakref.WeakValueDictionary()
    )
    _numbers = itertools.count(1)

    def __init__(
        self,
        fabric: str = "",
        delay_s: float = 0.0,
        can_end_reads: bool = True,
        location: str = "",
    ) -> None:
        """Starts the engine.

        Args:
            fabric: A label of the network. Engines with equal labels reach each other.
            delay_s: Seconds that a read of this engine's memory takes at least.
            can_end_reads: Whether this engine can end its reads. Otherwise reads that are abandoned
                go on until their peer answers or ends.
            location: Where this engine stands: `ZONE[/RACK[/NODE]]`.

        Raises:
            InvalidField: The location is not valid.
        """
        self._location = Location.parse(location)
        self._fabric = fabric
        self._delay_s = delay_s
        self._served = RegionBook()
        self._lent = RegionBook()
        self._can_end_reads = can_end_reads
        self._lingering = Lingering()
        self._session_id = f"in-process:{next(self._numbers)}"
        self._closed = False
        self._running = threading.Event()  # not paused
        self._running.set()
        self._lock = threading.Lock()  # of what follows
        self._connected: set[str] = set()
        self._abandoned: Counter[str] = Counter()  # how often each peer was
        self._reads: dict[int, _Read] = {}
        self._peers[self._session_id] = self

    @property
    def session_id(self) -> str:
        return self._session_id

    @property
    def protocol(self) -> str:
        return "in_process"

    @property
    def fabric(self) -> str:
        return self._fabric

    @property
    def location(self) -> Location:
        return self._location

    def register(self, region: Region) -> Regions:
        with self._served.lock:
            self._check_open()
            self._lingering.check(region.addr, region.nbytes)
            return self._served.begin(region).parts

    def unregister(self, region: Region) -> None:
        with self._served.lock:
            self._served.end(region)

    def lend(self, region: Region) -> Regions:
        with self._lent.lock:
            self._check_open()
            self._lingering.check(region.addr, region.nbytes)
            return self._lent.begin(region).parts

    def take_back(self, region: Region) -> None:
        self._lingering.check(region.addr, region.nbytes)
        with self._lent.lock:
            self._lent.end(region)

    def connect(self, peer: str, exports: Sequence[Export] = ()) -> None:
        self._check_open()
        before = self._abandoned[peer]
        while peer not in self._connected:
            running = self._engine_of(peer)._running.wait(_LOOK_S)
            with self._lock:
                if self._closed or self._abandoned[peer] != before:
                    raise ReadFailed(
                        f"cannot read from {session_of(peer)}: the contact was broken off",
                        session_id=session_of(peer),
                    )
                if running:
                    self._connected.add(peer)

    def start(self, peer: str, op: ReadOp) -> int:
        self._check_open()
        with self._lent.lock:
            self._lent.check_destination(op)
        self._lingering.check(op.dst_addr, op.nbytes)
        engine = self._engine_of(peer)
        with self._lock:
            if peer not in self._connected:
                raise ReadFailed(
                    f"cannot read from {session_of(peer)}: it is not connected",
                    session_id=session_of(peer),
                )
            number = next(self._numbers)
            self._reads[number] = _Read(peer, op, time.monotonic() + engine._delay_s)
        return number

    def done(self, number: int) -> bool:
        with self._lock:
            read = self._reads[number]
            self._carry_out(read)
            if not read.over:
                return False
            del self._reads[number]
        if read.failed or read.given_up:
            session_id = session_of(read.peer)
            raise ReadFailed(
                f"cannot read from {session_id}: it has ended or was abandoned, or "
                f"{read.op.src_addr:#x} is not registered",
                session_id=session_id,
            )
        return True

    def _carry_out(self, read: _Read) -> None:
        if read.over:
            return
        peer = self._peers.get(session_of(read.peer))
        if peer is None or peer._closed:
            read.over = read.failed = True
            return
        if not peer._running.is_set() or time.monotonic() < read.due:
            return
        op = read.op
        with peer._served.lock:
            read.over, read.failed = True, peer._served.holder_of(op.src_addr, op.nbytes) is None
            if not read.failed:
                ctypes.memmove(op.dst_addr, op.src_addr, op.nbytes)

    def abandon(self, peer: str) -> None:
        with self._lock:
            self._abandoned[peer] += 1
            given_up = [
                read
                for read in self._reads.values()
                if read.peer == peer and not (read.over or read.given_up)
            ]
            for read in given_up:
                read.given_up = True
                read.over = self._can_end_reads
                self._connected.discard(peer)
        for read in given_up:
            self._lingering.add(peer, read.op, partial(self._has_ended, read))

    def settled(self, peer: str) -> bool:
        return self._lingering.settled(peer)

    def _has_ended(self, read: _Read) -> bool:
        with self._lock:
            self._carry_out(read)
            return read.over

    def pause(self) -> None:
        """From now on this engine answers nobody, like a process that is stopped."""
        self._running.clear()

    def resume(self) -> None:
        """Answers all that was asked meanwhile and has not ended, whether or not anybody waits."""
        self._running.set()
        for reader in list(self._peers.values()):
            with reader._lock:
                for read in reader._reads.values():
                    if session_of(read.peer) == self._session_id:
                        reader._carry_out(read)

    def close(self) -> None:
        with self._served.lock, self._lent.lock:
            self._closed = True
            self._peers.pop(self._session_id, None)
            self._served.clear()
            self._lent.clear()
            self._lingering.clear()

    def _engine_of(self, peer: str) -> InProcessEngine:
        session_id = session_of(peer)
        engine = self._peers.get(session_id)
        if engine is None or engine._closed:
            raise ReadFailed(
                f"cannot read from {session_id}: no such engine", session_id=session_id
            )
        return engine

    def _check_open(self) -> None:
        if self._closed:
            raise EngineFailed("the transfer engine is closed")

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
