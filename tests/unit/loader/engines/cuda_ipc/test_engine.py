"""What the engine makes of reads: few launches, whose failures are those of the reads in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from engine_loader import CudaIpcEngine
from engine_loader.engines.cuda_ipc import launches as module
from engine_loader.engines.cuda_ipc.launch import Launch
from engine_loader.engines.cuda_ipc.table import Copy
from engine_loader.engines.cuda_ipc.tallies import Sums
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_registry import Region
from engine_registry.schema.manifest import Export
from tests.support.host_gpus import HostGpus

SIZE = 64


class Launched:
    """Is done when the test says so, or fails."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.copies = copies
        self.over = False
        self.error: EngineFailed | None = None
        self.waits = 0

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.over

    def wait(self) -> None:
        self.waits += 1
        if self.error is not None:
            raise self.error
        self.over = True


class Gpu(HostGpus):
    """One that copies nothing, and keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launched] = []
        self.error: EngineFailed | None = None

    def number_of(self, device: torch.device) -> int | None:
        return 0 if device.index else None

    def launch(self, gpu: int | None, copies: Sequence[Copy], sums: Sums | None) -> Launch:
        if self.error is not None:
            raise self.error
        self.launches.append(Launched(copies))
        return self.launches[-1]


class Bench:
    def __init__(self) -> None:
        self.gpu = Gpu()
        self.engine = CudaIpcEngine(gpus=self.gpu)
        self.memory = torch.zeros(64 * SIZE, dtype=torch.uint8)
        self.region = Region(self.memory.data_ptr(), self.memory.numel())
        self.engine.register(self.region)
        self.engine.lend(self.region)
        self.peer = self.engine.session_id
        self.engine.connect(self.peer)

    def start(self, count: int = 1) -> list[int]:
        op = ReadOp("a/0", self.region.addr, self.region.addr + SIZE, SIZE)
        return [self.engine.start(self.peer, op) for _ in range(count)]

    @property
    def sizes(self) -> list[int]:
        """How many copies each launch makes."""
        return [len(launch.copies) for launch in self.gpu.launches]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    with bench.engine:
        yield bench


def test_reads_are_launched_together_once_somebody_asks_for_one(bench: Bench) -> None:
    first, *others = bench.start(5)
    assert bench.sizes == []
    assert not bench.engine.done(others[2])
    assert bench.sizes == [5]
    (launch,) = bench.gpu.launches
    launch.over = True
    assert all(bench.engine.done(number) for number in (first, *others))
    assert bench.sizes == [5]
    with pytest.raises(KeyError):
        bench.engine.done(first)


def test_enough_reads_are_launched_unasked_and_each_launch_is_longer_up_to_a_limit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_NBYTES", 2 * SIZE)
    monkeypatch.setattr(module, "_LAUNCH_NBYTES", 8 * SIZE)
    numbers = bench.start(2 + 4 + 8 + 8 + 3)
    assert bench.sizes == [2, 4, 8, 8]
    assert not bench.engine.done(numbers[-1])
    assert bench.sizes == [2, 4, 8, 8, 3]


def test_a_launch_that_cannot_be_made_fails_all_its_reads(bench: Bench) -> None:
    numbers = bench.start(3)
    bench.gpu.error = EngineFailed("no compiler")
    with pytest.raises(EngineFailed, match="no compiler"):
        bench.engine.done(numbers[0])
    for number in numbers:
        with pytest.raises(ReadFailed, match="no compiler"):
            bench.engine.done(number)
    bench.gpu.error = None
    bench.start()
    assert not bench.engine.done(bench.start()[0])


def test_abandoned_reads_that_a_gpu_makes_are_waited_for_and_others_are_not_made(
    bench: Bench,
) -> None:
    made = bench.start(2)
    assert not bench.engine.done(made[0])
    waiting = bench.start(2)
    bench.engine.abandon(bench.peer)
    assert bench.engine.settled(bench.peer)
    assert [launch.waits > 0 for launch in bench.gpu.launches] == [True]
    for number in (*made, *waiting):
        with pytest.raises(ReadFailed, match="it was abandoned"):
            bench.engine.done(number)
    assert bench.sizes == [2]


def test_abandoning_and_closing_raise_nothing_when_the_gpu_has_failed() -> None:
    bench = Bench()
    with bench.engine:
        numbers = bench.start(3)
        assert not bench.engine.done(numbers[0])
        bench.gpu.launches[0].error = EngineFailed("the GPU has failed")
        with pytest.raises(EngineFailed, match="the GPU has failed"):
            bench.engine.done(numbers[0])
        bench.engine.abandon(bench.peer)
        for number in numbers:
            with pytest.raises(ReadFailed, match="it was abandoned"):
                bench.engine.done(number)
        bench.start()
    with pytest.raises(EngineFailed, match="the transfer engine is closed"):
        bench.start()


def test_a_region_that_is_no_one_allocation_is_not_registered(bench: Bench) -> None:
    addr = bench.gpu.allocate(4096)
    with pytest.raises(EngineFailed, match="are not one allocation"):
        bench.engine.register(Region(addr, 4097))
    bench.engine.register(Region(addr, 4096))
    assert len(bench.engine._served) == 2


def test_an_allocation_is_exported_once_however_many_regions_it_has(bench: Bench) -> None:
    addr = bench.gpu.allocate(4096)
    regions = [Region(addr, 16), Region(addr + 64, 16)]
    (export,) = bench.engine.exports(regions)
    assert (export.addr, export.nbytes) == (addr, 4096)
    assert bench.engine.exports([]) == ()
    assert [type(each) for each in bench.engine.exports([*regions, bench.region])] == [Export] * 2


def test_one_at_a_time_sums_up_what_comes_from_a_peer_into_a_gpu(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, gpu = torch.device("cpu"), torch.device("cpu", 0)
    pieces = [bench.region]
    assert bench.engine.tally(bench.peer, pieces, host) is None  # no GPU copies there
    monkeypatch.setattr(bench.gpu, "number_of", lambda _: 0)
    first = bench.engine.tally(bench.peer, pieces, gpu)
    assert first is not None
    assert bench.engine.tally(bench.peer, pieces, gpu) is None
    assert bench.engine.tally("another@1", pieces, gpu) is not None
    first.close()
    assert bench.engine.tally(bench.peer, pieces, gpu) is not None
