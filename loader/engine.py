"""What the loader needs of a transfer engine, whichever it is, and what all of them share.

`loader.mooncake_engine` is the real one; `loader.in_process` serves tests and single-process uses; both pass `tests/contract`.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

from loader.errors import EngineFailed
from loader.plan import ReadOp
from registry.manifest import Region


class Engine(Protocol):
    """Registers local memory so that peers can read it, and reads theirs. Calls may come from several threads."""

    @property
    def session_id(self) -> str:
        """Where peers find this engine."""

    @property
    def protocol(self) -> str: ...

    @property
    def fabric(self) -> str:
        """A label of who can reach this engine; equal labels can."""

    def register(self, region: Region) -> None:
        """Opens the region to peers. A region inside one that is registered already shares it. EngineFailed if refused."""

    def unregister(self, region: Region) -> None:
        """Takes back one `register` of the same region."""

    def lend(self, region: Region) -> None:
        """Lets `start` write into the region; peers see it only where the protocol cannot do without. Else as `register`."""

    def take_back(self, region: Region) -> None:
        """Ends one `lend` of the same region. Reads into it must have ended."""

    def connect(self, peer: str) -> None:
        """Makes the first contact with a peer, see `peer_of`; at once where that has been made. ReadFailed if nobody answers there.

        Lasts as long as the peer takes, a minute where its process is stopped: call it in a thread that may hang.
        """

    def start(self, peer: str, op: ReadOp) -> int:
        """Begins a read from a connected peer and returns, at once, a number to ask `done` with. ReadFailed if not connected.

        The destination must lie in a lent region, else EngineFailed.
        """

    def done(self, number: int) -> bool:
        """Whether the read has brought all its bytes; ReadFailed if it never will.

        After either answer the number is void, and asking again a KeyError.
        """

    def abandon(self, peer: str) -> bool:
        """Ends every read from that peer that is not over, and a `connect` that hangs. Never waits long.

        True: none of them writes any more. False: some still may; ask again. Where there is nothing to end, the contact stays.
        """

    def close(self) -> None:
        """Ends the engine with all its registrations; any number of times."""


def peer_of(session_id: str, incarnation: str) -> str:
    """Whom to connect to: a process, as of one registration. What an engine learns of a peer, such as where its memory is mapped,
    does not hold for what the same process registers later. A session id alone will do where nothing is registered later."""
    return f"{session_id}@{incarnation}"


def session_of(peer: str) -> str:
    return peer.partition("@")[0]


def offer(engine: Engine, undo: ExitStack, *regions: Region) -> None:
    """Registers them until `undo` is closed."""
    for region in regions:
        engine.register(region)
        undo.callback(engine.unregister, region)


def lend(engine: Engine, undo: ExitStack, *regions: Region) -> None:
    """Lends them until `undo` is closed."""
    for region in regions:
        engine.lend(region)
        undo.callback(engine.take_back, region)


def read(engine: Engine, peer: str, op: ReadOp) -> None:
    """One small read, contact to end. Lasts until the peer answers, or until another thread abandons it."""
    engine.connect(peer)
    number = engine.start(peer, op)
    nap_s = 20e-6
    while not engine.done(number):
        time.sleep(nap_s)
        nap_s = min(1.5 * nap_s, 5e-3)


class RegionBook:
    """Which local memory is registered, or lent, and how often: engines refuse to register a byte twice, but publishers, or
    loaders, in one process may share tensors. Regions never overlap."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._starts: list[int] = []  # sorted
        self._regions: dict[int, Region] = {}  # by start: as registered with the engine
        self._uses: dict[int, int] = {}  # by start: how many callers have it

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions.values())

    def __len__(self) -> int:
        return len(self._regions)

    def clear(self) -> None:
        self._starts, self._regions, self._uses = [], {}, {}

    def holder_of(self, addr: int, nbytes: int) -> Region | None:
        place = bisect.bisect_right(self._starts, addr) - 1
        region = self._regions[self._starts[place]] if place >= 0 else None
        return region if region is not None and addr + nbytes <= region.end else None

    def begin(self, region: Region) -> bool:
        """True if the engine has to register it; EngineFailed if it overlaps a registered one without lying inside."""
        holder = self.holder_of(region.addr, region.nbytes)
        if holder is not None:
            self._uses[holder.addr] += 1
            return False
        place = bisect.bisect_left(self._starts, region.addr)
        before = self._regions[self._starts[place - 1]].end if place else 0
        after = self._starts[place] if place < len(self._starts) else region.end
        if before > region.addr or after < region.end:
            raise EngineFailed(f"{region.nbytes} bytes at {region.addr:#x} overlap a region that is registered already")
        self._starts.insert(place, region.addr)
        self._regions[region.addr], self._uses[region.addr] = region, 1
        return True

    def end(self, region: Region) -> Region | None:
        """The region that the engine has to unregister, if any."""
        holder = self.holder_of(region.addr, region.nbytes)
        if holder is None:
            return None
        self._uses[holder.addr] -= 1
        if self._uses[holder.addr]:
            return None
        del self._starts[bisect.bisect_left(self._starts, holder.addr)]
        del self._regions[holder.addr], self._uses[holder.addr]
        return holder

    def check_destination(self, op: ReadOp) -> None:
        if self.holder_of(op.dst_addr, op.nbytes) is None:
            raise EngineFailed(f"{op.nbytes} bytes at {op.dst_addr:#x} are not lent to the engine: lend the destination first")
