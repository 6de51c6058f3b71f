"""Fills tensors with the weights of running ranks: find sources, compare, plan, read, check, report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from loader.engine import Engine
from loader.errors import Cancelled, LoaderError, SourceLost, TornRead, WeightsMismatch
from loader.plan import ReadOp, Span, alternates, complete_tensors, plan
from loader.regions import Shard, describe
from loader.sources import Wanted, find_sources
from loader.transfer import OnProgress, Pace, Progress, Share, Source, Transfer, pace_for
from loader.verify import HeaderCell, fetch_header
from registry import Event, Manifest, RankJoined, RankLost, RankRecord, RankUpdated, Registry
from registry.backoff import Backoff
from registry.errors import EtcdError, InvalidField, RecordDamaged, RegistryError

log = logging.getLogger(__name__)
_TRIES = 5  # of a read that is torn by an update of the source, with about a second of waiting between them in all


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `seconds` is all of it, `transfer_s` the bulk reads with their checks alone.

    `shares` has, for each source that was tried, the bytes that came from it and why it was dropped, if it was.
    """

    instance: str
    rank: int
    version: int
    protocol: str
    tensors: int
    nbytes: int
    reads: int
    retries: int
    seconds: float
    transfer_s: float
    shares: tuple[Share, ...] = ()

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0


def load(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    rank: int,
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard] | None = None,
    timeout_s: float = 60.0,
    version: int | None = None,
    max_sources: int = 4,
    pace: Pace | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> LoadReport:
    """Fills `tensors` in place with those of `rank` of the instance `source`, of several that are named, or of any that serves
    a ModelIdentity; from up to `max_sources` that have the same version of the same model, at once.

    Waits up to `timeout_s` for an instance to be ready; from then on it takes as long as bytes keep coming (see `Pace`). `cancel`,
    set from any thread, ends it with Cancelled. Raises WeightsMismatch before a byte has moved; SourceLost, Stalled, TornRead or
    Cancelled when the tensors may hold a part (`details["complete"]` names those that are whole); VersionUnavailable,
    SourceUnreachable; what `Registry.resolve` raises; TensorsUnusable.
    """
    dst = describe(tensors, shards)
    if not source:
        raise InvalidField("no instance to load from", field="source")
    with ExitStack() as undo:
        for region in dst.regions:
            engine.register(region)
            undo.callback(engine.unregister, region)
        task = _Load(
            registry=registry,
            engine=engine,
            wanted=source,
            rank=rank,
            dst=dst,
            device=next((tensor.device for tensor in tensors.values() if tensor.numel()), torch.device("cpu")),
            deadline=time.monotonic() + timeout_s,
            version=version,
            max_sources=max_sources,
            pace=pace or pace_for(engine.protocol),
            on_progress=progress or _ignore,
            cancel=cancel or threading.Event(),
        )
        return task.run()


@dataclass
class _Candidate:
    """A source that has been chosen, and what is needed to read from it."""

    record: RankRecord
    ops: tuple[ReadOp, ...]
    cell: HeaderCell
    bad_news: LoaderError | None = None

    def hear(self, event: Event) -> None:
        """What the registry tells while the source is being read."""
        if isinstance(event, RankLost) and event.record.incarnation == self.record.incarnation:
            self.bad_news = SourceLost(f"{self.record.key} is not registered any more: {event.reason}")
        elif isinstance(event, RankJoined | RankUpdated):
            now = event.record
            if now.rank == self.record.rank and now.incarnation != self.record.incarnation:
                self.bad_news = SourceLost(f"{self.record.key} belongs to another process now")
            elif now.rank == self.record.rank and now.version != self.record.version:
                self.bad_news = _torn(self.record, f"version {self.record.version}, now {now.version}")


@dataclass
class _Load:
    registry: Registry
    engine: Engine
    wanted: Wanted
    rank: int
    dst: Manifest
    device: torch.device
    deadline: float
    version: int | None
    max_sources: int
    pace: Pace
    on_progress: OnProgress
    cancel: threading.Event

    def run(self) -> LoadReport:
        """A torn read is tried again, a lost source does without it, until there is none left."""
        start = time.monotonic()
        backoff = Backoff(0.03, 1.0)
        avoid: set[str] = set()
        retries = 0
        records = self._find(avoid)
        while True:
            try:
                return self._once(records, start, retries)
            except TornRead as exc:
                retries += 1
                if retries == _TRIES:
                    raise
                log.info("%s; reading again", exc)
                if self.cancel.wait(backoff.next_s()):
                    raise Cancelled("the load was cancelled") from exc
                records = self._find(avoid)
            except SourceLost as exc:
                avoid.update(record.incarnation for record in records)
                records = self._find_another(avoid)
                if not records:
                    raise
                log.warning("%s; going on with another source", exc)

    def _find_another(self, avoid: set[str]) -> list[RankRecord]:
        """Whoever is there now: a load that has lost its sources does not wait for new ones."""
        self.deadline = time.monotonic()
        try:
            return self._find(avoid)
        except (RegistryError, LoaderError) as exc:
            log.info("no other source: %s", exc)
            return []

    def _find(self, avoid: set[str]) -> list[RankRecord]:
        return find_sources(
            self.registry,
            self.engine,
            self.wanted,
            self.rank,
            version=self.version,
            deadline=self.deadline,
            avoid=avoid,
            at_most=self.max_sources,
        )

    def _once(self, records: Sequence[RankRecord], start: float, retries: int) -> LoadReport:
        with ExitStack() as undo:
            candidates = [one for one in self._compare(records, undo) if self._take_ticket(one.record, undo)]
            if not candidates:
                raise TornRead(f"the record of {records[0].key} changed before it was read: load again", key=records[0].key)
            for candidate in candidates:
                watch = self.registry.watch(candidate.record.instance, candidate.record.rank)
                undo.callback(watch.stop)
                watch.call(candidate.hear)
            spans = alternates([candidate.ops for candidate in candidates])
            sources = [self._source(candidate) for candidate in candidates]
            transfer = Transfer(self.engine, spans, sources, self.pace, self.on_progress, self.cancel)
            transfer_start = time.monotonic()
            try:
                transfer.run()
                for candidate, share in zip(candidates, transfer.shares, strict=True):
                    if share.nbytes:
                        self._check_record(candidate.record)
            except (SourceLost, TornRead, Cancelled) as exc:
                raise self._with_what_came(exc, candidates, transfer.checked, spans) from exc
            transfer_s = time.monotonic() - transfer_start
        share = max(transfer.shares, key=lambda share: share.nbytes)
        record = candidates[transfer.shares.index(share)].record
        return LoadReport(
            instance=record.instance,
            rank=self.rank,
            version=record.version,
            protocol=record.protocol,
            tensors=len(self.dst.tensors),
            nbytes=sum(span.nbytes for span in spans),
            reads=len(spans),
            retries=retries,
            seconds=time.monotonic() - start,
            transfer_s=transfer_s,
            shares=tuple(transfer.shares),
        )

    def _compare(self, records: Sequence[RankRecord], undo: ExitStack) -> list[_Candidate]:
        """Those whose manifests fit the destination, with a plan for each; raises the first one's difference where none does."""
        candidates: list[_Candidate] = []
        misfits: list[LoaderError] = []
        for record in records:
            name = f"{record.instance}/{record.rank}"
            try:
                manifest = self._manifest_of(record)
                if record.rank != self.rank and any(entry.opaque for entry in manifest.tensors):
                    continue  # nothing says that a replica along dp holds the same
                ops = plan(name, manifest, self.dst)
            except (WeightsMismatch, SourceLost) as exc:
                misfits.append(exc)
                continue
            cell = HeaderCell(self.device)
            self.engine.register(cell.region)
            undo.callback(self.engine.unregister, cell.region)
            candidates.append(_Candidate(record, ops, cell))
        if not candidates:
            raise misfits[0]
        for misfit in misfits:
            log.info("not read from: %s", misfit)
        return candidates

    def _manifest_of(self, record: RankRecord) -> Manifest:
        try:
            return self.registry.manifest(record)
        except RecordDamaged as exc:
            if self._now(record) is None:
                raise SourceLost(f"{record.key} is not registered any more: load again", key=record.key) from exc
            raise

    def _take_ticket(self, record: RankRecord, undo: ExitStack) -> bool:
        """Says in etcd that we are reading, so that a source that wants to leave waits for us. False if it has changed."""
        try:
            ticket = self.registry.pull(record)
        except EtcdError as exc:
            log.warning("reading from %s without a ticket, so it may leave meanwhile: %s", record.key, exc)
            return True
        if ticket is None:
            return False
        undo.enter_context(ticket)
        return True

    def _source(self, candidate: _Candidate) -> Source:
        record, cell = candidate.record, candidate.cell
        return Source(record.key, record.session_id, lambda: self._check_header(record, cell), lambda: candidate.bad_news)

    def _check_header(self, record: RankRecord, cell: HeaderCell) -> None:
        header = fetch_header(self.engine, record, cell)
        if header.updating or header.version != record.version:
            raise _torn(record, f"version {record.version}, now {header.version}{', being changed' if header.updating else ''}")

    def _check_record(self, record: RankRecord) -> None:
        """The registry's view after the read: an evicted source does not count, whatever its memory says."""
        try:
            now = self._now(record)
        except EtcdError as exc:
            log.warning("not checked whether %s is still registered; its header says that it is the same: %s", record.key, exc)
            return
        if now is None:
            raise SourceLost(f"{record.key} was withdrawn or evicted meanwhile", key=record.key)

    def _now(self, record: RankRecord) -> RankRecord | None:
        """The registration that `record` is of, as it is now."""
        return next((now for now in self.registry.ranks(record.instance) if now.incarnation == record.incarnation), None)

    def _with_what_came(
        self, exc: LoaderError, candidates: Sequence[_Candidate], checked: Sequence[Span], spans: Sequence[Span]
    ) -> LoaderError:
        """The error with what the caller may want to know: which source it was, and which of the tensors are whole."""
        keys = [candidate.record.key for candidate in candidates]
        complete = complete_tensors(checked, self.dst.tensors) if checked else []
        came, wanted = (sum(span.nbytes for span in some) for some in (checked, spans))
        held = f"{came} of {wanted} bytes have come, {len(complete)} of {len(self.dst.tensors)} tensors are whole"
        what = f"{' and '.join(keys)} could not be read to the end ({exc})" if not isinstance(exc, Cancelled) else str(exc)
        return type(exc)(
            f"{what}; {held if came else 'no tensor is usable'}: load again, or from another instance",
            **{**exc.details, "key": keys[0], "sources": keys, "complete": complete},
        )


def _torn(record: RankRecord, how: str) -> TornRead:
    return TornRead(f"the weights of {record.key} changed while they were being read ({how})", key=record.key)


def _ignore(_: Progress) -> None:
    pass
