"""Of what a plan brings, blocks that are here already are left out: the rest, and nothing else of
these blocks, is read.
"""

from __future__ import annotations

import bisect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.planning.arrivals import Arrivals
from engine_loader.planning.boxes import Lines
from engine_loader.planning.held import Block, DigestedMemory, blocks_of
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import plan
from engine_loader.planning.reads import Costs, Span
from engine_registry import Manifest, TensorEntry
from engine_registry.schema.manifest import DigestTable
from tests.support.builders import a_manifest, an_entry

SRC, DST = 1 << 20, 1 << 30
BLOCK_NBYTES = 10


def digested(*entries: TensorEntry, block_nbytes: int = BLOCK_NBYTES) -> Manifest:
    some = a_manifest(*entries)
    return Manifest(some.tensors, some.regions, DigestTable("xxh3_128", 64, block_nbytes))


def blocks(manifest: Manifest, *spans: Span) -> list[Block]:
    return blocks_of(spans, {0: DigestedMemory(manifest)}).get(0, [])


def test_a_long_tensor_is_compared_block_by_block_and_a_short_one_as_it_is() -> None:
    some = digested(an_entry("short", SRC, 8), an_entry("long", SRC + 8, 24))
    span = Span(DST, 32, ((0, SRC),))
    # the digests of "long" and "short" come first, in this order
    assert blocks(some, span) == [
        (1, DST, 8),
        (2, DST + 8, 10),
        (3, DST + 18, 10),
        (4, DST + 28, 4),
    ]


def test_without_digests_of_blocks_whole_tensors_are_compared() -> None:
    some = digested(an_entry("short", SRC, 8), an_entry("long", SRC + 8, 24), block_nbytes=0)
    assert blocks(some, Span(DST, 32, ((0, SRC),))) == [(1, DST, 8), (0, DST + 8, 24)]


def test_blocks_that_come_only_in_part_are_not_compared() -> None:
    some = digested(an_entry("w", SRC, 40))
    assert blocks(some, Span(DST, 25, ((0, SRC + 9),))) == [(2, DST + 1, 10), (3, DST + 11, 10)]
    assert blocks(some, Span(DST, 11, ((0, SRC + 5),))) == []
    assert blocks(some, Span(DST, 9, ((0, SRC + 40),))) == []
    assert blocks(some, Span(DST, 9, ((0, SRC - 9),))) == []


def test_of_tensors_that_share_memory_the_longest_is_compared() -> None:
    some = digested(an_entry("view", SRC + 10, 10), an_entry("all", SRC, 20))
    assert blocks(some, Span(DST, 20, ((0, SRC),))) == [(2, DST, 10), (3, DST + 10, 10)]


def test_single_runs_are_compared_and_runs_at_equal_distances_are_not() -> None:
    some = digested(an_entry("a", SRC, 8), an_entry("b", SRC + 20, 8))
    lines = (Lines(0, DST + 4, 8), Lines(20, DST + 64, 8))
    assert blocks(some, Span(0, 28, ((0, SRC),), lines)) == [(0, DST + 4, 8), (1, DST + 64, 8)]
    assert blocks(some, Span(0, 28, ((0, SRC),), (Lines(0, DST, 2, (3,), (4,), (2,)),))) == []


def test_the_first_source_that_has_digests_is_asked() -> None:
    some = digested(an_entry("a", SRC, 8))
    span = Span(DST, 8, ((0, 5), (1, SRC), (2, SRC)))
    memories = {1: DigestedMemory(some), 2: DigestedMemory(some)}
    assert blocks_of([span], memories) == {1: [Block(0, DST, 8)]}
    assert blocks_of([span], {}) == {}


@pytest.mark.parametrize("scattered", [False, True])
@given(st.data())
def test_what_is_read_is_all_but_the_blocks_that_are_equal(
    scattered: bool, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 45), min_size=1, max_size=6))
    addrs: dict[int, list[int]] = {SRC: [], DST: []}
    for begin, places in addrs.items():
        for size in sizes:
            places.append(begin)
            begin += size + data.draw(st.sampled_from([0, 0, 7]))
    entries = {
        begin: [
            an_entry(f"t{number}", addr, size, dtype="uint8", shape=(size,))
            for number, (addr, size) in enumerate(zip(places, sizes, strict=True))
        ]
        for begin, places in addrs.items()
    }
    theirs, ours = digested(*entries[SRC]), a_manifest(*entries[DST])
    spans = plan([Origin("a", theirs)], ours, Costs(scattered=scattered))
    wanted = {
        entry.name: data.draw(st.binary(min_size=n, max_size=n))
        for entry, n in zip(entries[SRC], sizes, strict=True)
    }
    memory = {entry.addr: bytearray(_changed(data, wanted[entry.name])) for entry in entries[DST]}
    source = {entry.addr: wanted[entry.name] for entry in entries[SRC]}
    held = Arrivals(ours)
    equal = 0
    for block in blocks_of(spans, {0: DigestedMemory(theirs)})[0]:
        name, ahead = _place(entries[DST], block.addr)
        there = memory[_entry(entries[DST], name).addr][ahead : ahead + block.nbytes]
        if there == wanted[name][ahead : ahead + block.nbytes]:
            held.add([Span(block.addr, block.nbytes, ())])
            equal += block.nbytes
    rest = held.missing(spans)
    assert sum(span.payload for span in rest) == sum(sizes) - equal
    for span in rest:
        for src, dst, nbytes in [(some.src, some.dst, some.nbytes) for some in span.lines] or [
            (0, span.dst_addr, span.nbytes)
        ]:
            for byte in range(nbytes):
                _put(memory, dst + byte, _get(source, span.srcs[0][1] + src + byte))
    for entry in entries[DST]:
        assert memory[entry.addr] == wanted[entry.name]
    blocks_in_all = sum(-(-size // BLOCK_NBYTES) if size > BLOCK_NBYTES else 1 for size in sizes)
    assert len(blocks_of(spans, {0: DigestedMemory(theirs)})[0]) == blocks_in_all


def _changed(data: st.DataObject, content: bytes) -> bytes:
    """Some of its bytes are others."""
    other = bytearray(content)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=2)):
        other[place] ^= 1
    return bytes(other)


def _entry(entries: list[TensorEntry], name: str) -> TensorEntry:
    return next(entry for entry in entries if entry.name == name)


def _place(entries: list[TensorEntry], addr: int) -> tuple[str, int]:
    entry = entries[bisect.bisect_right([entry.addr for entry in entries], addr) - 1]
    return entry.name, addr - entry.addr


def _get(memory: dict[int, bytes], addr: int) -> int:
    begin = max(each for each in memory if each <= addr)
    return memory[begin][addr - begin]


def _put(memory: dict[int, bytearray], addr: int, byte: int) -> None:
    begin = max(each for each in memory if each <= addr)
    memory[begin][addr - begin] = byte
