"""Weights on a GPU that outlive their process: held by its keeper, and adopted here. One GPU is
enough.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch import nn

from engine_loader import (
    Adopted,
    CudaIpcEngine,
    HeldUnusable,
    PublishOptions,
    adopt,
    arena_of,
    publish,
)
from engine_loader.adopting.finding import find_held
from engine_loader.adopting.memory import OpenedRank
from engine_loader.digests.table import digests_of
from engine_loader.engines.base import Engine
from engine_loader.integrations.room import built_beside_held
from engine_loader.sharing import opening
from engine_loader.tensors.cuda import uuid_of
from engine_loader.tensors.deferred import Deferred
from engine_registry import Registry
from engine_registry.errors import KeeperFailed
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.held import Kept, keepers_here, let_go
from tests.gpu.conftest import Source, assert_equal, fill, zeroed
from tests.gpu.source import MODEL, Tensors, content, layers_content
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MIB = 1 << 20


def kept(registry: Registry) -> list[Kept]:
    """By keepers of ranks of this test; there may be others on this host."""
    found = [(one, registry.record_at(one.key)) for one in keepers_here()]
    return [one for one, record in found if record and record.incarnation == one.incarnation]


@pytest.fixture(autouse=True)
def _nothing_stays_held(registry: Registry) -> Iterator[None]:
    yield
    for one in kept(registry):
        with suppress(KeeperFailed):
            let_go(one)


def free_nbytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(0)[0])


def kill(registry: Registry, source: Source) -> Kept:
    """And waits until it is held."""
    source.kill()
    wait_until(lambda: any(one.held for one in kept(registry)))
    return kept(registry)[0]


def adopted(registry: Registry, tensors: Tensors | nn.Module, *, shared: bool = False) -> Adopted:
    found = adopt(registry, MODEL, tensors, rank=0, world_size=1, shared=shared)
    assert found is not None
    return found


@pytest.mark.parametrize("command", ["held", "segments"])
def test_weights_of_a_process_that_was_killed_are_adopted_where_they_are(
    registry: Registry, etcd: LocalEtcd, command: str
) -> None:
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if command == "segments" else {}
    source = Source(etcd.endpoint, "cuda_ipc", **env)
    source.do(f"{command} 3")
    source.do("update")
    before = registry.resolve("a")[0]
    kill(registry, source)
    digests_of(content(3, "cuda:0"), "multilinear_64")  # the first takes memory of its own
    found = {name: one.to("meta") for name, one in content(3, "cpu").items()}
    objects = dict(found)
    free = free_nbytes()
    result = adopted(registry, found)
    assert free - free_nbytes() < 8 * MIB
    assert result.verified
    assert (result.version, result.content) == (1, before.content)
    assert_equal(found, {name: one + 1 for name, one in content(3, "cpu").items()})
    assert all(found[name] is objects[name] for name in found)


def test_memory_is_held_without_a_process_and_free_once_it_is_let_go(
    registry: Registry, source: Source
) -> None:
    before = free_nbytes()
    source.do("held 1")
    held = kill(registry, source)
    assert free_nbytes() <= before - 40 * MIB
    assert held.devices == (uuid_of(0),)
    assert held.nbytes >= 40 * MIB
    let_go(held)
    assert free_nbytes() >= before - MIB
    assert adopt(registry, MODEL, zeroed(content(1, "cuda:0")), rank=0, world_size=1) is None


def test_memory_is_free_once_the_last_adopted_tensor_is_gone(
    registry: Registry, source: Source
) -> None:
    before = free_nbytes()
    source.do("held 1")
    kill(registry, source)
    found = zeroed(content(1, "cpu"), "cuda:0")
    result = adopted(registry, found)
    assert_equal(found, content(1, "cpu"))
    del found, result
    assert free_nbytes() >= before - MIB


def test_adopted_weights_are_published_loaded_and_shared_again(
    registry: Registry, source: Source, engine: CudaIpcEngine
) -> None:
    """Drivers give no descriptors of memory that was opened by one: ours are kept."""
    source.do("held 1")
    kill(registry, source)
    found = zeroed(content(1, "cpu"), "cuda:0")
    result = adopted(registry, found)
    options = PublishOptions(hold_s=60)
    with result.publish(registry, engine, instance="a", options=options) as publication:
        assert publication.content == result.content
        shared = zeroed(content(1, "cpu"), "cuda:0")
        with adopted(registry, shared, shared=True) as sharing:
            assert_equal(shared, content(1, "cpu"))
            with publication.update():
                found["long"].fill_(9)
            assert not sharing.current
            assert bool((shared["long"] == 9).all())
        loaded = zeroed(content(1, "cpu"), "cuda:0")
        fill(registry, engine, loaded)
        assert_equal(loaded, found)


_WRITER = """
import sys
import torch
from engine_loader import adopt
from engine_registry import Registry
from tests.gpu.conftest import zeroed
from tests.gpu.source import MODEL, content

with Registry.connect(sys.argv[1]) as registry:
    shared = zeroed(content(1, "cpu"), "cuda:0")
    with adopt(registry, MODEL, shared, rank=0, world_size=1, shared=True):
        print(int(shared["long"][0]))
        shared["long"].fill_(9)
        torch.cuda.synchronize()
"""


def test_memory_that_is_shared_cannot_be_written_to(
    registry: Registry, etcd: LocalEtcd, engine: CudaIpcEngine, source: Source
) -> None:
    source.do("held 1")
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, etcd.endpoint], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n"
    assert "an illegal memory access was encountered" in done.stderr
    found = zeroed(content(1, "cpu"), "cuda:0")
    fill(registry, engine, found)
    assert_equal(found, content(1, "cpu"))


def test_a_byte_that_has_changed_is_found_by_digests(registry: Registry, source: Source) -> None:
    source.do("held 1")
    kill(registry, source)
    rank = find_held(registry, MODEL, rank=0, world_size=1)
    assert rank is not None
    (entry,) = [one for one in rank.manifest.tensors if one.name == "long"]
    opened = OpenedRank(rank, shared=False)
    opened.at(entry.addr + 5, 1).add_(1)
    torch.cuda.synchronize()
    found = zeroed(content(1, "cpu"), "cuda:0")
    with pytest.raises(HeldUnusable) as caught:
        adopted(registry, found)
    assert caught.value.details["problems"] == ["long"]
    assert not any(one.any() for one in found.values())


def test_tensors_on_the_host_are_not_given_memory_of_a_gpu(
    registry: Registry, source: Source
) -> None:
    source.do("held 1")
    kill(registry, source)
    on_host = zeroed(content(1, "cpu"))
    assert adopt(registry, MODEL, on_host, rank=0, world_size=1) is None
    mixed = on_host | {"t0": torch.zeros_like(on_host["t0"], device="cuda:0")}
    with pytest.raises(HeldUnusable, match="t1: on cuda:0 held, on cpu here"):
        adopted(registry, mixed)
    found = zeroed(content(1, "cpu"), "cuda:0")
    adopted(registry, found)  # it was held on
    assert_equal(found, content(1, "cpu"))


def test_memory_of_a_gpu_that_this_process_does_not_see_is_refused(
    registry: Registry, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.do("held 1")
    kill(registry, source)
    monkeypatch.setattr(opening, "uuid_of", lambda gpu: "GPU-of-another-host")
    with pytest.raises(HeldUnusable, match="is none of the") as caught:
        adopted(registry, zeroed(content(1, "cpu"), "cuda:0"))
    assert caught.value.details["reason"] == "gone"


def test_a_module_on_the_meta_device_computes_with_adopted_weights(
    registry: Registry, engine: Engine
) -> None:
    model = nn.Linear(256, 256, device="cuda:0")
    arena_of(dict(model.named_parameters())).close()
    with (
        publish(
            registry,
            engine,
            instance="a",
            rank=0,
            world_size=1,
            tensors=dict(model.named_parameters()),
            model=MODEL,
            options=PublishOptions(hold_s=60),
        ),
        torch.no_grad(),
    ):
        new = nn.Linear(256, 256, device="meta")
        with adopted(registry, new, shared=True):
            data = torch.randn(8, 256, device="cuda:0")
            assert torch.equal(new(data), model(data))


class Layer(nn.Module):
    def __init__(self, wanted: torch.Tensor) -> None:
        super().__init__()
        weight = torch.empty_like(wanted, device="cuda:0")
        self.weight = nn.Parameter(weight, requires_grad=False)


@pytest.fixture
def crowded(registry: Registry, source: Source) -> Iterator[Tensors]:
    """Most of the GPU is in use, and half of the rest is held: what, as it should be."""
    wanted = layers_content(5, "cpu")
    source.do("layers 5")
    kill(registry, source)
    ballast = torch.empty(free_nbytes() - (1 << 30), dtype=torch.uint8, device="cuda:0")
    yield wanted
    del ballast
    free_nbytes()


def build(wanted: Tensors) -> tuple[nn.Module, Deferred]:
    with built_beside_held(torch.device("cuda")) as deferred:
        model = nn.Sequential()
        for tensor in wanted.values():
            model.append(Layer(tensor))
    assert deferred is not None
    assert deferred.nbytes == 4 << 30
    return model, deferred


def test_a_model_is_built_and_adopts_where_there_is_no_room_for_its_weights_beside_those_held(
    registry: Registry, crowded: Tensors
) -> None:
    free = free_nbytes()
    assert free <= 1 << 30
    model, deferred = build(crowded)
    result = adopted(registry, model)
    assert result.verified
    assert deferred.nbytes == 0
    assert_equal(dict(model.state_dict()), crowded)
    assert free - free_nbytes() < 128 * MIB


def test_what_was_not_adopted_can_be_let_go_for_the_memory_of_the_model(
    registry: Registry, crowded: Tensors
) -> None:
    model, deferred = build(crowded)
    with pytest.raises(torch.OutOfMemoryError):
        deferred.give_memory()
    let_go(kept(registry)[0])
    deferred.give_memory()
    for parameter, tensor in zip(model.parameters(), crowded.values(), strict=True):
        parameter.copy_(tensor)
    assert_equal(dict(model.state_dict()), crowded)
