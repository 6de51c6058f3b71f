"""Transfers whose sources answer, die, stop, change, are evicted and hang in any order: hypothesis
steps through them.

The clock is the machine's own, and nothing happens beside it: reads come, checks run and time
passes where a rule says so. Every 8-byte word that a source serves names its launch and its place,
so a mix of two contents cannot pass for one of them.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine_loader import InProcessEngine, Pace
from engine_loader.errors import (
    EngineFailed,
    LoaderError,
    ReadFailed,
    SourceEvicted,
    SourceLost,
    TornRead,
)
from engine_loader.planning.boxes import Lines
from engine_loader.planning.plan import ReadOp
from engine_loader.planning.reads import Span
from engine_loader.transfer.pipe import Source, Stock
from engine_loader.transfer.scheduler import Transfer
from engine_registry import Region

WORD = struct.Struct("<II")  # launch, place
CHUNK = 64
CHUNKS = 12
NBYTES = CHUNK * CHUNKS
PACE = Pace(CHUNK, 3, stall_s=1.0, patience_s=3.0, starve_s=2.0, check_s=0.2)
WANTED = 7  # the launch whose content is loaded


def words(launch: int, nbytes: int = NBYTES) -> bytes:
    return b"".join(WORD.pack(launch, place) for place in range(nbytes // WORD.size))


class ManualClock:
    """Moves when it is asked to, and keeps the work of a transfer until somebody lets it run."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.work: list[tuple[Callable[[], None], Future[None]]] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float, wait: Callable[[float], None]) -> None:
        self.time += seconds

    def start(self, work: Callable[[], None], name: str) -> Future[None]:
        future: Future[None] = Future()
        self.work.append((work, future))
        return future

    def run(self, number: int) -> None:
        work, future = self.work.pop(number % len(self.work))
        try:
            work()
        except BaseException as exc:  # noqa: BLE001  as SystemClock
            future.set_exception(exc)
        else:
            future.set_result(None)


class ManualEngine(InProcessEngine):
    """Its reads come when they are let, or fail."""

    def __init__(self, can_end_reads: bool) -> None:
        super().__init__(can_end_reads=can_end_reads)
        self.held: list[int] = []

    def start(self, peer: str, op: ReadOp) -> int:
        number = super().start(peer, op)
        self.held.append(number)
        return number

    def _carry_out(self, read: Any) -> None:
        if not any(self._reads.get(number) is read for number in self.held):
            super()._carry_out(read)

    def let_come(self, at: int) -> None:
        number = self.held.pop(at % len(self.held))
        with self._lock:
            if number in self._reads:
                self._carry_out(self._reads[number])

    def fail(self, at: int) -> None:
        number = self.held.pop(at % len(self.held))
        with self._lock:
            if number in self._reads:
                self._reads[number].over = self._reads[number].failed = True


class Served:
    """A source of the machine's: its memory, and what has become of it."""

    def __init__(self, machine: TransferMachine, number: int, loading: bool) -> None:
        self._machine = machine
        self._number = number
        self.engine: InProcessEngine = machine.stack.enter_context(InProcessEngine())
        self.launch = WANTED
        self.has = set(range(0 if loading else CHUNKS))
        self.seen: set[int] = set()  # of what it has, at the last check
        self.memory = ctypes.create_string_buffer(NBYTES)
        if not loading:
            self.memory.raw = words(WANTED)
        self.engine.register(Region(ctypes.addressof(self.memory), NBYTES))
        self.news: LoaderError | None = None
        self.check_fails: list[LoaderError] = []
        stock = Stock(self._holds, lambda: len(self.seen) / CHUNKS) if loading else None
        self.source = Source(
            f"s{number}", self.engine.session_id, self._check, lambda: self.news, stock
        )

    def _check(self) -> None:
        self._machine.reader.connect(self.engine.session_id)
        if self.check_fails:
            raise self.check_fails.pop()
        if self.launch != WANTED:
            raise TornRead(f"launch {self.launch} now")
        self.seen = set(self.has)

    def _holds(self, addr: int, nbytes: int) -> bool:
        at = addr - ctypes.addressof(self.memory)
        return set(range(at // CHUNK, -(-(at + nbytes) // CHUNK))) <= self.seen

    def put(self, chunk: int) -> None:
        self.has.add(chunk)
        ctypes.memmove(
            ctypes.addressof(self.memory) + chunk * CHUNK,
            words(self.launch)[chunk * CHUNK :],
            CHUNK,
        )

    def change(self) -> None:
        self.launch += 1
        self.memory.raw = words(self.launch)


class Buffers:
    """Two to stage in."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(2 * CHUNK)
        self.free = [ctypes.addressof(self.memory), ctypes.addressof(self.memory) + CHUNK]
        self.region = Region(ctypes.addressof(self.memory), 2 * CHUNK)

    def take(self) -> int | None:
        return self.free.pop() if self.free else None

    def give_back(self, addr: int) -> None:
        assert addr not in self.free
        self.free.append(addr)

    def copy(self, addr: int, lines: Sequence[Lines]) -> None:
        for some in lines:
            ctypes.memmove(some.dst, addr + some.src, some.nbytes)


def a_read_fails(machine: TransferMachine, one: Served, at: int) -> None:
    if machine.reader.held:
        machine.reader.fail(at)


def a_check_fails(kind: type[LoaderError]) -> Fault:
    return lambda machine, one, at: one.check_fails.append(kind("as the test wants"))


def the_registry_reports(kind: type[LoaderError]) -> Fault:
    def arrive(machine: TransferMachine, one: Served, at: int) -> None:
        one.news = kind("as the test wants")

    return arrive


Fault = Callable[["TransferMachine", Served, int], object]
FAULTS: dict[str, Fault] = {
    "a read fails": a_read_fails,
    "a check fails": a_check_fails(ReadFailed),
    "a check finds another process": a_check_fails(SourceLost),
    "it changes": lambda machine, one, at: one.change(),
    "it dies": lambda machine, one, at: one.engine.close(),
    "it is withdrawn": the_registry_reports(SourceLost),
    "it is evicted": the_registry_reports(SourceEvicted),
}


WORK = ["step", "step", "read", "read", "check", "wait"]


class TransferMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.stack = ExitStack()
        self.clock = ManualClock()
        self.reader: ManualEngine = ManualEngine(can_end_reads=True)  # another one may follow
        self.ended: object = None  # True, or what was raised
        self.checked: list[tuple[int, Span]] = []

    @initialize(
        loading=st.lists(st.sampled_from([False, False, True]), min_size=1, max_size=3),
        holders=st.one_of(
            st.just([7] * CHUNKS), st.lists(st.integers(1, 7), min_size=CHUNKS, max_size=CHUNKS)
        ),
        staged=st.sets(st.integers(0, CHUNKS - 1)),
        can_end_reads=st.booleans(),
    )
    def begin(
        self, loading: list[bool], holders: list[int], staged: set[int], can_end_reads: bool
    ) -> None:
        """`holders` has for each chunk, bit by bit, which sources hold it; the first one holds what
        nobody would.
        """
        self.reader = ManualEngine(can_end_reads)
        self.stack.callback(self.reader.close)
        self.served = [Served(self, number, each) for number, each in enumerate(loading)]
        self.dst = ctypes.create_string_buffer(NBYTES)
        self.buffers = Buffers()
        self.reader.lend(Region(ctypes.addressof(self.dst), NBYTES))
        self.reader.lend(self.buffers.region)
        spans = []
        for chunk, bits in enumerate(holders):
            ahead = chunk * CHUNK
            some = [number for number in range(len(loading)) if bits >> number & 1] or [0]
            srcs = tuple(
                (number, ctypes.addressof(self.served[number].memory) + ahead) for number in some
            )
            addr = ctypes.addressof(self.dst) + ahead
            half = CHUNK // 2
            lines = (
                (Lines(0, addr, half), Lines(half, addr + half, half)) if chunk in staged else ()
            )
            spans.append(Span(0 if lines else addr, CHUNK, srcs, lines))
        self.transfer = Transfer(
            self.reader,
            spans,
            [one.source for one in self.served],
            PACE,
            lambda progress: None,
            stage=self.buffers,
            on_checked=lambda number, spans: self.checked.extend((number, span) for span in spans),
            clock=self.clock,
        )

    # -- what happens
    # ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.ended is None)
    @rule(
        work=st.lists(
            st.sampled_from(["step", "step", "read", "read", "check", "wait"]),
            min_size=4,
            max_size=24,
        ),
        at=st.integers(0, 3),
    )
    def it_goes_on(self, work: list[str], at: int) -> None:
        """In small steps, whose order is what matters: a read that comes between a check's end and
        the next look, for example.
        """
        for one in work:
            if one == "step":
                self.step()
            elif one == "read" and self.reader.held:
                self.reader.let_come(at)
            elif one == "check" and self.clock.work:
                self.clock.run(at)
            elif one == "wait":
                self.clock.time += 0.11

    def step(self) -> None:
        if self.ended is not None:
            return
        try:
            if self.transfer.step():
                self.ended = True
            else:
                self.transfer.nap()
        except LoaderError as exc:
            self.ended = exc
        # the transfer has lost track of what it does
        assert type(self.ended) is not LoaderError, self.ended

    @rule()
    def a_source_is_silent_for_long(self) -> None:
        """Also when all is over, so that there is always something that may happen."""
        self.clock.time += 1.1

    @precondition(lambda self: any(one.source.stock is not None for one in self.served))
    @rule(chunks=st.sets(st.integers(0, CHUNKS - 1), min_size=1))
    def those_that_load_get_more(self, chunks: set[int]) -> None:
        for one in self.served:
            if one.source.stock is not None and one.launch == WANTED:
                for chunk in chunks:
                    one.put(chunk)

    @precondition(lambda self: self.ended is None and self.transfer.shares)
    @rule(at=st.integers(0, 2), fault=st.sampled_from(sorted(FAULTS)), reads=st.integers(0, 9))
    def something_goes_wrong(self, at: int, fault: str, reads: int) -> None:
        """As a rule to one source at most: what happens to all of them at once is soon over."""
        if len(self.faults) < len(self.served):
            self.faults.append(fault)
            FAULTS[fault](self, self.served[at % len(self.served)], reads)

    # -- what always holds
    # ----------------------------------------------------------------------------------------------

    @invariant()
    def no_buffer_is_lost(self) -> None:
        if not hasattr(self, "transfer"):
            return
        flights = [flight for pipe in self.transfer._pipes for flight in pipe.in_flight.values()]
        assert len(self.buffers.free) + sum(flight.staged is not None for flight in flights) == 2

    def teardown(self) -> None:
        try:
            if hasattr(self, "transfer"):
                self._end()
        finally:
            self.stack.close()

    def _end(self) -> None:
        """Lets everything go on, and looks at what has become of it."""
        for _ in range(3000):
            if self.ended is not None:
                break
            while self.reader.held:
                self.reader.let_come(0)
            while self.clock.work:
                self.clock.run(0)
            self.step()
        assert self.ended is not None, "the transfer hangs"
        unsettled = self._settle()
        evicted = {
            number for number, one in enumerate(self.served) if isinstance(one.news, SourceEvicted)
        }
        for number, span in self.checked:
            if number not in evicted:
                self._assert_right(span)
        for share, number in zip(self.transfer.shares, range(len(self.served)), strict=True):
            if isinstance(share.error, SourceEvicted):
                assert number in evicted
                assert not share.nbytes or self.ended is share.error
        if self.ended is True:
            assert self.dst.raw == words(WANTED)
            assert sum(share.nbytes for share in self.transfer.shares) == NBYTES
        if not unsettled:
            self._assert_nothing_comes_later()

    def _settle(self) -> bool:
        try:
            self.transfer.settle(interrupted=False)
        except EngineFailed:
            assert not self.reader._can_end_reads
            return True
        return False

    def _assert_right(self, span: Span) -> None:
        right, base = words(WANTED), ctypes.addressof(self.dst)
        for addr, nbytes in [(some.dst, some.nbytes) for some in span.lines] or [
            (span.dst_addr, span.nbytes)
        ]:
            assert (
                self.dst.raw[addr - base : addr - base + nbytes]
                == right[addr - base : addr - base + nbytes]
            )

    def _assert_nothing_comes_later(self) -> None:
        """What was on its way when the transfer ended must not write to memory that its owner has
        back.
        """
        ctypes.memset(self.dst, 7, NBYTES)
        ctypes.memset(self.buffers.memory, 7, 2 * CHUNK)
        while self.reader.held:
            self.reader.let_come(0)
        assert self.dst.raw == b"\7" * NBYTES
        assert self.buffers.memory.raw == b"\7" * (2 * CHUNK)
        assert not self.reader._reads
        assert len(self.buffers.free) == 2


def test_no_order_of_events_makes_a_transfer_hang_or_bring_a_wrong_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # else the window of a source would not matter for such chunks
    monkeypatch.setattr("engine_loader.transfer.reads._SMALL_NBYTES", 0)
    run_state_machine_as_test(
        TransferMachine,
        settings=settings(
            max_examples=300,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_what_a_lost_source_was_to_bring_is_found_behind_what_the_other_one_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one is loading itself, and gets nothing new meanwhile."""
    monkeypatch.setattr("engine_loader.transfer.reads._SMALL_NBYTES", 0)
    machine = TransferMachine()
    machine.begin([False, True], [3] * CHUNKS, set(), can_end_reads=True)
    try:
        complete = machine.served[0]
        machine.those_that_load_get_more(set(range(1, CHUNKS)))
        machine.step()
        machine.clock.run(1)
        while machine.transfer._chunks.queued > 2:
            machine.step()
            if machine.transfer._chunks.queued > 2 and machine.reader.held:
                machine.reader.let_come(0)
        machine.clock.run(0)
        machine.step()  # the last that the other one has, and after it what it lacks
        in_flight = machine.transfer._pipes[0].in_flight.values()
        base = ctypes.addressof(machine.dst)
        assert [(flight.chunk.dst_addr - base) // CHUNK for flight in in_flight] == [CHUNKS - 1, 0]
        complete.news = SourceLost("as the test wants")
        for _ in range(3000):
            machine.step()
            while machine.reader.held:
                machine.reader.let_come(0)
            while machine.clock.work:
                machine.clock.run(0)
        assert isinstance(machine.ended, LoaderError)
        brought = {(span.dst_addr - base) // CHUNK for _, span in machine.checked}
        assert brought == set(range(1, CHUNKS))
    finally:
        machine.teardown()
