"""What is copied from a buffer to its places, beside torch's own indexing."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.planning.boxes import Box, Lines
from engine_loader.planning.placed import lines
from engine_loader.transfer.staging import Staging
from tests.support.meshes import in_rows

CPU = torch.device("cpu")


def put(addr: int, tensor: torch.Tensor) -> None:
    ctypes.memmove(addr, tensor.contiguous().data_ptr(), tensor.nbytes)


def part_of(tensor: torch.Tensor, part: Box, whole: Box) -> torch.Tensor:
    """The part of a tensor that is the box `whole`."""
    starts = [start - base for start, base in zip(part.offsets, whole.offsets, strict=True)]
    return tensor[
        tuple([slice(start, start + size) for start, size in zip(starts, part.shape, strict=True)])
    ]


@st.composite
def parts(draw: st.DrawFn) -> tuple[Box, Box, Box]:
    """One that lies inside of two others."""
    part: list[tuple[int, int]] = []
    src: list[tuple[int, int]] = []
    dst: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, 4))):
        start, size = draw(st.integers(0, 3)), draw(st.integers(1, 4))
        part.append((start, size))
        for other in (src, dst):
            before = draw(st.integers(0, start))
            other.append((before, start + size - before + draw(st.integers(0, 2))))
    some = [
        Box(tuple(start for start, _ in axes), tuple(size for _, size in axes))
        for axes in (part, src, dst)
    ]
    return some[0], some[1], some[2]


@given(
    parts(),
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float64]),
    st.integers(0, 5),
    st.integers(0, 1),
)
def test_a_part_comes_to_its_place_and_nothing_else_is_touched(
    boxes: tuple[Box, Box, Box], dtype: torch.dtype, ahead: int, buffer: int
) -> None:
    part, src_box, dst_box = boxes
    src = torch.randint(0, 100, src_box.shape).to(dtype)
    storage = torch.full((ahead + dst_box.volume + 3,), 7, dtype=dtype)
    dst = storage[ahead : ahead + dst_box.volume].view(dst_box.shape)
    staging = Staging([torch.zeros(3), dst, storage[1:2], torch.empty(0)], CPU, 2, src.nbytes)
    addr = [staging.take(), staging.take()][buffer]
    assert addr is not None
    put(addr, src)
    wanted = storage.clone()
    place = wanted[ahead : ahead + dst_box.volume].view(dst_box.shape)
    part_of(place, part, dst_box).copy_(part_of(src, part, src_box))
    staging.copy(
        addr,
        [lines(part, in_rows(src_box), in_rows(dst_box), dtype.itemsize).at(0, dst.data_ptr())],
    )
    assert torch.equal(storage, wanted)


def test_several_lines_go_to_tensors_in_different_storages() -> None:
    tensors = [torch.zeros(6, dtype=torch.uint8) for _ in range(3)]
    staging = Staging(tensors, CPU, 1, 12)
    addr = staging.take()
    assert addr is not None
    put(addr, torch.arange(12, dtype=torch.uint8))
    staging.copy(
        addr,
        [
            Lines(0, tensors[2].data_ptr(), 2, (3,), (4,), (2,)),
            Lines(2, tensors[0].data_ptr(), 2, (3,), (4,), (2,)),
            Lines(5, tensors[1].data_ptr() + 1, 4),
        ],
    )
    assert [tensor.tolist() for tensor in tensors] == [
        [2, 3, 6, 7, 10, 11],
        [0, 5, 6, 7, 8, 0],
        [0, 1, 4, 5, 8, 9],
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_storages_of_one_foreign_buffer_may_lie_in_each_other(order: tuple[int, ...]) -> None:
    memory = bytearray(64)
    some = [
        torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=offset)
        for offset, count in ((0, 64), (0, 8), (16, 8))
    ]
    staging = Staging([some[place] for place in order], CPU, 1, 8)
    addr = staging.take()
    assert addr is not None
    put(addr, torch.arange(8, dtype=torch.uint8))
    staging.copy(addr, [Lines(0, some[0].data_ptr() + 20, 2, (4,), (2,), (10,))])
    assert [at for at, value in enumerate(memory) if value] == [21, 30, 31, 40, 41, 50, 51]


def test_buffers_lie_apart_in_the_region_and_are_free_again_when_they_are_given_back() -> None:
    staging = Staging([torch.zeros(1)], CPU, 3, 100)
    taken = [staging.take() for _ in range(4)]
    assert taken.pop() is None
    addrs = sorted(addr for addr in taken if addr is not None)
    assert addrs == [staging.region.addr + at for at in (0, 100, 200)]
    assert staging.region.nbytes == 300
    staging.give_back(addrs[1])
    assert staging.take() == addrs[1]
    assert staging.take() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_an_accelerators_tensors_are_filled_on_it() -> None:
    dst = torch.zeros((4, 6), dtype=torch.int16, device="cuda")
    staging = Staging([dst], dst.device, 2, 24)
    addr = staging.take()
    assert addr is not None
    at = addr - staging.region.addr
    staging._memory[at : at + 24].copy_(torch.arange(12, dtype=torch.int16).view(torch.uint8))
    staging.copy(addr, [Lines(0, dst.data_ptr() + 6, 6, (4,), (6,), (12,))])
    assert dst[:, 3:].cpu().tolist() == torch.arange(12).view(4, 3).tolist()
    assert not dst[:, :3].any()


def test_a_run_of_bytes_may_cross_storages_that_are_neighbours() -> None:
    memory = bytearray(3000)
    tensors = [
        torch.frombuffer(memory, dtype=torch.uint8, offset=at, count=1000) for at in (0, 1000, 2000)
    ]
    staging = Staging(tensors, CPU, 1, 4096)
    buffer = staging.take()
    assert buffer is not None
    wanted = torch.arange(2500).to(torch.uint8)
    put(buffer + 10, wanted)
    staging.copy(buffer, [Lines(10, tensors[0].data_ptr() + 400, 2500)])
    assert bytes(memory) == bytes(400) + bytes(wanted.tolist()) + bytes(100)
