"""One rank that may be read from: what it holds, and whether it is still what it was resolved to
be.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack, suppress

import torch

from engine_loader.digests.table import ALGORITHMS
from engine_loader.engines.base import Engine, lend
from engine_loader.engines.nearness import Nearness
from engine_loader.errors import (
    DigestsMissing,
    EngineFailed,
    LoaderError,
    ReadFailed,
    SourceEvicted,
    SourceLost,
    TornRead,
)
from engine_loader.planning.arrivals import Blocks
from engine_loader.planning.matching import Origin
from engine_loader.publishing.header import HeaderCell, fetch_header, peer_of_record
from engine_loader.tensors.cuda import on_default_stream, to_register
from engine_loader.transfer.pipe import Source, Stock
from engine_registry import (
    Event,
    Manifest,
    RankJoined,
    RankLost,
    RankRecord,
    RankState,
    RankUpdated,
    Registry,
)
from engine_registry.errors import EtcdError
from engine_registry.registration.writes import EVICTED, SOURCE_EVICTED
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_NEWS_S = 0.25  # how much later than etcd a watch may know


class SourceRank:
    """Holds nothing until `lend`. Its registry and engine are the loader's."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        record: RankRecord,
        manifest: Manifest,
        own: bool,
        device: torch.device,
    ) -> None:
        """`own`: it has the rank that is to be filled. `device`: of the tensors that are filled.
        SourceLost if it loads, and has nothing to read meanwhile.
        """
        self._registry = registry
        self._engine = engine
        self._reading = threading.Lock()
        self._connecting = threading.Lock()
        self._connected = False
        self._lent = False
        self._bad_news: LoaderError | None = None
        self.outlived = False  # its process has ended, and the engine reads its memory on
        self._has_news = threading.Event()
        self.record = record
        self.manifest = manifest
        self.origin = Origin(f"{record.instance}/{record.rank}", self.manifest, own)
        self._blocks: Blocks | None = None
        if record.state is RankState.LOADING:
            if not self.manifest.block_nbytes:
                raise SourceLost(
                    f"{record.key} is still loading, and cannot be read from meanwhile",
                    "load again when it is ready",
                    key=record.key,
                )
            self._blocks = Blocks(self.manifest.regions, self.manifest.block_nbytes)
        self._marks = bytes(len(self._blocks or ()))
        self._device = device
        here = torch.device("cpu") if engine.reads_to_host else device
        self._cell = HeaderCell(here, len(self._marks))

    @property
    def algorithm(self) -> str:
        """Of its digests; DigestsMissing where there are none that we could compare with."""
        table = self.manifest.digests if self._blocks is None else None
        if table is None or table.algorithm not in ALGORITHMS:
            why = (
                "offers no digests"
                if table is None
                else f"has digests by {table.algorithm!r}, which this version cannot compute"
            )
            raise DigestsMissing(
                f"{self.record.key} {why}",
                'publish its weights with `digests=True`, or load with `verify="header"`',
                key=self.record.key,
            )
        return table.algorithm

    def follow(self, now: RankRecord) -> bool:
        """Takes the record as it is now, if what is read stands as it was; whether it does."""
        same = now.as_of(self.record.version, self.record.content)
        if same is None or (same.state, same.shift) != (self.record.state, self.record.shift):
            return False
        self.record = same
        return True

    def lend(self, undo: ExitStack) -> None:
        """The memory that its header is read to. Where memory is mapped, that begins now. Once is
        enough until `undo` is closed.
        """
        if self._lent:
            return
        self._lent = True
        undo.callback(setattr, self, "_lent", False)
        lend(
            self._engine,
            undo,
            to_register(self._cell.region, self._cell.device.type),
            owner=self._cell,
        )
        if not self._engine.outlives_sources or self._blocks is not None:
            return
        if self._engine.is_connected(peer_of_record(self.record)):
            self._connected = True
        else:
            threading.Thread(
                target=self._meet, name=f"contact with {self.record.key}", daemon=True
            ).start()

    @property
    def news(self) -> LoaderError | None:
        """Why it should not be read from any more, as far as etcd says."""
        return self._bad_news

    def was_evicted(self) -> bool:
        """Whether its registration was ended on purpose, so that it should not be read from.

        Where no news comes of why it has gone, it may be so.
        """
        self._has_news.wait(_NEWS_S)
        if self._bad_news is None:
            return not self.outlived
        return isinstance(self._bad_news, SourceEvicted)

    def for_transfer(self) -> Source:
        """The rank as a Transfer takes it."""
        stock = (
            Stock(self._has, lambda: self._marks.count(1) / max(len(self._marks), 1))
            if self._blocks is not None
            else None
        )
        return Source(
            self.record.key,
            peer_of_record(self.record),
            self._check_header,
            lambda: self._bad_news,
            stock,
            ready=lambda: self._connected,
            near=Nearness.of(self.record, self._engine),
        )

    @property
    def within_host(self) -> bool:
        """Whether its memory is read without the network."""
        return self._engine.reads_within_host(peer_of_record(self.record))

    def _has(self, addr: int, nbytes: int) -> bool:
        if self._blocks is None:
            return True
        numbers = self._blocks.touched_by(addr, nbytes)
        return self._marks.find(0, numbers.start, numbers.stop) < 0

    def is_registered(self) -> bool:
        """The registry's view after the read: an evicted source does not count, whatever its memory
        says.
        """
        try:
            return self._registry.current(self.record) is not None
        except EtcdError as exc:
            log.warning(
                "not checked whether %s is still registered; its header says so: %s",
                self.record.key,
                exc,
                extra=fields("source_unchecked", key=self.record.key, error=exc),
            )
            return True

    def _meet(self) -> None:
        """Its memory is mapped while the plan is made. The first check says why it cannot be."""
        with suppress(ReadFailed, EngineFailed), on_default_stream(self._device):
            self._connect()
            self._connected = True

    def _connect(self) -> None:
        with self._connecting:
            self._engine.connect(peer_of_record(self.record), self.manifest.exports)

    def _check_header(self) -> None:
        with on_default_stream(self._device):
            self._connect()
            # a check that was given up as it hung may go on at the same time as the one after it
            with self._reading:
                header = fetch_header(self._engine, self.record, self._cell)
                marks = self._cell.read_marks()
        if header.updating:
            raise self._torn(f"version {header.version}, being changed")
        if (header.version, header.content) != (self.record.version, self.record.content):
            raise self._torn(f"version {header.version} with content {header.content[:8]}")
        self._marks = marks

    def notice(self, event: Event) -> None:
        """What the registry says of it. From any one thread."""
        self._judge(event)
        if self._bad_news is not None or self.outlived:
            self._has_news.set()

    def _judge(self, event: Event) -> None:
        if isinstance(event, RankLost) and event.record.incarnation == self.record.incarnation:
            evicted = event.reason in (EVICTED, SOURCE_EVICTED)
            if self._engine.outlives_sources and not evicted:
                self.outlived = True  # its header says until the end what its memory holds
                return
            kind = SourceEvicted if evicted else SourceLost
            self._bad_news = kind(
                f"{self.record.key} is not registered any more: {event.reason}", reason=event.reason
            )
        elif isinstance(event, RankJoined | RankUpdated) and event.record.key == self.record.key:
            now = event.record
            if now.incarnation != self.record.incarnation:
                if self._engine.outlives_sources:
                    self.outlived = True
                    return
                self._bad_news = SourceLost(f"{self.record.key} belongs to another process now")
            elif now.header_addr != self.record.header_addr:
                pass  # a newer snapshot lies elsewhere; where we read, the header says how it is
            elif (now.version, now.content) != (self.record.version, self.record.content):
                self._bad_news = self._torn(f"version {now.version} with content {now.content[:8]}")

    def _torn(self, now: str) -> LoaderError:
        return TornRead(
            f"the weights of {self.record.key} changed while they were being read: version "
            f"{self.record.version} with content "
            f"{self.record.content[:8]} was to be read, now it has {now}",
            key=self.record.key,
        )
