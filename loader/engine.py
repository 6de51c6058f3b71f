"""Transfer engines: what reads another process's memory. The only place that imports mooncake.

`Engine` is what the loader needs of one. `MooncakeEngine` is the real one; `InProcessEngine` serves tests and single-process
uses; both pass `tests/contract`.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Protocol

from loader.errors import EngineFailed, EngineUnavailable, ReadFailed
from loader.plan import ReadOp
from registry.manifest import Region
from registry.record import PROTOCOLS

MAX_BATCH = 512  # Mooncake's queue holds 1,024 a peer; a longer batch is refused and leaves the peer unusable
MAX_BATCH_NBYTES = 64 << 20  # nothing can be stopped within a batch


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
        """Opens the region to reads. A region inside one that is registered already shares it. EngineFailed if refused."""

    def unregister(self, region: Region) -> None:
        """Takes back one `register` of the same region."""

    def read(self, session_id: str, ops: Sequence[ReadOp]) -> None:
        """Returns when all ops (at most MAX_BATCH) are done; ReadFailed if any is not, with no word on which.

        Destinations must lie in registered regions, else EngineFailed.
        """

    def close(self) -> None:
        """Ends the engine with all its registrations; any number of times."""


class _Regions:
    """Which local memory is registered, and how often: engines refuse to register a byte twice, but publishers and loaders in
    one process may share tensors. Regions never overlap."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._starts: list[int] = []  # sorted
        self._regions: dict[int, Region] = {}  # by start: as registered with the engine
        self._uses: dict[int, int] = {}  # by start: how many callers have it

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions.values())

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
        self._starts.remove(holder.addr)
        del self._regions[holder.addr], self._uses[holder.addr]
        return holder

    def check_destinations(self, ops: Sequence[ReadOp]) -> None:
        if len(ops) > MAX_BATCH:
            raise ValueError(f"a batch has at most {MAX_BATCH} reads, not {len(ops)}")
        last: Region | None = None
        for op in ops:
            if last is None or not (last.addr <= op.dst_addr and op.dst_addr + op.nbytes <= last.end):
                last = self.holder_of(op.dst_addr, op.nbytes)
            if last is None:
                raise EngineFailed(f"{op.nbytes} bytes at {op.dst_addr:#x} are not registered: register the destination first")


class MooncakeEngine:
    """Mooncake's transfer engine with peer-to-peer handshake: no metadata server.

    It listens on all interfaces, and every peer that reaches it may read AND WRITE registered memory: use it on trusted
    networks only. `host` is what peers connect to, so an address of this machine that they can reach.
    """

    def __init__(self, host: str, protocol: str = "tcp", device: str = "", fabric: str = "") -> None:
        """`protocol`: tcp, rdma or nvlink_intra; `device`: RDMA device names, comma-separated, empty for all."""
        if protocol not in PROTOCOLS:
            raise EngineUnavailable(f"protocol {protocol!r} is unknown: use one of {', '.join(PROTOCOLS)}")
        self._protocol = protocol
        self._fabric = fabric
        self._regions = _Regions()
        with _environment({"MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR"), **_PROTOCOL_ENV.get(protocol, {})}):
            self._engine = _import_mooncake().TransferEngine()
            code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if code != 0:
            raise EngineUnavailable(
                f"the transfer engine cannot start on {host!r} with protocol {protocol!r} (code {code}): "
                "check that the host is an address of this machine, and the device"
            )
        self._session_id = f"{host}:{self._engine.get_rpc_port()}"

    @property
    def session_id(self) -> str:
        return self._session_id

    @property
    def protocol(self) -> str:
        return self._protocol

    @property
    def fabric(self) -> str:
        return self._fabric

    def register(self, region: Region) -> None:
        with self._regions.lock:
            engine = self._open()
            if not self._regions.begin(region):
                return
            code = engine.register_memory(region.addr, region.nbytes)
            if code != 0:
                self._regions.end(region)
                raise EngineFailed(
                    f"the transfer engine cannot register {region.nbytes} bytes at {region.addr:#x} (code {code}): "
                    "check the limit on locked memory (ulimit -l)"
                )

    def unregister(self, region: Region) -> None:
        with self._regions.lock:
            holder = self._regions.end(region)
            if holder is not None and self._engine is not None:
                self._engine.unregister_memory(holder.addr)

    def read(self, session_id: str, ops: Sequence[ReadOp]) -> None:
        engine = self._open()
        with self._regions.lock:
            self._regions.check_destinations(ops)
        if not ops:
            return
        code = engine.batch_transfer_sync_read(
            session_id, [op.dst_addr for op in ops], [op.src_addr for op in ops], [op.nbytes for op in ops]
        )
        if code != 0:
            raise ReadFailed(
                f"cannot read from {session_id} (code {code}): its process has ended, is not reachable over {self._protocol}, "
                "or does not offer that memory any more",
                session_id=session_id,
            )

    def close(self) -> None:
        with self._regions.lock:
            engine, self._engine = self._engine, None
            for region in self._regions if engine is not None else ():
                engine.unregister_memory(region.addr)
            self._regions.clear()

    def _open(self) -> Any:
        if self._engine is None:
            raise EngineFailed("the transfer engine is closed")
        return self._engine

    def __enter__(self) -> MooncakeEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


# Mooncake ignores the protocol that it is given and looks at these when it starts.
_PROTOCOL_ENV: dict[str, dict[str, str]] = {
    "tcp": {"MC_FORCE_TCP": "1"},
    "nvlink_intra": {"MC_INTRANODE_NVLINK": "1"},
}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _import_mooncake() -> Any:
    try:
        import mooncake.engine
    except ImportError as exc:
        raise EngineUnavailable(_what_to_install(str(exc))) from exc
    return mooncake.engine


def _what_to_install(complaint: str) -> str:
    if "libibverbs" in complaint:
        return "the transfer engine needs the system's libibverbs.so.1: apt-get install libibverbs1 (rdma-core on other systems)"
    if "libcudart" in complaint or "libcuda" in complaint:
        return (
            f"this transfer engine is built for CUDA, which is not here ({complaint}): pip install 'engine-registry[cpu]' instead"
        )
    if "No module named" in complaint:
        return "the transfer engine is not installed: pip install 'engine-registry[cpu]' (or [cuda12], [cuda13] on GPU machines)"
    return f"the transfer engine cannot be imported: {complaint}"


class InProcessEngine:
    """Reads the memory of other engines of this class in the same process, with the same refusals as the real one."""

    _peers: ClassVar[weakref.WeakValueDictionary[str, InProcessEngine]] = weakref.WeakValueDictionary()
    _numbers = itertools.count(1)

    def __init__(self, fabric: str = "") -> None:
        self._fabric = fabric
        self._regions = _Regions()
        self._session_id = f"in-process:{next(self._numbers)}"
        self._closed = False
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

    def register(self, region: Region) -> None:
        with self._regions.lock:
            self._check_open()
            self._regions.begin(region)

    def unregister(self, region: Region) -> None:
        with self._regions.lock:
            self._regions.end(region)

    def read(self, session_id: str, ops: Sequence[ReadOp]) -> None:
        self._check_open()
        with self._regions.lock:
            self._regions.check_destinations(ops)
        peer = self._peers.get(session_id)
        if peer is None or peer._closed:
            raise ReadFailed(f"cannot read from {session_id}: no such engine", session_id=session_id)
        with peer._regions.lock:
            for op in ops:
                if peer._regions.holder_of(op.src_addr, op.nbytes) is None:
                    raise ReadFailed(f"cannot read from {session_id}: {op.src_addr:#x} is not registered", session_id=session_id)
                ctypes.memmove(op.dst_addr, op.src_addr, op.nbytes)

    def close(self) -> None:
        with self._regions.lock:
            self._closed = True
            self._peers.pop(self._session_id, None)
            self._regions.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineFailed("the transfer engine is closed")

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
