"""The kernel, run by Triton's interpreter: it copies what the table says and nothing beside it, and
sums up what digests are made of.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_loader.digests import table as digests
from engine_loader.digests.table import digest_of_sums, digests_of
from engine_loader.engines.cuda_ipc import table
from engine_loader.engines.cuda_ipc.table import Blocks, Copy
from engine_loader.engines.cuda_ipc.tallies import Sums
from engine_loader.planning.boxes import Lines
from engine_registry import Region
from tests.support.host_gpus import KERNEL, HostGpus
from tests.support.interpreted import copy_of, interpreted

CPU = torch.device("cpu")
BLOCK_NBYTES = 128
ALGORITHM = "multilinear_64"


@contextmanager
def small(row_nbytes: int, tile: int = 32) -> Iterator[None]:
    """Rows, tiles and blocks are so small that little data takes several."""
    with ExitStack() as stack:
        for module, name, value in (
            (table, "_ROW_NBYTES", row_nbytes),
            (table, "BLOCK_NBYTES", BLOCK_NBYTES),
            (digests, "_BLOCK_WORDS", BLOCK_NBYTES // 4),
            (digests, "_factors", functools.cache(digests._factors.__wrapped__)),
            (copy_of(KERNEL), "_TILE", tile),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def memory(nbytes: int, seed: int) -> torch.Tensor:
    """Random bytes, none of which is zero, at an address of whole words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def launch(copies: Sequence[Copy], sums: Sums | None = None) -> None:
    assert HostGpus().launch(0, copies, sums).done()


row_limits = st.sampled_from([36, 100, 1 << 20])


def test_triton_is_as_it_was_after_a_kernel_was_interpreted() -> None:
    """So a process that has a GPU may compile kernels besides."""
    import triton.language as tl

    before = (tl.sum, tl.cdiv, tl.standard.sum, tl.load, tl.tensor.__add__, tl.tensor.to)
    src, dst = memory(64, seed=1), memory(64, seed=2)
    launch([Copy(src.data_ptr(), dst.data_ptr(), 0, 64)])
    after = (tl.sum, tl.cdiv, tl.standard.sum, tl.load, tl.tensor.__add__, tl.tensor.to)
    assert after == before
    assert "TRITON_INTERPRET" not in os.environ


# -- any copies
# --------------------------------------------------------------------------------------------------


@st.composite
def lines(draw: st.DrawFn) -> Lines:
    """A run, or runs at equal distances along one to three axes, of elements of 1, 2 or 4 bytes."""
    unit = draw(st.sampled_from([1, 2, 4]))
    nbytes = unit * draw(st.integers(1, 20))
    counts = draw(st.lists(st.integers(1, 3), max_size=3))
    steps: list[list[int]] = [[], []]
    extents = [nbytes, nbytes]
    for count in reversed(counts):
        for side in range(2):
            step = extents[side] + unit * draw(st.sampled_from([0, 0, 1, 5]))
            steps[side].insert(0, step)
            extents[side] += (count - 1) * step
    return Lines(0, 0, nbytes, tuple(counts), tuple(steps[0]), tuple(steps[1]))


@st.composite
def straight(draw: st.DrawFn) -> Lines:
    return Lines(0, 0, draw(st.integers(1, 15) | st.integers(16, 400)))


@st.composite
def placed(draw: st.DrawFn) -> list[Lines]:
    """Any copies, one behind the other on both sides, off a word by 0 to 3 bytes on either."""
    found = []
    src = dst = 0
    for some in draw(st.lists(lines() | straight(), min_size=1, max_size=6)):
        src += draw(st.integers(0, 3))
        dst += draw(st.integers(0, 3))
        found.append(some.at(src, dst))
        src += some.extent
        dst += some.dst_extent
    return found


def view(of: torch.Tensor, start: int, some: Lines, steps: Sequence[int]) -> torch.Tensor:
    return of.as_strided((*some.counts, some.nbytes), (*steps, 1), start)


@settings(max_examples=50)
@given(placed(), st.sampled_from([12, 100, 1 << 20]))
def test_one_launch_makes_any_copies_and_touches_nothing_beside_them(
    some: list[Lines], row_nbytes: int
) -> None:
    src = memory(some[-1].src + some[-1].extent + 8, seed=1)
    dst = memory(some[-1].dst + some[-1].dst_extent + 8, seed=2)
    wanted = dst.clone()
    for each in some:
        view(wanted, each.dst, each, each.dst_steps).copy_(
            view(src, each.src, each, each.src_steps)
        )
    copies = []
    for each in some:
        from_, to = src.data_ptr() + each.src, dst.data_ptr() + each.dst
        if each.counts:
            copies.append(Copy(from_, to, from_, each.extent, each._replace(src=0, dst=0)))
        else:
            copies.append(Copy(from_, to, from_, each.nbytes))
    with small(row_nbytes):
        launch(copies)
    assert torch.equal(dst, wanted)


@pytest.mark.parametrize(("src_off", "dst_off"), [(0, 0), (1, 1), (3, 3), (0, 1), (2, 0), (3, 1)])
def test_real_rows_bring_bytes_of_any_alignment(src_off: int, dst_off: int) -> None:
    for nbytes in (1, 3, 15, 16, 17, 1000, (1 << 20) + 5):
        src, dst = memory(nbytes + 8, seed=1), memory(nbytes + 8, seed=2)
        wanted = dst.clone()
        wanted[dst_off : dst_off + nbytes] = src[src_off : src_off + nbytes]
        launch([Copy(src.data_ptr() + src_off, dst.data_ptr() + dst_off, 0, nbytes)])
        assert torch.equal(dst, wanted)


# -- sums
# --------------------------------------------------------------------------------------------------


class Source:
    """Pieces in its memory, one behind the other or with words between them that belong to none."""

    def __init__(self, sizes: Sequence[int], gaps: Sequence[int]) -> None:
        begins, end = [], 0
        for nbytes, gap in zip(sizes, gaps, strict=True):
            begins.append(end + gap)
            end += gap + nbytes
        self.memory = memory(end, seed=3)
        self.parts = [
            self.memory[begin : begin + nbytes] for begin, nbytes in zip(begins, sizes, strict=True)
        ]
        # the source has them elsewhere than we
        self.ahead = 1 << 40
        self.pieces = [
            Region(self.memory.data_ptr() + self.ahead + begin, nbytes)
            for begin, nbytes in zip(begins, sizes, strict=True)
        ]

    def copy(self, start: int, dst: int, nbytes: int, some: Lines | None = None) -> Copy:
        src = self.memory.data_ptr() + start
        return Copy(src, dst, src + self.ahead, nbytes, some)

    def tallied(self, sums: Sums) -> list[tuple[int, bytes]]:
        """Of each piece: how many bytes were summed up, and their digest if they were all."""
        words, nbytes = sums.sums()
        found = []
        for number, (first, piece) in enumerate(zip(sums.firsts, self.pieces, strict=True)):
            last = sums.firsts[number + 1] if number + 1 < len(self.pieces) else len(words)
            found.append(
                (
                    int(nbytes[first:last].sum()),
                    digest_of_sums(piece.nbytes, words[first:last].tobytes()),
                )
            )
        return found

    @property
    def wanted(self) -> list[tuple[int, bytes]]:
        return [(part.numel(), digests_of({0: part}, ALGORITHM)[0]) for part in self.parts]


@st.composite
def sources(draw: st.DrawFn) -> Source:
    sizes = draw(st.lists(st.integers(1, 3 * BLOCK_NBYTES // 4), min_size=1, max_size=3))
    gaps = [draw(st.sampled_from([0, 0, 4, 12])) for _ in sizes]
    return Source([4 * size for size in sizes], gaps)


def sums_of(source: Source) -> Sums:
    return Sums(Blocks(source.pieces), CPU, lambda: None)


@settings(max_examples=25)
@given(sources(), row_limits, st.data())
def test_reads_cut_at_any_word_sum_up_to_the_digests_in_whatever_order_they_come(
    source: Source, row_nbytes: int, data: st.DataObject
) -> None:
    end = source.memory.numel()
    cuts = {4 * cut for cut in data.draw(st.sets(st.integers(1, end // 4), max_size=6))}
    reads = data.draw(st.permutations(list(itertools.pairwise(sorted({0, end} | cuts)))))
    dst = torch.zeros_like(source.memory)
    with small(row_nbytes):
        sums = sums_of(source)
        for some in (reads[: len(reads) // 2], reads[len(reads) // 2 :]):
            launch(
                [source.copy(start, dst.data_ptr() + start, stop - start) for start, stop in some],
                sums,
            )
        assert torch.equal(dst, source.memory)
        assert source.tallied(sums) == source.wanted


@settings(max_examples=25)
@given(sources(), row_limits, st.integers(0, 3), st.data())
def test_where_reads_cut_words_or_bytes_come_apart_no_sum_says_that_it_is_of_all_and_is_wrong(
    source: Source, row_nbytes: int, off: int, data: st.DataObject
) -> None:
    end = source.memory.numel()
    cuts = data.draw(st.sets(st.integers(1, end), max_size=4))
    reads = list(itertools.pairwise(sorted({0, end} | cuts)))
    dst = torch.zeros(end + off, dtype=torch.uint8)
    with small(row_nbytes):
        sums = sums_of(source)
        launch(
            [
                source.copy(start, dst.data_ptr() + off + start, stop - start)
                for start, stop in reads
            ],
            sums,
        )
        assert torch.equal(dst[off:], source.memory)
        for (count, digest), (nbytes, right) in zip(
            source.tallied(sums), source.wanted, strict=True
        ):
            assert count <= nbytes
            if count == nbytes:
                assert digest == right


@settings(max_examples=25)
@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([0, 4, 20]),
    row_limits,
)
def test_what_lies_in_a_row_at_the_source_is_summed_up_though_it_goes_to_runs_here(
    words: int, runs: int, planes: int, gap: int, row_nbytes: int
) -> None:
    width = 4 * words
    source = Source([width * runs * planes], [4])
    step = width + gap
    plane = runs * step + gap
    dst = torch.zeros(planes * plane, dtype=torch.uint8)
    some = Lines(0, 0, width, (planes, runs), (runs * width, width), (plane, step))
    with small(row_nbytes):
        sums = sums_of(source)
        launch([source.copy(4, dst.data_ptr(), width * runs * planes, some)], sums)
        assert source.tallied(sums) == source.wanted
    came = view(dst, 0, some, some.dst_steps)
    assert torch.equal(came.flatten(), source.parts[0])
    assert int(dst.count_nonzero()) == source.parts[0].numel()


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(2, 5), row_limits)
def test_runs_that_come_apart_at_the_source_are_in_no_sum(
    words: int, runs: int, row_nbytes: int
) -> None:
    width = 4 * words
    source = Source([2 * width * runs], [0])
    dst = torch.zeros(width * runs, dtype=torch.uint8)
    some = Lines(0, 0, width, (runs,), (2 * width,), (width,))
    with small(row_nbytes):
        sums = sums_of(source)
        launch([source.copy(0, dst.data_ptr(), some.extent, some)], sums)
        assert torch.equal(dst, source.memory.view(runs, 2 * width)[:, :width].flatten())
        assert source.tallied(sums)[0][0] == 0


def test_bytes_that_come_twice_count_twice() -> None:
    source = Source([64, 200], [0, 4])
    dst = torch.zeros_like(source.memory)
    whole = source.copy(0, dst.data_ptr(), source.memory.numel())
    with small(256):
        sums = sums_of(source)
        launch([whole], sums)
        launch([source.copy(128, dst.data_ptr() + 128, 40)], sums)
        assert [count for count, _ in source.tallied(sums)] == [64, 240]
        assert source.tallied(sums)[0] == source.wanted[0]


def test_real_blocks_have_the_sums_of_digests() -> None:
    assert 4 * digests._BLOCK_WORDS == table.BLOCK_NBYTES
    source = Source([4, (4 << 20) - 4, (4 << 20) + 4], [0, 0, 4])
    dst = torch.zeros_like(source.memory)
    sums = sums_of(source)
    launch([source.copy(0, dst.data_ptr(), source.memory.numel())], sums)
    assert torch.equal(dst, source.memory)
    assert source.tallied(sums) == source.wanted


# -- the kernel of digests
# --------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=4))
def test_the_kernel_of_digests_sums_up_blocks_as_the_host_does(counts: list[int]) -> None:
    parts = [memory(4 * count, seed=count) for count in counts]
    addrs = np.array([part.data_ptr() for part in parts])
    where, words = torch.from_numpy(np.stack([addrs, np.array(counts)]))
    sums = torch.zeros_like(where)
    kernel = "engine_loader.digests.kernel"
    with interpreted(kernel) as module:
        module._sum_blocks[len(parts), 3](where, words, sums, TILE=32, PARTS=3)
    for part, total in zip(parts, sums.numpy(), strict=True):
        assert digest_of_sums(part.numel(), total.tobytes()) == digests_of({0: part}, ALGORITHM)[0]
