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

from loader import metrics
from loader.candidates import Candidate
from loader.coverage import complete_tensors
from loader.cuda import on_default_stream, to_register, wait_for
from loader.digest_check import DigestCheck
from loader.engine import Engine, lend
from loader.errors import Cancelled, LoaderError, SourceLost, TornRead
from loader.plan import differences, plan
from loader.reads import Span
from loader.regions import Shard, describe, devices_of, local_parts
from loader.selection import Selection
from loader.sources import Found, find_sources
from loader.staging import Staging
from loader.transfer import OnProgress, Pace, Progress, Share, Transfer, pace_for
from loader.verify import HeaderCell
from registry import Manifest, RankRecord, Registry
from registry.backoff import Backoff
from registry.errors import InvalidField, RegistryError
from registry.logs import fields
from registry.waiting import Wanted

log = logging.getLogger(__name__)
Verify = Literal["header", "digest"]
_STAGING_NBYTES = 48 << 20  # for what is not read straight to its place
TRIES = 5  # of a read that is torn by an update of the source, with about a second of waiting between them in all


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `seconds` is all of it, `transfer_s` the reads with their checks, `digest_s` what digests took besides.

    `nbytes` are those of the tensors; `read_nbytes` have been read for them, and may be more where that was quicker.
    `shares` has, for each source that was tried last, the bytes that came from it, and why it was dropped, if it was.
    """

    instance: str
    rank: int | None
    version: int
    protocol: str
    tensors: int
    nbytes: int
    read_nbytes: int
    reads: int
    retries: int
    seconds: float
    transfer_s: float
    digest_s: float
    shares: tuple[Share, ...]

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0

    def facts(self) -> dict[str, object]:
        """For a log line."""
        names = ("instance", "rank", "version", "protocol", "tensors", "nbytes", "retries")
        sources = [share.name for share in self.shares if share.nbytes]
        return {**{name: getattr(self, name) for name in names}, "seconds": round(self.seconds, 6), "sources": sources}


def load(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    rank: int | None = None,
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Shard] | None = None,
    timeout_s: float = 60.0,
    verify: Verify = "header",
    version: int | None = None,
    max_sources: int = 4,
    partial: bool = False,
    pace: Pace | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> LoadReport:
    """Fills `tensors` in place with those of `rank` of the instance `source`, of several that are named, or of any that serves
    a ModelIdentity; from up to `max_sources` that have the same version of the same model, at once.

    DTensors, and tensors that say in `shards` which box of the whole they are, may be filled from ranks of another layout, each
    of which holds a part, if all are such. `rank` is then only a hint to who may hold the same, and may be None; and the source
    may have more tensors, as it may with `partial`.

    Waits up to `timeout_s` for an instance to be ready; from then on it takes as long as bytes keep coming (see `Pace`). `cancel`,
    set from any thread, ends it with Cancelled. That all bytes are of one version of the source's weights is always checked; with
    `verify="digest"` the bytes of each tensor are, too. Raises WeightsMismatch and DigestsMissing before a byte has moved;
    SourceLost, Stalled, TornRead or Cancelled when the tensors may hold a part (`details["complete"]` names those that are whole);
    DigestMismatch; VersionUnavailable, SourceUnreachable; what `Registry.resolve` raises; TensorsUnusable.
    """
    parts, shards = local_parts(tensors, shards)
    dst = describe(parts, shards)
    if not source:
        raise InvalidField("no instance to load from", field="source")
    if verify not in ("header", "digest"):
        raise InvalidField(f"verify {verify!r} is not valid: say header or digest", field="verify")
    if not timeout_s >= 0:
        raise InvalidField(f"timeout_s {timeout_s} is not valid: it is 0 seconds or more", field="timeout_s")
    boxes = not any(entry.opaque for entry in dst.tensors)
    if rank is None and not boxes:
        first = next(entry.name for entry in dst.tensors if entry.opaque)
        raise InvalidField(
            f"{first} does not say which part of the whole it is: say in `shards`, or from which `rank`", field="rank"
        )
    if rank is not None and not isinstance(rank, int):
        raise InvalidField(f"rank {rank!r} is not valid: it is a whole number", field="rank")
    if max_sources < 1:
        raise InvalidField(f"max_sources {max_sources} is not valid: it is 1 or more", field="max_sources")
    devices = devices_of(parts)
    with ExitStack() as undo:
        lend(engine, undo, *dst.regions)
        undo.enter_context(on_default_stream(devices[0]))
        undo.callback(wait_for, devices)  # nothing is on its way to the tensors any more
        wait_for(devices)  # nor anything that was begun before
        return _Load(
            registry=registry,
            engine=engine,
            wanted=source,
            rank=rank,
            tensors=parts,
            dst=dst,
            boxes=boxes,
            partial=boxes or partial,
            device=devices[0],
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
    rank: int | None
    tensors: Mapping[str, torch.Tensor]
    dst: Manifest
    boxes: bool  # all of it says which part of the whole it is
    partial: bool
    device: torch.device
    deadline: float
    verify: Verify
    version: int | None
    max_sources: int
    pace: Pace
    on_progress: OnProgress
    cancel: threading.Event
    reader: RankRecord | None = None  # the rank that is filled, if it is registered
    avoid: set[str] = field(default_factory=set)  # incarnations that were lost
    given_up: list[str] = field(default_factory=list)  # why sources were, since the load last went on without some

    def run(self) -> LoadReport:
        """Counted, however it ends."""
        try:
            report = self._run_through()
        except BaseException as exc:
            metrics.LOADS.inc(metrics.outcome_of(exc))
            raise
        metrics.count_loaded(report)
        log.info(
            "loaded %d bytes of %s version %d in %.3f s",
            report.nbytes,
            report.instance,
            report.version,
            report.seconds,
            extra=fields("loaded", **report.facts()),
        )
        return report

    def _run_through(self) -> LoadReport:
        """A torn read is tried again, lost sources are done without, until there is none left."""
        start = time.monotonic()
        backoff = Backoff(0.03, 1.0)
        retries = 0
        found = self._find()
        while True:
            try:
                return self._once(found, start, retries)
            except TornRead as exc:
                retries += 1
                if retries == TRIES:
                    raise
                log.info("%s; reading again", exc, extra=fields("torn_retry", retries=retries, **exc.details))
                metrics.RETRIES.inc()
                if self.cancel.wait(backoff.next_s()):
                    raise Cancelled("the load was cancelled") from exc
                found = self._find()
                if not found:
                    raise
                self.given_up = [reason for reason in self.given_up if reason != "torn"]  # they are asked again
                self._count_failovers()
            except SourceLost as exc:
                found = self._find_another()
                if not found:
                    raise
                log.warning("%s; going on with another source", exc, extra=fields("failover", sources=exc.details.get("sources")))
                self._count_failovers()

    def _count_failovers(self) -> None:
        """The load goes on, or has ended well."""
        for reason in self.given_up:
            metrics.FAILOVERS.inc(reason)
        self.given_up.clear()

    def _find(self) -> Found:
        return find_sources(
            self.registry,
            self.engine,
            self.wanted,
            self.rank,
            version=self.version,
            deadline=self.deadline,
            avoid=self.avoid,
            boxes=self.boxes,
        )

    def _find_another(self) -> Found:
        """Whoever is there now: a load that has lost its sources does not wait for new ones."""
        self.deadline = time.monotonic()
        try:
            return self._find()
        except (RegistryError, LoaderError) as exc:
            log.info("no other source: %s", exc, extra=fields("no_other_source", error=exc))
            return Found([], [])

    def _once(self, found: Found, start: float, retries: int) -> LoadReport:
        with ExitStack() as undo:
            candidates = self._choose(found, undo)
            spans = plan([candidate.origin for candidate in candidates], self.dst, self.pace.costs, partial=self.partial)
            check = DigestCheck(candidates, self.dst, self.tensors, self.device) if self.verify == "digest" else None
            if check is not None:
                check.lend(self.engine, undo)
            reads = [*spans, *(check.spans if check is not None else ())]
            transfer = Transfer(
                self.engine,
                reads,
                [one.source() for one in candidates],
                self.pace,
                lambda progress: self._tell(progress, candidates),
                self.cancel,
                self._stage(spans, undo),
            )
            transfer_start = time.monotonic()
            try:
                self._run(transfer, candidates)
            except (SourceLost, TornRead, Cancelled) as exc:
                raise self._with_what_came(exc, candidates, transfer.checked, reads) from exc
            transfer_s = time.monotonic() - transfer_start
            if check is not None:
                check.compare(self.dst)
            self._count_failovers()
            digest_s = time.monotonic() - transfer_start - transfer_s
        share = max(transfer.shares, key=lambda share: share.nbytes)
        record = candidates[transfer.shares.index(share)].record
        return LoadReport(
            instance=record.instance,
            rank=self.rank,
            version=record.version,
            protocol=record.protocol,
            tensors=len(self.dst.tensors),
            nbytes=sum(span.payload for span in spans),
            read_nbytes=sum(span.nbytes for span in spans),
            reads=len(spans),
            retries=retries,
            seconds=time.monotonic() - start,
            transfer_s=transfer_s,
            digest_s=digest_s,
            shares=tuple(transfer.shares),
        )

    def _tell(self, progress: Progress, candidates: Sequence[Candidate]) -> None:
        for candidate in candidates:
            candidate.tell(progress)
        self.on_progress(progress)

    def _choose(self, found: Found, undo: ExitStack) -> list[Candidate]:
        """Those that are read from; TornRead if they are not any more what they were resolved to be."""
        selection = Selection(
            self.dst,
            lambda record: Candidate(
                self.registry, self.engine, record, record.rank == self.rank, HeaderCell(self.device), self.reader
            ),
            digests=self.verify == "digest",
            max_sources=self.max_sources,
            partial=self.partial,
            session_id=self.engine.session_id,
        )
        try:
            chosen = selection.choose(found)
        finally:
            self.avoid.update(record.incarnation for record in selection.gone)
        entered = [candidate for candidate in chosen if candidate.enter(undo)]
        if len(entered) < len(chosen) and differences([one.origin for one in entered], self.dst, partial=self.partial):
            gone = next(candidate.record.key for candidate in chosen if candidate not in entered)
            raise TornRead(f"the record of {gone} changed before it was read: load again", key=gone)
        return entered

    def _stage(self, spans: Sequence[Span], undo: ExitStack) -> Staging | None:
        """Buffers, if any of the reads needs one."""
        staged = [span.nbytes for span in spans if span.lines]
        if not staged:
            return None
        nbytes = max(staged)
        count = min(len(staged), max(2, _STAGING_NBYTES // nbytes))
        staging = Staging(self.tensors.values(), self.device, count, nbytes)
        lend(self.engine, undo, to_register(staging.region, self.device.type))
        return staging

    def _run(self, transfer: Transfer, candidates: Sequence[Candidate]) -> None:
        """Remembers which sources were lost."""
        try:
            transfer.run()
        except SourceLost:
            self.avoid.update(candidate.record.incarnation for candidate in candidates)
            raise
        finally:
            self.given_up += [metrics.reason_of(share.error) for share in transfer.shares if share.error is not None]
        for candidate, share in zip(candidates, transfer.shares, strict=True):
            # What one that was dropped on the way had brought, it brought while it was registered.
            if share.nbytes and share.error is None and not candidate.is_registered():
                self.avoid.add(candidate.record.incarnation)
                self.given_up.append(metrics.reason_of(candidate.news) if candidate.news else "lost")
                raise SourceLost(f"{candidate.record.key} was withdrawn or evicted meanwhile")

    def _with_what_came(
        self, exc: LoaderError, candidates: Sequence[Candidate], checked: Sequence[Span], spans: Sequence[Span]
    ) -> LoaderError:
        """The error with what the caller may want to know: which sources, and which of the tensors are whole."""
        complete = complete_tensors(checked, self.dst.tensors) if checked else []
        came, wanted = (sum(span.payload for span in some) for some in (checked, spans))
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


def _ignore(_: Progress) -> None:
    pass
