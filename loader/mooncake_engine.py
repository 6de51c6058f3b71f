"""Mooncake's transfer engine behind `Engine`. The only place that imports mooncake.

One Mooncake engine serves our memory to peers. But for RDMA every peer that we read from gets one of its own besides, its reader: a
read that hangs cannot be cancelled, but it ends with the engine that it was started on; a peer that does not answer a first contact
blocks the engine that makes it for a minute; and what has been learnt of a peer's memory is never learnt anew. A reader costs
1 ms, two threads and five file descriptors.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from loader.cuda import on_device_of
from loader.engine import session_of
from loader.errors import EngineFailed, EngineUnavailable, ReadFailed
from loader.plan import ReadOp
from loader.region_book import RegionBook, Tiles
from registry.manifest import Region
from registry.record import PROTOCOLS

_MAX_REGIONS = 12_000  # what a peer is told of them must fit into 1 MB; each takes longer to register than the one before
_MAX_READERS = 128  # peers whose readers are kept for the next load from them
_NO_BATCH = (0, 2**64 - 1)  # what releases of Mooncake return where they refuse
_DRAIN_S = 60.0
_PENDING, _DONE, _TIMED_OUT = 0, 1, -2
_TIMEVAL = struct.Struct("ll")
_LOOK_UP_US = 50_000
_TRANSPORT = re.compile(rb"N8mooncake\d+([A-Z][A-Za-z]*)TransportE")  # a class's name, as C++ keeps it for exceptions and casts
_NO_WAYS = {"Multi"}  # it chooses among the others
_RDMA_DEVICES = Path("/sys/class/infiniband")
_OWN_READERS = ("tcp", "nvlink_intra")  # over RDMA an engine is dear, and a read ends whatever its peer's process does


class MooncakeEngine:
    """Mooncake's transfer engine with peer-to-peer handshake: no metadata server.

    It listens on all interfaces, and every peer that reaches it may read AND WRITE registered memory: use it on trusted
    networks only. `host` is what peers connect to, so an address of this machine that they can reach.
    """

    def __init__(self, host: str, protocol: str = "tcp", device: str = "", fabric: str = "") -> None:
        """`protocol`: tcp, rdma or nvlink_intra; `device`: RDMA device names, comma-separated, empty for all."""
        if protocol not in PROTOCOLS:
            raise EngineUnavailable(f"protocol {protocol!r} is unknown: use one of {', '.join(PROTOCOLS)}")
        if protocol == "rdma" and not rdma_devices():
            raise EngineUnavailable(
                f"no RDMA device is here ({_RDMA_DEVICES} has none), and Mooncake would fall back to tcp: say tcp"
            )
        _check_is_ours(host)
        self._host = host
        self._protocol = protocol
        self._device = device
        self._fabric = fabric or (this_host() if protocol == "nvlink_intra" else "")
        self._served = RegionBook()
        # But for RDMA an engine writes wherever it is told to, so peers need not be able to reach what is only read into.
        self._lent = self._served if protocol == "rdma" else RegionBook()
        self._lock = threading.Lock()  # of what follows
        self._readers: dict[str, _Reader] = {}  # by peer, the oldest first
        self._reads: dict[int, tuple[_Reader, int]] = {}  # by number: the reader and its batch
        self._numbers = itertools.count(1)
        self._engine: Any = self._new_engine()
        self._session_id = f"{host}:{self._engine.get_rpc_port()}"

    def _new_engine(self) -> Any:
        with _environment({"MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR"), **_PROTOCOL_ENV.get(self._protocol, {})}):
            engine = _import_mooncake().TransferEngine()
            code = engine.initialize(self._host, "P2PHANDSHAKE", self._protocol, self._device)
        if code != 0:
            raise EngineUnavailable(
                f"the transfer engine cannot start on {self._host!r} with protocol {self._protocol!r} and device "
                f"{self._device!r} (code {code}): check the device, and MC_LOG_LEVEL=INFO for more"
            )
        _let_it_end_soon(engine.get_rpc_port())
        return engine

    @property
    def session_id(self) -> str:
        return self._session_id

    @property
    def protocol(self) -> str:
        return self._protocol

    @property
    def fabric(self) -> str:
        return self._fabric

    def register(self, region: Region) -> Tiles:
        with self._served.lock:
            engine = self._open()
            tiles, new = self._served.begin(region)
            registered: list[Region] = []
            try:
                if len(self._served) > _MAX_REGIONS:
                    raise EngineFailed(
                        f"the memory lies in more than {_MAX_REGIONS} pieces, of which no peer could be told: put the tensors into "
                        "fewer blocks, as views of one storage"
                    )
                for one in new:
                    self._register(engine, one)
                    registered.append(one)
            except EngineFailed:
                self._served.end(region)
                for one in registered:
                    self._unregister(engine, one)
                raise
            return tiles

    def _register(self, engine: Any, region: Region) -> None:
        with self._where(region):
            code = engine.register_memory(region.addr, region.nbytes)
        if code != 0:
            raise EngineFailed(
                f"the transfer engine cannot register {region.nbytes} bytes at {region.addr:#x} (code {code}): "
                "check the limit on locked memory (ulimit -l)"
            )

    def unregister(self, region: Region) -> None:
        with self._served.lock:
            for one in self._served.end(region):
                if self._engine is not None:
                    self._unregister(self._engine, one)

    def _unregister(self, engine: Any, region: Region) -> None:
        with self._where(region):
            engine.unregister_memory(region.addr)

    def lend(self, region: Region) -> Tiles:
        if self._lent is self._served:
            return self.register(region)
        with self._lent.lock:
            self._open()
            return self._lent.begin(region).tiles

    def take_back(self, region: Region) -> None:
        if self._lent is self._served:
            return self.unregister(region)
        with self._lent.lock:
            self._lent.end(region)
        return None

    def connect(self, peer: str) -> None:
        self._open()
        with self._lock:
            reader = self._readers.get(peer)
        if reader is None:
            own = self._protocol in _OWN_READERS
            made = _Reader(session_of(peer), self._new_engine() if own else self._open(), own)
            with self._lock:
                reader = self._readers.setdefault(peer, made)
        if not reader.connect():
            self.abandon(peer)
            raise self._failed(session_of(peer))
        self._forget_idle_readers()

    def start(self, peer: str, op: ReadOp) -> int:
        with self._lent.lock:
            self._open()
            self._lent.check_destination(op)
        with self._lock:
            reader = self._readers.get(peer)
        batch = reader.start(op) if reader is not None else None
        if reader is None or batch is None:
            raise self._failed(session_of(peer))
        with self._lock:
            number = next(self._numbers)
            self._reads[number] = reader, batch
        return number

    def done(self, number: int) -> bool:
        with self._lock:
            reader, batch = self._reads[number]
        arrived = reader.arrived(batch)
        if arrived is None:
            return False
        with self._lock:
            del self._reads[number]
        if not arrived:
            raise self._failed(reader.session_id)
        return True

    def abandon(self, peer: str) -> bool:
        with self._lock:
            reader = self._readers.get(peer)
            if reader is None or not reader.busy:
                return True
            del self._readers[peer]
        reader.close()
        return True

    def close(self) -> None:
        with self._lock:
            readers = list(self._readers.values())
            self._readers.clear()
        for reader in readers:
            reader.close()
        with self._served.lock:
            engine, self._engine = self._engine, None
            for region in self._served if engine is not None else ():
                with self._where(region):
                    engine.unregister_memory(region.addr)
            self._served.clear()
            self._lent.clear()

    def _where(self, region: Region) -> AbstractContextManager[None]:
        return on_device_of(region.addr) if self._protocol == "nvlink_intra" else nullcontext()

    def _open(self) -> Any:
        if self._engine is None:
            raise EngineFailed("the transfer engine is closed")
        return self._engine

    def _forget_idle_readers(self) -> None:
        """The ones that have been there longest, if there are too many."""
        with self._lock:
            idle = [peer for peer, reader in self._readers.items() if not reader.busy]
            surplus = idle[: max(0, len(self._readers) - _MAX_READERS)]
            dropped = [self._readers.pop(peer) for peer in surplus]
        for reader in dropped:
            reader.close()

    def _failed(self, session_id: str) -> ReadFailed:
        return ReadFailed(
            f"cannot read from {session_id}: its process has ended, is not reachable over {self._protocol}, "
            "or does not offer that memory any more",
            session_id=session_id,
        )

    def __enter__(self) -> MooncakeEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Reader:
    """What reads from one peer, and can be made to stop. `own`: its engine is for this peer alone, and ends with it."""

    def __init__(self, session_id: str, engine: Any, own: bool) -> None:
        self.session_id = session_id
        self._own = own
        self._lock = threading.Lock()  # held during calls, which are short once the peer is connected
        self._engine = engine  # None once closed
        self._connected = False
        self._batches: set[int] = set()  # of one read each, not over yet
        self._unsure = False  # stays True if an interrupt comes before it is noted that a batch has begun, or is over

    @property
    def busy(self) -> bool:
        return bool(self._batches) or self._unsure or not self._connected

    def connect(self) -> bool:
        engine = self._engine  # not under the lock: this may last, and then nothing else is going on here
        if engine is None:
            return False
        if not self._connected:
            # An empty batch opens the peer's segment and reads nothing. Mooncake returns no batch where it cannot.
            self._connected = engine.batch_transfer_async_read(self.session_id, [], [], []) not in _NO_BATCH
        return self._connected

    def start(self, op: ReadOp) -> int | None:
        """The read's batch, or None."""
        with self._lock:
            if self._engine is None or not self._connected:
                return None
            self._unsure = True
            batch = int(self._engine.batch_transfer_async_read(self.session_id, [op.dst_addr], [op.src_addr], [op.nbytes]))
            if batch not in _NO_BATCH:
                self._batches.add(batch)
            self._unsure = False
            return batch if batch in self._batches else None

    def arrived(self, batch: int) -> bool | None:
        """None: not yet."""
        with self._lock:
            if self._engine is None or batch not in self._batches:  # asking about one that is over ends the process
                return False
            self._unsure = True
            self._batches.discard(batch)
            status = self._engine.transfer_check_status(batch)
            pending = status in (_PENDING, _TIMED_OUT)  # what has timed out may still write
            if pending:
                self._batches.add(batch)
            self._unsure = False
            return None if pending else bool(status == _DONE)

    def close(self) -> None:
        with self._lock:
            if not self._own:
                self._drain()
            # Destroys the engine of this peer, here and now: only a first contact that hangs, and has read nothing, may hold it.
            self._engine = None

    def _drain(self) -> None:
        deadline = time.monotonic() + _DRAIN_S
        while self._batches:
            self._batches = {b for b in self._batches if self._engine.transfer_check_status(b) in (_PENDING, _TIMED_OUT)}
            if time.monotonic() > deadline:
                raise EngineFailed(
                    f"reads from {self.session_id} have not ended in {_DRAIN_S:.0f} s: the memory that they write to must not be "
                    "used again before this process ends"
                )
            time.sleep(1e-3)


def this_host() -> str:
    """Also where containers of one machine have names of their own, or machines the same."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def rdma_devices() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in _RDMA_DEVICES.iterdir())) if _RDMA_DEVICES.is_dir() else ()


def built_transports() -> tuple[str, ...]:
    """Ways of reading that the installed Mooncake was built with, as its classes are called. EngineUnavailable if there is none."""
    library = Path(_import_mooncake().__file__)
    return tuple(sorted({name.decode() for name in _TRANSPORT.findall(library.read_bytes())} - _NO_WAYS))


def _check_is_ours(host: str) -> None:
    """Mooncake takes any host, and peers then look for us at an address that leads elsewhere or nowhere."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.bind(address)
    except OSError as exc:
        raise EngineUnavailable(
            f"{host!r} is no address of this machine ({exc.strerror or exc}): give one that peers can reach it by"
        ) from exc


def _let_it_end_soon(port: int) -> None:
    """An engine ends when its listening thread next looks up, once a second, and holds the GIL meanwhile: have it do so more often.

    Its socket is one of our own process's descriptors. Where it cannot be found the engine ends later, that is all.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and found.getsockname()[1] == port:
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, _LOOK_UP_US))
                    return
        except OSError:  # closed meanwhile
            continue


# Mooncake ignores the protocol that it is given and looks at these when it starts.
_PROTOCOL_ENV: dict[str, dict[str, str]] = {
    "tcp": {"MC_FORCE_TCP": "1"},
    "nvlink_intra": {"MC_INTRANODE_NVLINK": "1"},
}
_ENVIRONMENT = threading.Lock()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """For one thread at a time: another that came in between would start under what this one has put back, and put back its."""
    with _ENVIRONMENT:
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
