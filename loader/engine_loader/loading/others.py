"""Ranks with other contents beside the sources of an attempt: they bring blocks that they hold as
well. Made by `Attempt`.

Nothing that they say is believed. A block from them counts once its digest, computed here of what
has come, is that of the table of a source. Nothing depends on them: without them all comes from the
sources.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from engine_loader.errors import Cancelled, SourceLost, TornRead
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.loading.report import with_what_came
from engine_loader.loading.reuse import complete_one
from engine_loader.planning.reads import Span
from engine_loader.planning.shared import Elsewhere, Sharing, lent_by
from engine_loader.sources.block_proofs import BlockProofs, Proven
from engine_loader.sources.entrance import Entrance
from engine_loader.sources.manifests import find_manifests
from engine_loader.sources.others import OtherRank, OtherSearch
from engine_loader.sources.own_memory import OwnMemory
from engine_loader.sources.selection import Choice
from engine_loader.sources.source import SourceRank
from engine_loader.sources.tables import Table, Tables, has_digests
from engine_loader.transfer.progress import OnProgress, Progress
from engine_loader.transfer.received import Received
from engine_loader.transfer.scheduler import Transfer
from engine_loader.transfer.shares import Share
from engine_registry import Manifest, RankRecord
from engine_registry.errors import RegistryError
from engine_registry.pulls.taking import Taken
from engine_registry.telemetry.logs import fields
from engine_registry.watching.waiting import Wanted

log = logging.getLogger(__name__)


def _ignore(_: Sequence[Span]) -> None:
    pass


class Others:
    """Of one attempt: `enter`, then `run`, during which spans are to be received, and `check`.

    Attributes:
        ranks: The others. Their numbers follow those of the sources.
        taken: What was said of the tickets of the others.
    """

    def __init__(
        self,
        job: Job,
        choice: Choice,
        sources: Sequence[SourceRank],
        received: Received,
        lost: LostSources,
    ) -> None:
        """`sources` are those of the choice that are read from."""
        self._job = job
        self._choice = choice
        self._sources = sources
        self._received = received
        self._lost = lost
        self._on_proven: Callable[[Sequence[Span]], None] = _ignore
        self._witnesses: list[SourceRank] = []  # whose tables have come: the sources first
        self._tables: Mapping[int, Table] = {}  # of these, by their numbers
        self._proofs: BlockProofs | None = None
        self._refused: dict[int, SourceLost] = {}  # by the number of the rank
        self.ranks: list[OtherRank] = []
        self.taken: Sequence[Taken] = ()

    # -- before the reads
    # ----------------------------------------------------------------------------------------------

    def enter(
        self,
        spans: Sequence[Span],
        entrance: Entrance,
        reader: RankRecord | None,
        on_proven: Callable[[Sequence[Span]], None],
        on_progress: OnProgress,
        undo: ExitStack,
    ) -> Sequence[Span]:
        """Finds them, takes tickets for the `reader`, if it is registered, and reads the tables of
        all. Returns the spans, cut, with the others as further sources. `on_proven` gets what
        counts, once `received` has it.

        Raises Cancelled.
        """
        self._on_proven = on_proven
        if self._job.also_from is None or not spans:
            return spans
        none = Progress(0, sum(span.read_nbytes for span in spans))
        try:
            with ExitStack() as so_far:
                self._witnesses = [
                    *self._sources,
                    *complete_one(self._job, self._choice, self._sources, so_far),
                ]
                others = self._find(self._job.also_from)
                place = entrance.enter(Choice("", list(others)), reader, so_far)
                entered = [one for one in others if one in place.sources]
                tables = self._read_tables(
                    entered,
                    lambda progress: on_progress(replace(none, silent=progress.silent)),
                    so_far,
                )
                shared = self._share(spans, tables, entered, so_far)
                if self.ranks:  # else their tickets are given back now
                    self.taken = place.taken
                    undo.push(so_far.pop_all())
                return shared
        except (SourceLost, TornRead, RegistryError) as exc:
            # whatever that is for the load, its reads will show
            log.info(
                "no rank with another content is read from: %s",
                exc,
                extra=fields("no_others", error=exc),
            )
            return spans
        except Cancelled as exc:
            raise with_what_came(exc, self._sources, self._received) from exc

    def _find(self, wanted: Wanted) -> list[OtherRank]:
        """Those with digests by the algorithm of the sources, the best first. SourceLost where
        there are none.
        """
        job = self._job
        algorithms = {source.algorithm for source in self._witnesses if has_digests(source)}
        if not algorithms:
            raise SourceLost("none of the sources has digests")
        search = OtherSearch(job.registry, job.engine, wanted, job.max_sources)
        records = search.find([one.record for one in self._sources], self._lost.incarnations)
        found = []
        for record, manifest in zip(records, find_manifests(job.registry, records), strict=True):
            if isinstance(manifest, Manifest):
                one = OtherRank(job.registry, job.engine, record, manifest, False, job.device)
                if has_digests(one) and one.algorithm in algorithms:
                    found.append(one)
        if not found:
            raise SourceLost(
                "none that is ready and can be reached has digests as the sources have"
            )
        return found

    def _read_tables(
        self, others: list[OtherRank], on_progress: OnProgress, undo: ExitStack
    ) -> Tables:
        """Of the sources and the others, without those of `others` that are lost meanwhile."""
        job, own = self._job, self._witnesses
        while True:
            tables = Tables([*own, *others], job.device)
            tables.lend(job.engine, undo)
            transfer = Transfer(
                job.engine,
                tables.spans,
                [one.for_transfer() for one in [*own, *others]],
                replace(job.pace, patience_s=job.pace.stall_s),  # nothing depends on the others
                on_progress,
                job.cancel,
                on_checked=tables.receive,
            )
            theirs = transfer.shares[len(own) :]
            try:
                transfer.run()
                return tables
            except (SourceLost, TornRead):
                if not any(share.error is not None for share in theirs):
                    raise
                self._lose(others, theirs)
                others[:] = [
                    one for one, share in zip(others, theirs, strict=True) if share.error is None
                ]
            finally:
                self._received.shares += transfer.shares

    def _share(
        self,
        spans: Sequence[Span],
        tables: Tables,
        others: Sequence[OtherRank],
        undo: ExitStack,
    ) -> Sequence[Span]:
        job, count, behind = self._job, len(self._sources), len(self._witnesses)
        by_number = {number: table for table in tables.each for number in table.numbers}
        memory = OwnMemory(self._received.dst, job.destination.parts)
        sharing = Sharing(
            {number: each for number, each in tables.memories.items() if number < count},
            lambda number, slot: by_number[number].digest(slot),
            [
                Elsewhere(count + at, tables.memories[behind + at], by_number[behind + at].digest)
                for at in range(len(others))
            ],
            job.pace.chunk_nbytes,
            lambda addr, nbytes: memory.part(addr, nbytes) is not None,
        )
        shared, pieces = sharing.share(spans)
        if pieces:
            self._tables = by_number
            self._proofs = BlockProofs(pieces, by_number, memory, job.device)
            undo.callback(self._proofs.close)
            self.ranks = list(others)
        return shared

    # -- what comes
    # ----------------------------------------------------------------------------------------------

    def receive(self, number: int, spans: Sequence[Span]) -> None:
        """They have come from the source, or the rank with another content, with that number, and
        its header has proven them.
        """
        is_source = number < len(self._sources)
        if is_source:
            self._received.add(self._sources[number].record, spans)
            self._on_proven(spans)
        if self._proofs is not None:
            self._proofs.come(spans, None if is_source else number)
            self._count(self._proofs.proven())

    def run(self, transfer: Transfer) -> None:
        """The transfer of the spans, until all that it has brought is proven, or refused."""
        try:
            transfer.run()
        finally:
            if self._proofs is not None:
                self._count(self._proofs.proven(wait=True))
            for number, error in self._refused.items():
                share = transfer.shares[number]
                share.error = share.error or error
            self._lose(self.ranks, transfer.shares[len(self._sources) :])

    def forget(self) -> None:
        """Nobody wants to know any more what counts."""
        self._on_proven = _ignore

    def check(self) -> None:
        """SourceLost if something that has come does not count, and so has to be read again."""
        for error in self._refused.values():
            raise error

    def _count(self, proven: Proven) -> None:
        for (lender, number), spans in lent_by(proven.right).items():
            brought_by = [self._witnesses[one].record for one in self._tables[number].brought_by]
            self._received.borrow(self._rank(lender).record, brought_by, spans)
            self._on_proven(spans)
        # where several have brought a block, nobody knows whose part is wrong
        for lender, number in lent_by(proven.wrong):
            if lender not in self._refused:
                self._refuse(lender, self._witnesses[number].record.key)

    def _refuse(self, lender: int, source: str) -> None:
        rank = self._rank(lender)
        key = rank.record.key
        error = self._refused[lender] = SourceLost(
            f"{key} has brought blocks that are not what its digests, and those of {source}, say",
            "check its machine's memory, and whether anything writes to its weights outside of "
            "`update`",
            key=key,
        )
        rank.refuse(error)
        log.warning("%s", error, extra=fields("blocks_refused", key=key, source=source))

    def _rank(self, number: int) -> OtherRank:
        return self.ranks[number - len(self._sources)]

    def _lose(self, ranks: Sequence[OtherRank], shares: Sequence[Share]) -> None:
        """They are not read from again by this load, if an error says why."""
        self._lost.add(
            rank.record
            for rank, share in zip(ranks, shares, strict=True)
            if share.error is not None
        )
