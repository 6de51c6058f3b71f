"""Planning: every difference in one error, every byte written once, every read inside one region on either side."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.errors import WeightsMismatch
from loader.plan import ReadOp, Span, alternates, check_coverage, coalesce, complete_tensors, differences, plan
from registry import Manifest, Region, TensorEntry
from tests.builders import a_manifest, an_entry

FLOAT = {"dtype": "float32", "shape": (2, 3), "global_shape": (2, 3), "offsets": (0, 0), "nbytes": 24}


def op(src_addr: int, dst_addr: int, nbytes: int) -> ReadOp:
    return ReadOp("a/0", src_addr, dst_addr, nbytes)


def span(dst_addr: int, nbytes: int) -> Span:
    return Span(dst_addr, nbytes, (0,))


# -- differences -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("src", "dst", "line"),
    [
        ({"dtype": "float16"}, {"dtype": "bfloat16"}, "w: dtype float16 in the source, bfloat16 here"),
        (FLOAT, {**FLOAT, "shape": (3, 2), "global_shape": (3, 2)}, "w: shape 2x3 in the source, 3x2 here"),
        (FLOAT, {**FLOAT, "shape": (6,), "global_shape": (6,), "offsets": (0,)}, "w: shape 2x3 in the source, 6 here"),
        ({"nbytes": 1}, {"nbytes": 1, "shape": ()}, "w: shape 1 in the source, scalar here"),
        (
            {**FLOAT, "opaque": False, "global_shape": (4, 3)},
            {**FLOAT, "opaque": False, "global_shape": (4, 3), "offsets": (2, 0)},
            "w: box at [0, 0] of 4x3 in the source, box at [2, 0] of 4x3 here",
        ),
        (
            {**FLOAT, "opaque": False, "global_shape": (4, 3)},
            {**FLOAT, "opaque": False},
            "w: box at [0, 0] of 4x3 in the source, box at [0, 0] of 2x3 here",
        ),
        (
            FLOAT,
            {**FLOAT, "opaque": False},
            "w: no statement of what it is part of in the source, box at [0, 0] of 2x3 here",
        ),
        ({"nbytes": 16, "shape": (8,)}, {"nbytes": 8, "shape": (8,)}, "w: 16 bytes in the source, 8 here"),
    ],
)
def test_tensors_of_one_name_that_are_not_alike_differ_in_one_line(src: dict[str, Any], dst: dict[str, Any], line: str) -> None:
    assert differences([an_entry(**src)], [an_entry(**dst)]) == [line]


def test_equal_tensors_do_not_differ_wherever_they_lie_and_in_whatever_order() -> None:
    entries = [an_entry("a", addr=1), an_entry("b", addr=2), an_entry("empty", addr=0, nbytes=0)]
    moved = [replace(entry, addr=entry.addr + 1000) for entry in reversed(entries)]
    assert differences(entries, moved) == []


def test_all_differences_come_in_one_error_before_there_is_a_plan() -> None:
    src = a_manifest(an_entry("gone"), an_entry("both", dtype="float16"), an_entry("shape", shape=(4, 4)))
    dst = a_manifest(an_entry("both", dtype="bfloat16"), an_entry("new"), an_entry("shape", shape=(2, 8)))
    with pytest.raises(WeightsMismatch, match=r"the weights of a/0 do not match \(4 differences\), nothing was read: ") as caught:
        plan("a/0", src, dst)
    assert caught.value.details == {
        "source": "a/0",
        "problems": [
            "gone: in the source, but not here",
            "both: dtype float16 in the source, bfloat16 here",
            "new: here, but not in the source",
            "shape: shape 4x4 in the source, 2x8 here",
        ],
    }
    assert all(problem in str(caught.value) for problem in caught.value.details["problems"])


def test_a_long_list_of_differences_is_cut_in_the_message_and_whole_in_the_details() -> None:
    src = a_manifest(*[an_entry(f"t{number}") for number in range(25)])
    with pytest.raises(WeightsMismatch, match=r"\(25 differences\).*and 15 more$") as caught:
        plan("a/0", src, Manifest((), ()))
    assert len(caught.value.details["problems"]) == 25


# -- plans -----------------------------------------------------------------------------------------------------------------------


def test_tensors_that_follow_each_other_on_both_sides_become_one_read() -> None:
    names = ("a", "b", "c")
    src = a_manifest(*[an_entry(name, 1000 + 16 * at) for at, name in enumerate(names)], regions=(Region(1000, 48),))
    dst = a_manifest(*[an_entry(name, 5000 + 16 * at) for at, name in enumerate(names)], regions=(Region(5000, 48),))
    assert plan("a/0", src, dst) == (op(1000, 5000, 48),)


@pytest.mark.parametrize("cut_side", ["src", "dst"])
def test_no_read_reaches_over_the_end_of_a_region_although_the_next_begins_there(cut_side: str) -> None:
    whole, cut = [(0, 48)], [(0, 32), (32, 16)]
    sides = {
        side: a_manifest(
            *[an_entry(name, base + 16 * at) for at, name in enumerate(("a", "b", "c"))],
            regions=tuple(Region(base + start, nbytes) for start, nbytes in (cut if side == cut_side else whole)),
        )
        for side, base in (("src", 1000), ("dst", 5000))
    }
    assert plan("a/0", sides["src"], sides["dst"]) == (op(1000, 5000, 32), op(1032, 5032, 16))


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(op(17, 116, 16), id="a gap in the source"),
        pytest.param(op(16, 117, 16), id="a gap in the destination"),
        pytest.param(op(0, 116, 16), id="the same source twice"),
        pytest.param(ReadOp("b/0", 16, 116, 16), id="another source"),
    ],
)
def test_reads_that_do_not_follow_each_other_stay_two(second: ReadOp) -> None:
    first = op(0, 100, 16)
    assert coalesce([first, second], [Region(0, 64)], [Region(100, 64)]) == [first, second]


def test_reads_outside_of_all_regions_are_never_joined() -> None:
    ops = [op(0, 100, 16), op(16, 116, 16)]
    assert coalesce(ops, [], []) == coalesce(ops, [Region(0, 64)], []) == coalesce(ops, [], [Region(100, 64)]) == ops


def test_tensors_tied_on_both_sides_are_read_once() -> None:
    src = a_manifest(an_entry("embed", 1000), an_entry("head", 1000), regions=(Region(1000, 16),))
    dst = a_manifest(an_entry("embed", 5000), an_entry("head", 5000), regions=(Region(5000, 16),))
    assert plan("a/0", src, dst) == (op(1000, 5000, 16),)


def test_tensors_tied_in_the_source_only_are_read_twice() -> None:
    src = a_manifest(an_entry("embed", 1000), an_entry("head", 1000), regions=(Region(1000, 16),))
    dst = a_manifest(an_entry("embed", 5000), an_entry("head", 6000))
    assert plan("a/0", src, dst) == (op(1000, 5000, 16), op(1000, 6000, 16))


def test_views_of_each_other_on_both_sides_are_read_once() -> None:
    fused = (an_entry("v", 1032, 16), an_entry("qkv", 1000, 48), an_entry("q", 1000, 16), an_entry("tail", 1040, 24))
    moved = tuple(replace(entry, addr=entry.addr + 4000) for entry in fused)
    ops = plan("a/0", a_manifest(*fused, regions=(Region(1000, 64),)), a_manifest(*moved, regions=(Region(5000, 64),)))
    assert ops == (op(1000, 5000, 64),)


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        pytest.param([(1000, 16), (2000, 16)], [(5000, 16), (5000, 16)], id="tied here only"),
        pytest.param([(1000, 16), (2000, 16)], [(5000, 16), (5008, 16)], id="overlapping here only"),
        pytest.param([(1000, 16), (1004, 8)], [(5000, 16), (5008, 8)], id="overlapping otherwise"),
        pytest.param([(1000, 16), (2000, 8)], [(5000, 16), (5000, 8)], id="a view here only"),
    ],
)
def test_tensors_that_share_memory_here_but_not_so_in_the_source_are_refused(
    src: list[tuple[int, int]], dst: list[tuple[int, int]]
) -> None:
    sides = [
        a_manifest(*itertools.starmap(an_entry, ((name, *place) for name, place in zip("ab", side, strict=True))))
        for side in (src, dst)
    ]
    with pytest.raises(WeightsMismatch) as caught:
        plan("a/0", *sides)
    assert caught.value.details["problems"] == ["b: shares memory with a here, but not in the same way in the source"]


def test_tensors_without_bytes_need_no_read() -> None:
    empty = an_entry("empty", addr=0, nbytes=0, shape=(0, 7))
    assert plan("a/0", a_manifest(empty), a_manifest(empty)) == ()
    both = (an_entry("a", 1000), empty)
    assert plan("a/0", a_manifest(*both), a_manifest(*both)) == (op(1000, 1000, 16),)


def test_nothing_wanted_of_nothing_is_an_empty_plan() -> None:
    assert plan("a/0", Manifest((), ()), Manifest((), ())) == ()


# -- coverage --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ops",
    [
        pytest.param([], id="nothing"),
        pytest.param([op(0, 100, 8)], id="too short"),
        pytest.param([op(0, 100, 17)], id="too long"),
        pytest.param([op(0, 99, 16)], id="too early"),
        pytest.param([op(0, 100, 16), op(0, 100, 16)], id="twice"),
        pytest.param([op(0, 100, 10), op(10, 109, 7)], id="one byte twice"),
        pytest.param([op(0, 100, 7), op(8, 108, 8)], id="a gap"),
        pytest.param([op(0, 100, 16), op(0, 300, 1)], id="elsewhere as well"),
    ],
)
def test_a_plan_that_does_not_write_every_byte_once_is_refused(ops: list[ReadOp]) -> None:
    with pytest.raises(ValueError, match="the plan "):
        check_coverage(ops, [an_entry(addr=100)])


def test_a_tensor_may_be_written_in_pieces() -> None:
    check_coverage([op(900, 100, 5), op(0, 105, 11)], [an_entry(addr=100)])


def test_tensors_are_complete_when_all_their_bytes_are_written_in_whatever_pieces() -> None:
    tensors = [an_entry("a", 100), an_entry("b", 116), an_entry("c", 200), an_entry("tied", 100), an_entry("none", 0, 0)]
    assert complete_tensors([], tensors) == ["none"]
    assert complete_tensors([span(100, 16)], tensors) == ["a", "tied", "none"]
    assert complete_tensors([span(108, 24), span(100, 8)], tensors) == ["a", "b", "tied", "none"]
    assert complete_tensors([span(100, 15), span(116, 100)], tensors) == ["b", "c", "none"]
    assert complete_tensors([span(201, 15)], tensors) == ["none"]


# -- several sources -------------------------------------------------------------------------------------------------------------


@st.composite
def plans_for_one_destination(draw: st.DrawFn) -> list[list[ReadOp]]:
    """The same destination in pieces, which each source cuts further where it likes, and holds where it likes."""
    ends = [0]
    pieces = []
    for _ in range(draw(st.integers(0, 5))):
        start = ends[-1] + draw(st.integers(0, 3))
        ends.append(start + draw(st.integers(1, 20)))
        pieces.append((start, ends[-1]))
    plans = []
    for source in range(draw(st.integers(1, 4))):
        ops = []
        for start, end in pieces:
            cuts = sorted(draw(st.sets(st.integers(start, end), max_size=4)) | {start, end})
            for low, high in itertools.pairwise(cuts):
                ops.append(ReadOp(f"s{source}", draw(st.integers(0, 1_000)), low, high - low))
        plans.append(ops)
    return plans


@given(plans_for_one_destination())
def test_spans_hold_the_plans_of_all_sources_cut_only_where_one_of_them_is(plans: list[list[ReadOp]]) -> None:
    spans = alternates(plans)
    assert {span.dst_addr for span in spans} == {op.dst_addr for ops in plans for op in ops}
    for number, ops in enumerate(plans):
        where = {at: op.src_addr + at - op.dst_addr for op in ops for at in range(op.dst_addr, op.dst_addr + op.nbytes)}
        read = [span.read("s", number) for span in spans]
        assert {at: op.src_addr + at - op.dst_addr for op in read for at in range(op.dst_addr, op.dst_addr + op.nbytes)} == where


def test_the_plan_of_one_source_is_taken_as_it_is() -> None:
    assert alternates([[op(1, 100, 8), op(50, 200, 4)]]) == (Span(100, 8, (1,)), Span(200, 4, (50,)))


@pytest.mark.parametrize("other", [[], [op(0, 100, 7)], [op(0, 100, 9)], [op(0, 101, 8)], [op(0, 100, 8), op(0, 200, 1)]])
def test_plans_that_fill_different_memory_are_no_alternates(other: list[ReadOp]) -> None:
    with pytest.raises(ValueError, match="do not fill the same memory"):
        alternates([[op(0, 100, 8)], other])


# -- any layout ------------------------------------------------------------------------------------------------------------------

SRC_BASE, DST_BASE = 1_000, 50_000


@dataclass(frozen=True)
class Layout:
    """Two memories with the same tensors in them, each its own way."""

    src: Manifest
    dst: Manifest
    memory: bytes  # the source's

    def of_source(self, entry: TensorEntry) -> bytes:
        origin = next(other for other in self.src.tensors if other.name == entry.name)
        return self.memory[origin.addr - SRC_BASE : origin.addr - SRC_BASE + origin.nbytes]


@st.composite
def memories(draw: st.DrawFn, base: int, sizes: dict[str, int], views: dict[str, tuple[str, int]]) -> Manifest:
    """The tensors in any order, with gaps or without, in regions that may touch each other; views lie inside another tensor."""
    places: dict[str, int] = {}
    regions: list[Region] = []
    start = end = base
    for name in draw(st.permutations([name for name in sizes if name not in views])):
        if end > start and draw(st.integers(0, 3)) == 0:
            regions.append(Region(start, end - start))
            start = end = end + draw(st.sampled_from([0, 0, 5]))
        end += draw(st.sampled_from([0, 0, 0, 3]))
        places[name] = end
        end += sizes[name]
    if end > start:
        regions.append(Region(start, end - start))
    places |= {name: places[whole] + offset for name, (whole, offset) in views.items()}
    return Manifest(tuple(an_entry(name, places[name] if sizes[name] else 0, sizes[name]) for name in sizes), tuple(regions))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = {f"t{number}": draw(st.integers(0, 40)) for number in range(draw(st.integers(0, 8)))}
    src_views: dict[str, tuple[str, int]] = {}
    for name in sizes:
        wholes = [other for other in sizes if other < name and sizes[other] >= sizes[name] and other not in src_views]
        is_view = draw(st.booleans())
        if wholes and is_view:
            whole = draw(st.sampled_from(wholes))
            src_views[name] = (whole, draw(st.integers(0, sizes[whole] - sizes[name])))
    dst_views = {}
    for name, view in src_views.items():
        if draw(st.booleans()):
            dst_views[name] = view
    src = draw(memories(SRC_BASE, sizes, src_views))
    end = max((region.end for region in src.regions), default=SRC_BASE)
    return Layout(
        src, draw(memories(DST_BASE, sizes, dst_views)), draw(st.randoms(use_true_random=False)).randbytes(end - SRC_BASE)
    )


def inside_one(regions: tuple[Region, ...], addr: int, nbytes: int) -> bool:
    return any(region.addr <= addr and addr + nbytes <= region.end for region in regions)


@given(layouts())
def test_carrying_out_the_plan_of_any_two_layouts_reproduces_every_tensor_and_touches_nothing_else(layout: Layout) -> None:
    end = max((region.end for region in layout.dst.regions), default=DST_BASE)
    memory, written = bytearray(end - DST_BASE), bytearray(end - DST_BASE)
    for read in plan("a/0", layout.src, layout.dst):
        assert inside_one(layout.src.regions, read.src_addr, read.nbytes)
        assert inside_one(layout.dst.regions, read.dst_addr, read.nbytes)
        src, dst = read.src_addr - SRC_BASE, read.dst_addr - DST_BASE
        memory[dst : dst + read.nbytes] = layout.memory[src : src + read.nbytes]
        for at in range(dst, dst + read.nbytes):
            written[at] += 1
    wanted = bytearray(len(memory))
    for entry in layout.dst.tensors:
        if entry.nbytes:
            at = entry.addr - DST_BASE
            assert memory[at : at + entry.nbytes] == layout.of_source(entry)
            wanted[at : at + entry.nbytes] = b"\1" * entry.nbytes
    assert written == wanted


@given(layouts())
def test_reads_come_by_destination_and_no_two_could_be_one(layout: Layout) -> None:
    ops = plan("a/0", layout.src, layout.dst)
    for first, second in itertools.pairwise(ops):
        assert first.dst_addr + first.nbytes <= second.dst_addr
        follows = (first.src_addr + first.nbytes, first.dst_addr + first.nbytes) == (second.src_addr, second.dst_addr)
        both = first.nbytes + second.nbytes
        fits = inside_one(layout.src.regions, first.src_addr, both) and inside_one(layout.dst.regions, first.dst_addr, both)
        assert not (follows and fits)


@given(layouts().filter(lambda layout: any(entry.nbytes for entry in layout.dst.tensors)), st.data())
def test_any_plan_with_one_read_dropped_doubled_shifted_or_resized_fails_the_proof(layout: Layout, data: st.DataObject) -> None:
    ops = list(plan("a/0", layout.src, layout.dst))
    place = data.draw(st.integers(0, len(ops) - 1))
    victim = ops[place]
    by = data.draw(st.integers(1, 50)) * data.draw(st.sampled_from([-1, 1]))
    shifted = replace(victim, dst_addr=victim.dst_addr + by)
    resized = replace(victim, nbytes=victim.nbytes + by if victim.nbytes + by > 0 else victim.nbytes + 1)
    check_coverage(ops, layout.dst.tensors)
    for instead in ([], [victim, victim], [shifted], [resized]):
        wrong = sorted([*ops[:place], *instead, *ops[place + 1 :]], key=lambda op: op.dst_addr)
        with pytest.raises(ValueError, match="the plan "):
            check_coverage(wrong, layout.dst.tensors)
