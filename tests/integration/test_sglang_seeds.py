"""Seeds of SGLang in a real etcd, read by SGLang's calls to a real transfer engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_loader import MooncakeEngine, load
from engine_loader.errors import SourceLost, TornRead
from engine_loader.integrations.seat import Seat
from engine_loader.integrations.sglang.clients import Reading
from engine_loader.integrations.sglang.seeds import Seed, publish_seed
from engine_registry import ModelIdentity, Place, RankRecord, Registry
from tests.support.processes.sglang import transfer_engine

MODEL = ModelIdentity("llama", extra={"engine": "sglang", "stage": "transfer"})
SEAT = Seat("sglang-1", "g", Place(0, 1, {"tp": (0, 1), "pp": (0, 1)}))
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    return {"embed": torch.randn(200, 64), "norm": torch.randn(64, dtype=torch.bfloat16)}


@pytest.fixture
def seed(registry: Registry, tensors: Tensors) -> Iterator[Seed]:
    """As SGLang has it once its weights are loaded."""
    library, session_id = transfer_engine(tensors)
    transporter = SimpleNamespace(
        engine=library,
        session_id=session_id,
        weight_info={
            name: (tensor.data_ptr(), tensor.numel(), tensor.element_size())
            for name, tensor in tensors.items()
        },
    )
    seed = publish_seed(registry, transporter, tensors, MODEL, SEAT, "tcp", {"team": "search"})
    yield seed
    seed.close()
    del library


def the_record(registry: Registry) -> RankRecord:
    (record,) = registry.ranks(SEAT.instance)
    return record


def read_as_sglang(reading: Reading, library: Any, mine: Tensors) -> None:
    """As SGLang's loader does, by the answer about a seed."""
    session_id, weights = reading.answer
    here, there, nbytes = [], [], []
    for name, tensor in mine.items():
        addr, numel, itemsize = weights[name]
        assert (numel, itemsize) == (tensor.numel(), tensor.element_size())
        here.append(tensor.data_ptr())
        there.append(addr)
        nbytes.append(numel * itemsize)
    assert library.batch_transfer_sync_read(session_id, here, there, nbytes) == 0


def test_sglang_reads_the_seed_that_etcd_has(
    registry: Registry, seed: Seed, tensors: Tensors
) -> None:
    mine = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    library, _ = transfer_engine(mine)
    with Reading(registry, the_record(registry), library) as reading:
        read_as_sglang(reading, library, mine)
        assert registry.pulls(reading.record) == 1
        reading.check()
    assert registry.pulls(the_record(registry)) == 0
    assert all(torch.equal(mine[name], tensors[name]) for name in tensors)


def test_a_loader_of_this_library_reads_the_seed_too(
    registry: Registry, seed: Seed, tensors: Tensors
) -> None:
    mine = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with MooncakeEngine("127.0.0.1") as engine:
        load(registry, engine, SEAT.instance, rank=0, tensors=mine)
    assert all(torch.equal(mine[name], tensors[name]) for name in tensors)


def test_a_change_of_the_weights_while_sglang_reads_does_not_count(
    registry: Registry, seed: Seed, tensors: Tensors
) -> None:
    mine = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    library, _ = transfer_engine(mine)
    with Reading(registry, the_record(registry), library) as reading:
        read_as_sglang(reading, library, mine)
        seed.pause()
        with pytest.raises((TornRead, SourceLost)):
            reading.check()
    tensors["norm"].add_(1)
    seed.replace(tensors)
    record = the_record(registry)
    assert (record.version, record.labels) == (1, {"team": "search"})
    with Reading(registry, record, library) as reading:
        read_as_sglang(reading, library, mine)
        reading.check()
    assert torch.equal(mine["norm"], tensors["norm"])


def test_a_seed_that_is_closed_is_gone(registry: Registry, seed: Seed) -> None:
    seed.close()
    seed.close()
    assert registry.ranks(SEAT.instance) == ()
