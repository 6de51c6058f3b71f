"""Memory of the host that another process has made, as this one has it: to adopt or to share."""

from __future__ import annotations

import fcntl
import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine_loader import Arena, EngineFailed
from engine_loader.tensors.host_memory import HostMemory, ReadOnlyMemory, memory_at

NBYTES = 1 << 16


@pytest.fixture
def fd() -> Iterator[int]:
    """Of an arena whose tensors are gone."""
    with Arena("cpu", NBYTES) as arena:
        arena.empty((NBYTES,), torch.uint8).copy_(torch.arange(NBYTES) % 251)
        fd = arena.descriptor()
    yield fd
    os.close(fd)


def rights_at(addr: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, rights, *_ = line.split()
        start, end = (int(each, 16) for each in ends.split("-"))
        if start <= addr < end:
            return rights
    return ""


def test_adopted_memory_has_the_bytes_and_is_like_one_that_was_made_here(fd: int) -> None:
    memory = HostMemory.adopted(fd, NBYTES)
    addr = memory.region.addr
    tensor = memory.tensor(1000, 500)
    assert torch.equal(tensor, ((torch.arange(500) + 1000) % 251).to(torch.uint8))
    tensor.fill_(9)
    assert os.pread(fd, 3, 1499) == bytes([9, 1500 % 251, 1501 % 251])
    assert memory_at(addr) is memory
    again = memory.descriptor()
    assert os.fstat(again).st_ino == os.fstat(fd).st_ino
    os.close(again)
    del memory
    gc.collect()
    assert memory_at(addr) is not None  # its tensor keeps it
    del tensor
    gc.collect()
    assert memory_at(addr) is None
    assert rights_at(addr) == ""


def test_shared_memory_can_be_read_alone_and_nobody_takes_it_for_an_arena(fd: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = ReadOnlyMemory(fd, NBYTES)
        tensor = memory.tensor(0, 100)
    assert tensor.tolist() == list(range(100))
    assert rights_at(tensor.data_ptr()).startswith("r--s")
    assert memory_at(tensor.data_ptr()) is None
    os.pwrite(fd, b"\x77", 5)
    assert tensor[5] == 0x77


@pytest.mark.parametrize("opened", [HostMemory.adopted, ReadOnlyMemory])
def test_memory_of_another_size_or_that_can_be_cut_short_is_refused(fd: int, opened: type) -> None:
    with pytest.raises(EngineFailed, match="bytes of the host are offered, in memory of"):
        opened(fd, NBYTES + 4096)
    other = os.memfd_create("a test's", os.MFD_ALLOW_SEALING)
    os.ftruncate(other, NBYTES)
    with pytest.raises(EngineFailed, match="can be cut short"):
        opened(other, NBYTES)
    fcntl.fcntl(other, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert opened(other, NBYTES).region.nbytes == NBYTES
    os.close(other)
    with pytest.raises(EngineFailed):
        opened(other, NBYTES)
