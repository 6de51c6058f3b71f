"""Arenas on the host: tensors in one memory, and tensors that are moved into one."""

from __future__ import annotations

import fcntl
import gc
import logging
import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_loader import Arena, EngineFailed, TensorsUnusable, arena_of
from engine_loader.tensors.host_memory import HostMemory, memory_at
from engine_loader.tensors.regions import describe

MIB = 1 << 20


def of_arena(tensor: torch.Tensor, arena: Arena) -> bool:
    start = tensor.data_ptr()
    return arena.region.addr <= start and start + tensor.nbytes <= arena.region.end


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


# -- tensors of an arena
# --------------------------------------------------------------------------------------------------


def test_tensors_of_an_arena_are_aligned_and_lie_apart() -> None:
    with Arena("cpu", 64 << 10) as arena:
        tensors = [
            arena.empty((3, 5), torch.float32),
            arena.empty((), torch.float64),
            arena.empty((7,), torch.uint8),
            arena.empty((4, 6), torch.bfloat16, strides=(1, 4)),
            arena.empty((100,), torch.complex128),
        ]
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        for number, tensor in enumerate(tensors):
            assert tensor.data_ptr() % 256 == 0
            assert of_arena(tensor, arena)
            assert (tensor == number).all()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensors[3].stride() == (1, 4)
        assert arena.used_nbytes == 4 * 256 + 1600


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_a_tensor_without_elements_takes_no_memory(shape: tuple[int, ...]) -> None:
    with Arena("cpu", 1) as arena:
        tensor = arena.empty(shape, torch.int16)
        assert (tensor.shape, tensor.dtype) == (shape, torch.int16)
        assert arena.used_nbytes == 0


def test_an_arena_that_is_full_says_so_and_keeps_what_it_has() -> None:
    with Arena("cpu", 4096) as arena:
        first = arena.empty((4000,), torch.uint8).fill_(7)
        with pytest.raises(EngineFailed, match="has no room for 97 more: 4000 are taken"):
            arena.empty((97,), torch.uint8)
        assert (first == 7).all()


def test_memory_stays_until_the_last_tensor_is_gone() -> None:
    arena = Arena("cpu", MIB)
    addr = arena.region.addr
    tensor = arena.empty((100,), torch.int32).fill_(5)
    part = tensor[10:20]
    arena.close()
    arena.close()
    with pytest.raises(EngineFailed, match="the arena is closed"):
        arena.empty((1,), torch.int32)
    with pytest.raises(EngineFailed, match="the arena is closed"):
        arena.descriptor()
    del tensor, arena
    gc.collect()
    assert memory_at(addr) is not None
    assert (part == 5).all()
    del part
    gc.collect()
    assert memory_at(addr) is None


def test_an_arena_that_is_gone_leaves_no_descriptor_and_no_mapping() -> None:
    def arenas() -> int:
        names = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        maps = Path("/proc/self/maps").read_text().splitlines()
        return sum("memfd:arena" in line for line in [*names, *maps])

    gc.collect()
    before = arenas()
    with Arena("cpu", MIB) as arena:
        arena.empty((10,), torch.int32)
        assert arenas() > before
    del arena
    gc.collect()
    assert arenas() == before


def test_a_descriptor_shows_the_same_memory_whose_size_cannot_change() -> None:
    with Arena("cpu", MIB) as arena:
        tensor = arena.empty((1000,), torch.int64).fill_(3)
        fd = arena.descriptor()
        try:
            assert not os.get_inheritable(fd)
            assert os.fstat(fd).st_size == arena.nbytes
            with mmap.mmap(fd, arena.nbytes) as other:
                assert np.frombuffer(other, np.int64, 1000).tolist() == [3] * 1000
                tensor[0] = 4
                assert other[0] == 4
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        finally:
            os.close(fd)


def test_where_there_are_no_huge_pages_others_are_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = os.memfd_create

    def without(name: str, flags: int) -> int:
        if flags & os.MFD_HUGETLB:
            raise OSError(12, "Cannot allocate memory")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", without)
    caplog.set_level(logging.DEBUG, "engine_loader")
    with Arena("cpu", 3 * MIB) as arena:
        assert arena.nbytes == 3 * MIB
    assert "has no huge pages" in caplog.text


def test_memory_that_cannot_be_had_is_an_error_that_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(EngineFailed, match=f"no {1 << 62} bytes can be had of the host"):
        Arena("cpu", 1 << 62)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("device", ["meta", *([] if torch.cuda.is_available() else ["cuda:0"])])
def test_a_device_without_arenas_is_refused(device: str) -> None:
    with pytest.raises(EngineFailed, match=f"there are no arenas on {device} here"):
        Arena(device, 4096)


def test_threads_get_memory_of_their_own() -> None:
    found: list[torch.Tensor] = []
    with Arena("cpu", MIB) as arena:
        threads = [
            threading.Thread(target=lambda: found.extend(arena.take(100) for _ in range(50)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({tensor.data_ptr() for tensor in found}) == 400


# -- tensors that are moved
# --------------------------------------------------------------------------------------------------


def test_a_module_keeps_its_parameters_which_lie_in_the_arena() -> None:
    first, second = torch.nn.Linear(30, 20), torch.nn.Linear(20, 30)
    second.weight = torch.nn.Parameter(first.weight.detach().t())  # of other strides
    module = torch.nn.Sequential(first, second)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parameters = dict(module.named_parameters())
    data = torch.randn(4, 30)
    result = module(data)
    with arena_of(parameters) as arena:
        assert list(map(id, module.parameters())) == list(map(id, parameters.values()))
        for name, tensor in module.named_parameters():
            assert isinstance(tensor, torch.nn.Parameter)
            assert tensor.requires_grad
            assert of_arena(tensor, arena)
            assert bytes_of(tensor) == bytes_of(before[name])
        assert torch.equal(module(data), result)
        module(data).sum().backward()
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        optimizer.step()
        assert of_arena(parameters["0.weight"], arena)
    assert not torch.equal(module(data), result)


def test_tied_tensors_and_views_share_memory_afterwards_and_strides_stay() -> None:
    whole = torch.arange(1000, dtype=torch.float32)
    tensors = {
        "whole": whole,
        "view": whole[100:200].view(10, 10),
        "transposed": whole[200:300].view(10, 10).t(),
        "same": whole.view(-1),
        "words": whole.view(torch.int32),
        "alone": torch.arange(12, dtype=torch.int16).view(3, 4).t(),
    }
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    strides = {name: tensor.stride() for name, tensor in tensors.items()}
    with arena_of(tensors) as arena:
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name
            assert tensor.stride() == strides[name]
            assert of_arena(tensor, arena)
        tensors["view"].fill_(-1)
        assert (whole[100:200] == -1).all()
        assert (tensors["same"][100:200] == -1).all()
        assert tensors["transposed"][0, 0] == 200
        assert tensors["alone"].data_ptr() % 256 == 0
        assert arena.used_nbytes <= 4000 + 256 + 24


def test_parts_of_a_storage_that_nobody_named_are_not_moved() -> None:
    whole = torch.arange(1 << 20, dtype=torch.int32)
    parts = [whole[1:11], whole[500_000:500_100], whole[500_050:500_200]]
    expected = [part.clone() for part in parts]
    with arena_of(parts) as arena:
        assert all(map(torch.equal, parts, expected))
        assert arena.used_nbytes == 256 + 800
        parts[1][60] = -7
        assert parts[2][10] == -7
        assert whole[500_060] == 500_060


def test_tensors_without_elements_stay_as_they_are() -> None:
    empty = torch.empty(0, 3)
    with arena_of([empty, torch.ones(3)]) as arena:
        assert empty.shape == (0, 3)
        assert arena.used_nbytes == 12
    with arena_of([]) as arena:
        assert arena.used_nbytes == 0


def test_tensors_that_are_no_plain_memory_are_refused_by_name_and_nothing_is_moved() -> None:
    good = torch.ones(3)
    addr = good.data_ptr()
    with pytest.raises(TensorsUnusable, match="bad: is on the meta device"):
        arena_of({"good": good, "bad": torch.empty(3, device="meta")})
    with pytest.raises(TensorsUnusable, match="1: is not contiguous"):
        arena_of([good, torch.ones(4, 4)[:, 1]])
    assert good.data_ptr() == addr


class Buffer(bytearray):
    """Of a tensor, which keeps it."""


def test_the_memory_of_each_tensor_is_freed_before_the_next_is_moved() -> None:
    buffers: list[weakref.ref[Buffer]] = []
    alive: list[int] = []
    take = Arena.take

    def made(number: int) -> torch.Tensor:
        buffer = Buffer([number] * 1000)
        buffers.append(weakref.ref(buffer))
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def counted(arena: Arena, nbytes: int) -> torch.Tensor:
        alive.append(sum(buffer() is not None for buffer in buffers))
        return take(arena, nbytes)

    tensors = [made(number) for number in range(16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arena, "take", counted)
        arena_of(tensors).close()
    assert alive == list(range(16, 0, -1))
    assert not any(buffer() for buffer in buffers)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex128]),
            st.integers(0, 40),
            st.integers(0, 60),
        ),
        max_size=12,
    )
)
def test_whatever_parts_of_a_storage_are_moved_bytes_and_sharing_stay(
    parts: list[tuple[torch.dtype, int, int]],
) -> None:
    whole = torch.arange(2048, dtype=torch.int16).view(torch.uint8)
    tensors = [whole.view(dtype)[start : start + count] for dtype, start, count in parts]
    wanted = [bytes_of(tensor) for tensor in tensors]
    offsets = [tensor.data_ptr() for tensor in tensors]
    with arena_of(tensors) as arena:
        assert [bytes_of(tensor) for tensor in tensors] == wanted
        for one, before in zip(tensors, offsets, strict=True):
            if not one.numel():
                continue
            assert of_arena(one, arena)
            assert one.data_ptr() % one.itemsize == 0
            for other, its in zip(tensors, offsets, strict=True):
                if other.numel() and before <= its < before + one.nbytes:
                    assert other.data_ptr() - one.data_ptr() == its - before


def test_an_arena_is_one_region() -> None:
    tensors = {f"t{number}": torch.full((100 + number,), number) for number in range(50)}
    with arena_of(tensors) as arena:
        manifest = describe({**tensors, "elsewhere": torch.ones(4)})
        assert arena.region in manifest.regions
        assert len(manifest.regions) == 2


def test_tensors_are_saved_each_for_itself(tmp_path: Path) -> None:
    tensors = {"small": torch.ones(10), "large": torch.ones(MIB)}
    with arena_of(tensors):
        torch.save({"small": tensors["small"]}, tmp_path / "small")
    assert (tmp_path / "small").stat().st_size < 64 << 10


def test_host_memory_is_of_whole_pages() -> None:
    memory = HostMemory.of(1)
    assert memory.region.nbytes == len(memory) == mmap.PAGESIZE
