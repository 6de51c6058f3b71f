"""What every engine does: the same suite for the real transfer engine over tcp, for the one within
a process, and for the one that maps memory of GPUs, with the host's in their place.

Those that ask for reads also as over rdma, where one engine reads from all peers and cannot end a
read. With TEST_RDMA_HOST, the address of an RDMA device of this machine, also over real rdma. With
TEST_CUDA_IPC=1, also from GPU to GPU of this machine, or within the one that it has.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from engine_loader import Engine, InProcessEngine, MooncakeEngine
from engine_loader.engines.base import peer_of, read
from engine_loader.engines.cuda_ipc.engine import CudaIpcEngine
from engine_loader.engines.sockets.engine import SocketEngine
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.planning.boxes import Lines
from engine_loader.planning.plan import ReadOp
from engine_loader.tensors.arena import bytes_in_arena
from engine_registry import Region
from engine_registry.schema.manifest import Export
from tests.support.forkserver import ForkServer
from tests.support.host_gpus import HostGpus
from tests.support.processes.served import content, export_of
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

NBYTES = 1 << 16
IN_ARENA = "an arena on "  # before a device
NewEngine = Callable[[], Engine]


class Memory:
    """A block of our own memory, page-aligned as weights are, with some around it that is
    nobody's.
    """

    def __init__(self, content: bytes, device: str = "cpu") -> None:
        self._all = zeros(len(content) + 3 * 4096, device)
        addr = -(-self._all.data_ptr() // 4096) * 4096 + 4096
        self.region = Region(addr, len(content))
        self.write(content)

    def __bytes__(self) -> bytes:
        return self.read(0, self.region.nbytes)

    def read(self, start: int, nbytes: int) -> bytes:
        return self._part(start, nbytes).cpu().numpy().tobytes()

    def write(self, content: bytes, start: int = 0) -> None:
        some = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._part(start, len(content)).copy_(some)
        if self._all.is_cuda:
            torch.cuda.synchronize(self._all.device)  # engines do not know of its stream

    def fill(self, byte: int) -> None:
        self.write(bytes([byte]) * self.region.nbytes)

    def part(self, start: int, nbytes: int) -> Region:
        return Region(self.region.addr + start, nbytes)

    def _part(self, start: int, nbytes: int) -> torch.Tensor:
        begin = self.region.addr + start - self._all.data_ptr()
        return self._all[begin : begin + nbytes]


def zeros(nbytes: int, device: str) -> torch.Tensor:
    if not device.startswith(IN_ARENA):
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return bytes_in_arena(device.removeprefix(IN_ARENA), nbytes).zero_()


class Peers:
    """A source and a reader, each with a registered block, and a second one by which a test knows
    that the peer is well.

    After every fourth read that fails, mooncake lets the next read from that peer fail as well,
    whatever it asks for. So a read that must succeed has a second try here, and one that must fail
    is made when the peer has just been read.
    """

    def __init__(self, source: Engine, reader: Engine, device: str) -> None:
        self.source, self.reader = source, reader
        self.session_id = source.session_id
        self.device = device
        self.src, self.dst = self.memory(os.urandom(NBYTES)), self.memory(bytes(NBYTES))
        self._good_src, self._good_dst = self.memory(os.urandom(64)), self.memory(bytes(64))
        for memory in (self.src, self._good_src):
            source.register(memory.region)
        for memory in (self.dst, self._good_dst):
            reader.lend(memory.region)

    def memory(self, content: bytes) -> Memory:
        return Memory(content, self.device)

    def back(self) -> Peers:
        """The other way round, with other memory."""
        return Peers(self.reader, self.source, self.device)

    def op(self, src_start: int, dst_start: int, nbytes: int) -> ReadOp:
        return ReadOp(
            "a/0", self.src.region.addr + src_start, self.dst.region.addr + dst_start, nbytes
        )

    def start(self, *ops: ReadOp) -> list[int]:
        self.reader.connect(self.session_id)
        return [self.reader.start(self.session_id, op) for op in ops]

    def finish(self, numbers: list[int]) -> None:
        """Waits until all are over, and raises if one has failed."""
        failures = []
        for number in numbers:
            try:
                wait_until(lambda number=number: self.reader.done(number))  # type: ignore[misc]
            except ReadFailed as exc:
                failures.append(exc)
        if failures:
            raise failures[0]

    def read(self, *ops: ReadOp) -> None:
        try:
            self.finish(self.start(*ops))
        except ReadFailed:
            self.finish(self.start(*ops))

    def read_all(self) -> None:
        self.read(self.op(0, 0, NBYTES))

    def fail_to_read(self, *ops: ReadOp) -> ReadFailed:
        self.read(ReadOp("a/0", self._good_src.region.addr, self._good_dst.region.addr, 64))
        with pytest.raises(ReadFailed, match=f"cannot read from {self.session_id}") as caught:
            self.finish(self.start(*ops))
        return caught.value

    def part_ways(self) -> None:
        """Takes back whatever is still registered; more often than needed is no error."""
        for _ in range(3):
            for memory in (self.src, self._good_src):
                self.source.unregister(memory.region)
            for memory in (self.dst, self._good_dst):
                self.reader.take_back(memory.region)


@dataclass(frozen=True)
class Kind:
    """`can_end_reads`: those that are abandoned have ended when `abandon` returns, though the peer
    does not answer. `needs_process`: a peer whose process has stopped is not read from.
    """

    make: Callable[[], Engine]
    can_end_reads: bool
    served: tuple[str, ...] = ("mooncake", "127.0.0.1")  # the engine of another process
    lends_apart: bool = True  # from what is registered, so that peers do not reach it
    needs_process: bool = True
    meets_stopped_peers: bool = False  # their process has no part in a first contact
    strides: bool = False
    scatters: bool = False
    within_host: bool = False
    device: str = "cpu"  # that has all memory

    @property
    def leaves_reads_of_stopped_peers(self) -> bool:
        """That may still write when the peer goes on, after they were abandoned."""
        return self.needs_process and not self.can_end_reads


map_memory = partial(
    Kind,
    can_end_reads=True,
    needs_process=False,
    meets_stopped_peers=True,
    strides=True,
    within_host=True,
)
sockets = partial(Kind, can_end_reads=True, served=("socket", "127.0.0.1"), scatters=True)
KINDS = {
    "in process": Kind(InProcessEngine, True),
    "in process, unable to end reads": Kind(partial(InProcessEngine, can_end_reads=False), False),
    "mooncake over tcp": Kind(partial(MooncakeEngine, "127.0.0.1"), True),
    "mooncake over tcp, one engine for all peers": Kind(
        partial(MooncakeEngine, "127.0.0.1", shared=True), False
    ),
    "sockets": sockets(partial(SocketEngine, "127.0.0.1", same_host=False)),
    "sockets, within a host": sockets(partial(SocketEngine, "127.0.0.1"), needs_process=False),
    "cuda_ipc, with the host's memory": map_memory(
        lambda: CudaIpcEngine(gpus=HostGpus()), served=("host gpus",)
    ),
    "cuda_ipc, with the host's memory by descriptors": map_memory(
        lambda: CudaIpcEngine(gpus=HostGpus()),
        served=("host gpus", "pieces"),
        device=f"{IN_ARENA}cpu",
    ),
    "cuda_ipc, with arenas of the host": map_memory(
        lambda: CudaIpcEngine(gpus=HostGpus()),
        served=("host gpus", "arena"),
        device=f"{IN_ARENA}cpu",
    ),
}
if "TEST_RDMA_HOST" in os.environ:
    RDMA = os.environ["TEST_RDMA_HOST"], "rdma"
    KINDS["mooncake over rdma"] = Kind(
        partial(MooncakeEngine, *RDMA),
        False,
        ("mooncake", *RDMA),
        lends_apart=False,
        needs_process=False,
    )
if "TEST_CUDA_IPC" in os.environ:
    LAST = torch.cuda.device_count() - 1
    KINDS["cuda_ipc on GPUs"] = map_memory(
        CudaIpcEngine, served=("cuda_ipc", f"cuda:{LAST}"), device="cuda:0"
    )
    KINDS["cuda_ipc on GPUs, by descriptors"] = map_memory(
        CudaIpcEngine,
        served=("cuda_ipc", f"cuda:{LAST}", "arena"),
        device=f"{IN_ARENA}cuda:0",
    )
    KINDS["cuda_ipc on GPUs, from arenas of the host"] = map_memory(
        CudaIpcEngine, served=("cuda_ipc", "cpu", "arena"), device="cuda:0"
    )
    KINDS["cuda_ipc between arenas of the host"] = map_memory(
        CudaIpcEngine, served=("cuda_ipc", "cpu", "arena"), device=f"{IN_ARENA}cpu"
    )


@pytest.fixture(scope="module", params=list(KINDS.values()), ids=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture(scope="module")
def new_engine(kind: Kind) -> Iterator[NewEngine]:
    """Makes engines that are closed in the end."""
    with ExitStack() as stack:

        def make() -> Engine:
            engine = kind.make()
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture(scope="module")
def two_engines(new_engine: NewEngine) -> tuple[Engine, Engine]:
    return new_engine(), new_engine()


@pytest.fixture
def peers(kind: Kind, two_engines: tuple[Engine, Engine]) -> Iterator[Peers]:
    peers = Peers(*two_engines, kind.device)
    yield peers
    peers.part_ways()


@pytest.fixture
def mortal(new_engine: NewEngine, peers: Peers) -> Iterator[Peers]:
    """Peers whose source is the test's own to close."""
    mortal = Peers(new_engine(), peers.reader, peers.device)
    yield mortal
    mortal.part_ways()


# -- who it is
# --------------------------------------------------------------------------------------------------


def test_each_engine_has_a_session_of_its_own_and_says_how_it_reads(
    kind: Kind, two_engines: tuple[Engine, Engine]
) -> None:
    first, second = two_engines
    assert first.session_id
    assert first.session_id != second.session_id
    assert first.protocol == second.protocol != ""
    assert first.fabric == second.fabric
    assert (first.fabric != "") == kind.within_host
    assert (first.strides, first.scatters) == (kind.strides, kind.scatters)


# -- reading
# --------------------------------------------------------------------------------------------------


def test_a_read_brings_the_bytes_as_they_are(peers: Peers) -> None:
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)


def test_a_read_touches_no_byte_beside_its_destination(peers: Peers) -> None:
    peers.read(peers.op(100, 1000, 333), peers.op(5000, 2000, 1))
    wanted = bytearray(NBYTES)
    wanted[1000:1333] = bytes(peers.src)[100:433]
    wanted[2000] = bytes(peers.src)[5000]
    assert bytes(peers.dst) == bytes(wanted)


def test_a_read_sees_the_memory_as_it_is_now(peers: Peers) -> None:
    for _ in range(3):
        peers.src.write(os.urandom(64))
        peers.read(peers.op(0, 0, 64))
        assert bytes(peers.dst)[:64] == bytes(peers.src)[:64]


def test_many_small_reads_in_flight_at_once_each_bring_their_own(peers: Peers) -> None:
    size = NBYTES // 64
    wanted = bytearray(NBYTES)
    ops = []
    for number in range(64):
        src, dst = number * size, (63 - number) * size  # in the opposite order
        ops.append(peers.op(src, dst, size - 1))
        wanted[dst : dst + size - 1] = bytes(peers.src)[src : src + size - 1]
    for _ in range(5):
        peers.read(*ops)
    assert bytes(peers.dst) == bytes(wanted)


def test_one_read_may_span_many_mebibytes(peers: Peers) -> None:
    src, dst = peers.memory(os.urandom(1 << 10) * (9 << 10)), peers.memory(bytes(9 << 20))
    peers.source.register(src.region)
    peers.reader.lend(dst.region)
    peers.read(ReadOp("a/0", src.region.addr + 1, dst.region.addr, (9 << 20) - 1))
    assert bytes(dst) == bytes(src)[1:] + b"\0"
    peers.source.unregister(src.region)
    peers.reader.take_back(dst.region)


def test_an_engine_is_read_from_and_reads_at_the_same_time(peers: Peers) -> None:
    back = peers.back()
    with ThreadPoolExecutor(2) as pool:
        for read in [pool.submit(pair.read_all) for pair in (peers, back) for _ in range(10)]:
            read.result()
    assert (bytes(peers.dst), bytes(back.dst)) == (bytes(peers.src), bytes(back.src))
    back.part_ways()


def test_an_engine_reads_its_own_memory_like_that_of_others(peers: Peers) -> None:
    own = Peers(peers.reader, peers.reader, peers.device)
    own.read_all()
    assert bytes(own.dst) == bytes(own.src)
    own.part_ways()


# -- runs at equal distances
# --------------------------------------------------------------------------------------------------

RUNS = [
    Lines(0, 0, 7, (5,), (20,), (7,)),
    Lines(0, 0, 64, (5,), (64,), (100,)),
    Lines(0, 0, 12, (3, 4), (400, 40), (80, 16)),
    Lines(0, 0, 2, (2, 3, 4), (2000, 100, 6), (500, 50, 10)),
]


@pytest.mark.parametrize("some", RUNS, ids=lambda some: f"{len(some.counts)} axes, {some.nbytes}")
def test_a_read_of_runs_brings_those_to_their_places_or_is_refused(
    kind: Kind, peers: Peers, some: Lines
) -> None:
    read = replace(peers.op(100, 1004, some.extent), lines=some)
    wanted = bytearray(NBYTES)
    if kind.strides:
        peers.read(read, peers.op(0, 60_000, 64))
        for each in some.along(len(some.counts)):
            at = 1004 + each.dst
            wanted[at : at + each.nbytes] = peers.src.read(100 + each.src, each.nbytes)
        wanted[60_000:60_064] = peers.src.read(0, 64)
    else:
        with pytest.raises(EngineFailed, match="runs at equal distances"):
            peers.read(read)
    assert bytes(peers.dst) == bytes(wanted)


def test_runs_that_reach_beyond_what_is_lent_or_offered_are_refused(
    kind: Kind, peers: Peers
) -> None:
    if not kind.strides:
        return
    some = Lines(0, 0, 64, (4,), (64,), (NBYTES // 4,))
    with pytest.raises(EngineFailed, match="lend the destination first"):
        peers.read(replace(peers.op(0, NBYTES // 4, some.extent), lines=some))
    peers.fail_to_read(replace(peers.op(NBYTES - 255, 0, some.extent), lines=some))
    assert not any(bytes(peers.dst))


# -- many runs
# --------------------------------------------------------------------------------------------------


def pieces_at(*places: tuple[int, int, int], peers: Peers) -> ReadOp:
    """Of `src` and `dst` counted from their blocks, and a length."""
    base = min(src for src, _, _ in places)
    extent = max(src + nbytes for src, _, nbytes in places) - base
    at = peers.dst.region.addr
    some = tuple(Lines(src - base, at + dst, nbytes) for src, dst, nbytes in places)
    return replace(peers.op(base, places[0][1], extent), pieces=some)


def test_a_read_of_many_pieces_brings_each_to_its_place_or_is_refused(
    kind: Kind, peers: Peers
) -> None:
    places = [(400 + 40 * at, 60_000 - 50 * at, 1 + at % 37) for at in range(1000)]
    op = pieces_at(*places, peers=peers)
    wanted = bytearray(NBYTES)
    if kind.scatters:
        peers.read(op, peers.op(0, 64_000, 64), op)
        for src, dst, nbytes in places:
            wanted[dst : dst + nbytes] = peers.src.read(src, nbytes)
        wanted[64_000:64_064] = peers.src.read(0, 64)
    else:
        with pytest.raises(EngineFailed, match="many runs at once"):
            peers.read(op)
    assert bytes(peers.dst) == bytes(wanted)


def test_pieces_that_are_not_lent_or_not_offered_are_refused(kind: Kind, peers: Peers) -> None:
    if not kind.scatters:
        return
    with pytest.raises(EngineFailed, match="1 of 2 pieces are not lent"):
        peers.read(pieces_at((0, 0, 64), (128, NBYTES - 32, 64), peers=peers))
    peers.fail_to_read(pieces_at((NBYTES - 64, 64, 64), (NBYTES - 32, 128, 64), peers=peers))
    assert not any(bytes(peers.dst)[128:])


# -- reads that fail
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(lambda peers: peers.op(NBYTES, 0, 64), id="behind the region"),
        pytest.param(lambda peers: peers.op(NBYTES - 32, 0, 64), id="over its end"),
        pytest.param(lambda peers: peers.op(-64, 0, 64), id="before it"),
        pytest.param(
            lambda peers: ReadOp(
                "a/0", peers.memory(bytes(64)).region.addr, peers.dst.region.addr, 64
            ),
            id="elsewhere",
        ),
        pytest.param(lambda peers: ReadOp("a/0", 0, peers.dst.region.addr, 64), id="nowhere"),
    ],
)
def test_a_source_address_that_is_not_offered_fails_and_a_good_read_works_afterwards(
    peers: Peers, bad: Callable[[Peers], ReadOp]
) -> None:
    peers.fail_to_read(bad(peers))
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)


def test_a_bad_read_fails_among_good_ones(peers: Peers) -> None:
    failed = peers.fail_to_read(
        peers.op(0, 0, 64), peers.op(NBYTES, 64, 64), peers.op(128, 128, 64)
    )
    assert failed.details == {"session_id": peers.session_id}


def test_a_peer_can_be_read_however_often_a_read_from_it_has_failed(peers: Peers) -> None:
    for _ in range(6):
        peers.fail_to_read(peers.op(NBYTES, 0, 64))
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)


def test_memory_that_was_taken_back_cannot_be_read_until_it_is_offered_again(peers: Peers) -> None:
    peers.read_all()
    peers.source.unregister(peers.src.region)
    peers.fail_to_read(peers.op(0, 0, NBYTES))
    peers.source.register(peers.src.region)
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)


@pytest.mark.parametrize("session_id", ["127.0.0.1:1", "nonsense", "", "no-such-host.invalid:1"])
def test_a_session_that_does_not_exist_fails_and_leaves_good_ones_usable(
    peers: Peers, session_id: str
) -> None:
    with pytest.raises(ReadFailed):
        peers.reader.connect(session_id)
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)


@pytest.mark.parametrize(("start", "nbytes"), [(-64, 64), (-1, 64), (NBYTES - 63, 64), (NBYTES, 1)])
def test_a_destination_that_is_not_lent_is_refused_before_a_byte_moves(
    peers: Peers, start: int, nbytes: int
) -> None:
    with pytest.raises(
        EngineFailed, match="are not lent to the engine: lend the destination first"
    ):
        peers.read(peers.op(0, start, nbytes))
    assert bytes(peers.dst) == bytes(NBYTES)


# -- reads in flight
# --------------------------------------------------------------------------------------------------


def test_nothing_is_started_from_a_peer_that_was_never_contacted(
    new_engine: NewEngine, peers: Peers
) -> None:
    stranger = Peers(peers.source, new_engine(), peers.device)
    with pytest.raises(ReadFailed):
        stranger.reader.start(stranger.session_id, stranger.op(0, 0, 64))
    stranger.read_all()
    assert bytes(stranger.dst) == bytes(stranger.src)
    stranger.part_ways()


def test_a_second_contact_changes_nothing(peers: Peers) -> None:
    for _ in range(3):
        peers.reader.connect(peers.session_id)
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)


def test_abandoning_a_peer_ends_what_is_in_flight_and_the_next_contact_works(peers: Peers) -> None:
    numbers = peers.start(*[peers.op(0, 0, NBYTES) for _ in range(8)])
    peers.reader.abandon(peers.session_id)
    wait_until(lambda: peers.reader.settled(peers.session_id))
    for number in numbers:
        try:
            assert peers.reader.done(number)  # had come before
        except ReadFailed:
            continue
    peers.dst.fill(0)
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)


def test_each_registration_of_a_process_is_a_peer_of_its_own(peers: Peers) -> None:
    first, second = peer_of(peers.session_id, "1" * 32), peer_of(peers.session_id, "2" * 32)
    peers.reader.connect(first)
    with pytest.raises(ReadFailed, match=f"cannot read from {peers.session_id}: "):
        peers.reader.start(second, peers.op(0, 0, 64))
    later = peers.memory(os.urandom(64))
    peers.source.register(later.region)
    peers.reader.connect(second)
    read(peers.reader, second, ReadOp("a/1", later.region.addr, peers.dst.region.addr, 64))
    read(peers.reader, first, peers.op(64, 64, 64))
    assert bytes(peers.dst)[:128] == bytes(later) + bytes(peers.src)[64:128]
    peers.source.unregister(later.region)


def test_abandoning_when_nothing_is_in_flight_keeps_the_contact(peers: Peers) -> None:
    peers.read_all()
    for _ in range(2):
        peers.reader.abandon(peers.session_id)
    peers.reader.abandon("127.0.0.1:1")
    peers.reader.start(peers.session_id, peers.op(0, 0, 64))
    peers.reader.abandon(peers.session_id)
    wait_until(lambda: peers.reader.settled(peers.session_id))


def test_abandoning_one_peer_leaves_reads_from_others_alone(mortal: Peers, peers: Peers) -> None:
    numbers = peers.start(peers.op(0, 0, NBYTES))
    mortal.start(mortal.op(0, 0, NBYTES))
    mortal.reader.abandon(mortal.session_id)
    peers.finish(numbers)
    assert bytes(peers.dst) == bytes(peers.src)
    wait_until(lambda: mortal.reader.settled(mortal.session_id))


# -- peers that stop
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stoppable:
    """A peer of this reader that holds NBYTES of a known content, and can stop and go on."""

    session_id: str
    addr: int
    stop: Callable[[], object]
    go_on: Callable[[], object]
    is_contacted: Callable[[], bool]  # somebody waits for it to answer
    exports: tuple[Export, ...] = ()
    content = content(NBYTES)

    def op(self, dst: Memory, nbytes: int = NBYTES) -> ReadOp:
        return ReadOp("a/0", self.addr, dst.region.addr, nbytes)


@contextmanager
def stoppable_engine() -> Iterator[Stoppable]:
    with InProcessEngine() as engine:
        memory = Memory(Stoppable.content)
        engine.register(memory.region)
        yield Stoppable(
            engine.session_id, memory.region.addr, engine.pause, engine.resume, lambda: True
        )


@contextmanager
def stoppable_process(kind: Kind, server: ForkServer) -> Iterator[Stoppable]:
    args = ["-m", "tests.support.processes.served", str(NBYTES), *kind.served]
    with server.start(args, Path.cwd(), os.environ) as process:
        assert process.stdout is not None
        session_id, addr, *exports = process.stdout.readline().split()
        stop = partial(signal_and_wait, process.pid, signal.SIGSTOP)
        go_on = partial(process.send_signal, signal.SIGCONT)
        try:
            yield Stoppable(
                session_id,
                int(addr),
                stop,
                go_on,
                partial(has_connection_to, session_id),
                tuple(map(export_of, exports)),
            )
        finally:
            process.kill()


def has_connection_to(session_id: str) -> bool:
    """As the kernel lists them; 01 is an established one."""
    port = int(session_id.partition(":")[2])
    rows = map(str.split, Path("/proc/self/net/tcp").read_text().splitlines())
    return any(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with closing(ForkServer(["engine_loader", "torch"])) as server:
        yield server


@pytest.fixture
def stoppable(kind: Kind, peers: Peers, fork_server: ForkServer) -> Iterator[Stoppable]:
    with (
        stoppable_engine()
        if isinstance(peers.reader, InProcessEngine)
        else stoppable_process(kind, fork_server) as source
    ):
        yield source


def stop_with_reads_under_way(peers: Peers, stoppable: Stoppable, dst: Memory) -> list[int]:
    """Their numbers."""
    peers.reader.connect(stoppable.session_id, stoppable.exports)
    stoppable.stop()
    return [peers.reader.start(stoppable.session_id, stoppable.op(dst)) for _ in range(4)]


def test_a_first_contact_with_a_stopped_peer_holds_up_nothing_and_ends_when_it_is_abandoned(
    kind: Kind, peers: Peers, stoppable: Stoppable
) -> None:
    stoppable.stop()
    if kind.meets_stopped_peers:
        read_again(peers, stoppable)
        return
    with ThreadPoolExecutor(2) as pool:
        contacts = [pool.submit(peers.reader.connect, stoppable.session_id) for _ in range(2)]
        wait_until(stoppable.is_contacted)
        peers.read_all()
        stranger = Peers(peers.source, peers.reader, peers.device)  # another first contact
        stranger.reader.connect(f"{stranger.session_id}@again")
        stranger.read_all()
        stranger.part_ways()
        assert not any(contact.done() for contact in contacts)
        peers.reader.abandon(stoppable.session_id)
        for contact in contacts:
            with pytest.raises(ReadFailed, match=f"cannot read from {stoppable.session_id}: "):
                contact.result(60)
    stoppable.go_on()
    read_again(peers, stoppable)


def test_memory_of_which_there_is_less_than_the_peer_says_is_not_mapped(
    kind: Kind, peers: Peers, stoppable: Stoppable
) -> None:
    if not kind.meets_stopped_peers:
        return  # there is nothing to map
    (export,) = stoppable.exports
    longer = replace(export, nbytes=export.nbytes + 1)
    with pytest.raises(ReadFailed, match=r"cannot read from .* exported of an allocation of \d+"):
        peers.reader.connect(stoppable.session_id, [longer])
    read_again(peers, stoppable)


def test_a_first_contact_that_hangs_ends_when_its_engine_is_closed(
    kind: Kind, new_engine: NewEngine, stoppable: Stoppable
) -> None:
    if kind.meets_stopped_peers:
        return  # so that none hangs
    reader = new_engine()
    stoppable.stop()
    with ThreadPoolExecutor(1) as pool:
        contact = pool.submit(reader.connect, stoppable.session_id)
        wait_until(stoppable.is_contacted)
        reader.close()
        with pytest.raises((ReadFailed, EngineFailed)):
            contact.result(60)
    with pytest.raises(EngineFailed, match="the transfer engine is closed"):
        reader.connect(stoppable.session_id)


def test_abandoned_reads_from_a_peer_that_has_stopped_write_nothing_once_they_are_settled(
    kind: Kind, peers: Peers, stoppable: Stoppable
) -> None:
    dst = peers.memory(bytes(NBYTES))
    peers.reader.lend(dst.region)
    numbers = stop_with_reads_under_way(peers, stoppable, dst)
    peers.reader.abandon(stoppable.session_id)
    if not kind.needs_process:
        wait_until(lambda: peers.reader.settled(stoppable.session_id))
    assert peers.reader.settled(stoppable.session_id) is not kind.leaves_reads_of_stopped_peers
    if kind.leaves_reads_of_stopped_peers:
        assert not any(peers.reader.done(number) for number in numbers)
        stoppable.go_on()
        with pytest.raises(ReadFailed, match=f"cannot read from {stoppable.session_id}"):
            wait_until(lambda: peers.reader.done(numbers[0]))  # though its bytes come in the end
        wait_until(lambda: peers.reader.settled(stoppable.session_id))
        del numbers[0]
    for number in numbers:
        failing = pytest.raises(ReadFailed, match=f"cannot read from {stoppable.session_id}")
        with failing if kind.needs_process else suppress(ReadFailed):
            assert peers.reader.done(number)  # had come before
        with pytest.raises(KeyError):
            peers.reader.done(number)
    dst.fill(77)
    stoppable.go_on()
    # By when this has been read, the peer has long sent what it had been asked for before.
    read_again(peers, stoppable)
    assert bytes(dst) == bytes([77]) * NBYTES
    peers.reader.take_back(dst.region)


def read_again(peers: Peers, stoppable: Stoppable) -> None:
    fresh = peers.memory(bytes(NBYTES))
    peers.reader.lend(fresh.region)
    peers.reader.connect(stoppable.session_id, stoppable.exports)
    read(peers.reader, stoppable.session_id, stoppable.op(fresh))
    assert bytes(fresh) == stoppable.content
    peers.reader.take_back(fresh.region)


def test_memory_that_an_abandoned_read_may_write_to_is_for_nobody_until_that_has_ended(
    kind: Kind, peers: Peers, stoppable: Stoppable
) -> None:
    dst = peers.memory(bytes(NBYTES))
    half, other = dst.part(0, NBYTES // 2), dst.part(NBYTES // 2 + 4096, 64)
    peers.reader.lend(half)
    peers.reader.connect(stoppable.session_id, stoppable.exports)
    stoppable.stop()
    peers.reader.start(stoppable.session_id, stoppable.op(dst, half.nbytes))
    peers.reader.abandon(stoppable.session_id)
    if not kind.needs_process:
        wait_until(lambda: peers.reader.settled(stoppable.session_id))
    peers.reader.connect(peers.session_id)
    read_into_it = ReadOp("a/0", peers.src.region.addr, half.addr, 64)
    uses: list[Callable[[], object]] = [
        lambda: peers.reader.lend(dst.part(half.nbytes - 1, 64)),
        lambda: peers.reader.register(dst.region),
        lambda: peers.reader.start(peers.session_id, read_into_it),
        lambda: peers.reader.take_back(half),
    ]
    for use in uses:
        with (
            pytest.raises(
                EngineFailed,
                match=f"a read from {stoppable.session_id} that was given up may still write",
            )
            if kind.leaves_reads_of_stopped_peers
            else nullcontext()
        ):
            use()
    peers.reader.lend(other)  # beside it
    peers.read(ReadOp("a/0", peers.src.region.addr, other.addr, 64))
    stoppable.go_on()
    wait_until(lambda: peers.reader.settled(stoppable.session_id))
    for region in (half, other, dst.part(half.nbytes - 1, 64)):
        peers.reader.take_back(region)
    peers.reader.unregister(dst.region)
    with pytest.raises(EngineFailed, match="lend the destination first"):
        peers.reader.start(peers.session_id, read_into_it)


def test_a_peer_that_has_stopped_does_not_keep_others_from_being_read_or_abandoned(
    peers: Peers, stoppable: Stoppable
) -> None:
    dst = peers.memory(bytes(NBYTES))
    peers.reader.lend(dst.region)
    stop_with_reads_under_way(peers, stoppable, dst)
    peers.read_all()
    peers.reader.abandon(stoppable.session_id)
    peers.dst.fill(0)
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)
    peers.start(peers.op(0, 0, 64))
    peers.reader.abandon(peers.session_id)
    wait_until(lambda: peers.reader.settled(peers.session_id))
    stoppable.go_on()
    wait_until(lambda: peers.reader.settled(stoppable.session_id))
    peers.reader.take_back(dst.region)


def test_a_peer_that_has_ended_settles_what_was_abandoned(peers: Peers, mortal: Peers) -> None:
    mortal.start(*[mortal.op(0, 0, NBYTES) for _ in range(4)])
    mortal.reader.abandon(mortal.session_id)
    mortal.source.close()
    wait_until(lambda: mortal.reader.settled(mortal.session_id))
    peers.read_all()


def test_closing_ends_what_was_abandoned_whether_the_peer_answers_or_not(
    new_engine: NewEngine, peers: Peers, stoppable: Stoppable
) -> None:
    own = Peers(peers.source, new_engine(), peers.device)
    dst = peers.memory(bytes(NBYTES))
    own.reader.lend(dst.region)
    stop_with_reads_under_way(own, stoppable, dst)
    own.reader.abandon(stoppable.session_id)
    own.reader.close()
    own.part_ways()
    assert own.reader.settled(stoppable.session_id)
    dst.fill(77)
    stoppable.go_on()
    read_again(peers, stoppable)
    assert bytes(dst) == bytes([77]) * NBYTES


# -- registering
# --------------------------------------------------------------------------------------------------


def test_a_region_registered_twice_is_offered_until_it_was_taken_back_twice(peers: Peers) -> None:
    peers.source.register(peers.src.region)
    peers.source.unregister(peers.src.region)
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)
    peers.source.unregister(peers.src.region)
    peers.fail_to_read(peers.op(0, 0, NBYTES))


@pytest.mark.parametrize("first_back", ["inner", "outer"])
def test_a_region_inside_a_registered_one_shares_it_and_survives_the_end_of_the_other(
    peers: Peers, first_back: str
) -> None:
    inner = peers.src.part(1024, 2048)
    peers.source.register(inner)
    first, second = (
        (inner, peers.src.region) if first_back == "inner" else (peers.src.region, inner)
    )
    peers.source.unregister(first)
    peers.read(peers.op(1024, 1024, 2048))
    assert bytes(peers.dst)[1024:3072] == bytes(peers.src)[1024:3072]
    peers.source.unregister(second)
    peers.fail_to_read(peers.op(1024, 1024, 2048))


@pytest.mark.parametrize(
    ("start", "nbytes", "parts"),
    [
        (-4096, 8192, [(-4096, 4096), (0, 4096)]),
        (NBYTES - 1, 2, [(NBYTES - 1, 1), (NBYTES, 1)]),
        (-64, NBYTES + 128, [(-64, 64), (0, NBYTES), (NBYTES, 64)]),
        (0, NBYTES, [(0, NBYTES)]),
        (1024, 2048, [(1024, 2048)]),
    ],
    ids=["over the beginning", "over the end", "around it", "the same", "inside"],
)
@pytest.mark.parametrize("first_back", ["the new one", "the old one"])
def test_a_region_that_shares_bytes_with_a_registered_one_is_made_of_tiles_and_each_can_be_read(
    peers: Peers, start: int, nbytes: int, parts: list[tuple[int, int]], first_back: str
) -> None:
    region = peers.src.part(start, nbytes)
    assert peers.source.register(region) == tuple(peers.src.part(*part) for part in parts)
    peers.read_all()
    if first_back == "the old one":
        peers.source.unregister(peers.src.region)
    for at, size in parts:
        peers.read(peers.op(at, 0, size))
        assert bytes(peers.dst)[:size] == peers.src.read(at, size)
    peers.source.unregister(region)
    if first_back == "the old one":
        peers.fail_to_read(peers.op(0, 0, 64))
    else:
        peers.read_all()


def test_regions_that_touch_are_two_and_each_is_taken_back_alone(peers: Peers) -> None:
    half = NBYTES // 2
    peers.source.unregister(peers.src.region)
    for start in (0, half):
        peers.source.register(peers.src.part(start, half))
    peers.source.unregister(peers.src.part(0, half))
    peers.read(peers.op(half, 0, half))
    assert bytes(peers.dst)[:half] == bytes(peers.src)[half:]
    peers.fail_to_read(peers.op(0, 0, 64))
    peers.source.unregister(peers.src.part(half, half))


def test_taking_back_what_was_never_registered_is_no_error_and_harms_nothing(peers: Peers) -> None:
    peers.source.unregister(peers.memory(bytes(64)).region)
    peers.read_all()
    assert bytes(peers.dst) == bytes(peers.src)


# -- lending
# --------------------------------------------------------------------------------------------------


def test_memory_that_is_only_lent_cannot_be_read_by_peers_unless_the_protocol_needs_that(
    kind: Kind, peers: Peers
) -> None:
    peers.source.unregister(peers.src.region)
    peers.source.lend(peers.src.region)
    (peers.fail_to_read if kind.lends_apart else peers.read)(peers.op(0, 0, 64))
    peers.source.take_back(peers.src.region)


def test_memory_that_is_only_registered_is_no_destination_unless_that_is_the_same(
    kind: Kind, peers: Peers
) -> None:
    peers.reader.take_back(peers.dst.region)
    peers.reader.register(peers.dst.region)
    with (
        pytest.raises(EngineFailed, match="lend the destination first")
        if kind.lends_apart
        else nullcontext()
    ):
        peers.read(peers.op(0, 0, 64))
    peers.reader.unregister(peers.dst.region)


def test_memory_may_be_registered_and_lent_and_either_ends_alone(peers: Peers) -> None:
    back = peers.back()
    peers.reader.register(peers.dst.region)
    peers.reader.take_back(peers.dst.region)
    peers.dst.write(os.urandom(64))
    back.read(ReadOp("a/0", peers.dst.region.addr, back.dst.region.addr, 64))
    assert bytes(back.dst)[:64] == bytes(peers.dst)[:64]
    peers.reader.unregister(peers.dst.region)
    back.part_ways()


def test_a_region_lent_twice_is_a_destination_until_it_was_taken_back_twice(peers: Peers) -> None:
    peers.reader.lend(peers.dst.region)
    peers.reader.take_back(peers.dst.region)
    peers.read_all()
    peers.reader.take_back(peers.dst.region)
    with pytest.raises(EngineFailed, match="lend the destination first"):
        peers.read_all()


def test_what_was_never_lent_can_be_taken_back(peers: Peers) -> None:
    peers.reader.take_back(peers.memory(bytes(64)).region)
    peers.read_all()


def test_a_region_that_shares_bytes_with_a_lent_one_is_made_of_parts(peers: Peers) -> None:
    region = peers.dst.part(-64, 128)
    assert peers.reader.lend(region) == (peers.dst.part(-64, 64), peers.dst.part(0, 64))
    peers.read(peers.op(0, -64, 64))
    assert peers.dst.read(-64, 64) == bytes(peers.src)[:64]
    peers.reader.take_back(region)
    with pytest.raises(EngineFailed, match="lend the destination first"):
        peers.read(peers.op(0, -64, 64))
    peers.read_all()


# -- closing
# --------------------------------------------------------------------------------------------------


def test_a_closed_peer_cannot_be_read_but_others_can_and_may_have_its_memory(
    mortal: Peers, peers: Peers
) -> None:
    mortal.read_all()
    mortal.source.close()
    with pytest.raises(ReadFailed, match=f"cannot read from {mortal.session_id}"):
        mortal.read_all()
    peers.source.register(mortal.src.region)
    peers.read(mortal.op(0, 0, NBYTES))
    peers.source.unregister(mortal.src.region)
    assert bytes(mortal.dst) == bytes(mortal.src)


def test_closing_is_idempotent_and_use_afterwards_is_an_error(mortal: Peers, peers: Peers) -> None:
    for _ in range(2):
        mortal.source.close()
    with pytest.raises(EngineFailed, match="the transfer engine is closed"):
        mortal.source.connect(peers.session_id)
    with pytest.raises(EngineFailed, match="the transfer engine is closed"):
        mortal.source.start(
            peers.session_id, ReadOp("a/0", peers.src.region.addr, mortal.src.region.addr, 64)
        )
    with pytest.raises(EngineFailed, match="the transfer engine is closed"):
        mortal.source.register(mortal.src.region)
    with pytest.raises(EngineFailed, match="the transfer engine is closed"):
        mortal.source.lend(mortal.src.region)
    mortal.source.unregister(mortal.src.region)
    mortal.source.take_back(mortal.src.region)


def test_a_read_during_which_the_peer_closes_either_brings_all_bytes_or_fails(
    mortal: Peers,
) -> None:
    begun = threading.Event()

    def read_until_it_fails() -> int:
        for done in range(1_000_000):
            try:
                mortal.read_all()
            except ReadFailed:
                return done
            assert bytes(mortal.dst) == bytes(mortal.src)
            begun.set()
        raise AssertionError("a closed peer was read")

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_until_it_fails)
        assert begun.wait(60)
        mortal.source.close()
        assert reading.result() > 0


# -- threads
# --------------------------------------------------------------------------------------------------


def test_several_threads_read_at_once_each_its_own_part(peers: Peers) -> None:
    size = NBYTES // 8

    def read(part: int) -> None:
        for _ in range(20):
            peers.read(
                *[peers.op(part * size + at, part * size + at, 256) for at in range(0, size, 256)]
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert bytes(peers.dst) == bytes(peers.src)


def test_threads_that_register_and_read_do_not_disturb_each_other(
    kind: Kind, two_engines: tuple[Engine, Engine]
) -> None:
    def work(_: int) -> bool:
        peers = Peers(*two_engines, kind.device)
        peers.read_all()
        peers.part_ways()
        return bytes(peers.dst) == bytes(peers.src)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))
