"""What a load has of one content, and from which ranks: so that the spans of an evicted rank can be
discarded.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from engine_loader.deltas.kept import KeptDelta
from engine_loader.planning.arrivals import Arrivals
from engine_loader.planning.reads import Span, payload_of
from engine_loader.transfer.shares import Share
from engine_registry import Manifest, RankRecord, RankState, Registry
from engine_registry.errors import EtcdError
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class Received:
    """`arrivals` has all of it; `evicted` the ranks that are known not to count any more, see
    `find_evicted`. `shares` are those of attempts that did not bring all. `compared`: what the
    tensors held before has been compared with tables of digests. `delta_nbytes` were read of
    deltas, which count for nothing until that comparison. `deltas` are those that have brought the
    tensors to the content, where that took nothing else.
    """

    def __init__(self, content: str, dst: Manifest, block_nbytes: int | None = None) -> None:
        """`content` is empty before there is one to load; `dst` and `block_nbytes` as for
        Arrivals.
        """
        self.content = content
        self.dst = dst
        self.shares: list[Share] = []
        self._block_nbytes = block_nbytes
        self._records: dict[
            str, RankRecord
        ] = {}  # by incarnation: ranks that have brought something
        # by incarnation: what each has brought
        self._spans: defaultdict[str, list[Span]] = defaultdict(list)
        # what was there before, and the incarnations of all whose tables it takes to say so
        self._held: list[tuple[Sequence[Span], frozenset[str]]] = []
        # what ranks with other contents have brought, and the incarnations of these ranks first,
        # then of all whose tables it takes to say that it is of this content
        self._lent: list[tuple[Sequence[Span], tuple[str, ...]]] = []
        self.compared = False
        self.delta_nbytes = 0
        self.deltas: Sequence[KeptDelta] = ()
        self.arrivals = Arrivals(dst, block_nbytes)
        self.evicted: list[RankRecord] = []

    def add(self, record: RankRecord, spans: Sequence[Span]) -> None:
        """They have come from the rank, and are of the content.

        Each lies in the memory of the tensors.
        """
        if spans:
            self._records[record.incarnation] = record
            self._spans[record.incarnation] += spans
            self.arrivals.add(spans)

    def hold(self, records: Sequence[RankRecord], spans: Sequence[Span]) -> None:
        """They are of the content and were there before, as tables of all of these ranks say."""
        if spans:
            self._records |= {record.incarnation: record for record in records}
            self._held.append((spans, frozenset([record.incarnation for record in records])))
            self.arrivals.add(spans)

    def borrow(
        self, lender: RankRecord, records: Sequence[RankRecord], spans: Sequence[Span]
    ) -> None:
        """They have come from a rank with another content, and are of this one, as tables of all
        of these ranks say.
        """
        every = [lender, *records]
        self._records |= {record.incarnation: record for record in every}
        self._lent.append((spans, tuple([record.incarnation for record in every])))
        self.arrivals.add(spans)

    @property
    def lent(self) -> dict[str, int]:
        """Bytes that ranks with other contents have brought, by the key of the rank."""
        found: Counter[str] = Counter()
        for spans, (lender, *_) in self._lent:
            found[self._records[lender].key] += payload_of(spans)
        return dict(found)

    def counts_on(self, record: RankRecord) -> bool:
        """Some of what there is counts only as long as nobody has evicted this rank."""
        return record.incarnation in self._records

    @property
    def held(self) -> Arrivals | None:
        """What was there before, if anything was."""
        if not self._held:
            return None
        found = Arrivals(self.dst)
        for spans, _ in self._held:
            found.add(spans)
        return found

    def find_evicted(self, registry: Registry, here: Collection[str]) -> None:
        """Looks in etcd for ranks that have brought something and were evicted since, but for those
        with incarnations in `here`.

        A rank that is still loading, and that the load has left, may stand still. Then it does not
        notice that its own source was evicted, so this looks at its sources as well.
        """
        for incarnation, record in self._records.items():
            if incarnation in here:
                continue
            try:
                current = registry.current(record)
                if current is None:
                    evicted = registry.was_evicted(record)
                else:
                    evicted = _is_loading(current) and _reads_from_evicted(registry, record)
                if evicted:
                    self.evicted.append(record)
            except EtcdError as exc:
                log.info(
                    "not known whether %s was evicted; what it has brought counts: %s",
                    record.key,
                    exc,
                    extra=fields("eviction_unknown", key=record.key, error=exc),
                )

    def discard(self, records: Sequence[RankRecord]) -> bool:
        """Forgets all that these have brought, and all that ranks have which were loading: it may
        be from these. Whether that was anything.
        """
        if records:
            records = [*records, *filter(_is_loading, self._records.values())]
        gone = {record.incarnation for record in records} & self._records.keys()
        for incarnation in gone:
            self._spans.pop(incarnation, None)
            del self._records[incarnation]
        self._held = [each for each in self._held if each[1].isdisjoint(gone)]
        self._lent = [each for each in self._lent if gone.isdisjoint(each[1])]
        self.evicted.clear()
        if gone:
            self.compared = False  # others may say the same
            self.deltas = ()
            keys = {record.key for record in records}
            for share in self.shares:
                if share.name in keys:
                    share.nbytes = 0
            self.arrivals = Arrivals(self.dst, self._block_nbytes)
            for spans, _ in [*self._held, *self._lent]:
                self.arrivals.add(spans)
            for spans in self._spans.values():
                self.arrivals.add(spans)
        return bool(gone)


def _is_loading(record: RankRecord) -> bool:
    return record.state is RankState.LOADING


def _reads_from_evicted(registry: Registry, record: RankRecord) -> bool:
    """Whether an evicted rank is among those that it reads from, or that these read from. Their
    tickets say so, which they hold as long as they read.
    """
    pulls = registry.all_pulls()
    readers, seen = [record.incarnation], {record.incarnation}
    while readers:
        reader = readers.pop()
        for pull in pulls:
            by_reader = pull.reader is not None and pull.reader.incarnation == reader
            if by_reader and pull.incarnation not in seen:
                if registry.was_evicted(pull):
                    return True
                seen.add(pull.incarnation)
                readers.append(pull.incarnation)
    return False
