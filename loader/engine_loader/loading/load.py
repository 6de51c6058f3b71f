"""Fills tensors with the weights of running ranks: find sources, compare, plan, read, check,
report.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from engine_loader import metrics
from engine_loader.engines.base import Engine, lend, with_regions
from engine_loader.errors import (
    Cancelled,
    LoaderError,
    SourceEvicted,
    SourceLost,
    TornRead,
    WeightsMismatch,
)
from engine_loader.loading.report import LoadReport, summed
from engine_loader.options import LoadOptions, Verify
from engine_loader.planning.plan import Planner
from engine_loader.planning.reads import Span
from engine_loader.publishing.replica import Replica, Republication, as_replica
from engine_loader.sources.digest_check import DigestCheck
from engine_loader.sources.search import Search
from engine_loader.sources.selection import Choice, Selection
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.cuda import on_default_stream, to_register, wait_for
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.regions import Shard
from engine_loader.tensors.uses import USES
from engine_loader.transfer.pace import Pace, pace_for, pace_in_chain
from engine_loader.transfer.pipe import Share
from engine_loader.transfer.progress import OnProgress, Progress
from engine_loader.transfer.received import Received
from engine_loader.transfer.scheduler import Transfer
from engine_loader.transfer.staging import Staging
from engine_registry import Manifest, ModelIdentity, Place, RankRecord, Registry, failpoints
from engine_registry.errors import InvalidField, RegistryError
from engine_registry.etcd.backoff import Backoff
from engine_registry.registration.writes import SOURCE_EVICTED
from engine_registry.schema.numbers import seconds
from engine_registry.telemetry.logs import fields
from engine_registry.watching.waiting import Wanted

log = logging.getLogger(__name__)
_STAGING_NBYTES = 48 << 20  # for what is not read straight to its place
# of a read that is torn by an update of the source, with about a second of waiting between them in
# all
TRIES = 5


def load(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    tensors: Mapping[str, torch.Tensor],
    rank: int | None = None,
    shards: Mapping[str, Shard] | None = None,
    timeout_s: float = 60.0,
    world_size: int | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    publish: bool | str | Replica = False,
    options: LoadOptions = LoadOptions(),
) -> LoadReport:
    """Fills tensors in place with the weights of running ranks.

    The tensors are those of `rank`, or any parts of the whole. They come from up to
    `options.max_sources` ranks with the same content of the same model, at once. Sources have the
    same content where digests prove it, or where one has loaded from the other.

    DTensors, and tensors with a shard, say which box of the whole they are. If all do, ranks of
    another layout may be sources, and the source may have more tensors. `rank` is then only a hint
    which rank may hold the same.

    For a ModelIdentity and a `rank`, that rank is enough, of any instance of the model, whatever
    else of it is there. A rank that is still loading is also a source then, for the parts that it
    has by then, unless `options.pipelined` is False or digests are verified. With `publish`, the
    rank that is filled becomes such a source itself. So many ranks that load at once, each from
    the one before it, take little longer than one.

    Nobody else may fill the tensors meanwhile. Published tensors are filled only inside their
    publication's `update()`. Nothing stays published if the load raises.

    Args:
        registry: Finds the sources.
        engine: Reads their memory.
        source: The name of an instance, several names, or a ModelIdentity, which stands for any
            instance that serves it.
        tensors: The tensors to fill, by name. A `Destination` saves the inspection of tensors that
            are filled again and again.
        rank: The rank of the source whose tensors these are. It may be None if every tensor says
            which box of the whole it is.
        shards: Which box of the whole a tensor is, by name.
        timeout_s: How many seconds to wait until a source is ready. From then on the load takes as
            long as bytes keep coming (see `Pace`).
        world_size: How many ranks the instance has that `rank` is counted in. Only for tensors that
            do not say which box they are.
        topology: The place of `rank` along each parallel axis: (index, size) by axis. Only for
            tensors that do not say which box they are.
        publish: Publishes the rank that is filled: the name of an instance, a Replica, or True for
            a name that follows from the source's. The report's `publication` is the caller's to
            close.
        options: How to choose, read and check; see LoadOptions.

    Returns:
        What the load did.

    Raises:
        WeightsMismatch: Source and destination differ. No byte has moved.
        DigestsMissing: Digests were to be verified, and the source has none. No byte has moved.
        SourceLost: Every source went away. The tensors may hold a part; `details["complete"]` names
            those that are whole.
        Stalled: The last source is there, and nothing comes from it. As SourceLost.
        TornRead: The weights changed in every try. As SourceLost.
        Cancelled: `options.cancel` was set. As SourceLost.
        DigestMismatch: Tensors are not what their source published.
        VersionUnavailable: The version or the contents are not served.
        SourceUnreachable: There are sources, and this engine can read none of them.
        MemoryInUse: The memory is published, or another load fills it.
        TensorsUnusable: Tensors cannot be filled, or were given other memory meanwhile.
        InvalidField: An argument is not valid; `details["field"]` names it.
        RegistryError: What `Registry.resolve` raises; with `publish`, what `publish` raises.
    """
    timeout_s = seconds("timeout_s", timeout_s)
    place = _place(rank, world_size, topology)
    if isinstance(tensors, Destination) and shards is not None:
        raise InvalidField(
            "a Destination says which boxes its tensors are: give no shards besides", field="shards"
        )
    destination = tensors if isinstance(tensors, Destination) else Destination(tensors, shards)
    destination.check_writable()
    dst, devices = destination.manifest, destination.devices
    if not source:
        raise InvalidField("no instance to load from", field="source")
    boxes = not any(entry.opaque for entry in dst.tensors)
    if place is None and not boxes:
        first = next(entry.name for entry in dst.tensors if entry.opaque)
        raise InvalidField(
            f"{first} does not say which part of the whole it is: say in `shards`, or from "
            "which `rank`",
            field="rank",
        )
    pace = options.pace or pace_for(engine.protocol)
    replica = as_replica(publish, source)
    if replica is not None:
        pace = pace_in_chain(pace, dst.nbytes)
    by_rank = isinstance(source, ModelIdentity) and place is not None
    search = Search(
        registry,
        engine,
        source,
        place,
        dst,
        boxes,
        options.version,
        options.contents,
        options.max_sources,
        by_rank,
        pipelined=by_rank and options.pipelined and options.verify == "header",
        hop=max(8 * pace.chunk_nbytes, pace.hop_nbytes) / max(dst.nbytes, 1),
    )
    destination.check_in_place(
        "tensors have other memory than when their Destination was made: make a new one"
    )
    with ExitStack() as undo:
        filling = undo.enter_context(USES.fill(f"a load of {_name_of(source)}", destination.runs))
        dst = with_regions(dst, lend(engine, undo, *dst.regions, owner=destination))
        undo.enter_context(on_default_stream(devices[0]))
        undo.callback(wait_for, devices)  # nothing is on its way to the tensors any more
        wait_for(devices)  # nor anything that was begun before
        own = (
            Republication(
                registry, engine, replica, search.rank, destination, pace.chunk_nbytes, filling
            )
            if replica is not None
            else None
        )
        return _Load(
            search=search,
            destination=destination,
            dst=dst,
            planner=Planner(dst, pace.costs, boxes or options.partial),
            deadline=time.monotonic() + timeout_s,
            verify=options.verify,
            pace=pace,
            on_progress=options.progress or _ignore,
            cancel=options.cancel or threading.Event(),
            received=Received(dst),
            replica=own,
        ).run()


@dataclass
class _Load:
    search: Search
    destination: Destination
    dst: Manifest  # of the destination, with the parts of its regions
    planner: Planner
    deadline: float
    verify: Verify
    pace: Pace
    on_progress: OnProgress
    cancel: threading.Event
    replica: Republication | None
    received: Received  # what has come of the content that is being loaded
    content: str = ""
    shares: list[Share] = field(
        default_factory=list
    )  # of sources that were read from before, of that content
    avoid: set[str] = field(default_factory=set)  # incarnations that were lost
    given_up: list[str] = field(
        default_factory=list
    )  # why sources were, since the load last went on without some

    @property
    def device(self) -> torch.device:
        return self.destination.devices[0]

    def run(self) -> LoadReport:
        """Counted, however it ends."""
        try:
            report = self._run_through()
        except BaseException as exc:
            metrics.LOADS.inc(metrics.outcome_of(exc))
            if isinstance(exc, SourceLost | TornRead | Cancelled):
                exc.details.setdefault("complete", [])
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
        sources = self._find(self.deadline)
        while True:
            try:
                return self._once(sources, start, retries)
            except TornRead as exc:
                retries += 1
                if retries == TRIES:
                    raise
                log.info(
                    "%s; reading again",
                    exc,
                    extra=fields("torn_retry", retries=retries, **exc.details),
                )
                metrics.RETRIES.inc()
                if self.cancel.wait(backoff.next_s()):
                    raise Cancelled("the load was cancelled") from exc
                failpoints.reach("load.torn")
                sources = self._find(self.deadline)
                if not sources:
                    raise
                self.given_up = [
                    reason for reason in self.given_up if reason != "torn"
                ]  # they are asked again
            except SourceLost as exc:
                sources = self._find_another()
                if not sources:
                    raise
                log.warning(
                    "%s; going on with another source",
                    exc,
                    extra=fields("failover", sources=exc.details.get("sources")),
                )
            self._count_failovers()

    def _count_failovers(self) -> None:
        """The load goes on, or has ended well."""
        for reason in self.given_up:
            metrics.FAILOVERS.inc(reason)
        self.given_up.clear()

    # -- sources
    # ----------------------------------------------------------------------------------------------

    def _find(self, deadline: float) -> list[SourceRank]:
        """Sources of one content, the one that is being loaded if there are any of it; none where
        all are to be avoided.
        """
        gone: SourceLost | None = None
        while True:
            try:
                choice = self._choose(deadline)
            except (
                SourceLost
            ) as exc:  # it went while its manifest was fetched, and is avoided from now on
                log.info("%s", exc, extra=fields("source_gone", error=exc))
                gone = exc
                continue
            if choice is None:
                if gone is not None:
                    raise gone
                return []
            if choice.content == self.content and (
                self.replica is None or self.replica.record is not None
            ):
                return choice.sources
            self._begin(choice)
            if self.replica is None:
                return choice.sources
            # Chosen anew: now we have a place among those that are loading.

    def _choose(self, deadline: float) -> Choice | None:
        own = self.replica.record if self.replica is not None else None
        found = self.search.find(
            deadline, self.avoid, own.incarnation if own is not None else "", self.content
        )
        if not found:
            return None
        search = self.search
        selection = Selection(
            self.dst,
            lambda record: SourceRank(
                search.registry, search.engine, record, record.rank == search.rank, self.device, own
            ),
            self.planner,
            digests=self.verify == "digest",
            max_sources=search.max_sources,
            session_id=search.engine.session_id,
        )
        try:
            return selection.choose(found)
        except WeightsMismatch:
            if found.instances or not (search.by_rank and search.boxes):
                raise
            # All ranks of an instance together may have what one has not.
            self.search = replace(search, by_rank=False, pipelined=False)
            return self._choose(deadline)
        finally:
            self.avoid.update(record.incarnation for record in selection.gone)

    def _begin(self, choice: Choice) -> None:
        """What has come so far counts only if it is of this content.

        A replica begins anew in either case.
        """
        dst = self.dst
        if self.replica is not None:
            # A read must not cross what the marks of our own memory are about: both go by the same
            # regions.
            dst = with_regions(dst, self.replica.begin(choice.sources[0].record, choice.content))
        if choice.content != self.content or dst is not self.dst:
            self.content, self.shares, self.dst = choice.content, [], dst
            self.planner = self.planner.into(dst)
            self.received = Received(dst, self.pace.chunk_nbytes if self.replica else None)
        if self.replica is not None:
            self.replica.mark(self.received.arrivals)

    def _find_another(self) -> list[SourceRank]:
        """Whatever is there now: a load that has lost its sources does not wait for new ones.

        But where one is being updated that is waited for, as it would have been at the beginning.
        """
        sources = self._find_if_any(time.monotonic())
        if sources or not self._is_one_updated():
            return sources
        return self._find_if_any(self.deadline)

    def _find_if_any(self, deadline: float) -> list[SourceRank]:
        try:
            return self._find(deadline)
        except (RegistryError, LoaderError) as exc:
            log.info("no other source: %s", exc, extra=fields("no_other_source", error=exc))
            return []

    def _is_one_updated(self) -> bool:
        try:
            return self.search.is_being_updated(self.avoid)
        except RegistryError as exc:
            log.info(
                "not known whether a source is being updated: %s",
                exc,
                extra=fields("updates_unknown", error=exc),
            )
            return False

    # -- one try
    # ----------------------------------------------------------------------------------------------

    def _once(self, sources: Sequence[SourceRank], start: float, retries: int) -> LoadReport:
        arrivals = self.received.arrivals
        with ExitStack() as undo:
            entered = self._enter(sources, undo)
            spans = self.planner.plan([source.origin for source in entered])
            missing = arrivals.missing(spans)
            check = (
                DigestCheck(entered, self.dst, self.destination.parts, self.device)
                if self.verify == "digest"
                else None
            )
            if check is not None:
                check.lend(self.search.engine, undo)
            ahead = sum(span.nbytes for span in spans) - sum(span.nbytes for span in missing)
            transfer = Transfer(
                self.search.engine,
                [*missing, *(check.spans if check is not None else ())],
                [one.source() for one in entered],
                self.pace,
                lambda progress: self._tell(progress, ahead, entered),
                self.cancel,
                self._stage(missing, undo),
                lambda number, checked: self._arrived(entered[number].record, checked, check),
            )
            transfer_start = time.monotonic()
            try:
                self._run(transfer, entered)
            except (SourceLost, TornRead, Cancelled) as exc:
                self.shares += transfer.shares
                self._discard_evicted(transfer, entered)
                raise self._with_what_came(exc, entered) from exc
            transfer_s = time.monotonic() - transfer_start
            if check is not None:
                check.compare(self.dst)
            self.destination.check_in_place(
                "tensors were given other memory while they were being filled: load again"
            )
            self._count_failovers()
            digest_s = time.monotonic() - transfer_start - transfer_s
        share = max(transfer.shares, key=lambda share: share.nbytes)
        record = entered[transfer.shares.index(share)].record
        return LoadReport(
            instance=record.instance,
            rank=self.search.rank,
            version=record.version,
            content=self.content,
            protocol=record.protocol,
            tensors=len(self.dst.tensors),
            nbytes=sum(span.payload for span in spans),
            read_nbytes=sum(span.nbytes for span in spans),
            reads=len(spans),
            retries=retries,
            seconds=time.monotonic() - start,
            transfer_s=transfer_s,
            digest_s=digest_s,
            shares=summed([*self.shares, *transfer.shares]),
            publication=self.replica.complete() if self.replica is not None else None,
        )

    def _arrived(
        self, record: RankRecord, checked: Sequence[Span], check: DigestCheck | None
    ) -> None:
        self.received.add(
            record, [span for span in checked if check is None or not check.wants(span)]
        )
        if self.replica is not None:
            self.replica.mark(self.received.arrivals)

    def _tell(self, progress: Progress, ahead: int, sources: Sequence[SourceRank]) -> None:
        of_all = Progress(ahead + progress.nbytes, ahead + progress.total_nbytes)
        for source in sources:
            source.tell(of_all)
        self.on_progress(of_all)

    def _enter(self, sources: Sequence[SourceRank], undo: ExitStack) -> list[SourceRank]:
        """Those that can be read from; TornRead if they are not any more what they were resolved to
        be.
        """
        entered = [source for source in sources if source.enter(undo)]
        if len(entered) < len(sources) and self.planner.differences(
            [one.origin for one in entered]
        ):
            missed = next(source.record for source in sources if source not in entered)
            if self.search.registry.current(missed) is None:
                self.avoid.add(missed.incarnation)
                raise SourceLost(
                    f"{missed.key} is not registered any more: load again", key=missed.key
                )
            raise TornRead(
                f"the record of {missed.key} changed before it was read: load again", key=missed.key
            )
        return entered

    def _stage(self, spans: Sequence[Span], undo: ExitStack) -> Staging | None:
        """Buffers, if any of the reads needs one."""
        staged = [span.nbytes for span in spans if span.lines]
        if not staged:
            return None
        nbytes = max(staged)
        count = min(len(staged), max(2, _STAGING_NBYTES // nbytes))
        staging = Staging(self.destination.parts.values(), self.device, count, nbytes)
        lend(self.search.engine, undo, to_register(staging.region, self.device.type), owner=staging)
        return staging

    def _run(self, transfer: Transfer, sources: Sequence[SourceRank]) -> None:
        """Remembers which sources were lost."""
        try:
            transfer.run()
            self._check_registered(transfer, sources)
        except SourceEvicted:
            self.avoid.update(
                source.record.incarnation
                for source, share in zip(sources, transfer.shares, strict=True)
                if share.error is not None
            )
            raise
        except SourceLost:
            self.avoid.update(source.record.incarnation for source in sources)
            raise
        finally:
            self.given_up += [
                metrics.reason_of(share.error)
                for share in transfer.shares
                if share.error is not None
            ]

    def _check_registered(self, transfer: Transfer, sources: Sequence[SourceRank]) -> None:
        """SourceEvicted if one that has brought something was evicted by now, whatever its memory
        said.

        One that was withdrawn, or whose process has ended, after it had been read and checked is as
        good as any.
        """
        for source, share in zip(sources, transfer.shares, strict=True):
            if share.nbytes and not source.is_registered() and source.was_evicted():
                share.error = SourceEvicted(
                    f"{source.record.key} was evicted meanwhile", key=source.record.key
                )
        here = {source.record.incarnation for source in sources}
        self.received.find_evicted(self.search.registry, here)
        if gone := [
            share.error
            for share in transfer.shares
            if isinstance(share.error, SourceEvicted) and share.nbytes
        ]:
            raise gone[0]
        if self.received.evicted:
            raise SourceEvicted(
                f"{self.received.evicted[0].key} was evicted meanwhile",
                key=self.received.evicted[0].key,
            )

    def _discard_evicted(self, transfer: Transfer, sources: Sequence[SourceRank]) -> None:
        """What an evicted source has brought is read again, and our own readers must know."""
        evicted = [*self.received.evicted]
        for source, share in zip(sources, transfer.shares, strict=True):
            if isinstance(share.error, SourceEvicted):
                evicted.append(source.record)
                share.nbytes = 0
        if not self.received.discard(evicted):
            return
        for share in self.shares:
            if share.name in {record.key for record in evicted}:
                share.nbytes = 0
        if self.replica is not None:
            self.replica.close(SOURCE_EVICTED)

    def _with_what_came(self, exc: LoaderError, sources: Sequence[SourceRank]) -> LoaderError:
        """The error with what the caller may want to know: which sources, and which of the tensors
        are whole.
        """
        arrivals = self.received.arrivals
        complete = arrivals.complete() if arrivals.nbytes else []
        held = (
            f"{arrivals.nbytes} of {self.dst.nbytes} bytes have come, {len(complete)} of "
            f"{len(self.dst.tensors)} tensors are whole"
        )
        what = (
            str(exc)
            if isinstance(exc, Cancelled)
            else f"{_names(sources)} could not be read to the end ({exc})"
        )
        return type(exc)(
            f"{what}; {held if arrivals.nbytes else 'no tensor is usable'}",
            "load again, or from another instance",
            key=sources[0].record.key,
            sources=[source.record.key for source in sources],
            complete=complete,
        )


def _place(
    rank: int | None, world_size: int | None, topology: Mapping[str, tuple[int, int]] | None
) -> Place | None:
    if rank is not None:
        return Place(rank, world_size, topology or {})
    for field_name, value in {"world_size": world_size, "topology": topology}.items():
        if value is not None:
            raise InvalidField(
                f"`{field_name}` is given without the rank that it is about",
                f"say `rank` as well, or leave `{field_name}` out",
                field=field_name,
            )
    return None


def _names(sources: Sequence[SourceRank]) -> str:
    return " and ".join(source.record.key for source in sources)


def _name_of(source: Wanted) -> str:
    return (
        source
        if isinstance(source, str)
        else str(source)
        if isinstance(source, ModelIdentity)
        else " or ".join(source)
    )


def _ignore(_: Progress) -> None:
    pass
