"""From GPU to GPU of one host: the memory of sources is mapped into this process, and one kernel
reads it.

A source's manifest has handles of its allocations. A reader opens them at the first contact, and
keeps them. Reads that are started become a table, and the table one launch, once there is enough
for one or somebody asks for a read. Nothing of the source's process takes part in that: it may be
stopped, hold the GIL, or have ended. What is mapped is let go soon after the source has ended, or
has taken memory back: see `sources`.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

import torch

from engine_loader.engines.base import ClosableEngine, session_of
from engine_loader.engines.cuda_ipc import link
from engine_loader.engines.cuda_ipc.gpus import CudaGpus, Gpus, Launch, Sums
from engine_loader.engines.cuda_ipc.sources import MappedSource, OwnSource, Source, Sources
from engine_loader.engines.cuda_ipc.table import Blocks, Copy
from engine_loader.engines.mooncake.machine import this_host
from engine_loader.engines.region_book import RegionBook, Regions
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_registry.schema.location import Location
from engine_registry.schema.manifest import Export, Region

# Of one launch. The first one is short, so that the GPU begins; each that follows takes as long as
# the next one takes to be made ready; and after the longest ones, of 11 ms, what has come is seen.
_FIRST_NBYTES = 256 << 20
_LAUNCH_NBYTES = 4 << 30
_KEPT_BLOCKS = 8  # for the next load of the same


class _Read:
    """`launch` is None until it is launched."""

    __slots__ = ("failure", "gpu", "launch", "op", "source")

    def __init__(self, source: Source, gpu: int | None, op: ReadOp) -> None:
        self.source = source
        self.gpu = gpu
        self.op = op
        self.launch: Launch | None = None
        self.failure: ReadFailed | None = None


class _Waiting:
    """Reads from one source into one GPU that are not launched yet."""

    def __init__(self) -> None:
        self.reads: list[_Read] = []
        self.nbytes = 0


class CudaIpcEngine(ClosableEngine):
    """Reads memory of GPUs of this host, by handles that sources publish, with one kernel.

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
            EngineUnavailable: There is no GPU or no Triton, or nothing can listen at that address.
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
        self._launching = threading.Lock()  # held while reads become a launch; taken first
        self._lock = threading.Lock()  # of what follows
        self._reads: dict[int, _Read] = {}
        self._waiting: defaultdict[tuple[Source, int | None], _Waiting] = defaultdict(_Waiting)
        self._enough: dict[tuple[Source, int | None], int] = {}  # bytes of the next launch
        self._sums: dict[tuple[str, int], Sums] = {}  # by peer and GPU
        self._blocks: deque[tuple[Sequence[Region], Blocks]] = deque(maxlen=_KEPT_BLOCKS)
        self._numbers = itertools.count(1)
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

    # -- memory

    def register(self, region: Region) -> Regions:
        with self._served.lock:
            self._check_open()
            parts, new = self._served.begin(region)
            try:
                for one in new:
                    export = self._gpus.export(one.addr)
                    if one.end > export.end:
                        raise EngineFailed(
                            f"{one.nbytes} bytes at {one.addr:#x} are not one allocation of CUDA's",
                            "serve tensors of one allocation each",
                        )
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
        found = [self._gpus.export(region.addr) for region in regions]
        return tuple({export.addr: export for export in found}.values())

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
        if gpu is None:
            return None
        with self._lock:
            if (peer, gpu) in self._sums:
                return None
            sums = Sums(self._blocks_of(pieces), device, lambda: self._sums.pop((peer, gpu), None))
            self._sums[peer, gpu] = sums
            return sums

    def _blocks_of(self, pieces: Sequence[Region]) -> Blocks:
        """Those that were made last are kept."""
        for known, blocks in self._blocks:
            if known is pieces:
                return blocks
        blocks = Blocks(pieces)
        self._blocks.append((pieces, blocks))
        return blocks

    # -- sources

    def connect(self, peer: str, exports: Sequence[Export] = ()) -> None:
        self._check_open()
        if self._sources.is_connected(peer):
            return
        session_id = session_of(peer)
        own = self._here.get(session_id)
        if own is not None and not own._closed:
            self._sources.add(OwnSource(peer, own._offers))
            return
        before = self._abandoned[peer]
        try:
            connection = link.connect(
                session_id, lambda: self._closed or self._abandoned[peer] != before
            )
        except ReadFailed:
            if not self._sources.is_mapped(peer):
                raise
            return  # the process has ended, and its memory is still at hand
        if self._sources.connect_again(peer, connection):
            return
        source = MappedSource(peer, exports, self._gpus, connection)
        try:
            source.open(self._gpus.current())
        except BaseException:
            source.close()
            raise
        self._sources.add(source)
        self._check_open()

    def _offers(self, op: ReadOp) -> bool:
        with self._served.lock:
            return self._served.holder_of(op.src_addr, op.nbytes) is not None

    # -- reads

    def start(self, peer: str, op: ReadOp) -> int:
        with self._lent.lock:
            self._check_open()
            self._lent.check_destination(op, strides=True)
            region = self._lent.holder_of(op.dst_addr, op.dst_nbytes)
            gpu = self._gpu_of[region.addr] if region is not None else None
        source = self._sources.begin(peer, op)
        read = _Read(source, gpu, op)
        with self._lock:
            number = next(self._numbers)
            self._reads[number] = read
            waiting = self._waiting[source, gpu]
            waiting.reads.append(read)
            waiting.nbytes += op.nbytes
            enough = waiting.nbytes >= self._enough.get((source, gpu), _FIRST_NBYTES)
        if enough:
            self._launch(source, gpu)
        return number

    def done(self, number: int) -> bool:
        read = self._reads[number]
        if read.launch is None and read.failure is None:
            self._launch(read.source, read.gpu)
        if read.failure is None and (read.launch is None or not read.launch.done()):
            return False
        with self._lock:
            del self._reads[number]
            if not self._reads:
                self._enough.clear()
        self._sources.end(read.source)
        if read.failure is not None:
            raise read.failure
        return True

    def _launch(self, source: Source, gpu: int | None) -> None:
        """All that waits for it; what cannot be read has failed."""
        with self._launching:
            with self._lock:
                waiting = self._waiting.pop((source, gpu), _Waiting())
                nbytes = min(2 * max(waiting.nbytes, _FIRST_NBYTES), _LAUNCH_NBYTES)
                self._enough[source, gpu] = nbytes
            reads, copies = [], []
            for read in waiting.reads:
                op = read.op
                try:
                    src = source.address(op, gpu)
                except ReadFailed as exc:
                    read.failure = exc
                    continue
                reads.append(read)
                copies.append(Copy(src, op.dst_addr, op.src_addr, op.nbytes, op.lines))
            if not copies:
                return
            sums = self._sums.get((source.peer, gpu)) if gpu is not None else None
            try:
                launch = self._gpus.launch(gpu, copies, sums)
            except EngineFailed as exc:
                for read in reads:
                    read.failure = link.failed(source.session_id, exc.what)
                raise
            for read in reads:
                read.launch = launch

    def abandon(self, peer: str) -> None:
        self._abandoned[peer] += 1
        with self._launching, self._lock:
            reads = [read for read in self._reads.values() if read.source.peer == peer]
            for read in reads:
                if read.launch is None:
                    self._waiting.pop((read.source, read.gpu), None)
                else:
                    with suppress(EngineFailed):  # a GPU that has failed writes nothing more
                        read.launch.wait()  # for the GPU, and for nobody else
                read.failure = read.failure or link.failed(session_of(peer), "it was abandoned")

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
