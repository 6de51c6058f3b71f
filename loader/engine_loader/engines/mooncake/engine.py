"""Mooncake behind `Engine`: an engine of the library that serves our memory, and readers of peers.

Over tcp and nvlink_intra every peer is read from by an engine for it alone: a read that hangs
cannot be cancelled, but it ends with the engine that it was started on; and what has been learnt of
a peer's memory is never learnt anew. Such an engine costs 1 ms, two threads and five file
descriptors. Over rdma it would have to register all memory that is read into once more, so there
the engine that serves also reads. First contacts are made on separate engines in any case. At
exit all reading ends, as no thread may come back from the library while Python ends.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

from engine_loader.engines.base import ClosableEngine, session_of
from engine_loader.engines.lingering import Lingering
from engine_loader.engines.machine import check_host, this_host
from engine_loader.engines.mooncake.binding import Binding
from engine_loader.engines.mooncake.choice import choose, rails_of
from engine_loader.engines.mooncake.reader import PeerReader
from engine_loader.engines.mooncake.shared import SharedEngine
from engine_loader.engines.mooncake.start import start
from engine_loader.engines.region_book import RegionBook, Regions
from engine_loader.errors import EngineFailed, EngineUnavailable, LoaderError, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_loader.tensors.cuda import on_device_of, pci_address
from engine_registry.schema.address import join
from engine_registry.schema.location import Location
from engine_registry.schema.manifest import Export, Region
from engine_registry.schema.record import PROTOCOLS

# the list of them that a peer gets must fit into 1 MB; each takes longer to register than the one
# before
_MAX_REGIONS = 12_000
_MAX_READERS = 128  # peers whose readers are kept for the next load from them
_WAYS = ("tcp", "rdma", "nvlink_intra")
_SHARED = ("rdma",)  # protocols over which one engine reads from all peers
_OPEN: weakref.WeakSet[MooncakeEngine] = weakref.WeakSet()


def _refused(protocol: str) -> EngineUnavailable:
    if protocol in PROTOCOLS:
        return EngineUnavailable(f"Mooncake does not read over {protocol}", "use `open_engine`")
    return EngineUnavailable(
        f"protocol {protocol!r} is unknown", f"use one of {', '.join(PROTOCOLS)}"
    )


class MooncakeEngine(ClosableEngine):
    """Mooncake's transfer engine with peer-to-peer handshake: no metadata server.

    It listens on all interfaces. Every peer that reaches it may read AND WRITE registered memory:
    use it on trusted networks only, and SocketEngine on others. All engines of a process speak
    IPv4, or all speak IPv6, as their hosts do. They read from peers that speak the same.
    """

    def __init__(
        self,
        host: str,
        protocol: str = "tcp",
        device: str = "",
        fabric: str = "",
        location: str = "",
        *,
        shared: bool | None = None,
    ) -> None:
        """Starts the engine.

        Args:
            host: The address of this machine that peers connect to.
            protocol: How to read: tcp, rdma or nvlink_intra.
            device: Over rdma: names of devices, with commas between them; `"auto"`, those nearest
                to this thread's GPU, or to the CPUs where CUDA is not in use; or empty, all.
            fabric: A label of the network. Engines with equal labels reach each other.
            location: Where this machine stands, `ZONE[/RACK[/NODE]]`, each of which may be empty.
                Loads prefer sources that are near, and leave the zone only where they must.
            shared: Whether the engine that serves also reads from all peers. None: as the protocol
                needs it. For tests.

        Raises:
            EngineUnavailable: The engine cannot be imported or started here.
            InvalidField: The location is not valid.
        """
        self._location = Location.parse(location)
        if protocol not in _WAYS:
            raise _refused(protocol)
        devices = choose(device, pci_address()) if protocol == "rdma" else ()
        self._host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        self._family = check_host(self._host)
        self._protocol = protocol
        self._device = ",".join(one.name for one in devices) if device else ""
        self._rails = rails_of(devices)
        self._fabric = fabric or (this_host() if protocol == "nvlink_intra" else "")
        self._served = RegionBook()
        # But for RDMA an engine writes to any address that it is given, so peers need not be able
        # to reach what is only read into.
        self._lent = self._served if protocol == "rdma" else RegionBook()
        self._lingering = Lingering()
        self._lock = threading.Lock()  # of what follows
        self._readers: dict[str, PeerReader] = {}  # by peer, the oldest first
        self._reads: dict[int, tuple[PeerReader, int]] = {}  # by number: the reader and its batch
        self._numbers = itertools.count(1)
        self._reading = True
        self._binding: Binding | None = start(self._host, self._family, protocol, self._device)
        self._session_id = join(self._host, self._binding.port)
        self._shared: SharedEngine | None = None
        if shared or (shared is None and protocol in _SHARED):
            try:
                self._shared = SharedEngine(self._binding)
            except EngineFailed as exc:
                self._binding.end()
                raise EngineUnavailable(exc.what, exc.remedy) from exc
        _OPEN.add(self)
        self._mark_open()

    @property
    def session_id(self) -> str:
        return self._session_id

    @property
    def protocol(self) -> str:
        return self._protocol

    @property
    def fabric(self) -> str:
        return self._fabric

    @property
    def rails(self) -> Mapping[str, str]:
        return self._rails

    @property
    def location(self) -> Location:
        return self._location

    def register(self, region: Region) -> Regions:
        with self._served.lock:
            binding = self._open()
            self._lingering.check(region.addr, region.nbytes)
            parts, new = self._served.begin(region)
            registered: list[Region] = []
            try:
                if len(self._served) > _MAX_REGIONS:
                    raise EngineFailed(
                        f"the memory lies in more than {_MAX_REGIONS} pieces, of which no "
                        "peer could learn",
                        "put the tensors into fewer blocks, as views of one storage",
                    )
                for one in new:
                    with self._where(one):
                        binding.register(one)
                    registered.append(one)
            except BaseException:
                self._served.end(region)
                for one in registered:
                    self._forget(binding, one)
                raise
            return parts

    def unregister(self, region: Region) -> None:
        with self._served.lock:
            for one in self._served.end(region):
                if self._binding is not None:
                    self._forget(self._binding, one)

    def _forget(self, binding: Binding, region: Region) -> None:
        with self._where(region):
            binding.unregister(region)

    def lend(self, region: Region) -> Regions:
        if self._lent is self._served:
            return self.register(region)
        with self._lent.lock:
            self._open()
            self._lingering.check(region.addr, region.nbytes)
            return self._lent.begin(region).parts

    def take_back(self, region: Region) -> None:
        self._lingering.check(region.addr, region.nbytes)
        if self._lent is self._served:
            return self.unregister(region)
        with self._lent.lock:
            self._lent.end(region)
        return None

    def connect(self, peer: str, exports: Sequence[Export] = ()) -> None:
        self._open()
        with self._lock:
            if not self._reading:
                raise _closed()
            reader = self._readers.get(peer)
            if reader is None:
                # A separate engine, or for a first contact, which needs no more than tcp.
                new = partial(
                    start,
                    self._host,
                    self._family,
                    "tcp" if self._shared is not None else self._protocol,
                    self._device,
                )
                reader = self._readers[peer] = PeerReader(
                    peer, self._protocol, self._family, new, self._shared
                )
        try:
            reader.connect()
        except LoaderError:
            self._drop(peer, reader)
            raise
        self._forget_idle_readers()

    def start(self, peer: str, op: ReadOp) -> int:
        with self._lent.lock:
            self._open()
            self._lent.check_destination(op)
        self._lingering.check(op.dst_addr, op.nbytes)
        with self._lock:
            reader = self._readers.get(peer)
        if reader is None:
            raise ReadFailed(
                f"cannot read from {session_of(peer)}: it is not connected",
                session_id=session_of(peer),
            )
        batch = reader.begin(op)
        with self._lock:
            number = next(self._numbers)
            self._reads[number] = reader, batch
        return number

    def done(self, number: int) -> bool:
        with self._lock:
            reader, batch = self._reads[number]
        arrived: bool | None = False
        try:
            arrived = reader.arrived(batch)
        finally:
            if arrived is not None:
                with self._lock:
                    del self._reads[number]
        if arrived is False:
            raise reader.failed()
        return arrived is True

    def abandon(self, peer: str) -> None:
        with self._lock:
            reader = self._readers.get(peer)
        if reader is not None and reader.busy:
            self._drop(peer, reader)

    def settled(self, peer: str) -> bool:
        return self._lingering.settled(peer)

    def _drop(self, peer: str, reader: PeerReader) -> None:
        with self._lock:
            if self._readers.get(peer) is reader:
                del self._readers[peer]
        for op, ended in reader.give_up():
            self._lingering.add(peer, op, ended)

    def _stop_reading(self) -> None:
        with self._lock:
            self._reading = False
            readers = list(self._readers.items())
        for peer, reader in readers:
            self._drop(peer, reader)

    def close(self) -> None:
        self._stop_reading()
        with self._served.lock:
            binding, self._binding = self._binding, None
            if binding is not None:
                for region in self._served:
                    with suppress(EngineFailed):  # it ends with the engine
                        self._forget(binding, region)
                binding.end()
            self._served.clear()
            self._lent.clear()
            self._lingering.clear()
        self._mark_closed()

    def _where(self, region: Region) -> AbstractContextManager[None]:
        return on_device_of(region.addr) if self._protocol == "nvlink_intra" else nullcontext()

    def _open(self) -> Binding:
        if self._binding is None:
            raise _closed()
        return self._binding

    def _forget_idle_readers(self) -> None:
        """The ones that have been there longest, if there are too many."""
        with self._lock:
            idle = [(peer, reader) for peer, reader in self._readers.items() if not reader.busy]
            surplus = idle[: max(0, len(self._readers) - _MAX_READERS)]
        for peer, reader in surplus:
            self._drop(peer, reader)

    def _label(self) -> str:
        return f"at {self._session_id}"


def _closed() -> EngineFailed:
    return EngineFailed("the transfer engine is closed")


@atexit.register
def _stop_all_reading() -> None:
    for engine in list(_OPEN):
        engine._stop_reading()
