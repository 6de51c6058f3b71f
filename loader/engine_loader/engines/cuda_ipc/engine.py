"""Between GPUs of one host, and from its memory to them: the memory of sources is mapped into this
process, and one kernel reads it.

A source's manifest has handles of its allocations, or says where its keeper hands out descriptors
of them: see `memory`. A reader opens them at the first contact, and keeps them. Reads that are
started become a table, and the table one launch, once there is enough for one or somebody asks for
a read. Nothing of the source's process takes part in that: it may be stopped, hold the GIL, or have
ended. What is mapped is let go soon after the source has ended, or has taken memory back: see
`sources`.
"""

from __future__ import annotations

import atexit
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch

from engine_loader.engines.base import ClosableEngine, session_of
from engine_loader.engines.cuda_ipc import link
from engine_loader.engines.cuda_ipc.gpus import CudaGpus, Gpus
from engine_loader.engines.cuda_ipc.launches import Launches
from engine_loader.engines.cuda_ipc.sources import MappedSource, OwnSource, Sources
from engine_loader.engines.cuda_ipc.tallies import Sums, Tallies
from engine_loader.engines.dial import dial
from engine_loader.engines.machine import this_host
from engine_loader.engines.region_book import RegionBook, Regions
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_loader.sharing import offers
from engine_loader.sharing.pieces import is_by_descriptors
from engine_loader.tensors.arena import bytes_in_arena
from engine_loader.tensors.modes import plain_torch
from engine_registry.registration.descriptors import Descriptors
from engine_registry.schema.location import Location
from engine_registry.schema.manifest import Export, Region


class CudaIpcEngine(ClosableEngine):
    """Reads memory of GPUs and arenas of this host, as sources publish them, with one kernel.

    Every process of this host that can read etcd may read memory that is offered, and write to it.
    """

    _here: ClassVar[weakref.WeakValueDictionary[str, CudaIpcEngine]] = weakref.WeakValueDictionary()

    def __init__(
        self,
        host: str = "127.0.0.1",
        fabric: str = "",
        *,
        location: str = "",
        gpus: Gpus | None = None,
    ) -> None:
        """Starts the engine.

        Args:
            host: The address of this machine at which readers see whether this process is there.
            fabric: A label of the network. Engines with equal labels reach each other. Empty: the
                one of this host.
            location: Where this machine stands, as for MooncakeEngine.
            gpus: What it uses of CUDA. For tests.

        Raises:
            EngineUnavailable: There is no GPU, or neither kernels nor Triton, or nothing can listen
                at that address.
            InvalidField: The location is not valid.
        """
        self._fabric = fabric or this_host()
        self._location = Location.parse(location)
        self._gpus: Gpus = gpus or CudaGpus()
        self._listener = link.Listener(host)
        self._served = RegionBook()
        self._lent = RegionBook()
        self._gpu_of: dict[int, int | None] = {}  # by where a lent region begins
        self._sources = Sources()
        self._tallies = Tallies()
        self._launches = Launches(self._gpus, self._tallies)
        self._abandoned: Counter[str] = Counter()  # how often each peer was
        self._closed = False
        self._here[self.session_id] = self
        _OPEN.add(self)
        self._mark_open()

    @property
    def session_id(self) -> str:
        return self._listener.session_id

    @property
    def protocol(self) -> str:
        return "cuda_ipc"

    @property
    def fabric(self) -> str:
        return self._fabric

    @property
    def location(self) -> Location:
        return self._location

    @property
    def strides(self) -> bool:
        return True

    @property
    def outlives_sources(self) -> bool:
        return True

    @property
    def reads_to_host(self) -> bool:
        return True

    @property
    def in_order(self) -> bool:
        return True

    # -- memory

    def register(self, region: Region) -> Regions:
        with self._served.lock:
            self._check_open()
            parts, new = self._served.begin(region)
            try:
                for one in new:
                    offers.check_whole(self._gpus, one)
            except BaseException:
                self._served.end(region)
                raise
            return parts

    def unregister(self, region: Region) -> None:
        with self._served.lock:
            ended = self._served.end(region)
        if ended:
            self._listener.cut()  # readers let go of what they have mapped

    def exports(self, regions: Sequence[Region]) -> tuple[Export, ...]:
        return offers.describe(self._gpus, regions)

    def descriptors(self, exports: Sequence[Export]) -> Descriptors | None:
        return offers.descriptors_of(self._gpus, exports)

    @plain_torch()
    def memory_beside(
        self, region: Region, device: torch.device, nbytes: int
    ) -> torch.Tensor | None:
        if self._gpus.number_of(device) is not None:
            if not offers.are_by_descriptors(self._gpus, region):
                return None
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
            if offers.are_by_descriptors(self._gpus, Region(memory.data_ptr(), nbytes)):
                return memory
        return bytes_in_arena(device, nbytes)  # what has handles cannot be opened after our end

    def can_share(self, tensor: torch.Tensor) -> bool:
        return self._gpus.can_be_shared(tensor.untyped_storage().data_ptr())

    def lend(self, region: Region) -> Regions:
        with self._lent.lock:
            self._check_open()
            parts, new = self._lent.begin(region)
            for one in new:
                self._gpu_of[one.addr] = self._gpus.gpu_of(one.addr)
            return parts

    def take_back(self, region: Region) -> None:
        with self._lent.lock:
            for one in self._lent.end(region):
                self._gpu_of.pop(one.addr, None)

    @property
    def tallies(self) -> str:
        return "multilinear_64"

    def tally(self, peer: str, pieces: Sequence[Region], device: torch.device) -> Sums | None:
        gpu = self._gpus.number_of(device)
        return None if gpu is None else self._tallies.begin(peer, pieces, gpu, device)

    # -- sources

    def connect(self, peer: str, exports: Sequence[Export] = ()) -> None:
        self._check_open()
        if self._sources.is_connected(peer):
            return
        session_id = session_of(peer)
        own = self._here.get(session_id)
        if own is not None and not own._closed:
            self._sources.add(OwnSource(peer, own._offers, self._gpus))
            return
        before = self._abandoned[peer]

        def is_given_up() -> bool:
            return self._closed or self._abandoned[peer] != before

        connection = None
        try:
            connection = dial(session_id, is_given_up)
        except ReadFailed:
            if self._sources.is_mapped(peer):
                return  # the process has ended, and its memory is still at hand
            if is_given_up() or not exports or not all(map(is_by_descriptors, exports)):
                raise
            # or its keeper has it for a moment
        if connection is not None and self._sources.connect_again(peer, connection):
            return
        source = MappedSource(peer, exports, self._gpus, connection)
        try:
            source.open(self._gpus.current())
        except BaseException:
            source.close()
            raise
        self._sources.add(source)
        self._check_open()

    def is_connected(self, peer: str) -> bool:
        return self._sources.is_connected(peer)

    def _offers(self, op: ReadOp) -> bool:
        with self._served.lock:
            return self._served.holder_of(op.src_addr, op.nbytes) is not None

    # -- reads

    def start(self, peer: str, op: ReadOp) -> int:
        with self._lent.lock:
            self._check_open()
            gpu = self._gpu_of[self._lent.check_destination(op, strides=True).addr]
        return self._launches.start(self._sources.begin(peer, op), gpu, op)

    def done(self, number: int) -> bool:
        over = self._launches.over(number)
        if over is None:
            return False
        source, failure = over
        self._sources.end(source)
        if failure is not None:
            raise failure
        return True

    def abandon(self, peer: str) -> None:
        self._abandoned[peer] += 1
        self._launches.abandon(peer)

    def settled(self, peer: str) -> bool:
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise EngineFailed("the transfer engine is closed")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._here.pop(self.session_id, None)
        self._listener.close()
        for source in self._sources.all():
            self.abandon(source.peer)
        self._sources.close()
        with self._served.lock, self._lent.lock:
            self._served.clear()
            self._lent.clear()
        _OPEN.discard(self)
        self._mark_closed()

    def _label(self) -> str:
        return f"at {self.session_id}"


_OPEN: weakref.WeakSet[CudaIpcEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before CUDA ends: a thread may be letting memory go."""
    for engine in list(_OPEN):
        engine._sources.close()
