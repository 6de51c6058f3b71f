"""The sources that an engine reads from: their memory, as it is mapped here.

A thread waits for the end of the connections to them. What a source has is let go when its
connection has ended and nobody has read from it for a moment: a load that is under way reads on,
and nothing of a process that has ended stays in memory.
"""

from __future__ import annotations

import bisect
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from engine_loader.engines.base import session_of
from engine_loader.engines.cuda_ipc import link
from engine_loader.engines.cuda_ipc.gpus import Gpus
from engine_loader.engines.dial import failed
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_loader.sharing.pieces import is_on_host
from engine_registry.schema.manifest import Export

LET_GO_S = 2.0  # after the last read from a source that has ended
_LOOK_S = 0.25


class Source:
    """A process, as of one registration. `reads` of it have begun and are not over."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.reads = 0
        self.used_at = time.monotonic()

    @property
    def session_id(self) -> str:
        return session_of(self.peer)

    def check(self, op: ReadOp) -> None:
        """ReadFailed where it does not offer these bytes."""
        raise NotImplementedError

    def address(self, op: ReadOp, gpu: int | None) -> int:
        """Where the first of them is for that GPU; ReadFailed."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets its memory go."""

    def not_offered(self, op: ReadOp) -> ReadFailed:
        return failed(self.session_id, f"it does not offer {op.nbytes} bytes at {op.src_addr:#x}")


class OwnSource(Source):
    """An engine of this process, whose memory is at hand. `offers` says whether it has bytes."""

    def __init__(self, peer: str, offers: Callable[[ReadOp], bool], gpus: Gpus) -> None:
        super().__init__(peer)
        self._offers = offers
        self._gpus = gpus

    def check(self, op: ReadOp) -> None:
        if not self._offers(op):
            raise self.not_offered(op)

    def address(self, op: ReadOp, gpu: int | None) -> int:
        self.check(op)
        if gpu is None:
            return op.src_addr
        try:
            return self._gpus.reach(op.src_addr, op.nbytes, gpu)
        except EngineFailed as exc:
            raise failed(self.session_id, exc.what) from exc


class MappedSource(Source):
    """Another process. Each GPU that reads opens its handles; memory of the host is opened once."""

    def __init__(
        self, peer: str, exports: Sequence[Export], gpus: Gpus, connection: socket.socket | None
    ) -> None:
        """`connection` is None where the process has ended."""
        super().__init__(peer)
        self._exports = sorted(exports, key=lambda export: export.addr)
        self._starts = [export.addr for export in self._exports]
        self._gpus = gpus
        # By GPU, and number of the export: where it is, and for which GPU it was opened.
        self._mapped: dict[tuple[int | None, int], tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.connection = connection

    def open(self, gpu: int) -> None:
        """All that it has; ReadFailed."""
        for number in range(len(self._exports)):
            self._open(gpu, number)

    def _open(self, gpu: int, number: int) -> int:
        with self._lock:
            if self._closed:
                raise failed(self.session_id, "its memory has been let go")
            export = self._exports[number]
            key = None if is_on_host(export) else gpu, number
            found = self._mapped.get(key)
            if found is None:
                try:
                    found = self._gpus.open(export, gpu), gpu
                except EngineFailed as exc:
                    raise failed(self.session_id, exc.what) from exc
                self._mapped[key] = found
            return found[0]

    def check(self, op: ReadOp) -> None:
        self._number_of(op)

    def address(self, op: ReadOp, gpu: int | None) -> int:
        number = self._number_of(op)
        base = self._open(self._gpus.current() if gpu is None else gpu, number)
        start = op.src_addr - self._starts[number]
        if gpu is not None and is_on_host(self._exports[number]):
            try:
                self._gpus.pin(base, start, op.nbytes, gpu)
            except EngineFailed as exc:
                raise failed(self.session_id, exc.what) from exc
        return base + start

    def _number_of(self, op: ReadOp) -> int:
        number = bisect.bisect_right(self._starts, op.src_addr) - 1
        if number < 0 or op.src_addr + op.nbytes > self._exports[number].end:
            raise self.not_offered(op)
        return number

    def close(self) -> None:
        with self._lock:
            self._closed = True
            mapped, self._mapped = self._mapped, {}
        for addr, gpu in mapped.values():
            self._gpus.close(addr, gpu)
        if self.connection is not None:
            self.connection.close()


class Sources:
    """All sources of an engine, by their names as peers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[str, Source] = {}
        self._ended: set[MappedSource] = set()  # their connections have; they may be read from
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None
        self._closed = False

    def is_connected(self, peer: str) -> bool:
        """Whether nothing has happened to the source since the first contact."""
        with self._lock:
            source = self._sources.get(peer)
            return source is not None and source not in self._ended

    def is_mapped(self, peer: str) -> bool:
        """Whether it can be read from, though its process may have ended."""
        with self._lock:
            source = self._sources.get(peer)
            if source is not None:
                source.used_at = time.monotonic()
            return source is not None

    def all(self) -> list[Source]:
        with self._lock:
            return list(self._sources.values())

    def begin(self, peer: str, op: ReadOp) -> Source:
        """Of a read, until `end`; ReadFailed where it is not connected, or does not offer that."""
        with self._lock:
            source = self._sources.get(peer)
            if source is None:
                raise failed(session_of(peer), "it is not connected")
            source.check(op)
            source.reads += 1
            source.used_at = time.monotonic()
            return source

    def end(self, source: Source) -> None:
        with self._lock:
            source.reads -= 1
            source.used_at = time.monotonic()

    def add(self, source: Source) -> None:
        """Unless another thread was faster."""
        with self._lock:
            if source.peer not in self._sources and not self._closed:
                self._sources[source.peer] = source
                if isinstance(source, MappedSource):
                    self._watch(source)
                return
        source.close()

    def connect_again(self, peer: str, connection: socket.socket) -> bool:
        """The source is there and offers what it did. False where it has been let go."""
        with self._lock:
            source = self._sources.get(peer)
            if not isinstance(source, MappedSource) or source not in self._ended:
                return False
            self._ended.discard(source)
            if source.connection is not None:
                source.connection.close()
            source.connection = connection
            self._watch(source)
            return True

    def _watch(self, source: MappedSource) -> None:
        if source.connection is not None:
            self._selector.register(source.connection, selectors.EVENT_READ, source)
        else:
            self._ended.add(source)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="memory of other processes", daemon=True
            )
            self._thread.start()
        self._wake.send(b"+")

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(_LOOK_S if self._ended else None):
                with self._lock:
                    if key.data is None:
                        self._woken.recv(64)
                    elif link.ended(key.data.connection):
                        self._selector.unregister(key.fileobj)
                        self._ended.add(key.data)
            for source in self._unused():
                source.close()

    def _unused(self) -> list[MappedSource]:
        """Of those that have ended; they are forgotten."""
        with self._lock:
            now = time.monotonic()
            unused = [
                source
                for source in self._ended
                if not source.reads and now - source.used_at > LET_GO_S
            ]
            for source in unused:
                self._ended.discard(source)
                if self._sources.get(source.peer) is source:
                    del self._sources[source.peer]
            return unused

    def close(self) -> None:
        """Lets all memory go. No read may be under way."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sources = list(self._sources.values())
            self._sources.clear()
            self._wake.send(b"-")
        if self._thread is not None:
            self._thread.join()
        self._selector.close()
        self._woken.close()
        self._wake.close()
        for source in sources:
            source.close()
