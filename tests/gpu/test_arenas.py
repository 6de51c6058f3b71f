"""Arenas on a GPU: one is enough."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from engine_loader import Arena, EngineFailed, arena_of
from engine_loader.tensors import arena as module
from engine_loader.tensors import cuda_memory
from engine_loader.tensors.cuda_memory import on_gpu
from engine_loader.tensors.regions import describe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MIB = 1 << 20


def free_nbytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(0)[0])


def test_tensors_of_an_arena_are_torchs_and_aligned() -> None:
    with Arena("cuda", 64 * MIB) as arena:
        assert arena.device == torch.device("cuda", torch.cuda.current_device())
        weight = arena.empty((1000, 1000), torch.bfloat16)
        row = arena.empty((7,), torch.float32).fill_(3)
        other = arena.empty((30, 40), torch.float32, strides=(1, 30))
        other.copy_(torch.arange(1200.0).view(30, 40))
        weight.normal_()
        assert all(one.data_ptr() % 512 == 0 for one in (weight, row, other))
        assert weight.is_cuda
        assert (weight @ weight.t()).isfinite().all()
        assert (row.cpu() == 3).all()
        assert torch.equal(other.cpu(), torch.arange(1200.0).view(30, 40))
        assert describe({"weight": weight, "row": row, "other": other}).regions == (arena.region,)


def test_memory_stays_until_the_last_tensor_is_gone_and_is_free_then() -> None:
    before = free_nbytes()
    with Arena("cuda:0", 512 * MIB) as arena:
        tensor = arena.empty((100 * MIB,), torch.uint8).fill_(9)
    del arena
    assert free_nbytes() <= before - 512 * MIB
    assert bool((tensor == 9).all())
    del tensor
    assert free_nbytes() >= before


def test_a_descriptor_is_of_all_of_it_and_keeps_it() -> None:
    before = free_nbytes()
    with Arena("cuda:0", 64 * MIB) as arena:
        arena.empty((64 * MIB,), torch.uint8).fill_(1)
        fd = arena.descriptor()
        nbytes = arena.nbytes
    del arena
    assert free_nbytes() <= before - 64 * MIB
    with on_gpu(0):
        handle = cuda_memory.from_descriptor(fd)
        mapping = cuda_memory.Mapping(0, nbytes)
        mapping.add(handle, nbytes)
        cuda_memory.release(handle)
        mapping.allow()
        assert not cuda_memory.is_shareable(mapping.region.addr)  # it is another's
        assert cuda_memory.piece_at(mapping.region.addr + 5) == mapping.region
        mapping.close()
    os.close(fd)
    assert free_nbytes() >= before


@pytest.mark.parametrize("piece_nbytes", [None, 32 * MIB])
def test_a_module_is_moved_and_stays_the_same(
    monkeypatch: pytest.MonkeyPatch, piece_nbytes: int | None
) -> None:
    monkeypatch.setattr(module, "_piece_nbytes", lambda *_: piece_nbytes)
    layers = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(12)]).to("cuda:0")
    layers[1].weight = layers[0].weight  # tied
    data = torch.randn(3, 2048, device="cuda:0")
    result = layers(data)
    parameters = dict(layers.named_parameters())
    before = {name: one.detach().cpu() for name, one in parameters.items()}
    with arena_of(parameters) as arena:
        for name, one in layers.named_parameters():
            assert one is parameters[name]
            assert arena.region.addr <= one.data_ptr() < arena.region.end
            assert torch.equal(one.detach().cpu(), before[name])
        assert layers[1].weight is layers[0].weight
        assert torch.equal(layers(data), result)
        if piece_nbytes is None:
            assert describe(dict(parameters)).regions == (arena.region,)
            os.close(arena.descriptor())
        else:
            with pytest.raises(EngineFailed, match="has no single descriptor"):
                arena.descriptor()


def test_an_arena_for_which_there_is_no_memory_is_refused_and_leaves_nothing() -> None:
    before = free_nbytes()
    with pytest.raises(EngineFailed, match=r"no \d+ bytes can be had of cuda:0"):
        Arena("cuda:0", 4 << 40)
    assert free_nbytes() >= before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_another_gpu_copies_from_an_arena_and_to_one() -> None:
    with Arena("cuda:0", 8 * MIB) as arena:
        tensor = arena.empty((MIB,), torch.int32)
        tensor.copy_(torch.arange(MIB, dtype=torch.int32, device="cuda:1"))
        assert torch.equal(
            tensor.to("cuda:1"), torch.arange(MIB, dtype=torch.int32, device="cuda:1")
        )
