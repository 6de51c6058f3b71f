"""Fills tensors with the weights of running ranks: find sources, compare, plan, read, check, report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch

from loader.candidates import Candidate
from loader.digests import DigestCell
from loader.engine import Engine, lend
from loader.errors import (
    Cancelled,
    DigestMismatch,
    DigestsMissing,
    LoaderError,
    SourceLost,
    TornRead,
    WeightsMismatch,
    listed,
)
from loader.plan import Span, alternates, complete_tensors
from loader.regions import Shard, describe, device_of
from loader.sources import find_sources
from loader.transfer import OnProgress, Pace, Progress, Share, Transfer, pace_for
from loader.verify import HeaderCell
from registry import Manifest, RankRecord, Registry
from registry.backoff import Backoff
from registry.errors import InvalidField, RegistryError
from registry.waiting import Wanted

log = logging.getLogger(__name__)
Verify = Literal["header", "digest"]
TRIES = 5  # of a read that is torn by an update of the source, with about a second of waiting between them in all


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `seconds` is all of it, `transfer_s` the reads with their checks, `digest_s` what digests took besides.

    `shares` has, for each source that was tried last, the bytes that came from it, and why it was dropped, if it was.
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
    digest_s: float
    shares: tuple[Share, ...]

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
    verify: Verify = "header",
    version: int | None = None,
    max_sources: int = 4,
    pace: Pace | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> LoadReport:
    """Fills `tensors` in place with those of `rank` of the instance `source`, of several that are named, or of any that serves
    a ModelIdentity; from up to `max_sources` that have the same version of the same model, at once.

    Waits up to `timeout_s` for an instance to be ready; from then on it takes as long as bytes keep coming (see `Pace`). `cancel`,
    set from any thread, ends it with Cancelled. That all bytes are of one version of the source's weights is always checked; with
    `verify="digest"` the bytes of each tensor are, too. Raises WeightsMismatch and DigestsMissing before a byte has moved;
    SourceLost, Stalled, TornRead or Cancelled when the tensors may hold a part (`details["complete"]` names those that are whole);
    DigestMismatch; VersionUnavailable, SourceUnreachable; what `Registry.resolve` raises; TensorsUnusable.
    """
    dst = describe(tensors, shards)
    if not source:
        raise InvalidField("no instance to load from", field="source")
    if verify not in ("header", "digest"):
        raise InvalidField(f"verify {verify!r} is not valid: say header or digest", field="verify")
    if not timeout_s >= 0:
        raise InvalidField(f"timeout_s {timeout_s} is not valid: it is 0 seconds or more", field="timeout_s")
    if not isinstance(rank, int):
        raise InvalidField(f"rank {rank!r} is not valid: it is a whole number", field="rank")
    if max_sources < 1:
        raise InvalidField(f"max_sources {max_sources} is not valid: it is 1 or more", field="max_sources")
    with ExitStack() as undo:
        lend(engine, undo, *dst.regions)
        return _Load(
            registry=registry,
            engine=engine,
            wanted=source,
            rank=rank,
            tensors=tensors,
            dst=dst,
            device=device_of(tensors),
            deadline=time.monotonic() + timeout_s,
            verify=verify,
            version=version,
            max_sources=max_sources,
            pace=pace or pace_for(engine.protocol),
            on_progress=progress or _ignore,
            cancel=cancel or threading.Event(),
        ).run()


@dataclass
class _Load:
    registry: Registry
    engine: Engine
    wanted: Wanted
    rank: int
    tensors: Mapping[str, torch.Tensor]
    dst: Manifest
    device: torch.device
    deadline: float
    verify: Verify
    version: int | None
    max_sources: int
    pace: Pace
    on_progress: OnProgress
    cancel: threading.Event
    avoid: set[str] = field(default_factory=set)  # incarnations that were lost

    def run(self) -> LoadReport:
        """A torn read is tried again, lost sources are done without, until there is none left."""
        start = time.monotonic()
        backoff = Backoff(0.03, 1.0)
        retries = 0
        records = self._find()
        while True:
            try:
                return self._once(records, start, retries)
            except TornRead as exc:
                retries += 1
                if retries == TRIES:
                    raise
                log.info("%s; reading again", exc)
                if self.cancel.wait(backoff.next_s()):
                    raise Cancelled("the load was cancelled") from exc
                records = self._find()
                if not records:
                    raise
            except SourceLost as exc:
                records = self._find_another()
                if not records:
                    raise
                log.warning("%s; going on with another source", exc)

    def _find(self) -> list[RankRecord]:
        return find_sources(
            self.registry,
            self.engine,
            self.wanted,
            self.rank,
            version=self.version,
            deadline=self.deadline,
            avoid=self.avoid,
            # Only what says which box of the whole it is can be told to be the same in another rank.
            replicas=not any(entry.opaque for entry in self.dst.tensors),
        )

    def _find_another(self) -> list[RankRecord]:
        """Whoever is there now: a load that has lost its sources does not wait for new ones."""
        self.deadline = time.monotonic()
        try:
            return self._find()
        except (RegistryError, LoaderError) as exc:
            log.info("no other source: %s", exc)
            return []

    def _once(self, records: Sequence[RankRecord], start: float, retries: int) -> LoadReport:
        with ExitStack() as undo:
            candidates = [candidate for candidate in self._compare(records) if candidate.enter(undo)]
            if not candidates:
                raise TornRead(f"the record of {records[0].key} changed before it was read: load again", key=records[0].key)
            spans = alternates([candidate.ops for candidate in candidates])
            table = self._digest_cell(candidates, undo)
            also = [] if table is None else [_span_of_digests(table, candidates)]
            transfer = Transfer(
                self.engine, [*spans, *also], [one.source() for one in candidates], self.pace, self.on_progress, self.cancel
            )
            transfer_start = time.monotonic()
            try:
                self._run(transfer, candidates)
            except (SourceLost, TornRead, Cancelled) as exc:
                raise self._with_what_came(exc, candidates, transfer.checked, spans) from exc
            transfer_s = time.monotonic() - transfer_start
            if table is not None:
                self._compare_digests(table, candidates)
            digest_s = time.monotonic() - transfer_start - transfer_s
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
            digest_s=digest_s,
            shares=tuple(transfer.shares),
        )

    def _run(self, transfer: Transfer, candidates: Sequence[Candidate]) -> None:
        """Remembers which sources were lost."""
        try:
            transfer.run()
        except SourceLost:
            self.avoid.update(candidate.record.incarnation for candidate in candidates)
            raise
        for candidate, share in zip(candidates, transfer.shares, strict=True):
            # What one that was dropped on the way had brought, it brought while it was registered.
            if share.nbytes and share.error is None and not candidate.is_registered():
                self.avoid.add(candidate.record.incarnation)
                raise SourceLost(f"{candidate.record.key} was withdrawn or evicted meanwhile")

    def _compare(self, records: Sequence[RankRecord]) -> list[Candidate]:
        """The first that fit the destination and, with digests, have them alike; raises why not where none does."""
        candidates: list[Candidate] = []
        misfits: list[LoaderError] = []
        algorithm = ""  # that of the first's digests, if they are wanted
        for record in records:
            if len(candidates) == self.max_sources:
                break
            try:
                candidate = Candidate(self.registry, self.engine, record, self.dst, HeaderCell(self.device))
                theirs = candidate.algorithm if self.verify == "digest" else ""
            except (WeightsMismatch, SourceLost, DigestsMissing) as exc:
                misfits.append(exc)
                if isinstance(exc, SourceLost):
                    self.avoid.add(record.incarnation)
                continue
            if not candidates:
                algorithm = theirs
            if theirs == algorithm:
                candidates.append(candidate)
        if not candidates:
            raise misfits[0]
        for misfit in misfits:
            log.info("not read from: %s", misfit)
        return candidates

    def _digest_cell(self, candidates: Sequence[Candidate], undo: ExitStack) -> DigestCell | None:
        """Where the sources' digests are read to, if they are wanted."""
        if self.verify != "digest":
            return None
        cell = DigestCell(self.tensors, self.device, candidates[0].algorithm)
        lend(self.engine, undo, cell.region)
        return cell

    def _compare_digests(self, cell: DigestCell, candidates: Sequence[Candidate]) -> None:
        wrong = cell.differing(self.tensors)
        if wrong:
            raise DigestMismatch(
                f"{len(wrong)} of {len(self.tensors)} tensors are not what {_names(candidates)} published, though they were read "
                f"whole: {listed(wrong)}: check both machines' memory, and whether somebody writes to the source's weights outside "
                "of `update`",
                tensors=wrong,
                complete=[name for name in self.tensors if name not in set(wrong)],
            )

    def _with_what_came(
        self, exc: LoaderError, candidates: Sequence[Candidate], checked: Sequence[Span], spans: Sequence[Span]
    ) -> LoaderError:
        """The error with what the caller may want to know: which sources, and which of the tensors are whole."""
        complete = complete_tensors(checked, self.dst.tensors) if checked else []
        came, wanted = (sum(span.nbytes for span in some) for some in (checked, spans))
        held = f"{came} of {wanted} bytes have come, {len(complete)} of {len(self.dst.tensors)} tensors are whole"
        what = str(exc) if isinstance(exc, Cancelled) else f"{_names(candidates)} could not be read to the end ({exc})"
        return type(exc)(
            f"{what}; {held if came else 'no tensor is usable'}: load again, or from another instance",
            key=candidates[0].record.key,
            sources=[candidate.record.key for candidate in candidates],
            complete=complete,
        )


def _names(candidates: Sequence[Candidate]) -> str:
    return " and ".join(candidate.record.key for candidate in candidates)


def _span_of_digests(cell: DigestCell, candidates: Sequence[Candidate]) -> Span:
    """Read with the weights, so that the header vouches for them too."""
    tables = [candidate.manifest.digests for candidate in candidates]
    return Span(cell.region.addr, cell.region.nbytes, tuple(table.addr for table in tables if table is not None))


def _ignore(_: Progress) -> None:
    pass
