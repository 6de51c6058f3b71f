"""What of a rank's memory has come while it is being filled: bytes, blocks and tensors, in whatever
order and pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.planning.arrivals import Arrivals, Blocks, Runs
from engine_loader.planning.boxes import Lines
from engine_loader.planning.reads import Span
from engine_registry import Manifest, Region
from engine_registry.schema.manifest import TensorEntry
from tests.support.builders import an_entry
from tests.support.meshes import lines_one_by_one


def tensor(name: str, addr: int, nbytes: int) -> TensorEntry:
    return an_entry(
        name, addr=addr, nbytes=nbytes, shape=(nbytes,), global_shape=(nbytes,), offsets=(0,)
    )


def span(dst_addr: int, nbytes: int, src_addr: int = 0) -> Span:
    return Span(dst_addr, nbytes, ((0, src_addr),))


def staged(*lines: Lines) -> Span:
    return Span(0, 1 << 20, ((0, 0),), lines)


# of the 16 bytes at 100
EVEN, ODD = (
    Lines(0, 100, 2, (4,), (4,), (4,)),
    Lines(2, 102, 2, (4,), (4,), (4,)),
)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12),
    st.integers(0, 60),
    st.integers(0, 20),
)
def test_runs_are_a_set_of_bytes(added: list[tuple[int, int]], start: int, nbytes: int) -> None:
    runs, held = Runs(), set[int]()
    for at, length in added:
        wanted = set(range(at, at + length))
        new = runs.add(at, at + length)
        assert {byte for begin, end in new for byte in range(begin, end)} == wanted - held
        held |= wanted
    assert {byte for begin, end in runs for byte in range(begin, end)} == held
    assert all(one[1] < other[0] for one, other in itertools.pairwise(runs))
    asked = set(range(start, start + nbytes))
    assert runs.within(start, start + nbytes) == len(asked & held)
    assert {
        byte for begin, end in runs.gaps(start, start + nbytes) for byte in range(begin, end)
    } == asked - held


def test_blocks_are_numbered_through_all_regions() -> None:
    blocks = Blocks([Region(100, 25), Region(200, 10)], 10)
    assert len(blocks) == 4
    assert [blocks.touched_by(*some) for some in [(100, 1), (109, 2), (120, 5), (200, 10)]] == [
        range(1),
        range(2),
        range(2, 3),
        range(3, 4),
    ]
    assert list(blocks.pieces(105, 20)) == [(0, 5), (1, 10), (2, 5)]
    for outside in [(99, 1), (120, 6), (124, 2), (210, 1)]:
        with pytest.raises(ValueError, match="lie in no region"):
            blocks.touched_by(*outside)


@st.composite
def loads(draw: st.DrawFn) -> tuple[Manifest, int, list[Span]]:
    """Tensors with gaps between them in two regions, tied ones among them; the size of blocks;
    reads that fill them.
    """
    entries: list[TensorEntry] = []
    spans: list[Span] = []
    regions: list[Region] = []
    at = 1000
    for _ in range(2):
        start = at
        for _ in range(draw(st.integers(1, 4))):
            nbytes = draw(st.integers(0, 40))
            name = f"t{len(entries)}"
            entries.append(tensor(name, at, nbytes))
            if draw(st.booleans()):
                entries.append(tensor(f"{name} again", at, nbytes))
            if nbytes >= 8 and draw(st.booleans()):  # every other pair of bytes, then the rest
                pairs = nbytes // 4
                even = Lines(0, at, 2, (pairs,), (4,), (4,))
                spans += [staged(even), staged(even.at(2, 2))]
                at += 4 * pairs
                if nbytes % 4:
                    spans.append(span(at, nbytes % 4))
                at += nbytes % 4
            elif nbytes:
                cut = draw(st.integers(0, nbytes))
                spans += [
                    some for some in (span(at, cut), span(at + cut, nbytes - cut)) if some.nbytes
                ]
                at += nbytes
            at += draw(st.integers(0, 12))
        regions.append(Region(start, max(1, at - start)))
        at += 100
    return (
        Manifest(tuple(entries), tuple(regions)),
        draw(st.integers(1, 64)),
        draw(st.permutations(spans)),
    )


def bytes_of(spans: Sequence[Span]) -> set[int]:
    return {
        byte
        for some in spans
        for lines in (some.lines or (Lines(0, some.dst_addr, some.nbytes),))
        for _, dst in lines_one_by_one(lines)
        for byte in range(dst, dst + lines.nbytes)
    }


@given(loads(), st.integers(0, 20))
def test_a_block_is_marked_when_all_its_wanted_bytes_have_come_and_never_before(
    load: tuple[Manifest, int, list[Span]], first: int
) -> None:
    manifest, block_nbytes, spans = load
    arrivals = Arrivals(manifest, block_nbytes)
    blocks = Blocks(manifest.regions, block_nbytes)
    wanted = {
        byte for entry in manifest.tensors for byte in range(entry.addr, entry.addr + entry.nbytes)
    }
    for some in spans[:first]:
        arrivals.add([some])
    came = bytes_of(spans[:first])
    for region in manifest.regions:
        for byte in range(region.addr, region.end):
            (number,) = blocks.touched_by(byte, 1)
            there = {
                one
                for one in wanted
                if region.addr <= one < region.end
                and blocks.touched_by(one, 1) == range(number, number + 1)
            }
            if arrivals.blocks[number]:
                assert there <= came
            else:  # what comes in pairs of bytes counts once the tensor is whole
                assert there
    assert arrivals.nbytes == len(came)
    rest = arrivals.missing(spans)
    assert bytes_of(rest) >= wanted - came
    names = {
        entry.name
        for entry in manifest.tensors
        if set(range(entry.addr, entry.addr + entry.nbytes)) <= came
    }
    assert set(arrivals.complete()) == names
    arrivals.add(rest)
    assert bytes(arrivals.blocks) == bytes([1]) * len(blocks)
    assert arrivals.nbytes == len(wanted)
    assert arrivals.missing(spans) == []


def test_what_has_come_is_not_read_again_and_the_rest_is_from_where_it_lies() -> None:
    arrivals = Arrivals(Manifest((tensor("a", 100, 16), tensor("b", 116, 8)), (Region(100, 24),)))
    arrivals.add([span(104, 4), span(112, 6)])
    assert arrivals.missing([span(100, 24, src_addr=500)]) == [
        span(100, 4, src_addr=500),
        span(108, 4, src_addr=508),
        span(118, 6, src_addr=518),
    ]
    assert arrivals.nbytes == 10


def test_of_a_tensor_that_comes_in_lines_all_is_read_again_unless_it_is_whole() -> None:
    arrivals = Arrivals(Manifest((tensor("a", 100, 16),), (Region(100, 16),)), 16)
    arrivals.add([staged(EVEN)])
    assert (arrivals.nbytes, arrivals.complete(), bytes(arrivals.blocks)) == (8, [], b"\0")
    assert arrivals.missing([staged(EVEN), staged(ODD)]) == [staged(EVEN), staged(ODD)]
    arrivals.add([staged(ODD)])
    # what came before has been forgotten: it is read anew
    assert (arrivals.nbytes, arrivals.complete()) == (
        8,
        [],
    )
    arrivals.add([staged(EVEN)])
    assert (arrivals.nbytes, arrivals.complete(), bytes(arrivals.blocks)) == (16, ["a"], b"\1")
    assert arrivals.missing([staged(EVEN), staged(ODD), span(100, 16)]) == []


@pytest.mark.parametrize(
    ("came", "complete"),
    [
        ([], ["none"]),
        ([span(100, 16)], ["a", "tied", "none"]),
        ([span(108, 24), span(100, 8)], ["a", "b", "tied", "none"]),
        ([span(100, 15), span(116, 100)], ["b", "c", "none"]),
        ([staged(EVEN)], ["none"]),
        ([staged(EVEN), staged(ODD)], ["a", "tied", "none"]),
        ([staged(EVEN), *[span(addr, 2) for addr in (102, 106, 110, 114)]], ["a", "tied", "none"]),
    ],
)
def test_the_tensors_that_are_whole_are_named(came: list[Span], complete: list[str]) -> None:
    tensors = (
        tensor("a", 100, 16),
        tensor("b", 116, 16),
        tensor("c", 200, 16),
        tensor("tied", 100, 16),
        tensor("none", 0, 0),
    )
    arrivals = Arrivals(Manifest(tensors, (Region(100, 116),)))
    arrivals.add(came)
    assert arrivals.complete() == complete
