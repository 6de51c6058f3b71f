"""What a transfer makes of sources that are slow, stop, change or go away: with engines of this
process, and a clock on which time passes only while the transfer sleeps.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader import InProcessEngine, Pace, Progress, metrics
from engine_loader.errors import (
    Cancelled,
    EngineFailed,
    LoaderError,
    ReadFailed,
    SourceEvicted,
    SourceLost,
    Stalled,
    TornRead,
)
from engine_loader.planning.boxes import Lines
from engine_loader.planning.plan import ReadOp
from engine_loader.planning.reads import Span
from engine_loader.transfer.clock import Clock
from engine_loader.transfer.pace import pace_for
from engine_loader.transfer.pipe import Source, Stock
from engine_loader.transfer.scheduler import Transfer
from engine_registry import Region
from tests.support.clock import Gate, SteppedClock
from tests.support.engines import Interrupted
from tests.support.meshes import lines_one_by_one

NBYTES = 2 << 20
CHUNK = 1 << 17
PACE = Pace(CHUNK, 4, stall_s=0.3, patience_s=2.0, starve_s=1.0)
ALWAYS = b"\xaa" * NBYTES  # what every source holds
PIECE, RUN = 1 << 15, 1 << 10  # of what is staged


class Buffers:
    """To stage in, for `lent` to the engine; they all have to be given back."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.memory = ctypes.create_string_buffer(count * PIECE)
        self.free = [ctypes.addressof(self.memory) + at * PIECE for at in range(count)]
        self.region = Region(ctypes.addressof(self.memory), count * PIECE)

    def take(self) -> int | None:
        return self.free.pop() if self.free else None

    def give_back(self, addr: int) -> None:
        assert addr not in self.free
        self.free.append(addr)

    def copy(self, addr: int, lines: Sequence[Lines]) -> None:
        for some in lines:
            for src, dst in lines_one_by_one(some):
                ctypes.memmove(dst, addr + src, some.nbytes)


class Bench:
    """A destination, and sources that hold what it wants; `check`s of sources succeed unless set
    otherwise.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.reader = stack.enter_context(InProcessEngine())
        self.dst = ctypes.create_string_buffer(NBYTES)
        self.blocks: list[ctypes.Array[ctypes.c_char]] = []
        self.engines: list[InProcessEngine] = []
        self.sources: list[Source] = []
        self.progress: list[Progress] = []
        self.checked: list[Span] = []
        self.cancel = threading.Event()
        self.clock = SteppedClock(self._hangs)
        self._gates: list[Gate] = []

    def _hangs(self, thread: int) -> bool:
        """It is in contact with a source that is paused."""
        return any(thread in gate.waiting for gate in self._gates)

    def source(
        self,
        content: bytes = ALWAYS,
        delay_s: float = 0.0,
        check: Callable[[], None] = lambda: None,
        lost: Callable[[], LoaderError | None] = lambda: None,
    ) -> InProcessEngine:
        engine = self._stack.enter_context(InProcessEngine(delay_s=delay_s))
        engine._running = Gate()
        engine._running.set()
        self._gates.append(engine._running)
        block = ctypes.create_string_buffer(content, NBYTES)
        engine.register(Region(ctypes.addressof(block), NBYTES))

        def contact_and_check() -> None:
            self.reader.connect(engine.session_id)
            check()

        self.blocks.append(block)
        self.engines.append(engine)
        self.sources.append(
            Source(f"source {len(self.sources)}", engine.session_id, contact_and_check, lost)
        )
        return engine

    def see(self, _: int, spans: Sequence[Span]) -> None:
        self.checked.extend(spans)

    def read_with(self, reader: InProcessEngine) -> None:
        self.reader = self._stack.enter_context(reader)

    def transfer(
        self,
        pace: Pace = PACE,
        on_progress: Callable[[Progress], None] | None = None,
        piece: int = NBYTES,
        clock: Clock | None = None,
    ) -> Transfer:
        self.reader.lend(Region(ctypes.addressof(self.dst), NBYTES))
        spans = [
            Span(
                ctypes.addressof(self.dst) + at,
                piece,
                tuple(
                    (number, ctypes.addressof(block) + at)
                    for number, block in enumerate(self.blocks)
                ),
            )
            for at in range(0, NBYTES, piece)
        ]
        return Transfer(
            self.reader,
            spans,
            self.sources,
            pace,
            on_progress or self.progress.append,
            self.cancel,
            on_checked=self.see,
            clock=clock or self.clock,
        )

    def staging(
        self,
        buffers: Buffers,
        pace: Pace = PACE,
        holders: Callable[[int], Sequence[int]] | None = None,
    ) -> Transfer:
        """In which every other piece is staged, and comes in another order of its runs. `holders`
        has who holds the piece that is the `at`th, if not all do.
        """
        self.reader.lend(Region(ctypes.addressof(self.dst), NBYTES))
        self.reader.lend(buffers.region)
        spans = []
        for at in range(NBYTES // PIECE):
            ahead = at * PIECE
            some = range(len(self.blocks)) if holders is None else holders(at)
            srcs = tuple((number, ctypes.addressof(self.blocks[number]) + ahead) for number in some)
            addr = ctypes.addressof(self.dst) + ahead
            half = PIECE // 2
            even = Lines(0, addr, RUN, (half // RUN,), (2 * RUN,), (RUN,))
            spans.append(
                Span(0, PIECE, srcs, (even, even.at(RUN, half)))
                if at % 2
                else Span(addr, PIECE, srcs)
            )
        return Transfer(
            self.reader,
            spans,
            self.sources,
            pace,
            self.progress.append,
            self.cancel,
            buffers,
            self.see,
            clock=self.clock,
        )

    def run_staging(self, transfer: Transfer, buffers: Buffers) -> None:
        """The sources hold `MIXED`."""
        transfer.run()
        assert self.dst.raw == SORTED
        assert sum(share.nbytes for share in transfer.shares) == NBYTES
        self.assert_nothing_is_staged(buffers)

    def assert_nothing_is_staged(self, buffers: Buffers) -> None:
        assert len(set(buffers.free)) == buffers.count
        before = buffers.memory.raw
        self.assert_nothing_is_in_flight()
        assert buffers.memory.raw == before

    def run(self, transfer: Transfer) -> None:
        transfer.run()
        assert self.dst.raw == ALWAYS
        assert sum(share.nbytes for share in transfer.shares) == NBYTES
        assert sum(span.nbytes for span in self.checked) == NBYTES
        self.assert_nothing_is_in_flight()

    def assert_nothing_is_in_flight(self) -> None:
        """What is resumed now, or comes late, must not write to memory that its owner has back."""
        ctypes.memset(self.dst, 7, NBYTES)
        for engine in self.engines:
            engine.resume()
        assert self.dst.raw == b"\7" * NBYTES
        assert not self.reader._reads


def _sorted(content: bytes) -> bytes:
    """As the lines of `Bench.staging` put it."""
    pieces = []
    for at in range(NBYTES // PIECE):
        runs = [
            content[at * PIECE + ahead : at * PIECE + ahead + RUN] for ahead in range(0, PIECE, RUN)
        ]
        pieces += [*runs[::2], *runs[1::2]] if at % 2 else runs
    return b"".join(pieces)


MIXED = os.urandom(NBYTES)
SORTED = _sorted(MIXED)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with ExitStack() as stack:
        bench = Bench(stack)
        monkeypatch.setattr("engine_loader.engines.in_process.time", bench.clock)
        yield bench


def raiser(error: Exception) -> Callable[[], None]:
    def check() -> None:
        raise error

    return check


class Striding(InProcessEngine):
    """Reads runs at equal distances, one by one."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(delay_s=delay_s)
        self._runs: dict[int, list[int]] = {}  # numbers of their reads, by the number of the last

    @property
    def strides(self) -> bool:
        return True

    def start(self, peer: str, op: ReadOp) -> int:
        if op.lines is None:
            return super().start(peer, op)
        assert op.lines.dst == 0
        self._lent.check_destination(replace(op, lines=None, nbytes=op.dst_nbytes))
        numbers = [
            super(Striding, self).start(
                peer, ReadOp(op.source, op.src_addr + src, op.dst_addr + dst, op.lines.nbytes)
            )
            for src, dst in lines_one_by_one(op.lines)
        ]
        self._runs[numbers[-1]] = numbers
        return numbers[-1]

    def done(self, number: int) -> bool:
        numbers = self._runs.get(number, [number])
        while numbers and super().done(numbers[0]):
            numbers.pop(0)
        if not numbers:
            self._runs.pop(number, None)
        return not numbers


@pytest.mark.parametrize("piece", [3 * RUN, CHUNK])
def test_progress_counts_the_bytes_that_are_read_of_runs_and_not_what_lies_between(
    bench: Bench, piece: int
) -> None:
    bench.read_with(Striding())
    bench.source()
    bench.source()
    bench.reader.lend(Region(ctypes.addressof(bench.dst), NBYTES))
    runs = NBYTES // (2 * RUN)  # every other one is wanted
    some = Lines(0, ctypes.addressof(bench.dst), RUN, (runs,), (2 * RUN,), (2 * RUN,))
    srcs = tuple((number, ctypes.addressof(block)) for number, block in enumerate(bench.blocks))
    span = Span(some.dst, some.extent, srcs, (some,), direct=True)
    transfer = Transfer(
        bench.reader,
        [span],
        bench.sources,
        replace(PACE, chunk_nbytes=piece),
        bench.progress.append,
        bench.cancel,
        on_checked=bench.see,
        clock=bench.clock,
    )
    transfer.run()
    wanted = (ALWAYS[:RUN] + bytes(RUN)) * runs
    assert bench.dst.raw == wanted
    assert sum(share.nbytes for share in transfer.shares) == NBYTES // 2
    assert sum(span.read_nbytes for span in bench.checked) == NBYTES // 2
    assert bench.progress[-1] == Progress(NBYTES // 2, NBYTES // 2)
    assert all(one.nbytes <= NBYTES // 2 for one in bench.progress)
    bench.assert_nothing_is_in_flight()


# -- one source
# --------------------------------------------------------------------------------------------------


def test_everything_comes_and_progress_goes_up_to_the_last_byte(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(metrics.READ_NBYTES, "inc", lambda amount: counted.append(amount))
    bench.source()
    bench.run(bench.transfer())
    assert sum(counted) == NBYTES
    assert bench.progress[-1] == Progress(NBYTES, NBYTES)
    assert [one.nbytes for one in bench.progress] == sorted(one.nbytes for one in bench.progress)


def test_small_pieces_come_as_well_as_long_ones(bench: Bench) -> None:
    bench.source()
    bench.run(bench.transfer(piece=512))


@given(st.integers(1, 200), st.integers(1, 64))
def test_a_span_is_cut_into_as_few_pieces_as_possible_that_hold_it_in_order(
    nbytes: int, most: int
) -> None:
    pieces = list(Span(1000, nbytes, ((0, 5000), (2, 9000))).cut(most))
    assert len(pieces) == -(-nbytes // most)
    at = 0
    for piece in pieces:
        assert (piece.dst_addr, piece.srcs) == (1000 + at, ((0, 5000 + at), (2, 9000 + at)))
        assert 1 <= piece.nbytes <= most
        at += piece.nbytes
    assert at == nbytes


class Counting(InProcessEngine):
    """How many reads of a size were in flight at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def start(self, session_id: str, op: ReadOp) -> int:
        number = super().start(session_id, op)
        self.most = max(self.most, len(self._reads))
        return number


@pytest.mark.parametrize(("piece", "most"), [(CHUNK * 2, 4), (512, 64)])
def test_no_more_is_in_flight_than_the_pace_allows_and_small_reads_may_be_many(
    bench: Bench, piece: int, most: int
) -> None:
    reader = Counting()
    bench.read_with(reader)
    bench.source(delay_s=0.001)
    bench.run(bench.transfer(replace(PACE, chunk_nbytes=CHUNK + 1), piece=piece))
    assert reader.most == most


def test_nothing_is_read_before_the_first_check_has_succeeded(bench: Bench) -> None:
    bench.source(check=raiser(TornRead("being changed")))
    with pytest.raises(TornRead, match="being changed"):
        bench.transfer().run()
    assert bench.dst.raw == bytes(NBYTES)


def test_weights_that_changed_after_they_were_read_are_torn(bench: Bench) -> None:
    answers = iter([None, TornRead("changed")])

    def check() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    bench.source(check=check)
    transfer = bench.transfer()
    with pytest.raises(TornRead, match="changed"):
        transfer.run()
    assert bench.checked == []
    bench.assert_nothing_is_in_flight()


def test_a_read_that_fails_once_is_made_again(bench: Bench) -> None:
    class Flaky(InProcessEngine):
        failed = False

        def done(self, number: int) -> bool:
            done = super().done(number)
            if done and not self.failed:
                self.failed = True
                raise ReadFailed("for once")
            return done

    bench.read_with(Flaky())
    bench.source()
    bench.run(bench.transfer())


def test_a_source_whose_reads_fail_now_and_then_is_read_to_the_end(bench: Bench) -> None:
    class Flaky(InProcessEngine):
        came = 0

        def done(self, number: int) -> bool:
            done = super().done(number)
            self.came += done
            if done and self.came % 6 == 3:
                raise ReadFailed("now and then")
            return done

    bench.read_with(reader := Flaky())
    bench.source()
    bench.run(bench.transfer())
    assert reader.came > 9  # so two have failed at least


def test_a_source_whose_reads_all_fail_is_checked_once_more_and_then_lost(bench: Bench) -> None:
    class Failing(InProcessEngine):
        def done(self, number: int) -> bool:
            if super().done(number):
                raise ReadFailed("always")
            return False

    checks: list[int] = []
    bench.read_with(Failing())
    bench.source(check=lambda: checks.append(len(checks)))
    with pytest.raises(SourceLost, match="always"):
        bench.transfer().run()
    assert len(checks) == 2


def test_a_source_that_ends_is_lost(bench: Bench) -> None:
    engine = bench.source()
    bench.read_with(Interrupted(engine.close, at=3))
    with pytest.raises(SourceLost, match="cannot read from"):
        bench.transfer().run()
    bench.assert_nothing_is_in_flight()


def test_what_the_registry_reports_ends_the_reading_at_once(bench: Bench) -> None:
    news: list[LoaderError] = []
    bench.source(delay_s=0.002, lost=lambda: news[0] if news else None)
    bench.read_with(Interrupted(lambda: news.append(SourceLost("evicted")), at=3))
    with pytest.raises(SourceLost, match="evicted"):
        bench.transfer().run()
    bench.assert_nothing_is_in_flight()


def test_a_fault_of_our_own_engine_is_not_taken_for_one_of_the_source(bench: Bench) -> None:
    bench.source(check=raiser(EngineFailed("the transfer engine is closed")))
    with pytest.raises(EngineFailed, match="closed"):
        bench.transfer().run()


def test_a_bug_in_a_check_is_raised_as_it_is(bench: Bench) -> None:
    bench.source(check=raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        bench.transfer().run()


# -- stalls
# --------------------------------------------------------------------------------------------------


def test_the_last_source_is_given_time_to_go_on(bench: Bench) -> None:
    engine = bench.source()

    def pause() -> None:
        engine.pause()
        bench.clock.after(3 * PACE.stall_s, engine.resume)

    bench.read_with(Interrupted(pause, at=3))
    bench.run(bench.transfer(replace(PACE, patience_s=20)))


def test_a_source_that_brings_nothing_is_named_each_second_until_it_goes_on(bench: Bench) -> None:
    engine = bench.source()

    def pause() -> None:
        engine.pause()
        bench.clock.after(3.5, engine.resume)

    bench.read_with(Interrupted(pause, at=3))
    bench.run(bench.transfer(replace(PACE, patience_s=20)))
    silences = [one for progress in bench.progress for one in progress.silent]
    assert {one.source for one in silences} == {"source 0"}
    assert [round(one.seconds) for one in silences] == [1, 2, 3]
    assert bench.progress[-1] == Progress(NBYTES, NBYTES)


@pytest.mark.parametrize("at", [0, 3])
def test_a_source_that_stays_silent_is_given_up_and_nothing_of_it_is_written_later(
    bench: Bench, at: int
) -> None:
    engine = bench.source()
    if at:
        bench.read_with(Interrupted(engine.pause, at=at))
    else:
        engine.pause()
    with pytest.raises(Stalled, match="nothing has come from in-process"):
        bench.transfer().run()
    bench.assert_nothing_is_in_flight()


def test_a_source_that_answers_checks_but_sends_nothing_is_given_up_too(bench: Bench) -> None:
    class Swallowing(InProcessEngine):
        def done(self, number: int) -> bool:
            with self._lock:
                if not self._reads[number].over:
                    return False
            return super().done(number)

    bench.read_with(Swallowing())
    bench.source()
    with pytest.raises(Stalled):
        bench.transfer().run()
    assert not bench.reader._reads


def test_reads_that_nothing_comes_of_are_ended_and_made_again(bench: Bench) -> None:
    class Losing(InProcessEngine):
        """The reads that it begins before it has abandoned some never end by themselves."""

        abandoned = False

        def done(self, number: int) -> bool:
            with self._lock:
                if not self.abandoned and not self._reads[number].over:
                    return False
            return super().done(number)

        def abandon(self, peer: str) -> None:
            super().abandon(peer)
            self.abandoned = True

    bench.read_with(Losing())
    bench.source()
    bench.run(bench.transfer(replace(PACE, patience_s=20)))


def test_a_slow_source_has_less_in_flight_but_is_not_given_up(bench: Bench) -> None:
    reader = Counting()
    bench.read_with(reader)
    bench.source(delay_s=0.03)
    bench.run(bench.transfer(replace(PACE, stall_s=5, slow_s=0.01)))
    assert reader.most == 2  # as at the beginning


# -- several sources
# --------------------------------------------------------------------------------------------------


def test_every_source_contributes_and_the_slow_one_less(bench: Bench) -> None:
    bench.source(delay_s=0.001)
    bench.source(delay_s=0.02)
    transfer = bench.transfer(replace(PACE, stall_s=5))
    bench.run(transfer)
    fast, slow = (share.nbytes for share in transfer.shares)
    assert fast > slow > 0


def test_one_of_two_that_ends_is_made_up_for_by_the_other(bench: Bench) -> None:
    bench.source(delay_s=0.001)
    bench.source(delay_s=0.001)
    bench.read_with(Interrupted(bench.engines[0].close, at=5))
    transfer = bench.transfer()
    bench.run(transfer)
    assert isinstance(transfer.shares[0].error, SourceLost)
    assert transfer.shares[1].error is None


def test_one_of_two_that_stops_is_made_up_for_and_writes_nothing_when_it_goes_on(
    bench: Bench,
) -> None:
    """Its weights have changed meanwhile: what it still sent would be wrong."""
    stopped = bench.source()
    bench.source()

    def stop() -> None:
        stopped.pause()
        ctypes.memset(bench.blocks[0], 1, NBYTES)

    bench.read_with(Interrupted(stop, at=1))
    transfer = bench.transfer()
    bench.run(transfer)
    assert isinstance(transfer.shares[0].error, Stalled)
    assert re.search(r"has come from in-process:\d+ for \d+\.\d s", str(transfer.shares[0].error))


def test_what_a_source_brought_before_it_was_found_to_have_changed_is_read_again_from_another(
    bench: Bench,
) -> None:
    answers = iter([None, TornRead("changed")])

    def check() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    bench.source(os.urandom(NBYTES), check=check)
    bench.source(delay_s=0.001)
    transfer = bench.transfer()
    bench.run(transfer)
    assert transfer.shares[0].nbytes == 0
    assert isinstance(transfer.shares[0].error, TornRead)
    assert any(
        later.nbytes < one.nbytes
        for one, later in zip(bench.progress, bench.progress[1:], strict=False)
    )


def test_a_source_that_never_answers_does_not_keep_the_others_from_finishing(bench: Bench) -> None:
    bench.source().pause()
    bench.source()
    transfer = bench.transfer()
    bench.run(transfer)
    assert transfer.shares[1].nbytes == NBYTES


def test_of_what_a_rank_with_another_content_has_a_slow_source_takes_little(bench: Bench) -> None:
    bench.source(delay_s=0.1)
    bench.source(delay_s=0.001)
    bench.sources[1].lends = True
    transfer = bench.transfer(replace(PACE, stall_s=5))
    bench.run(transfer)
    assert [share.nbytes for share in transfer.shares] == [CHUNK, NBYTES - CHUNK]


def test_a_slow_rank_with_another_content_is_asked_for_little(bench: Bench) -> None:
    bench.source(delay_s=0.001)
    bench.source(delay_s=0.1)
    bench.sources[1].lends = True
    transfer = bench.transfer(replace(PACE, stall_s=5, begin=4))
    bench.run(transfer)
    assert [share.nbytes for share in transfer.shares] == [NBYTES - CHUNK, CHUNK]


def test_without_the_rank_that_lends_a_source_takes_all_with_its_whole_window(
    bench: Bench,
) -> None:
    reader = Counting()
    bench.read_with(reader)
    bench.source(delay_s=0.001)
    bench.source(lost=lambda: SourceLost("gone"))
    bench.sources[1].lends = True
    bench.run(bench.transfer())
    assert reader.most == PACE.depth


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([SourceLost("gone"), SourceLost("evicted")], SourceLost),
        ([SourceLost("gone"), Stalled("silent")], Stalled),
        ([Stalled("silent"), TornRead("changed")], TornRead),
    ],
)
def test_when_none_is_left_the_error_says_what_became_of_each(
    bench: Bench, errors: list[LoaderError], kind: type
) -> None:
    for error in errors:
        bench.source(check=raiser(error))
    with pytest.raises(LoaderError) as caught:
        bench.transfer().run()
    assert type(caught.value) is kind
    assert all(
        f"source {number}: {error}" in str(caught.value) for number, error in enumerate(errors)
    )


def test_nothing_that_an_evicted_source_brought_counts_even_where_another_is_left(
    bench: Bench,
) -> None:
    news: list[LoaderError] = []
    bench.source(os.urandom(NBYTES), lost=lambda: news[0] if news else None)
    bench.source(delay_s=0.01)

    def evict(_: Progress) -> None:
        if bench.checked and not news:
            news.append(SourceEvicted("evicted"))

    transfer = bench.transfer(replace(PACE, check_s=0.0), evict)
    with pytest.raises(SourceEvicted):
        transfer.run()
    assert transfer.shares[0].error is news[0]
    bench.assert_nothing_is_in_flight()


def test_an_evicted_source_that_has_brought_nothing_is_done_without(bench: Bench) -> None:
    bench.source(lost=lambda: SourceEvicted("evicted"))
    bench.source()
    bench.run(bench.transfer())


def in_contact(bench: Bench) -> tuple[InProcessEngine, InProcessEngine]:
    """A reader that cannot end reads, as over RDMA, in contact with a source that stops then; and
    another source.
    """
    stopped = bench.source()
    bench.source()
    reader = InProcessEngine(can_end_reads=False)
    bench.read_with(reader)
    bench.sources[0].check()
    stopped.pause()
    return reader, stopped


def test_reads_that_cannot_be_ended_do_not_keep_another_source_from_bringing_the_rest(
    bench: Bench,
) -> None:
    reader, stopped = in_contact(bench)
    bench.clock.after(0.5, stopped.resume)
    transfer = bench.transfer(replace(PACE, patience_s=20))
    bench.run(transfer)
    assert isinstance(transfer.shares[0].error, Stalled)
    assert reader.settled(stopped.session_id)
    before_the_end = [one.total_nbytes - one.nbytes for one in bench.progress[:-2]]
    assert before_the_end[-1] == 2 * CHUNK  # all but what the stopped one had been asked for


@pytest.mark.parametrize("dropped", [False, True], ids=["is read from", "was dropped before"])
def test_memory_that_a_read_may_still_write_to_is_not_handed_back_silently(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, dropped: bool
) -> None:
    monkeypatch.setattr("engine_loader.transfer.leaving._HAND_BACK_S", 0.1)
    reader, stopped = in_contact(bench)

    def cancel(_: Progress) -> None:
        if not dropped or transfer.shares[0].error is not None:
            bench.cancel.set()

    transfer = bench.transfer(on_progress=cancel)
    with pytest.raises(EngineFailed, match=r"have not ended: the memory .* must") as caught:
        transfer.run()
    assert caught.value.details["unsettled"] == ["source 0"]
    # the other source's have ended
    assert {read.peer for read in reader._reads.values()} == {stopped.session_id}


def test_a_transfer_does_not_wait_for_ever_for_memory_that_a_read_may_still_write_to(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other source could bring the rest, but for where those reads write to."""
    for name in ("DRAIN_S", "_HAND_BACK_S"):
        monkeypatch.setattr(f"engine_loader.transfer.leaving.{name}", 0.1)
    in_contact(bench)
    with pytest.raises(EngineFailed, match="have not ended") as caught:
        bench.transfer(replace(PACE, patience_s=3600)).run()
    # it gave up by itself: whatever ends a transfer then, its last word is the same
    assert isinstance(caught.value.__context__, EngineFailed)


def test_an_engine_that_fails_to_end_reads_of_one_source_ends_those_of_the_others(
    bench: Bench,
) -> None:
    bench.source(delay_s=0.01)
    bench.source(delay_s=0.01)

    class Broken(InProcessEngine):
        broken = True

        def abandon(self, peer: str) -> None:
            if peer == bench.sources[0].peer and self.broken:
                Broken.broken = False
                raise EngineFailed("for once")
            super().abandon(peer)

    bench.read_with(Broken())

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(EngineFailed, match="for once"):
        bench.transfer(on_progress=interrupt).run()
    bench.assert_nothing_is_in_flight()


def test_a_second_interrupt_does_not_leave_reads_in_flight(bench: Bench) -> None:
    bench.source(delay_s=0.01)
    left = [KeyboardInterrupt(), KeyboardInterrupt(), KeyboardInterrupt()]

    class Interrupting(InProcessEngine):
        def abandon(self, peer: str) -> None:
            if left:
                raise left.pop()
            super().abandon(peer)

    bench.read_with(Interrupting())

    def interrupt(_: Progress) -> None:
        raise left.pop()

    with pytest.raises(KeyboardInterrupt):
        bench.transfer(on_progress=interrupt).run()
    assert not left
    bench.assert_nothing_is_in_flight()


def test_an_interrupt_while_reads_are_ended_is_raised_before_any_other_error(bench: Bench) -> None:
    bench.source(delay_s=0.01)
    errors = [KeyboardInterrupt(), EngineFailed("for once")]

    class Interrupting(InProcessEngine):
        def abandon(self, peer: str) -> None:
            if errors:
                raise errors.pop()
            super().abandon(peer)

    bench.read_with(Interrupting())

    def fail(_: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt):
        bench.transfer(on_progress=fail).run()
    assert not errors
    bench.assert_nothing_is_in_flight()


def test_a_check_that_fails_while_reads_have_come_does_not_lose_them(bench: Bench) -> None:
    """They are neither the lost source's any more nor forgotten: else the transfer would wait for
    them for ever.
    """
    for _ in range(2):
        bench.source()
    answers = iter([None, ReadFailed("once"), ReadFailed("twice")])

    def check() -> None:
        if (answer := next(answers, None)) is not None:
            raise answer

    contact = bench.sources[0].check

    def contact_and_check() -> None:
        contact()
        check()

    bench.sources[0].check = contact_and_check
    bench.run(bench.transfer(replace(PACE, check_s=0.0)))


# -- what only some of them hold
# -------------------------------------------------------------------------------------------------


def halves(bench: Bench) -> list[Span]:
    """Each of two sources holds one half of what is wanted."""
    bench.reader.lend(Region(ctypes.addressof(bench.dst), NBYTES))
    half = NBYTES // 2
    addrs = [ctypes.addressof(block) for block in bench.blocks]
    return [
        Span(ctypes.addressof(bench.dst) + half * at, half, ((at, addrs[at] + half * at),))
        for at in range(2)
    ]


def test_each_part_comes_from_a_source_that_holds_it(bench: Bench) -> None:
    bench.source(ALWAYS[: NBYTES // 2], delay_s=0.002)
    bench.source(bytes(NBYTES // 2) + ALWAYS[NBYTES // 2 :])
    transfer = Transfer(
        bench.reader,
        halves(bench),
        bench.sources,
        PACE,
        bench.progress.append,
        on_checked=bench.see,
        clock=bench.clock,
    )
    bench.run(transfer)
    assert [share.nbytes for share in transfer.shares] == [NBYTES // 2] * 2


def test_what_others_hold_too_is_left_to_them_as_long_as_there_is_something_that_they_do_not(
    bench: Bench,
) -> None:
    """Else what only one holds would be read last, by that one alone."""
    reads: list[ReadOp] = []

    class Recording(InProcessEngine):
        def start(self, peer: str, op: ReadOp) -> int:
            if peer == bench.sources[0].peer:
                reads.append(op)
            return super().start(peer, op)

    bench.read_with(Recording())
    for _ in range(2):
        bench.source(MIXED, delay_s=0.001)
    buffers = Buffers(99)
    pieces = NBYTES // PIECE
    bench.run_staging(
        bench.staging(buffers, holders=lambda at: [0] if at >= pieces // 2 else [0, 1]), buffers
    )
    first = ctypes.addressof(bench.blocks[0]) + NBYTES // 2
    assert all(op.src_addr >= first for op in reads[: pieces // 2])


def test_the_loss_of_the_only_holder_of_a_part_ends_the_transfer_although_others_are_left(
    bench: Bench,
) -> None:
    bench.source(delay_s=0.001)
    bench.source(delay_s=0.001)
    bench.read_with(Interrupted(bench.engines[1].close, at=3))
    transfer = Transfer(
        bench.reader,
        halves(bench),
        bench.sources,
        PACE,
        bench.progress.append,
        on_checked=bench.see,
        clock=bench.clock,
    )
    with pytest.raises(SourceLost, match="cannot read from"):
        transfer.run()
    assert transfer.shares[0].error is None
    bench.assert_nothing_is_in_flight()


def test_the_loss_of_a_source_all_of_whose_part_has_come_and_been_checked_is_none(
    bench: Bench,
) -> None:
    news: list[LoaderError] = []
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1

    bench.source(check=check, lost=lambda: SourceLost("evicted") if news else None)
    bench.source(delay_s=0.05)

    class Evicting(InProcessEngine):
        """Once nothing is left but what the other source holds."""

        def done(self, number: int) -> bool:
            if transfer is not None and not transfer._chunks._left[(0,)]:
                news.append(SourceLost("evicted"))
            return super().done(number)

    transfer: Transfer | None = None
    bench.read_with(Evicting())
    transfer = Transfer(
        bench.reader,
        halves(bench),
        bench.sources,
        replace(PACE, stall_s=5),
        bench.progress.append,
        on_checked=bench.see,
        clock=bench.clock,
    )
    bench.run(transfer)
    assert checks >= 2
    assert isinstance(transfer.shares[0].error, SourceLost)


def test_the_only_holder_of_a_part_is_given_time_to_go_on_although_there_are_others(
    bench: Bench,
) -> None:
    engine = bench.source()
    bench.source()

    def pause() -> None:
        engine.pause()
        bench.clock.after(3 * PACE.stall_s, engine.resume)

    bench.read_with(Interrupted(pause, at=3))
    bench.run(
        Transfer(
            bench.reader,
            halves(bench),
            bench.sources,
            replace(PACE, patience_s=20),
            bench.progress.append,
            on_checked=bench.see,
            clock=bench.clock,
        )
    )


# -- by way of buffers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 99])
@pytest.mark.parametrize("sources", [1, 3])
def test_what_is_staged_comes_to_its_places_however_few_buffers_there_are(
    bench: Bench, count: int, sources: int
) -> None:
    for _ in range(sources):
        bench.source(MIXED, delay_s=0.0005)
    buffers = Buffers(count)
    bench.run_staging(bench.staging(buffers), buffers)
    assert bench.progress[-1] == Progress(NBYTES, NBYTES)


def test_what_needs_no_buffer_is_read_while_there_is_none(bench: Bench) -> None:
    reader = Counting()
    bench.read_with(reader)
    bench.source(MIXED, delay_s=0.002)
    bench.source(MIXED, check=raiser(SourceLost("gone")))
    buffers = Buffers(1)
    # What is staged is held by the first only, so it comes first there.
    bench.run_staging(bench.staging(buffers, holders=lambda at: [0] if at % 2 else [0, 1]), buffers)
    assert reader.most > 2


def test_without_buffers_what_has_to_be_staged_is_refused(bench: Bench) -> None:
    bench.source()
    span = Span(0, 16, ((0, 0),), (Lines(0, 0, 16),))
    with pytest.raises(ValueError, match="no buffers"):
        Transfer(
            bench.reader, [span], bench.sources, PACE, bench.progress.append, on_checked=bench.see
        )


def test_what_was_on_its_way_into_a_buffer_when_its_source_ended_comes_from_another(
    bench: Bench,
) -> None:
    for _ in range(2):
        bench.source(MIXED, delay_s=0.001)
    bench.read_with(Interrupted(bench.engines[0].close, at=5))
    buffers = Buffers(4)
    transfer = bench.staging(buffers)
    bench.run_staging(transfer, buffers)
    assert isinstance(transfer.shares[0].error, SourceLost)


@pytest.mark.parametrize("count", [1, 4])
def test_buffers_that_a_stopped_source_was_to_fill_are_free_for_another(
    bench: Bench, count: int
) -> None:
    """It would still write to them when it goes on: so its reads are ended before."""
    stopped = bench.source(MIXED)
    bench.source(MIXED)

    def stop() -> None:
        stopped.pause()
        ctypes.memset(bench.blocks[0], 1, NBYTES)

    bench.read_with(Interrupted(stop, at=1))
    buffers = Buffers(count)
    transfer = bench.staging(buffers)
    bench.run_staging(transfer, buffers)
    assert isinstance(transfer.shares[0].error, Stalled)


def test_what_was_staged_of_weights_that_had_changed_is_written_over(bench: Bench) -> None:
    answers = iter([None, TornRead("changed")])

    def check() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    bench.source(os.urandom(NBYTES), check=check)
    bench.source(MIXED, delay_s=0.001)
    buffers = Buffers(4)
    transfer = bench.staging(buffers)
    bench.run_staging(transfer, buffers)
    assert transfer.shares[0].nbytes == 0


def test_a_staged_read_that_fails_once_is_made_again(bench: Bench) -> None:
    class Flaky(InProcessEngine):
        failed = False

        def done(self, number: int) -> bool:
            staged = (
                number in self._reads
                and buffers.region.addr <= self._reads[number].op.dst_addr < buffers.region.end
            )
            done = super().done(number)
            if done and staged and not self.failed:
                self.failed = True
                raise ReadFailed("for once")
            return done

    bench.read_with(Flaky())
    bench.source(MIXED)
    buffers = Buffers(2)
    bench.run_staging(bench.staging(buffers), buffers)


def test_a_staged_read_that_cannot_begin_gives_its_buffer_back(bench: Bench) -> None:
    class Refusing(InProcessEngine):
        refused = False

        def start(self, peer: str, op: ReadOp) -> int:
            staged = buffers.region.addr <= op.dst_addr < buffers.region.end
            if staged and not self.refused:
                self.refused = True
                raise ReadFailed("for once")
            return super().start(peer, op)

    bench.read_with(Refusing())
    bench.source(MIXED)
    buffers = Buffers(2)
    bench.run_staging(bench.staging(buffers), buffers)


def test_cancelling_gives_all_buffers_back_and_leaves_them_alone(bench: Bench) -> None:
    bench.source(MIXED, delay_s=0.01)
    bench.read_with(Interrupted(bench.cancel.set, at=6))
    buffers = Buffers(3)
    with pytest.raises(Cancelled):
        bench.staging(buffers).run()
    bench.assert_nothing_is_staged(buffers)


def test_cancelling_gives_the_buffers_of_a_stopped_source_back_as_well(bench: Bench) -> None:
    engine = bench.source(MIXED)

    def stop() -> None:
        engine.pause()
        bench.cancel.set()

    bench.read_with(Interrupted(stop, at=2))
    buffers = Buffers(3)
    with pytest.raises(Cancelled):
        bench.staging(buffers, replace(PACE, stall_s=3600, patience_s=3600)).run()
    bench.assert_nothing_is_staged(buffers)


def test_copying_that_fails_ends_the_transfer_with_nothing_in_flight(bench: Bench) -> None:
    class Broken(Buffers):
        def copy(self, addr: int, lines: Sequence[Lines]) -> None:
            raise ZeroDivisionError

    bench.source(MIXED, delay_s=0.001)
    with pytest.raises(ZeroDivisionError):
        bench.staging(Broken(3)).run()
    bench.assert_nothing_is_in_flight()


# -- ending early
# --------------------------------------------------------------------------------------------------


def test_a_cancelled_transfer_ends_with_nothing_in_flight(bench: Bench) -> None:
    bench.source(delay_s=0.01)
    bench.read_with(Interrupted(bench.cancel.set, at=2))
    transfer = bench.transfer()
    with pytest.raises(Cancelled):
        transfer.run()
    assert transfer.shares[0].nbytes == sum(span.nbytes for span in bench.checked)
    bench.assert_nothing_is_in_flight()


def test_a_cancelled_transfer_does_not_wait_for_a_source_that_is_stopped(bench: Bench) -> None:
    engine = bench.source()

    def stop() -> None:
        engine.pause()
        bench.clock.after(1.0, bench.cancel.set)

    bench.read_with(Interrupted(stop, at=2))
    with pytest.raises(Cancelled):
        bench.transfer(replace(PACE, stall_s=3600, patience_s=3600)).run()
    assert bench.clock.now() < 60
    bench.assert_nothing_is_in_flight()


def test_a_cancelled_transfer_breaks_off_a_check_that_hangs(bench: Bench) -> None:
    """It would write to the memory of the header, which its owner has back."""
    bench.source().pause()
    bench.source(delay_s=0.001)
    bench.read_with(Interrupted(bench.cancel.set))
    broken_off = threading.Event()
    contact = bench.sources[0].check

    def check() -> None:
        try:
            contact()
        except ReadFailed:
            broken_off.set()

    bench.sources[0].check = check
    with pytest.raises(Cancelled):
        bench.transfer(replace(PACE, stall_s=3600)).run()
    assert broken_off.wait(60)


@pytest.mark.parametrize("dies", [False, True])
def test_a_cancelled_transfer_lets_reads_end_that_are_about_to(bench: Bench, dies: bool) -> None:
    """Where they were broken off, other loads would lose their contact with the source."""

    class Shared(InProcessEngine):
        begun = 0

        def start(self, peer: str, op: ReadOp) -> int:
            number = super().start(peer, op)
            self.begun += 1
            if self.begun == 4:
                bench.cancel.set()
                if dies:
                    engine.close()
            return number

        def abandon(self, peer: str) -> None:
            raise AssertionError("another load may be reading from it")

    bench.read_with(Shared())
    engine = bench.source(delay_s=0.01)
    with pytest.raises(Cancelled):
        bench.transfer().run()
    bench.assert_nothing_is_in_flight()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_the_progress_callback_raises_leaves_nothing_in_flight(
    bench: Bench, interrupt: type[BaseException]
) -> None:
    bench.source(delay_s=0.005)

    def on_progress(_: Progress) -> None:
        raise interrupt

    with pytest.raises(interrupt):
        bench.transfer(on_progress=on_progress).run()
    bench.assert_nothing_is_in_flight()


def test_an_interrupt_just_when_a_read_is_over_leaves_nothing_in_flight(bench: Bench) -> None:
    class Interrupting(InProcessEngine):
        def done(self, number: int) -> bool:
            if super().done(number):
                raise KeyboardInterrupt
            return False

    bench.read_with(Interrupting())
    bench.source(delay_s=0.005)
    with pytest.raises(KeyboardInterrupt):
        bench.transfer().run()
    bench.reader.abandon = lambda peer: None  # type: ignore[method-assign]
    bench.assert_nothing_is_in_flight()


def test_a_transfer_that_ends_in_order_leaves_the_reads_of_others_from_the_same_source_alone(
    bench: Bench,
) -> None:
    class Sharing(InProcessEngine):
        def abandon(self, session_id: str) -> None:
            raise AssertionError("another load may be reading from it")

    bench.read_with(Sharing())
    bench.source()
    bench.run(bench.transfer())
    bench.sources[0].check = raiser(TornRead("changed"))
    with pytest.raises(TornRead):
        bench.transfer().run()


def test_every_protocol_has_a_pace() -> None:
    assert all(
        pace_for(protocol).depth > 1
        for protocol in ("tcp", "rdma", "nvlink_intra", "in_process", "another")
    )


# -- sources that are loading themselves
# -----------------------------------------------------------------------------------------


class Shelf:
    """What the source that is `number` in a bench has: nothing before it is set."""

    def __init__(self, bench: Bench, number: int = 0) -> None:
        self._bench = bench
        self._number = number
        self._has: set[int] = set()
        self._seen: set[int] = set()  # at the last check
        self.checks = 0
        source = bench.sources[number]
        check = source.check

        def look() -> None:
            check()
            self.checks += 1
            self._seen = set(self._has)

        source.check, source.stock = look, Stock(self._holds, lambda: len(self._seen) / CHUNKS)

    def put(self, *chunks: int) -> None:
        self._has.update(chunks)

    def _holds(self, addr: int, nbytes: int) -> bool:
        at = addr - ctypes.addressof(self._bench.blocks[self._number])
        return set(range(at // CHUNK, -(-(at + nbytes) // CHUNK))) <= self._seen


CHUNKS = NBYTES // CHUNK


@pytest.mark.parametrize(
    "order", [range(CHUNKS), range(CHUNKS - 1, -1, -1)], ids=["from the front", "from the end"]
)
def test_what_a_source_gets_is_read_when_it_has_it_and_no_sooner(
    bench: Bench, order: Sequence[int]
) -> None:
    bench.source()
    shelf = Shelf(bench)
    left = list(order)
    came: list[int] = []

    def put_next(progress: Progress) -> None:
        came.append(progress.nbytes // CHUNK)
        assert len(came) <= CHUNKS - len(left)
        shelf.put(*[left.pop(0)] if left else [])

    shelf.put(left.pop(0))
    bench.run(bench.transfer(replace(PACE, depth=1), put_next))
    assert came == list(range(1, CHUNKS + 1))
    assert shelf.checks > 1


@pytest.mark.parametrize("there", [[3, 5, 9], [0, 5, 9]])
def test_a_source_that_gets_nothing_new_is_given_up_with_what_it_had(
    bench: Bench, there: list[int]
) -> None:
    bench.source()
    Shelf(bench).put(*there)
    with pytest.raises(
        Stalled, match=r"source 0, which is loading itself, has got nothing new for \d\.\d s"
    ):
        bench.transfer().run()
    base = ctypes.addressof(bench.dst)
    assert sorted((span.dst_addr - base) // CHUNK for span in bench.checked) == there
    bench.assert_nothing_is_in_flight()


def test_what_one_that_is_loading_lacks_a_complete_one_brings(bench: Bench) -> None:
    bench.source()
    bench.source()
    Shelf(bench).put(*range(4))
    transfer = bench.transfer()
    bench.run(transfer)
    assert 0 < transfer.shares[0].nbytes <= 4 * CHUNK


def test_one_that_is_loading_is_not_waited_for_when_it_stops(bench: Bench) -> None:
    """Others, that this transfer does not know, have what it has; so it is not given the time that
    the last one gets.
    """
    engine = bench.source(delay_s=0.01)
    Shelf(bench).put(*range(CHUNKS))
    bench.read_with(Interrupted(engine.pause, at=3))
    with pytest.raises(Stalled, match="nothing has come from in-process"):
        bench.transfer(replace(PACE, patience_s=1e6)).run()
    bench.assert_nothing_is_in_flight()


def test_what_comes_back_from_a_source_that_is_lost_is_found_behind_what_is_not_there_yet(
    bench: Bench,
) -> None:
    """The one that is left has only what the other had begun to read."""
    first = bench.source(delay_s=0.05)
    bench.source()
    shelf = Shelf(bench, 1)
    shelf.put(0, 1)
    lost: list[LoaderError] = []
    bench.sources[0].lost = lambda: lost[0] if lost else None

    def lose(_: Progress) -> None:
        if not lost:
            first.pause()
            lost.append(SourceLost("evicted"))
            shelf.put(*range(CHUNKS))

    bench.run(bench.transfer(replace(PACE, starve_s=5), lose))


def test_one_that_gets_much_more_than_it_brings_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_loader.transfer.pipe._SLOW_AFTER_S", 0.1)
    bench.source(delay_s=0.05)
    shelf = Shelf(bench)
    shelf.put(0)
    bench.clock.after(0.05, lambda: shelf.put(*range(CHUNKS)))
    with pytest.raises(
        Stalled, match=r"has 100% by now and brought us \d\d?%: the way from there is slow"
    ):
        bench.transfer(replace(PACE, depth=1, check_s=0.01)).run()
    bench.assert_nothing_is_in_flight()


def test_one_that_had_much_when_we_came_is_not_slow_for_that(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_loader.transfer.pipe._SLOW_AFTER_S", 0.1)
    bench.source(delay_s=0.02)
    Shelf(bench).put(*range(CHUNKS))
    bench.run(bench.transfer(replace(PACE, depth=1, check_s=0.01)))


# -- what never happens
# --------------------------------------------------------------------------------------------------


class StandingClock(SteppedClock):
    """Its time stands still for as long as a transfer sleeps `stands_s`, so no source is late."""

    def __init__(self, hangs: Callable[[int], bool], stands_s: float) -> None:
        super().__init__(hangs)
        self._stands_s = stands_s

    def now(self) -> float:
        return max(0.0, super().now() - self._stands_s)


def test_a_transfer_that_has_lost_a_chunk_raises_instead_of_waiting_for_it(bench: Bench) -> None:
    bench.source(delay_s=0.01)
    transfer = bench.transfer()
    transfer.step()
    next(queue for queue in transfer._chunks._queues.values() if queue).pop()
    with pytest.raises(
        LoaderError, match=r"expects 1\d more chunks, and has a place for 1\d: load again"
    ):
        transfer.run()
    bench.assert_nothing_is_in_flight()


def test_a_transfer_in_which_nothing_happens_ends_although_nobody_is_late(bench: Bench) -> None:
    bench.source(delay_s=1000.0)
    pace = replace(PACE, nap_s=(0.01, 0.1))
    transfer = bench.transfer(pace, clock=StandingClock(bench._hangs, stands_s=200.0))
    with pytest.raises(
        LoaderError,
        match="nothing happens in a transfer that lacks 16 chunks, of which 14 are queued",
    ):
        transfer.run()
