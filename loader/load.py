"""Fills tensors with the weights of running ranks: find sources, compare, plan, read, check, report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from loader import metrics
from loader.arrivals import Arrivals
from loader.candidates import Candidate
from loader.cuda import on_default_stream, to_register, wait_for
from loader.destination import Destination
from loader.digest_check import DigestCheck
from loader.engine import Engine, lend
from loader.errors import Cancelled, LoaderError, SourceLost, TornRead, WeightsMismatch
from loader.pace import Pace, pace_for, pace_in_chain
from loader.pipe import Share
from loader.plan import Planner
from loader.reads import Span
from loader.regions import Shard
from loader.replica import Replica, Republication, as_replica
from loader.report import LoadReport
from loader.selection import Selection
from loader.sources import Found, Search
from loader.staging import Staging
from loader.transfer import OnProgress, Progress, Transfer
from registry import Manifest, ModelIdentity, Registry
from registry.backoff import Backoff
from registry.errors import InvalidField, RegistryError
from registry.logs import fields
from registry.waiting import Wanted

log = logging.getLogger(__name__)
Verify = Literal["header", "digest"]
_STAGING_NBYTES = 48 << 20  # for what is not read straight to its place
TRIES = 5  # of a read that is torn by an update of the source, with about a second of waiting between them in all


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
    publish: bool | str | Replica = False,
    pipelined: bool = True,
    pace: Pace | None = None,
    progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> LoadReport:
    """Fills `tensors` in place with those of `rank` of the instance `source`, of several that are named, or of any that serves
    a ModelIdentity; from up to `max_sources` that have the same version of the same model, at once.

    DTensors, and tensors that say in `shards` which box of the whole they are, may be filled from ranks of another layout, each of
    which holds a part, if all are such. `rank` is then only a hint to who may hold the same, and may be None; and the source may
    have more tensors, as it may with `partial`. A Destination saves looking at the tensors where they are loaded again and again.

    For a ModelIdentity and a `rank` that rank will do, of any instance of the model, whatever else of it there is; and so will one
    that is still loading, for what it has by then, unless `pipelined` is False or digests are to be verified. With `publish`, which
    names an instance (see Replica), the rank that is filled becomes such a source, and a complete one in the end:
    `report.publication`, which the caller closes. So many that load at once, each from the one before it, take little longer than
    one.

    Waits up to `timeout_s` for an instance to be ready; from then on it takes as long as bytes keep coming (see `Pace`). `cancel`,
    set from any thread, ends it with Cancelled. That all bytes are of one version of the source's weights is always checked; with
    `verify="digest"` the bytes of each tensor are, too. Raises WeightsMismatch and DigestsMissing before a byte has moved;
    SourceLost, Stalled, TornRead or Cancelled when the tensors may hold a part (`details["complete"]` names those that are whole);
    DigestMismatch; VersionUnavailable, SourceUnreachable; what `Registry.resolve` raises, and with `publish`, what `publish` does;
    TensorsUnusable. Nothing stays published then.
    """
    if isinstance(tensors, Destination) and shards is not None:
        raise InvalidField("a Destination says which boxes its tensors are: give no shards besides", field="shards")
    destination = tensors if isinstance(tensors, Destination) else Destination(tensors, shards)
    parts, dst, devices = destination.parts, destination.manifest, destination.devices
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
    pace = pace or pace_for(engine.protocol)
    replica = as_replica(publish, source)
    if replica is not None:
        pace = pace_in_chain(pace, dst.nbytes)
    by_rank = isinstance(source, ModelIdentity) and rank is not None
    search = Search(
        registry,
        engine,
        source,
        rank,
        boxes,
        version,
        max_sources,
        by_rank,
        pipelined=by_rank and pipelined and verify == "header",
        hop=max(8 * pace.chunk_nbytes, pace.hop_nbytes) / max(dst.nbytes, 1),
    )
    with ExitStack() as undo:
        lend(engine, undo, *dst.regions)
        undo.enter_context(on_default_stream(devices[0]))
        undo.callback(wait_for, devices)  # nothing is on its way to the tensors any more
        wait_for(devices)  # nor anything that was begun before
        return _Load(
            search=search,
            tensors=parts,
            dst=dst,
            planner=Planner(dst, pace.costs, boxes or partial),
            device=devices[0],
            deadline=time.monotonic() + timeout_s,
            verify=verify,
            pace=pace,
            on_progress=progress or _ignore,
            cancel=cancel or threading.Event(),
            arrivals=Arrivals(dst),
            replica=Republication(registry, engine, replica, rank, parts, dst, pace.chunk_nbytes) if replica is not None else None,
        ).run()


@dataclass
class _Load:
    search: Search
    tensors: Mapping[str, torch.Tensor]
    dst: Manifest
    planner: Planner
    device: torch.device
    deadline: float
    verify: Verify
    pace: Pace
    on_progress: OnProgress
    cancel: threading.Event
    replica: Republication | None
    arrivals: Arrivals  # of that version
    version: int | None = None  # that is being loaded
    shares: list[Share] = field(default_factory=list)  # of sources that were read from before, of that version
    avoid: set[str] = field(default_factory=set)  # incarnations that were lost
    given_up: list[str] = field(default_factory=list)  # why sources were, since the load last went on without some

    def run(self) -> LoadReport:
        """Counted, however it ends."""
        try:
            report = self._run_through()
        except BaseException as exc:
            metrics.LOADS.inc(metrics.outcome_of(exc))
            if self.replica is not None:
                self.replica.close()
            raise
        metrics.count_loaded(report.nbytes, report.seconds)
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
            except WeightsMismatch:
                if found.instances or not (self.search.by_rank and self.search.boxes):
                    raise
                self.search = replace(self.search, by_rank=False, pipelined=False)  # all ranks together may have what one has not
                found = self._find()

    def _count_failovers(self) -> None:
        """The load goes on, or has ended well."""
        for reason in self.given_up:
            metrics.FAILOVERS.inc(reason)
        self.given_up.clear()

    def _find(self) -> Found:
        found = self._look()
        first = next(iter(found.alike), None) or next((records[0] for records in found.instances), None)
        if first is None or self.version == first.version:
            return found
        self.version, self.shares = first.version, []
        self.arrivals = Arrivals(self.dst, self.pace.chunk_nbytes if self.replica else None)
        if self.replica is None:
            return found
        self.replica.begin(first)
        return self._look()  # anew: now we have a place among those that are loading

    def _look(self) -> Found:
        own = self.replica.record if self.replica is not None else None
        return self.search.find(self.deadline, self.avoid, own.incarnation if own is not None else "")

    def _find_another(self) -> Found:
        """Whoever is there now: a load that has lost its sources does not wait for new ones."""
        self.deadline = time.monotonic()
        try:
            return self._find()
        except (RegistryError, LoaderError) as exc:
            log.info("no other source: %s", exc, extra=fields("no_other_source", error=exc))
            return Found([], [])

    def _once(self, found: Found, start: float, retries: int) -> LoadReport:
        arrivals = self.arrivals
        with ExitStack() as undo:
            candidates = self._choose(found, undo)
            spans = self.planner.plan([candidate.origin for candidate in candidates])
            missing = arrivals.missing(spans)
            check = DigestCheck(candidates, self.dst, self.tensors, self.device) if self.verify == "digest" else None
            if check is not None:
                check.lend(self.search.engine, undo)
            ahead = sum(span.nbytes for span in spans) - sum(span.nbytes for span in missing)
            transfer = Transfer(
                self.search.engine,
                [*missing, *(check.spans if check is not None else ())],
                [one.source() for one in candidates],
                self.pace,
                lambda progress: self._tell(progress, ahead, candidates),
                self.cancel,
                self._stage(missing, undo),
                lambda _, checked: self._arrived(arrivals, checked, check),
            )
            transfer_start = time.monotonic()
            try:
                self._run(transfer, candidates)
            except (SourceLost, TornRead, Cancelled) as exc:
                self.shares += transfer.shares
                raise self._with_what_came(exc, candidates, arrivals) from exc
            transfer_s = time.monotonic() - transfer_start
            if check is not None:
                check.compare(self.dst)
            self._count_failovers()
            digest_s = time.monotonic() - transfer_start - transfer_s
        share = max(transfer.shares, key=lambda share: share.nbytes)
        record = candidates[transfer.shares.index(share)].record
        return LoadReport(
            instance=record.instance,
            rank=self.search.rank,
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
            shares=_summed([*self.shares, *transfer.shares]),
            publication=self.replica.complete() if self.replica is not None else None,
        )

    def _arrived(self, arrivals: Arrivals, checked: Sequence[Span], check: DigestCheck | None) -> None:
        arrivals.add([span for span in checked if check is None or not check.wants(span)])
        if self.replica is not None:
            self.replica.mark(arrivals)

    def _tell(self, progress: Progress, ahead: int, candidates: Sequence[Candidate]) -> None:
        of_all = Progress(ahead + progress.nbytes, ahead + progress.total_nbytes)
        for candidate in candidates:
            candidate.tell(of_all)
        self.on_progress(of_all)

    def _choose(self, found: Found, undo: ExitStack) -> list[Candidate]:
        """Those that are read from; TornRead if they are not any more what they were resolved to be."""
        search = self.search
        reader = self.replica.record if self.replica is not None else None
        selection = Selection(
            self.dst,
            lambda record: Candidate(search.registry, search.engine, record, record.rank == search.rank, self.device, reader),
            self.planner,
            digests=self.verify == "digest",
            max_sources=found.at_once,
            session_id=search.engine.session_id,
        )
        try:
            chosen = selection.choose(found)
        finally:
            self.avoid.update(record.incarnation for record in selection.gone)
        entered = [candidate for candidate in chosen if candidate.enter(undo)]
        if len(entered) < len(chosen) and self.planner.differences([one.origin for one in entered]):
            missed = next(candidate.record for candidate in chosen if candidate not in entered)
            if search.registry.current(missed) is None:
                self.avoid.add(missed.incarnation)
                raise SourceLost(f"{missed.key} is not registered any more: load again", key=missed.key)
            raise TornRead(f"the record of {missed.key} changed before it was read: load again", key=missed.key)
        return entered

    def _stage(self, spans: Sequence[Span], undo: ExitStack) -> Staging | None:
        """Buffers, if any of the reads needs one."""
        staged = [span.nbytes for span in spans if span.lines]
        if not staged:
            return None
        nbytes = max(staged)
        count = min(len(staged), max(2, _STAGING_NBYTES // nbytes))
        staging = Staging(self.tensors.values(), self.device, count, nbytes)
        lend(self.search.engine, undo, to_register(staging.region, self.device.type))
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
                if candidate.was_evicted():  # what it brought does not count
                    self.version = None
                raise SourceLost(f"{candidate.record.key} was withdrawn or evicted meanwhile")

    def _with_what_came(self, exc: LoaderError, candidates: Sequence[Candidate], arrivals: Arrivals) -> LoaderError:
        """The error with what the caller may want to know: which sources, and which of the tensors are whole."""
        complete = arrivals.complete() if arrivals.nbytes else []
        held = (
            f"{arrivals.nbytes} of {self.dst.nbytes} bytes have come, {len(complete)} of {len(self.dst.tensors)} tensors are whole"
        )
        what = str(exc) if isinstance(exc, Cancelled) else f"{_names(candidates)} could not be read to the end ({exc})"
        return type(exc)(
            f"{what}; {held if arrivals.nbytes else 'no tensor is usable'}: load again, or from another instance",
            key=candidates[0].record.key,
            sources=[candidate.record.key for candidate in candidates],
            complete=complete,
        )


def _summed(shares: Sequence[Share]) -> tuple[Share, ...]:
    """One for each source, with what it brought in all and why it was dropped in the end."""
    summed: dict[str, Share] = {}
    for share in shares:
        before = summed.get(share.name, share)
        summed[share.name] = share if before is share else replace(share, nbytes=before.nbytes + share.nbytes)
    return tuple(summed.values())


def _names(candidates: Sequence[Candidate]) -> str:
    return " and ".join(candidate.record.key for candidate in candidates)


def _ignore(_: Progress) -> None:
    pass
