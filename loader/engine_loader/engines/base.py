"""What the loader needs of a transfer engine, whichever it is.

`engines.mooncake.engine` is the real one; `engines.in_process` serves tests and single-process
uses; both pass `tests/contract`.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import torch

from engine_loader.engines.region_book import Regions
from engine_loader.engines.tally import Tally
from engine_loader.errors import EngineFailed, TensorsUnusable, listed
from engine_loader.planning.plan import ReadOp
from engine_loader.tensors.cuda import can_be_opened_by_others
from engine_registry.lifetime import Closable
from engine_registry.registration.descriptors import Descriptors
from engine_registry.schema.location import UNKNOWN, Location
from engine_registry.schema.manifest import Export, Manifest, Region
from engine_registry.schema.record import WITHIN_HOST


class Engine(Protocol):
    """Registers local memory so that peers can read it, and reads theirs.

    Calls may come from several threads.
    """

    @property
    def session_id(self) -> str:
        """Where peers find this engine."""

    @property
    def protocol(self) -> str:
        """How this engine reads: tcp, socket, rdma, cuda_ipc, nvlink_intra, or another
        name."""

    @property
    def fabric(self) -> str:
        """A label of the network. Engines with equal labels reach each other."""

    @property
    def rails(self) -> Mapping[str, str]:
        """The network cards that this engine uses: the subnet of each, or empty, by its name.

        It decides which of equal sources is nearer. Empty where the engine has no say in it.
        """
        return {}

    @property
    def location(self) -> Location:
        """Where this machine stands, as far as it is known. It decides which sources are near."""
        return UNKNOWN

    @property
    def strides(self) -> bool:
        """Whether a read may be of runs at equal distances: see `ReadOp.lines`."""
        return False

    @property
    def scatters(self) -> bool:
        """Whether a read may be of many short runs: see `ReadOp.pieces`."""
        return False

    @property
    def outlives_sources(self) -> bool:
        """Whether it can read what a source had offered after the source's process has ended."""
        return False

    @property
    def reads_to_host(self) -> bool:
        """Whether it reads into memory of the host, whatever memory it reads: then what a processor
        looks at goes there.
        """
        return False

    @property
    def in_order(self) -> bool:
        """Whether reads from one peer end about in the order in which they were begun, so that it
        is enough to ask for the first.
        """
        return False

    def register(self, region: Region) -> Regions:
        """Opens the region to peers.

        Args:
            region: Memory of this process: an address and a length in bytes.

        Returns:
            The parts that make it up, in their order. A part that lies in a region that is
            registered already shares that region. A read stays inside one part.

        Raises:
            EngineFailed: The engine refuses.
        """

    def unregister(self, region: Region) -> None:
        """Takes back one `register` of the same region."""

    def exports(self, regions: Sequence[Region]) -> tuple[Export, ...]:
        """What peers must know of registered memory besides its address: for `connect`.

        Nothing where an address is enough.

        Args:
            regions: Regions, or parts of them.

        Returns:
            The allocations that they lie in, each once.

        Raises:
            EngineFailed: The engine refuses.
        """
        return ()

    def descriptors(self, exports: Sequence[Export]) -> Descriptors | None:
        """File descriptors that the keeper of the rank has to hand out: for `connect` of peers.

        Args:
            exports: What `exports` has returned. The memory is registered still.

        Returns:
            The descriptors, which the caller closes or gives away. None where peers need none.

        Raises:
            EngineFailed: The process can have no more descriptors, or the engine refuses.
        """
        return None

    def memory_beside(
        self, region: Region, device: torch.device, nbytes: int
    ) -> torch.Tensor | None:
        """Memory for what a publication adds to its weights, such as the header.

        Args:
            region: Memory of the weights.
            device: Where the new memory shall be.
            nbytes: How many bytes.

        Returns:
            Bytes that peers reach as they reach the region. None where any of the device's will do.

        Raises:
            EngineFailed: There is not so much memory.
        """
        return None

    def can_share(self, tensor: torch.Tensor) -> bool:
        """Whether peers can reach the memory of a tensor, which has some."""
        if self.protocol not in WITHIN_HOST:
            return True
        return tensor.is_cuda and can_be_opened_by_others(tensor.untyped_storage().data_ptr())

    def lend(self, region: Region) -> Regions:
        """Lets `start` write into the region.

        Peers can reach it only where the protocol cannot do without.

        Args:
            region: As for `register`.

        Returns:
            As `register`.

        Raises:
            EngineFailed: The engine refuses.
        """

    def take_back(self, region: Region) -> None:
        """Ends one `lend` of the same region. Reads into it must have ended.

        Raises:
            EngineFailed: A read that was abandoned may still write there. The region stays lent
                then. Until that read has ended, memory that it may write to is neither lent nor
                registered nor read into.
        """

    @property
    def tallies(self) -> str:
        """The algorithm of digests whose sums it computes as it reads; empty where it does not."""
        return ""

    def tally(self, peer: str, pieces: Sequence[Region], device: torch.device) -> Tally | None:
        """Sums up the bytes of pieces as they are read from the peer from now on, block by block.

        Args:
            peer: The name of the peer.
            pieces: Regions of the peer's memory that do not overlap, of whole words.
            device: Where they are read to.

        Returns:
            The sums, until they are closed. None where the engine cannot, or does already.
        """
        return None

    def connect(self, peer: str, exports: Sequence[Export] = ()) -> None:
        """Makes the first contact with a peer. Returns at once if it has been made.

        It lasts as long as the peer takes, up to a minute, or until `abandon`. Call it in a thread
        that may hang. Nothing else of the engine waits for it meanwhile.

        Args:
            peer: The name of the peer; see `peer_of`.
            exports: What the peer says of its memory.

        Raises:
            ReadFailed: No peer answers there.
        """

    def is_connected(self, peer: str) -> bool:
        """Whether `connect` would return at once, if the engine knows."""
        return False

    def reads_within_host(self, peer: str) -> bool:
        """Whether a connected peer is read without the network."""
        return self.protocol in WITHIN_HOST

    def start(self, peer: str, op: ReadOp) -> int:
        """Begins a read from a connected peer, and returns at once.

        Args:
            peer: The name of the peer.
            op: What to read, and where to. The destination lies in a lent region.

        Returns:
            The number of the read, for `done`.

        Raises:
            ReadFailed: The peer is not connected.
            EngineFailed: The destination is not lent.
        """

    def done(self, number: int) -> bool:
        """Says whether a read has brought all its bytes.

        A read that was abandoned is not done as long as it may still write. Then it has failed.

        Args:
            number: The number of the read. It is void once the read is done or has failed.

        Returns:
            True once all bytes have come.

        Raises:
            ReadFailed: The read will never bring all its bytes.
            KeyError: The number is void.
        """

    def wait(self, seconds: float) -> None:
        """Waits so long, or until a read may be over, if the engine notices."""
        time.sleep(seconds)

    def abandon(self, peer: str) -> None:
        """Gives up every read from that peer that is not over, and a `connect` that hangs. Never
        waits for the peer, and raises nothing.

        Reads that the engine can end have ended when this returns, and write nothing any more. It
        can end all of them if it has an engine for each peer, as over tcp. Over rdma they go on
        until the peer has answered or is known to be gone: see `settled`. Where there is nothing to
        give up, the contact stays.
        """

    def settled(self, peer: str) -> bool:
        """Whether no read from that peer that was abandoned may write any more. Never waits."""

    def close(self) -> None:
        """Ends the engine with all its registrations; any number of times."""


class ClosableEngine(Closable, Engine):
    """One that warns when it is never closed."""


def peer_of(session_id: str, incarnation: str) -> str:
    """The name of a peer: a process, as of one registration. What an engine learns of a peer, such
    as where its memory is mapped, does not hold for what the same process registers later. A
    session id alone will do where nothing is registered later.
    """
    return f"{session_id}@{incarnation}"


def session_of(peer: str) -> str:
    return peer.partition("@")[0]


def offer(engine: Engine, undo: ExitStack, *regions: Region) -> Regions:
    """Registers them until `undo` is closed; the parts of all of them."""
    parts: list[Region] = []
    for region in regions:
        parts += engine.register(region)
        undo.callback(engine.unregister, region)
    return tuple(parts)


def lend(engine: Engine, undo: ExitStack, *regions: Region, owner: object) -> Regions:
    """Lends them until `undo` is closed; the parts of all of them.

    `owner` keeps their memory. Where reads that cannot be ended may still write to it, that is
    EngineFailed when `undo` is closed, and the owner is kept for as long as the process lives:
    memory that was freed would belong to another object by then.
    """
    parts: list[Region] = []
    lent: list[Region] = []
    undo.callback(_take_back, engine, lent, owner)
    for region in regions:
        parts += engine.lend(region)
        lent.append(region)
    return tuple(parts)


_STILL_WRITTEN: list[object] = []


def _take_back(engine: Engine, lent: list[Region], owner: object) -> None:
    """All of them, though one cannot be had back."""
    failure: EngineFailed | None = None
    while lent:
        try:
            engine.take_back(lent.pop())
        except EngineFailed as exc:
            failure = exc
    if failure is not None:
        _STILL_WRITTEN.append(owner)
        raise failure


def with_regions(manifest: Manifest, parts: Regions) -> Manifest:
    """The manifest with these parts as its regions; TensorsUnusable where one ends inside a tensor.

    That takes tensors that share a part of their bytes with others that are registered already.
    """
    if parts == manifest.regions:
        return manifest
    parts = tuple(sorted(parts, key=lambda part: part.addr))
    starts = [part.addr for part in parts]
    cut = [
        entry.name
        for entry in manifest.tensors
        if entry.nbytes
        and entry.addr + entry.nbytes > parts[bisect.bisect_right(starts, entry.addr) - 1].end
    ]
    if cut:
        raise TensorsUnusable(
            f"{len(cut)} tensors lie partly in memory that this process offers or fills already, "
            f"as parts of other tensors: {listed(cut)}",
            "publish or load tensors that share memory together",
            problems=cut,
        )
    return replace(manifest, regions=parts)


def read(engine: Engine, peer: str, op: ReadOp) -> None:
    """One small read, contact to end.

    Lasts until the peer answers, or until another thread abandons it.
    """
    engine.connect(peer)
    number = engine.start(peer, op)
    nap_s = 20e-6
    while not engine.done(number):
        time.sleep(nap_s)
        nap_s = min(1.5 * nap_s, 5e-3)
