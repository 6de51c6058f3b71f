"""Weights in arenas: published by a process, and loaded by another one while it runs, is stopped,
or has been killed. The host's memory stands for that of GPUs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import pytest
import torch

from engine_loader import CudaIpcEngine, Engine, LoadOptions, LoadReport, SocketEngine, load
from engine_loader.engines.base import read
from engine_loader.engines.cuda_ipc import sources
from engine_loader.errors import ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_loader.publishing.header import NBYTES, peer_of_record
from engine_loader.sharing.pieces import is_by_descriptors
from engine_registry import Manifest, RankRecord, Region, Registry
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes
from tests.support.arenas import Rank, arenas_of, bytes_of
from tests.support.host_gpus import HostGpus
from tests.support.processes.arena import weights
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def start(processes: Processes, shared_etcd: LocalEtcd, namespace: str) -> Callable[[str], Rank]:
    def start(engine: str, endpoint: str = shared_etcd.endpoint) -> Rank:
        args = ("-m", "tests.support.processes.arena", endpoint, namespace, engine)
        return Rank(processes.start(*args))

    return start


def reader(stack: ExitStack) -> CudaIpcEngine:
    return stack.enter_context(CudaIpcEngine(gpus=HostGpus()))


def fill(registry: Registry, engine: Engine, found: Tensors) -> LoadReport:
    return load(
        registry,
        engine,
        "a",
        rank=0,
        tensors=found,
        timeout_s=60,
        options=LoadOptions(verify="digest"),
    )


def assert_loads(registry: Registry, engine: Engine, added: int = 0) -> LoadReport:
    found = {
        name: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype).zero_()
        for name, one in weights().items()
    }
    report = fill(registry, engine, found)
    for name, tensor in weights().items():
        assert torch.equal(found[name], tensor + added), name
        assert found[name].stride() == tensor.stride()
    return report


def test_weights_in_an_arena_are_one_region_and_one_descriptor(
    registry: Registry, start: Callable[[str], Rank], stack: ExitStack
) -> None:
    """The header and the table of digests have one each."""
    rank = start("host gpus")
    manifest = registry.manifest(registry.resolve("a", 60)[0])
    assert len(manifest.regions) == 1
    assert len(manifest.exports) <= 3  # neighbours are one
    assert all(map(is_by_descriptors, manifest.exports))
    assert arenas_of(rank.keeper) == 3
    engine = reader(stack)
    assert assert_loads(registry, engine).verified
    rank.do("update")
    assert assert_loads(registry, engine, added=1).version == 1


@pytest.mark.parametrize("kind", ["socket", "socket, same host"])
def test_weights_in_an_arena_are_loaded_over_sockets(
    registry: Registry, start: Callable[[str], Rank], stack: ExitStack, kind: str
) -> None:
    rank = start(kind)
    engine = stack.enter_context(SocketEngine("127.0.0.1", same_host=kind != "socket"))
    assert assert_loads(registry, engine).verified
    rank.do("update")
    assert assert_loads(registry, engine, added=1).version == 1
    assert registry.manifest(registry.resolve("a")[0]).exports == ()


def test_a_rank_that_is_stopped_is_met_and_read(
    registry: Registry, start: Callable[[str], Rank], stack: ExitStack
) -> None:
    rank = start("host gpus")
    signal_and_wait(rank.pid, signal.SIGSTOP)
    for _ in range(2):
        assert assert_loads(registry, reader(stack)).verified


def test_a_keeper_that_takes_the_place_of_a_dead_one_has_the_memory_too(
    registry: Registry, start: Callable[[str], Rank], stack: ExitStack
) -> None:
    rank = start("host gpus")
    signal_and_wait(rank.keeper, signal.SIGKILL)
    rank.do("update")  # which waits for the next keeper
    wait_until(lambda: [record.version for record in registry.ranks("a")] == [1])
    assert assert_loads(registry, reader(stack), added=1).verified


def test_a_pause_closes_descriptors_and_what_is_resumed_has_others(
    registry: Registry, start: Callable[[str], Rank], stack: ExitStack
) -> None:
    rank = start("host gpus")
    few = arenas_of(rank.pid)
    rank.do("pause")
    assert arenas_of(rank.keeper) == 0
    assert arenas_of(rank.pid) < few
    rank.do("resume")
    assert arenas_of(rank.keeper) == 3
    assert assert_loads(registry, reader(stack)).verified


# -- ranks that were killed
# --------------------------------------------------------------------------------------------------


class Dead:
    """A rank that was killed while etcd does not answer, so that its keeper is still there."""

    def __init__(self, etcd: LocalEtcd, namespace: str, start: Callable[..., Rank]) -> None:
        self.rank = start("host gpus", etcd.endpoint)
        with Registry.connect(etcd.endpoint, namespace=namespace) as registry:
            self.record: RankRecord = registry.resolve("a", 60)[0]
            self.manifest: Manifest = registry.manifest(self.record)
        etcd.pause()
        signal_and_wait(self.rank.pid, signal.SIGKILL)

    def read(self, engine: CudaIpcEngine) -> Tensors:
        """All that it had, read by addresses."""
        found: Tensors = {}
        peer = peer_of_record(self.record)
        engine.connect(peer, self.manifest.exports)
        for entry in self.manifest.tensors:
            tensor = torch.zeros(entry.nbytes, dtype=torch.uint8)
            found[entry.name] = tensor
            if entry.nbytes:
                self._read(engine, peer, entry.addr, tensor)
        self.header = torch.zeros(NBYTES, dtype=torch.uint8)
        self._read(engine, peer, self.record.header_addr, self.header)
        return found

    def _read(self, engine: CudaIpcEngine, peer: str, addr: int, to: torch.Tensor) -> None:
        place = Region(to.data_ptr(), to.nbytes)
        engine.lend(place)
        number = engine.start(peer, ReadOp(self.record.key, addr, place.addr, place.nbytes))
        wait_until(lambda: engine.done(number))
        engine.take_back(place)


def is_let_go(gpus: HostGpus) -> bool:
    return gpus.opened == 0


def test_memory_of_a_rank_that_was_killed_is_opened_as_long_as_its_keeper_lives(
    own_etcd: LocalEtcd,
    namespace: str,
    start: Callable[..., Rank],
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead = Dead(own_etcd, namespace, start)
    for _ in range(2):  # engines that have not met it
        engine = reader(stack)
        monkeypatch.setattr(sources, "LET_GO_S", 1000.0)
        found = dead.read(engine)
        monkeypatch.setattr(sources, "LET_GO_S", 0.0)
        assert {name: bytes_of(one) for name, one in found.items()} == {
            name: bytes_of(one) for name, one in weights().items()
        }
        assert bytes.fromhex(dead.record.incarnation) in bytes_of(dead.header)
        assert isinstance(engine._gpus, HostGpus)
        wait_until(partial(is_let_go, engine._gpus))
    own_etcd.resume()
    wait_until(lambda: not os.path.exists(f"/proc/{dead.rank.keeper}"))
    with pytest.raises(ReadFailed, match="the keeper that hands out the memory has ended"):
        dead.read(reader(stack))


def test_a_load_that_has_met_a_rank_reads_it_to_the_end_when_rank_and_keeper_are_killed(
    registry: Registry, start: Callable[[str], Rank], stack: ExitStack
) -> None:
    rank = start("host gpus")
    engine = reader(stack)
    assert_loads(registry, engine)
    (record,) = registry.resolve("a")
    manifest = registry.manifest(record)
    peer = peer_of_record(record)
    engine.connect(peer, manifest.exports)
    signal_and_wait(rank.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):  # it may have been quicker to end by itself
        signal_and_wait(rank.keeper, signal.SIGKILL)
    entry = next(one for one in manifest.tensors if one.name == "tied")
    tensor = torch.zeros(entry.nbytes, dtype=torch.uint8)
    engine.lend(Region(tensor.data_ptr(), tensor.nbytes))
    read_from = ReadOp(record.key, entry.addr, tensor.data_ptr(), tensor.nbytes)
    read(engine, peer, read_from)
    assert bytes_of(tensor) == bytes_of(weights()["tied"])
