"""An attempt begins with the sources that are still what they were resolved to be, reads what is
missing, and says of each source that fails what that is for the load: with engines of this process.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine_loader import InProcessEngine, Pace, Progress, metrics
from engine_loader.errors import (
    Cancelled,
    DigestMismatch,
    DigestsMissing,
    LoaderError,
    SourceEvicted,
    SourceLost,
    TensorsUnusable,
    TornRead,
)
from engine_loader.loading import attempt as attempt_module
from engine_loader.loading import reading as module
from engine_loader.loading.attempt import Attempt, PlaceTaken
from engine_loader.loading.job import Job
from engine_loader.loading.lost import LostSources
from engine_loader.planning.boxes import Lines
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import Planner
from engine_loader.planning.reads import Span
from engine_loader.publishing.replica import Republication
from engine_loader.sources.entrance import Entered, Entrance
from engine_loader.sources.selection import Choice
from engine_loader.sources.source import SourceRank
from engine_loader.transfer.pipe import Source
from engine_loader.transfer.received import Received
from engine_registry import Manifest, RankRecord, Region, TensorEntry
from engine_registry.holders.query import Holders
from engine_registry.pulls.taking import Taken
from tests.support.builders import CONTENT, OTHER_INCARNATION, a_manifest, a_record, an_entry

ONE, TWO = a_record(instance="one"), a_record(instance="two", incarnation=OTHER_INCARNATION)
OWN = a_record(instance="own", incarnation="5" * 32)
A, B = an_entry("a", 4096), an_entry("b", 8192)
HOLDERS = Holders()


def source(record: RankRecord, *tensors: TensorEntry) -> SourceRank:
    """One that holds the tensors."""
    origin = Origin(f"{record.instance}/0", a_manifest(*tensors), True)
    return cast(SourceRank, SimpleNamespace(record=record, origin=origin))


class Doors:
    """As an Entrance: ranks that have `changed` cannot be entered, nor those that are `taken` by
    another load.
    """

    def __init__(
        self, *, changed: Sequence[RankRecord] = (), taken: Sequence[RankRecord] = ()
    ) -> None:
        self._closed = {record.incarnation for record in [*changed, *taken]}
        self._taken = Taken(None, (), faster=frozenset(one.incarnation for one in taken))
        self.readers: list[RankRecord | None] = []
        self.reported: list[Progress] = []

    def enter(self, choice: Choice, reader: RankRecord | None, undo: ExitStack) -> Entered:
        self.readers.append(reader)
        some = [each for each in choice.sources if each.record.incarnation not in self._closed]
        return Reported(some, [self._taken], HOLDERS, None, self.reported)


@dataclass(frozen=True)
class Reported(Entered):
    reported: list[Progress] = field(default_factory=list)

    def report(self, progress: Progress) -> None:
        self.reported.append(progress)


def attempt(
    sources: Sequence[SourceRank],
    dst: Manifest,
    registered: Sequence[RankRecord] = (ONE, TWO),
    **closed: Sequence[RankRecord],
) -> Attempt:
    job = SimpleNamespace(
        registry=SimpleNamespace(current=lambda rank: rank if rank in registered else None),
        engine=InProcessEngine(),
        pace=Pace(8, 2),
        verify="header",
        cancel=threading.Event(),
        reuse=False,
        also_from=None,
    )
    planner, received = Planner(dst, partial=True), Received(CONTENT, dst)
    return Attempt(
        cast(Job, job),
        Choice(CONTENT, list(sources)),
        cast(Entrance, Doors(**closed)),
        planner,
        received,
        LostSources(),
        None,
    )


def test_a_source_that_changed_before_it_was_read_is_spared_where_others_have_all() -> None:
    sources = [source(ONE, A), source(TWO, A, B)]
    one = attempt(sources, a_manifest(A, B), changed=[ONE])
    assert one._enter(ExitStack()).sources == sources[1:]


@pytest.mark.parametrize(
    ("registered", "kind", "lost"),
    [([ONE, TWO], TornRead, set()), ([ONE], SourceLost, {TWO.incarnation})],
    ids=["it changed", "it has gone"],
)
def test_a_source_that_cannot_be_spared_is_the_error(
    registered: Sequence[RankRecord], kind: type[LoaderError], lost: set[str]
) -> None:
    sources = [source(ONE, A), source(TWO, B)]
    one = attempt(sources, a_manifest(A, B), registered, changed=[TWO])
    with pytest.raises(kind, match=r"/engines/two/0 .*: load again") as caught:
        one._enter(ExitStack())
    assert type(caught.value) is kind
    assert caught.value.details["key"] == TWO.key
    assert one.lost.incarnations == lost


def test_a_source_that_another_load_was_faster_to_is_as_it_was_and_is_chosen_anew() -> None:
    one = attempt([source(ONE, A)], a_manifest(A), taken=[ONE])
    with pytest.raises(PlaceTaken, match=ONE.key) as caught:
        one._enter(ExitStack())
    assert caught.value.holders is HOLDERS
    assert one.lost.incarnations == set()
    others = attempt([source(ONE, A), source(TWO, A)], a_manifest(A), taken=[ONE])
    assert [each.record for each in others._enter(ExitStack()).sources] == [TWO]


# -- what is read
# --------------------------------------------------------------------------------------------------


NBYTES, CHUNK = 32, 8
PACE = Pace(CHUNK, 1, begin=1, check_s=0.0, stall_s=60.0)


class Offering:
    """A source that holds both tensors; `fate` says, whenever asked, what has become of it."""

    def __init__(self, bench: Bench, record: RankRecord, content: bytes, delay_s: float) -> None:
        self.record = record
        self.outlived = False
        self.within_host = False
        self.engine: InProcessEngine = bench.stack.enter_context(InProcessEngine(delay_s=delay_s))
        self.memory = ctypes.create_string_buffer(content, NBYTES)
        self.fate: Callable[[], LoaderError | None] = lambda: None
        self.torn = False
        self.evicted = False  # etcd says so at the end
        self._reader = bench.reader
        addr = ctypes.addressof(self.memory)
        self.engine.register(Region(addr, NBYTES))
        self.origin = Origin(f"{record.instance}/0", two_tensors(addr), True)

    def for_transfer(self) -> Source:
        return Source(self.record.key, self.engine.session_id, self._check, lambda: self.fate())

    def _check(self) -> None:
        self._reader.connect(self.engine.session_id)
        if self.torn:
            raise TornRead("it has changed")

    def is_registered(self) -> bool:
        return not self.evicted

    def was_evicted(self) -> bool:
        return self.evicted


class Digests:
    """As a DigestCheck, whose table is this span."""

    tallied = False

    def __init__(self, span: Span) -> None:
        self.spans = [span]
        self.lent_to: list[object] = []
        self.compared = 0
        self.received: list[Span] = []
        self.error: LoaderError | None = None

    def lend(self, engine: object, undo: ExitStack) -> None:
        assert isinstance(undo, ExitStack)
        self.lent_to.append(engine)

    def receive(self, spans: Sequence[Span]) -> None:
        self.received += spans

    def look(self) -> None:
        pass

    def wants(self, span: Span) -> bool:
        return span in self.spans

    def compare(self, dst: Manifest) -> None:
        self.compared += 1
        if self.error is not None:
            raise self.error


class Replica:
    """As a Republication."""

    record = OWN

    def __init__(self) -> None:
        self.marked: list[int] = []  # bytes that had come by then
        self.reasons: list[str] = []

    def mark(self, arrivals: Any) -> None:
        self.marked.append(arrivals.nbytes)

    def close(self, reason: str) -> None:
        self.reasons.append(reason)


def two_tensors(addr: int) -> Manifest:
    return a_manifest(
        an_entry("a", addr), an_entry("b", addr + 16), regions=(Region(addr, NBYTES),)
    )


class Bench:
    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stack = stack
        self.content = os.urandom(NBYTES)
        self.memory = ctypes.create_string_buffer(NBYTES)
        self.dst = two_tensors(ctypes.addressof(self.memory))
        self.received = Received(CONTENT, self.dst)
        self.sources: list[Offering] = []
        self.doors = Doors()
        self.lost = LostSources()
        self.replica: Replica | None = None
        self.progress: list[Progress] = []
        self.on_progress: Callable[[], object] = lambda: None
        self.cancel = threading.Event()
        self.verify = "header"
        self.moved = False
        self.failovers: list[str] = []
        self.registered: list[RankRecord] = [ONE, TWO]
        self.reader: InProcessEngine = stack.enter_context(InProcessEngine())
        self.reader.lend(Region(ctypes.addressof(self.memory), NBYTES))
        monkeypatch.setattr(metrics.FAILOVERS, "inc", self.failovers.append)
        # else such chunks would be read all at once
        monkeypatch.setattr("engine_loader.transfer.reads._SMALL_NBYTES", 0)

    def source(
        self, record: RankRecord = ONE, content: bytes | None = None, delay_s: float = 0.0
    ) -> Offering:
        self.sources.append(Offering(self, record, content or self.content, delay_s))
        return self.sources[-1]

    def attempt(self) -> Attempt:
        job = SimpleNamespace(
            registry=SimpleNamespace(
                current=lambda rank: rank if rank in self.registered else None,
                was_evicted=lambda rank: rank not in self.registered,
                all_pulls=lambda: (),
            ),
            engine=self.reader,
            pace=PACE,
            verify=self.verify,
            reuse=False,
            also_from=None,
            cancel=self.cancel,
            on_progress=self._report,
            destination=SimpleNamespace(parts={}, check_in_place=self._check_in_place),
            device=torch.device("cpu"),
        )
        return Attempt(
            cast(Job, job),
            Choice(CONTENT, cast("list[SourceRank]", self.sources)),
            cast(Entrance, self.doors),
            Planner(self.dst),
            self.received,
            self.lost,
            cast("Republication | None", self.replica),
        )

    def _report(self, progress: Progress) -> None:
        self.progress.append(progress)
        self.on_progress()

    def _check_in_place(self, what: str, remedy: str) -> None:
        assert remedy == "load again"
        if self.moved:
            raise TensorsUnusable(what, remedy)

    def digests(self, monkeypatch: pytest.MonkeyPatch) -> Digests:
        table = ctypes.create_string_buffer(CHUNK)
        addr = ctypes.addressof(self.sources[0].memory)
        self.reader.lend(Region(ctypes.addressof(table), CHUNK))
        check = Digests(Span(ctypes.addressof(table), CHUNK, ((0, addr),)))
        self.stack.callback(lambda: table)

        def made(sources: Sequence[object], dst: Manifest, *others: object) -> Digests:
            assert (sources, dst) == (self.sources, self.dst)
            return check

        monkeypatch.setattr(module, "DigestCheck", made)
        self.verify = "digest"
        return check


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack, monkeypatch)


def test_all_that_is_wanted_is_read_and_progress_goes_to_the_caller_and_to_the_source(
    bench: Bench,
) -> None:
    bench.source()
    bench.replica = Replica()
    filled = bench.attempt().fill()
    assert bench.memory.raw == bench.content
    assert bench.received.arrivals.complete() == ["a", "b"]
    assert filled.record == ONE
    assert [share.nbytes for share in filled.shares] == [NBYTES]
    assert sum(span.nbytes for span in filled.spans) == NBYTES
    assert bench.progress[-1] == Progress(NBYTES, NBYTES)
    assert bench.doors.reported == bench.progress
    assert bench.replica.marked[-1] == NBYTES
    assert bench.doors.readers == [OWN]
    assert bench.replica.reasons == []


def test_the_time_of_the_reads_and_that_of_the_checks_are_measured_apart(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.source()
    clock = SimpleNamespace(monotonic=iter([100.0, 103.0, 110.0, 117.0]).__next__)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(attempt_module, "time", clock)
    filled = bench.attempt().fill()
    assert (filled.transfer_s, filled.digest_s) == (3.0, 7.0)


def test_what_had_come_before_is_not_read_again_and_counts_as_progress(bench: Bench) -> None:
    bench.source()
    bench.received.add(TWO, [Span(bench.dst.regions[0].addr, 16, ((0, 0),))])
    filled = bench.attempt().fill()
    assert bench.memory.raw == bytes(16) + bench.content[16:]
    assert [share.nbytes for share in filled.shares] == [16]
    assert sum(span.nbytes for span in filled.spans) == NBYTES  # the report is of the whole load
    assert bench.progress[0].nbytes > 16
    assert {one.total_nbytes for one in bench.progress} == {NBYTES}
    assert bench.doors.reported[-1] == Progress(NBYTES, NBYTES)


def test_the_source_that_has_brought_the_most_stands_for_all(bench: Bench) -> None:
    bench.source(ONE, delay_s=0.05)
    bench.source(TWO)
    filled = bench.attempt().fill()
    one, two = (share.nbytes for share in filled.shares)
    assert (filled.record == TWO) == (two > one)


def test_sources_that_end_are_lost_with_the_reason_and_what_has_come(bench: Bench) -> None:
    source = bench.source()
    bench.on_progress = source.engine.close
    attempt = bench.attempt()
    with pytest.raises(SourceLost, match="/engines/one/0 could not be read to the end") as caught:
        attempt.fill()
    assert caught.value.details["sources"] == [ONE.key]
    assert bench.lost.incarnations == {ONE.incarnation}
    assert [type(share.error) for share in bench.received.shares] == [SourceLost]
    bench.lost.count_failovers()
    assert bench.failovers == ["lost"]


def test_a_source_whose_weights_have_changed_is_asked_again(bench: Bench) -> None:
    source = bench.source()
    bench.on_progress = lambda: setattr(source, "torn", True)
    with pytest.raises(TornRead):
        bench.attempt().fill()
    assert bench.lost.incarnations == set()
    bench.lost.count_failovers()
    assert bench.failovers == ["torn"]


def test_a_load_that_is_cancelled_says_what_has_come(bench: Bench) -> None:
    bench.source()
    bench.on_progress = bench.cancel.set
    with pytest.raises(Cancelled) as caught:
        bench.attempt().fill()
    assert caught.value.details["complete"] == bench.received.arrivals.complete()
    assert bench.lost.incarnations == set()


def test_of_two_sources_that_are_read_the_evicted_one_alone_is_lost_with_what_it_brought(
    bench: Bench,
) -> None:
    bad, bench.replica = bench.source(ONE, os.urandom(NBYTES)), Replica()
    bench.source(TWO, delay_s=0.05)

    def fate() -> LoaderError | None:
        brought = bench.received._spans.get(ONE.incarnation)
        return SourceEvicted("evicted by hand") if brought else None

    bad.fate = fate
    with pytest.raises(SourceEvicted):
        bench.attempt().fill()
    assert bench.lost.incarnations == {ONE.incarnation}
    assert ONE.incarnation not in bench.received._spans
    assert bench.received.shares[0].nbytes == 0
    assert bench.replica.reasons == ["its source was evicted"]


def test_a_source_whose_eviction_shows_at_the_end_has_brought_nothing(bench: Bench) -> None:
    source = bench.source()
    source.evicted = True
    with pytest.raises(SourceEvicted, match="was evicted meanwhile"):
        bench.attempt().fill()
    assert bench.lost.incarnations == {ONE.incarnation}
    assert bench.received.arrivals.nbytes == 0
    bench.lost.count_failovers()
    assert bench.failovers == ["evicted"]


def test_what_an_evicted_rank_has_brought_in_an_attempt_before_is_read_again(bench: Bench) -> None:
    bench.source()
    bench.registered = [ONE]
    bench.received.add(TWO, [Span(bench.dst.regions[0].addr, 16, ((0, 0),))])
    with pytest.raises(SourceEvicted, match="/engines/two/0"):
        bench.attempt().fill()
    assert bench.lost.incarnations == set()  # the one that is there is read from again
    bench.attempt().fill()
    assert bench.memory.raw == bench.content


def test_a_source_that_was_done_without_counts_as_a_failover_when_the_tensors_are_filled(
    bench: Bench,
) -> None:
    bench.source(ONE).fate = lambda: SourceLost("withdrawn")
    bench.source(TWO)
    assert bench.attempt().fill().record == TWO
    assert bench.failovers == ["lost"]


@pytest.mark.parametrize("error", [None, DigestMismatch("w is another")])
def test_digests_are_read_and_compared_and_are_no_part_of_the_tensors(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: LoaderError | None
) -> None:
    bench.source()
    check = bench.digests(monkeypatch)
    check.error = error
    if error is None:
        filled = bench.attempt().fill()
        assert [share.nbytes for share in filled.shares] == [NBYTES + CHUNK]
        assert sum(span.nbytes for span in filled.spans) == NBYTES
    else:
        with pytest.raises(DigestMismatch):
            bench.attempt().fill()
    assert (check.lent_to, check.compared) == ([bench.reader], 1)
    assert sum(span.nbytes for span in check.received) == NBYTES  # the weights, not the table
    assert bench.received.arrivals.nbytes == NBYTES


@pytest.mark.parametrize("checked", [True, False])
def test_what_is_filled_says_whether_digests_prove_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    bench.source()
    if checked:
        bench.digests(monkeypatch)
    assert bench.attempt().fill().verified is checked


def test_sources_that_were_read_to_the_end_of_their_process_and_beyond_are_named(
    bench: Bench,
) -> None:
    bench.source(ONE)
    assert bench.attempt().fill().outlived == []
    bench.received = Received(CONTENT, bench.dst)
    bench.sources[0].outlived = True
    assert bench.attempt().fill().outlived == [ONE.key]


def test_a_load_says_which_sources_it_has_read_without_the_network(bench: Bench) -> None:
    bench.source(ONE).within_host = True
    bench.source(TWO).within_host = True
    bench.sources[1].fate = lambda: SourceLost("withdrawn")  # it brings nothing
    assert bench.attempt().fill().within_host == [ONE.key]


def test_a_source_that_has_ended_and_brought_nothing_was_not_outlived(bench: Bench) -> None:
    bench.source(ONE)
    bench.source(TWO).outlived = True
    bench.sources[1].fate = lambda: SourceLost("withdrawn")
    assert bench.attempt().fill().outlived == []


MISSING = DigestsMissing("offers no digests")


class Table:
    """A source whose digests are by this algorithm, if it has any."""

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self.origin = Origin("one/0", two_tensors(0), True)

    @property
    def algorithm(self) -> str:
        if not self._algorithm:
            raise MISSING
        return self._algorithm


@pytest.mark.parametrize(
    ("verify", "tallies", "algorithms", "proven", "outcome"),
    [
        ("auto", "m", ["m", "m"], True, "checked"),
        ("auto", "", ["m"], True, "by the header"),
        ("auto", "m", ["m", ""], True, "by the header"),
        ("auto", "m", ["x"], True, "by the header"),
        ("auto", "m", ["m", "x"], True, "by the header"),
        ("auto", "m", ["m"], False, "by the header"),
        ("header", "m", ["m"], True, "by the header"),
        ("digest", "", ["x"], True, "checked"),
        ("digest", "m", ["m"], True, "checked"),
        ("digest", "m", ["m"], False, "refused"),
    ],
)
def test_digests_are_compared_where_that_is_asked_for_or_free_and_all_have_them(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    verify: str,
    tallies: str,
    algorithms: list[str],
    proven: bool,
    outcome: str,
) -> None:
    """A rank that is still loading offers none, so in a chain the header alone proves the bytes."""
    bench.verify = verify
    monkeypatch.setattr(InProcessEngine, "tallies", tallies)
    check = Digests(Span(0, 0, ()))

    def made(*_: object) -> Digests:
        if not proven:
            raise MISSING
        return check

    monkeypatch.setattr(module, "DigestCheck", made)
    entered = cast("list[SourceRank]", [Table(algorithm) for algorithm in algorithms])
    with ExitStack() as undo:
        if outcome == "refused":
            with pytest.raises(DigestsMissing):
                bench.attempt()._reading(entered, undo)
            return
        found = bench.attempt()._reading(entered, undo).check
    assert (found is not None) == (outcome == "checked")
    assert check.lent_to == ([bench.reader] if outcome == "checked" else [])


def test_tensors_that_have_moved_while_they_were_filled_are_unusable(bench: Bench) -> None:
    bench.source()
    bench.moved = True
    with pytest.raises(TensorsUnusable, match="tensors were given other memory while"):
        bench.attempt().fill()
    assert bench.memory.raw == bench.content


@pytest.mark.parametrize(
    ("nbytes", "reads", "count"),
    [(16 << 20, 9, 3), (48 << 20, 9, 2), (64 << 20, 9, 2), (1 << 20, 5, 5), (1 << 20, 99, 48)],
)
def test_buffers_take_48_mib_or_two_reads_and_no_more_than_there_are_reads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, nbytes: int, reads: int, count: int
) -> None:
    made: list[tuple[object, ...]] = []
    memory = ctypes.create_string_buffer(8)

    def staging(tensors: object, *parts: Any) -> Any:
        made.append(parts)
        return SimpleNamespace(region=Region(ctypes.addressof(memory), 8))

    monkeypatch.setattr(module, "Staging", staging)
    lines = (Lines(0, 0, nbytes // 2),)
    spans = [Span(0, nbytes, (), lines), Span(0, 8, (), lines), Span(0, 4 * nbytes, ())]
    spans += [spans[0]] * (reads - 2)
    bench.source()
    with ExitStack() as undo:
        one = bench.attempt()._reading(bench.sources, undo)  # type: ignore[arg-type]
        assert one._staging(spans) is not None
        assert len(list(bench.reader._lent)) == 2
    assert len(list(bench.reader._lent)) == 1
    assert made == [(torch.device("cpu"), count, nbytes)]
    assert one._staging(spans[2:3]) is None


def test_a_load_of_no_tensors_whose_source_has_changed_does_not_wait_for_it() -> None:
    one = attempt([source(ONE, A)], Manifest((), ()), changed=[ONE])
    with pytest.raises(TornRead, match="/engines/one/0 changed before it was read"):
        one.fill()
