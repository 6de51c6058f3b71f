"""Tensors are filled from safetensors files: whole and in part, tied, of every dtype; what does not
fit is reported before a read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import engine_loader.files.disk
from engine_loader import Progress, Shard
from engine_loader.errors import Cancelled, WeightsFileInvalid, WeightsMismatch
from engine_loader.files.disk import read_into
from tests.unit.loader.files.test_weights import STORABLE, same

Tensors = dict[str, torch.Tensor]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return (
        torch.randint(0, 2, (nbytes,), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .view(shape)
    )


def zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read of tensors."""
    reads: list[int] = []
    preadv = os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(preadv(descriptor, buffers, offset))
        return reads[-1]

    monkeypatch.setattr(os, "preadv", count)
    return reads


def test_every_dtype_and_shape_comes_as_it_was_stored(tmp_path: Path) -> None:
    stored = {str(dtype): random(3, 5, dtype=dtype) for dtype in STORABLE}
    stored |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "long": random(100_000)}
    save_file(stored, tmp_path / "model.safetensors")
    found = zeros(stored)
    report = read_into(tmp_path, found)
    assert same(found, stored)
    nbytes = sum(tensor.nbytes for tensor in stored.values())
    assert (report.files, report.tensors, report.nbytes, report.read_nbytes) == (
        1,
        len(stored),
        nbytes,
        nbytes,
    )


def test_a_folder_that_engines_load_has_written_gives_each_rank_its_file(tmp_path: Path) -> None:
    for rank in range(2):
        save_file({"w": random(4, seed=rank)}, tmp_path / f"rank-{rank}.safetensors")
    found = {"w": torch.zeros(4)}
    read_into(tmp_path, found, rank=1)
    assert same(found, {"w": random(4, seed=1)})
    with pytest.raises(
        WeightsFileInvalid,
        match=r"tensor 'w' is in .*rank-0.safetensors and in .*rank-1.safetensors",
    ):
        read_into(tmp_path, found, rank=2)


@pytest.mark.parametrize(
    ("offsets", "shape"),
    [((2, 0), (3, 64)), ((0, 16), (8, 16)), ((3, 40), (2, 7)), ((0, 0), (8, 64))],
)
@pytest.mark.parametrize("columns", [64, 1 << 20])
def test_a_shard_is_cut_out_of_the_whole_tensor(
    tmp_path: Path,
    counted: list[int],
    offsets: tuple[int, int],
    shape: tuple[int, int],
    columns: int,
) -> None:
    """Short runs come with what lies between them, long ones do not."""
    factor = columns // 64
    offsets, shape = (offsets[0], offsets[1] * factor), (shape[0], shape[1] * factor)
    whole = random(8, columns, dtype=torch.float16)
    save_file(
        {"before": random(3), "w": whole, "other": random(1000)}, tmp_path / "model.safetensors"
    )
    found = {"w": torch.zeros(shape, dtype=torch.float16)}
    read_into(tmp_path, found, shards={"w": Shard((8, columns), offsets)})
    rows, cols = (slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
    assert same(found, {"w": whole[rows, cols].contiguous()})
    assert sum(counted) <= (whole.nbytes if columns == 64 else found["w"].nbytes)


def test_a_file_may_hold_just_the_part_that_is_wanted(tmp_path: Path) -> None:
    stored = {"w": random(2, 16)}
    save_file(stored, tmp_path / "mine.safetensors")
    found = zeros(stored)
    read_into(tmp_path / "mine.safetensors", found, shards={"w": Shard((8, 16), (4, 0))})
    assert same(found, stored)


def test_of_tensors_that_share_memory_the_file_need_hold_but_one(tmp_path: Path) -> None:
    save_file({"embed": random(9, 4)}, tmp_path / "model.safetensors")
    tied = torch.zeros(9, 4)
    read_into(tmp_path, {"embed": tied, "head": tied})
    assert same({"embed": tied}, {"embed": random(9, 4)})


def test_tensors_tied_here_may_be_stored_one_by_one_if_their_bytes_are_the_same(
    tmp_path: Path,
) -> None:
    """As `engines load --out` stores those that are tied in its source."""
    embed, tied = random(3000, 1000), torch.zeros(3000, 1000)
    save_file({"embed": embed}, tmp_path / "1.safetensors")
    save_file({"head": embed}, tmp_path / "2.safetensors")
    read_into(tmp_path, {"head": tied, "embed": tied})
    assert same({"embed": tied}, {"embed": embed})
    other = embed.clone()
    other.view(torch.uint8)[-1, -1] ^= 1
    save_file({"head": other}, tmp_path / "2.safetensors")
    words = "head: shares memory with embed here, but not in the same way in the source"
    with pytest.raises(WeightsMismatch, match=words):
        read_into(tmp_path, {"embed": tied, "head": tied})


def test_a_tensor_that_only_begins_where_a_stored_one_does_is_missed(tmp_path: Path) -> None:
    save_file({"q": random(4)}, tmp_path / "model.safetensors")
    qkv = torch.zeros(12)
    with pytest.raises(WeightsMismatch, match="qkv: here, but not in the source"):
        read_into(tmp_path, {"q": qkv[:4], "qkv": qkv})
    save_file({"qkv": random(12)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsMismatch, match="q: here, but not in the source"):
        read_into(tmp_path, {"q": qkv[:4], "qkv": qkv})


def test_views_of_one_memory_are_filled_at_once(tmp_path: Path, counted: list[int]) -> None:
    stored = {f"layer.{number}": random(100, seed=number) for number in range(10)}
    save_file(stored, tmp_path / "model.safetensors")
    memory = torch.zeros(1000)
    found = {f"layer.{number}": memory[100 * number : 100 * number + 100] for number in range(10)}
    read_into(tmp_path, found)
    assert same(found, stored)
    assert counted == [4000]


def test_every_difference_is_reported_in_one_error_before_a_byte_is_read(
    tmp_path: Path, counted: list[int]
) -> None:
    save_file(
        {"a": random(4), "b": random(4, 4), "c": random(4), "more": random(1)},
        tmp_path / "model.safetensors",
    )
    found = {
        "a": torch.zeros(5),
        "b": torch.zeros(2, 4),
        "c": torch.zeros(4, dtype=torch.float16),
        "d": torch.zeros(1),
    }
    with pytest.raises(WeightsMismatch) as caught:
        read_into(tmp_path, found, shards={"b": Shard((16, 4), (0, 0))})
    assert caught.value.details["problems"] == [
        "a: shape 4 in the source, 5 here",
        "b: part of 4x4 in the source, of 16x4 here",
        "c: dtype float32 in the source, float16 here",
        "d: here, but not in the source",
    ]
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert counted == []


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [cut_off, scramble, empty, remove])
def test_a_damaged_file_is_named_before_a_byte_is_read(
    tmp_path: Path, counted: list[int], damage: Callable[[Path], None]
) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        save_file({f"w{number}": random(100)}, path)
    damage(paths[1])
    with pytest.raises(WeightsFileInvalid, match=r"1\.safetensors"):
        read_into(paths, {"w0": torch.zeros(100), "w1": torch.zeros(100)})
    assert counted == []


def test_a_file_that_shrinks_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": random(1000)}, path)
    preadv = os.preadv

    def shrink(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(path, 2000)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrink)
    with pytest.raises(WeightsFileInvalid, match=r"model\.safetensors has become shorter"):
        read_into(path, {"w": torch.zeros(1000)})


def test_an_error_of_the_disk_is_reported_with_the_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": random(1000)}, path)

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        WeightsFileInvalid, match=r"model\.safetensors cannot be read: Input/output error"
    ):
        read_into(path, {"w": torch.zeros(1000)})


@pytest.fixture
def in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loader.files.disk, "_CHUNK_NBYTES", 4096)


@pytest.mark.usefixtures("in_small_chunks")
def test_progress_reaches_the_total(tmp_path: Path) -> None:
    stored = {"w": random(5000)}
    save_file(stored, tmp_path / "model.safetensors")
    seen: list[Progress] = []
    read_into(tmp_path, zeros(stored), progress=seen.append)
    assert len(seen) == 5
    assert seen[-1] == Progress(20_000, 20_000)
    assert [one.nbytes for one in seen] == sorted({one.nbytes for one in seen})


@pytest.mark.usefixtures("in_small_chunks")
@pytest.mark.parametrize("how", ["cancelled", "interrupted"])
def test_nothing_is_written_any_more_once_a_read_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    save_file({"w": random(1 << 20) + 1}, tmp_path / "model.safetensors")
    found, cancel, ended = {"w": torch.zeros(1 << 20)}, threading.Event(), threading.Event()
    preadv, shutdown = os.preadv, ThreadPoolExecutor.shutdown

    def end(progress: Progress) -> None:
        if how == "interrupted":
            raise KeyboardInterrupt
        cancel.set()

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset > 100_000:  # the disk is slow
            ended.wait(60)
        return preadv(descriptor, buffers, offset)

    def leave(pool: ThreadPoolExecutor, wait: bool = True) -> None:
        ended.set()
        shutdown(pool, wait)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", leave)
    with pytest.raises(Cancelled if how == "cancelled" else KeyboardInterrupt):
        read_into(tmp_path, found, progress=end, cancel=cancel)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("disk")]
    assert 0 < found["w"].count_nonzero() < 100_000
