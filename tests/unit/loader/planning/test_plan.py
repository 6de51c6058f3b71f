"""Planning: every difference in one error, every byte written once, every read inside one region on
either side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.errors import WeightsMismatch
from engine_loader.planning.arrivals import Arrivals
from engine_loader.planning.boxes import Box, Lines
from engine_loader.planning.coverage import check_coverage
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import Planner, differences, plan
from engine_loader.planning.reads import Costs, Span
from engine_registry import Manifest, Region, TensorEntry
from tests.support.builders import a_manifest, an_entry
from tests.support.meshes import (
    Resharding,
    Whole,
    carry_out,
    lines_one_by_one,
    memory_of,
    origins_of,
    reshardings,
    shards,
    slices_of,
)

FLOAT = {
    "dtype": "float32",
    "shape": (2, 3),
    "global_shape": (2, 3),
    "offsets": (0, 0),
    "nbytes": 24,
}
STRAIGHT = Costs(read_nbytes=0)  # nothing is staged


def origin(
    *entries: TensorEntry,
    regions: tuple[Region, ...] | None = None,
    name: str = "a/0",
    own: bool = True,
) -> Origin:
    return Origin(
        name, Manifest((), ()) if not entries else a_manifest(*entries, regions=regions), own
    )


def span(src_addr: int, dst_addr: int, nbytes: int) -> Span:
    return Span(dst_addr, nbytes, ((0, src_addr),))


# -- differences
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("src", "dst", "line"),
    [
        (
            {"dtype": "float16"},
            {"dtype": "bfloat16"},
            "w: dtype float16 in the source, bfloat16 here",
        ),
        (
            FLOAT,
            {**FLOAT, "shape": (3, 2), "global_shape": (3, 2)},
            "w: shape 2x3 in the source, 3x2 here",
        ),
        (
            FLOAT,
            {**FLOAT, "shape": (6,), "global_shape": (6,), "offsets": (0,)},
            "w: shape 2x3 in the source, 6 here",
        ),
        ({"nbytes": 1}, {"nbytes": 1, "shape": ()}, "w: shape 1 in the source, scalar here"),
        (
            {**FLOAT, "opaque": False, "global_shape": (4, 3)},
            {**FLOAT, "opaque": False, "global_shape": (4, 3), "offsets": (2, 0)},
            "w: no rank of the source holds the box at [2, 0] of shape 2x3",
        ),
        (
            {**FLOAT, "opaque": False, "global_shape": (4, 3)},
            {**FLOAT, "opaque": False},
            "w: part of 4x3 in the source, of 2x3 here",
        ),
        (
            FLOAT,
            {**FLOAT, "opaque": False},
            "w: no statement of what it is part of in the source, box at [0, 0] of 2x3 here: "
            "say `shards` on both sides, or on neither",
        ),
        (
            {"nbytes": 16, "shape": (8,)},
            {"nbytes": 8, "shape": (8,)},
            "w: 16 bytes in the source, 8 here",
        ),
        (
            {**FLOAT, "opaque": False},
            {**FLOAT, "opaque": False, "nbytes": 48},
            "w: 24 bytes in the source, 48 here, though the dtype is the same",
        ),
    ],
)
def test_tensors_of_one_name_that_are_not_alike_differ_in_one_line(
    src: dict[str, Any], dst: dict[str, Any], line: str
) -> None:
    assert differences([origin(an_entry(**src))], a_manifest(an_entry(**dst))) == [line]


def test_equal_tensors_do_not_differ_wherever_they_lie_and_in_whatever_order() -> None:
    entries = [
        an_entry("a", addr=100),
        an_entry("b", addr=200),
        an_entry("empty", addr=0, nbytes=0),
    ]
    moved = [replace(entry, addr=entry.addr + 1000) for entry in reversed(entries)]
    assert differences([origin(*entries)], a_manifest(*moved)) == []


def test_all_differences_come_in_one_error_before_there_is_a_plan() -> None:
    src = origin(
        an_entry("gone"),
        an_entry("both", dtype="float16"),
        an_entry("shape", shape=(4, 4)),
        an_entry("a", 200),
        an_entry("b", 300),
    )
    dst = a_manifest(
        an_entry("both", dtype="bfloat16"),
        an_entry("new"),
        an_entry("shape", shape=(2, 8)),
        an_entry("b", 500),
        an_entry("a", 500),
    )
    with pytest.raises(
        WeightsMismatch,
        match=r"the weights of a/0 do not match \(5 differences\), nothing was read: ",
    ) as caught:
        plan([src], dst)
    assert caught.value.details == {
        "source": "a/0",
        "problems": [
            "gone: in the source, but not here",
            "both: dtype float16 in the source, bfloat16 here",
            "new: here, but not in the source",
            "shape: shape 4x4 in the source, 2x8 here",
            "a: shares memory with b here, but not in the same way in the source",
        ],
    }
    assert all(problem in str(caught.value) for problem in caught.value.details["problems"])


def test_a_long_list_of_differences_is_cut_in_the_message_and_whole_in_the_details() -> None:
    src = origin(*[an_entry(f"t{number}") for number in range(25)])
    with pytest.raises(WeightsMismatch, match=r"\(25 differences\).*and 15 more$") as caught:
        plan([src], Manifest((), ()))
    assert len(caught.value.details["problems"]) == 25


def test_the_error_names_all_sources_once() -> None:
    with pytest.raises(
        WeightsMismatch, match=r"the weights of a/0 and b/0 do not match \(1 difference\)"
    ):
        plan(
            [origin(an_entry(), name=name) for name in ("a/0", "b/0", "a/0")],
            a_manifest(an_entry(dtype="int8")),
        )


def test_a_source_may_hold_more_where_only_a_part_is_wanted() -> None:
    src, dst = origin(an_entry("a", 1000), an_entry("b", 2000)), a_manifest(an_entry("a", 5000))
    assert differences([src], dst) == ["b: in the source, but not here"]
    assert differences([src], dst, partial=True) == []
    assert plan([src], dst, partial=True) == (span(1000, 5000, 16),)


# -- plans
# --------------------------------------------------------------------------------------------------


def test_tensors_that_follow_each_other_on_both_sides_become_one_read() -> None:
    names = ("a", "b", "c")
    src = origin(
        *[an_entry(name, 1000 + 16 * at) for at, name in enumerate(names)],
        regions=(Region(1000, 48),),
    )
    dst = a_manifest(
        *[an_entry(name, 5000 + 16 * at) for at, name in enumerate(names)],
        regions=(Region(5000, 48),),
    )
    assert plan([src], dst) == (span(1000, 5000, 48),)


@pytest.mark.parametrize("cut_side", ["src", "dst"])
def test_no_read_reaches_over_the_end_of_a_region_although_the_next_begins_there(
    cut_side: str,
) -> None:
    whole, cut = [(0, 48)], [(0, 32), (32, 16)]
    sides = {
        side: a_manifest(
            *[an_entry(name, base + 16 * at) for at, name in enumerate(("a", "b", "c"))],
            regions=tuple(
                Region(base + start, nbytes)
                for start, nbytes in (cut if side == cut_side else whole)
            ),
        )
        for side, base in (("src", 1000), ("dst", 5000))
    }
    assert plan([Origin("a/0", sides["src"])], sides["dst"], STRAIGHT) == (
        span(1000, 5000, 32),
        span(1032, 5032, 16),
    )


def test_a_planner_goes_by_the_regions_that_it_is_given_for_the_same_tensors() -> None:
    here = a_manifest(an_entry("a", 0, 8), an_entry("b", 8, 8), regions=(Region(0, 16),))
    there = origin(an_entry("a", 100, 8), an_entry("b", 108, 8), regions=(Region(100, 16),))
    planner = Planner(here, STRAIGHT)
    assert planner.make([there]) == (span(100, 0, 16),)
    parts = replace(here, regions=(Region(0, 8), Region(8, 8)))
    assert planner.into(parts).make([there]) == (span(100, 0, 8), span(108, 8, 8))


def test_tensors_tied_on_both_sides_are_read_once() -> None:
    src = origin(an_entry("embed", 1000), an_entry("head", 1000), regions=(Region(1000, 16),))
    dst = a_manifest(an_entry("embed", 5000), an_entry("head", 5000), regions=(Region(5000, 16),))
    assert plan([src], dst) == (span(1000, 5000, 16),)


def test_tensors_tied_on_both_sides_are_read_once_although_they_are_put_together_from_parts() -> (
    None
):
    halves = [
        origin(
            *[a_box(name, 1000, Box((0, 3 * rank), (4, 3)), (4, 6)) for name in ("embed", "head")],
            own=False,
        )
        for rank in range(2)
    ]
    dst = a_manifest(
        *[a_box(name, 5000, Box((0, 0), (4, 6)), (4, 6)) for name in ("embed", "head")]
    )
    assert sum(some.payload for some in plan(halves, dst)) == 24


def test_tensors_tied_in_the_source_only_are_read_twice() -> None:
    src = origin(an_entry("embed", 1000), an_entry("head", 1000), regions=(Region(1000, 16),))
    dst = a_manifest(an_entry("embed", 5000), an_entry("head", 6000))
    assert plan([src], dst) == (span(1000, 5000, 16), span(1000, 6000, 16))


def test_tensors_tied_here_come_from_those_sources_in_which_they_are() -> None:
    tied = origin(an_entry("embed", 1000), an_entry("head", 1000), name="a/0")
    not_tied = origin(an_entry("embed", 1000), an_entry("head", 2000), name="b/0")
    dst = a_manifest(an_entry("embed", 5000), an_entry("head", 5000))
    assert plan([not_tied, tied], dst) == (Span(5000, 16, ((1, 1000),)),)
    assert differences([not_tied], dst) == [
        "head: shares memory with embed here, but not in the same way in the source"
    ]


def test_of_tensors_tied_here_the_source_need_have_but_one() -> None:
    dst = a_manifest(an_entry("embed", 5000), an_entry("head", 5000))
    for name in ("embed", "head"):
        src = origin(an_entry(name, 1000))
        assert differences([src], dst) == []
        assert plan([src], dst) == (span(1000, 5000, 16),)
    both = [
        origin(an_entry("embed", 1000), name="a/0"),
        origin(an_entry("embed", 2000), an_entry("head", 2000), name="b/0"),
    ]
    assert plan(both, dst) == (Span(5000, 16, ((1, 2000),)),)


def test_of_tensors_tied_in_the_source_one_need_be_wanted() -> None:
    tied, dst = (
        [an_entry("embed", 1000), an_entry("head", 1000)],
        a_manifest(an_entry("embed", 5000)),
    )
    assert plan([origin(*tied)], dst) == (span(1000, 5000, 16),)
    apart = [an_entry("embed", 1000), an_entry("head", 2000)]
    assert differences([origin(*tied), origin(*apart)], dst) == [
        "head: in the source, but not here"
    ]


BOX: dict[str, Any] = {"shape": (16,), "global_shape": (32,), "offsets": (16,), "opaque": False}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(an_entry("head", 5000, 8), id="a view of a part"),
        pytest.param(an_entry("head", 5000, dtype="int8"), id="another dtype"),
        pytest.param(
            an_entry("head", 5000, shape=(4, 4), global_shape=(4, 4), offsets=(0, 0)),
            id="another shape",
        ),
        pytest.param(an_entry("head", 5000, **BOX), id="another box"),
        pytest.param(an_entry("head", 5016), id="other memory"),
        pytest.param(an_entry("head", 0, 0), id="no memory"),
    ],
)
def test_what_is_not_exactly_the_same_memory_is_missed(other: TensorEntry) -> None:
    src, dst = an_entry("embed", 1000), an_entry("embed", 5000)
    assert differences([origin(src)], a_manifest(dst, other)) == [
        "head: here, but not in the source"
    ]
    there = replace(other, addr=other.addr - 4000 if other.nbytes else 0)
    assert differences([origin(src, there)], a_manifest(dst)) == [
        "head: in the source, but not here"
    ]


def test_views_of_each_other_on_both_sides_are_read_once() -> None:
    fused = (
        an_entry("v", 1032, 16),
        an_entry("qkv", 1000, 48),
        an_entry("q", 1000, 16),
        an_entry("tail", 1040, 24),
    )
    moved = tuple(replace(entry, addr=entry.addr + 4000) for entry in fused)
    spans = plan(
        [origin(*fused, regions=(Region(1000, 64),))],
        a_manifest(*moved, regions=(Region(5000, 64),)),
    )
    assert spans == (span(1000, 5000, 64),)


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        pytest.param([(1000, 16), (2000, 16)], [(5000, 16), (5000, 16)], id="tied here only"),
        pytest.param(
            [(1000, 16), (2000, 16)], [(5000, 16), (5008, 16)], id="overlapping here only"
        ),
        pytest.param([(1000, 16), (1004, 8)], [(5000, 16), (5008, 8)], id="overlapping otherwise"),
        pytest.param([(1000, 16), (2000, 8)], [(5000, 16), (5000, 8)], id="a view here only"),
    ],
)
def test_tensors_that_share_memory_here_but_not_so_in_the_source_are_refused(
    src: list[tuple[int, int]], dst: list[tuple[int, int]]
) -> None:
    sides = [
        a_manifest(
            *itertools.starmap(
                an_entry, ((name, *place) for name, place in zip("ab", side, strict=True))
            )
        )
        for side in (src, dst)
    ]
    with pytest.raises(WeightsMismatch) as caught:
        plan([Origin("a/0", sides[0])], sides[1])
    assert caught.value.details["problems"] == [
        "b: shares memory with a here, but not in the same way in the source"
    ]


def test_tensors_without_bytes_need_no_read() -> None:
    empty = an_entry("empty", addr=0, nbytes=0, shape=(0, 7))
    assert plan([origin(empty)], a_manifest(empty)) == ()
    both = (an_entry("a", 1000), empty)
    assert plan([origin(*both)], a_manifest(*both)) == (span(1000, 1000, 16),)


def test_nothing_wanted_of_nothing_is_an_empty_plan() -> None:
    assert plan([origin()], Manifest((), ())) == ()


# -- any layout
# --------------------------------------------------------------------------------------------------

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
def memories(
    draw: st.DrawFn, base: int, sizes: dict[str, int], views: dict[str, tuple[str, int]]
) -> Manifest:
    """The tensors in any order, with gaps or without, in regions that may touch each other; views
    lie inside another tensor.
    """
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
    return Manifest(
        tuple(an_entry(name, places[name] if sizes[name] else 0, sizes[name]) for name in sizes),
        tuple(regions),
    )


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = {f"t{number}": draw(st.integers(0, 40)) for number in range(draw(st.integers(0, 8)))}
    src_views: dict[str, tuple[str, int]] = {}
    for name in sizes:
        wholes = [
            other
            for other in sizes
            if other < name and sizes[other] >= sizes[name] and other not in src_views
        ]
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
        src,
        draw(memories(DST_BASE, sizes, dst_views)),
        draw(st.randoms(use_true_random=False)).randbytes(end - SRC_BASE),
    )


def inside_one(regions: tuple[Region, ...], addr: int, nbytes: int) -> bool:
    return any(region.addr <= addr and addr + nbytes <= region.end for region in regions)


@given(layouts())
def test_carrying_out_the_plan_of_any_two_layouts_reproduces_every_tensor_and_touches_nothing_else(
    layout: Layout,
) -> None:
    end = max((region.end for region in layout.dst.regions), default=DST_BASE)
    memory, written = bytearray(end - DST_BASE), bytearray(end - DST_BASE)
    for read in plan([Origin("a/0", layout.src)], layout.dst, STRAIGHT):
        ((_, src_addr),) = read.srcs
        assert inside_one(layout.src.regions, src_addr, read.nbytes)
        assert inside_one(layout.dst.regions, read.dst_addr, read.nbytes)
        src, dst = src_addr - SRC_BASE, read.dst_addr - DST_BASE
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
def test_straight_reads_come_by_destination_and_no_two_could_be_one(layout: Layout) -> None:
    spans = plan([Origin("a/0", layout.src)], layout.dst, STRAIGHT)
    for first, second in itertools.pairwise(spans):
        assert first.dst_addr + first.nbytes <= second.dst_addr
        ((_, first_src),), ((_, second_src),) = first.srcs, second.srcs
        follows = (first_src + first.nbytes, first.dst_addr + first.nbytes) == (
            second_src,
            second.dst_addr,
        )
        both = first.nbytes + second.nbytes
        fits = inside_one(layout.src.regions, first_src, both) and inside_one(
            layout.dst.regions, first.dst_addr, both
        )
        assert not (follows and fits)


def with_more_names(manifest: Manifest, data: st.DataObject) -> Manifest:
    """Some of its tensors have other names besides, before their own or after it."""
    entries = list(manifest.tensors)
    for entry in manifest.tensors:
        for number in range(data.draw(st.integers(0, 2))):
            place = data.draw(st.integers(0, len(entries)))
            entries.insert(place, replace(entry, name=f"{entry.name} as {number}"))
    return replace(manifest, tensors=tuple(entries))


def of_bytes(manifest: Manifest) -> Manifest:
    return replace(manifest, tensors=tuple(entry for entry in manifest.tensors if entry.nbytes))


@given(layouts(), st.data())
def test_more_names_of_the_same_memory_on_either_side_change_no_plan(
    layout: Layout, data: st.DataObject
) -> None:
    src, dst = of_bytes(layout.src), of_bytes(layout.dst)
    wanted = plan([Origin("a/0", src)], dst, STRAIGHT)
    assert plan([Origin("a/0", src)], with_more_names(dst, data), STRAIGHT) == wanted
    assert plan([Origin("a/0", with_more_names(src, data))], dst, STRAIGHT) == wanted


# -- any ranks
# --------------------------------------------------------------------------------------------------


def a_box(name: str, addr: int, box: Box, global_shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(
        name, "uint8", box.shape, addr, box.volume, global_shape, box.offsets, opaque=False
    )


def plan_of(ranks: Resharding) -> tuple[Span, ...]:
    return plan(origins_of(ranks.sources), ranks.dst.manifest, ranks.costs)


def assert_filled(wholes: Sequence[Whole], ranks: Resharding, spans: Sequence[Span]) -> None:
    content, times = carry_out(spans, ranks.sources, ranks.dst)
    wanted = [0] * len(times)
    for whole, entry in (
        (whole, entry)
        for whole in wholes
        for entry in ranks.dst.manifest.tensors
        if entry.name == whole.name
    ):
        at = entry.addr - ranks.dst.base
        if entry.nbytes:
            assert content[at : at + entry.nbytes] == whole.part(entry.along)
            wanted[at : at + entry.nbytes] = [1] * entry.nbytes
    assert times == wanted


@given(reshardings())
def test_a_rank_of_any_mesh_is_filled_from_all_ranks_of_others_and_nothing_else_is_touched(
    ranks: Resharding,
) -> None:
    spans = plan_of(ranks)
    assert_filled(ranks.wholes, ranks, spans)
    assert all(some.nbytes <= ranks.costs.staged_nbytes for some in spans if some.staged)
    if ranks.costs.strided:
        assert not any(some.staged for some in spans)
    elif not ranks.costs.scattered:
        assert not any(some.direct for some in spans)
    arrivals = Arrivals(ranks.dst.manifest)
    arrivals.add(spans)
    assert arrivals.complete() == [entry.name for entry in ranks.dst.manifest.tensors]
    assert arrivals.missing(spans) == []


@given(reshardings(), st.integers(1, 60), st.data())
def test_pieces_of_a_plan_that_come_in_two_tries_fill_everything(
    ranks: Resharding, most: int, data: st.DataObject
) -> None:
    """Reads that stride are cut inside their runs' axes, and what came of them counts."""
    spans = plan_of(replace(ranks, costs=replace(ranks.costs, strided=True)))
    pieces = [piece for span in spans for piece in span.cut(most)]
    first = [piece for piece in pieces if data.draw(st.booleans())]
    arrivals = Arrivals(ranks.dst.manifest)
    arrivals.add(first)
    assert arrivals.nbytes == sum(piece.read_nbytes for piece in first)
    again = [piece for span in arrivals.missing(spans) for piece in span.cut(most)]
    _, once = carry_out(first, ranks.sources, ranks.dst)
    _, twice = carry_out(again, ranks.sources, ranks.dst)
    _, wanted = carry_out(spans, ranks.sources, ranks.dst)
    assert [min(1, sum(both)) for both in zip(once, twice, strict=True)] == wanted
    assert_filled(ranks.wholes, ranks, pieces)
    arrivals.add(again)
    assert arrivals.missing(spans) == []
    assert arrivals.complete() == [entry.name for entry in ranks.dst.manifest.tensors]


@given(reshardings(), st.data())
def test_more_names_of_the_same_box_on_either_side_change_no_plan(
    ranks: Resharding, data: st.DataObject
) -> None:
    """A plan is proven to write each byte once before it is returned."""
    sources, dst = [of_bytes(one.manifest) for one in ranks.sources], of_bytes(ranks.dst.manifest)

    def plan_between(some: Sequence[Manifest], manifest: Manifest) -> tuple[Span, ...]:
        origins = [Origin("a/0", one, own=False) for one in some]
        return plan(origins, manifest, ranks.costs, partial=True)

    wanted = plan_between(sources, dst)
    assert_filled(ranks.wholes, replace(ranks, dst=replace(ranks.dst, manifest=dst)), wanted)
    assert plan_between(sources, with_more_names(dst, data)) == wanted
    assert plan_between([with_more_names(one, data) for one in sources], dst) == wanted


@pytest.mark.parametrize("itemsize", [1, 4])
@pytest.mark.parametrize("axes", list(itertools.product([None, 0, 1, 2], repeat=2)))
def test_straight_staged_and_strided_reads_fill_the_same(
    axes: tuple[int | None, int | None], itemsize: int
) -> None:
    """Columns of three dimensions from rows, rows from columns, and so on: a rank of another mesh
    gets all that it wants.
    """
    whole = Whole("w", (5, 6, 7), itemsize, bytes(at % 251 for at in range(5 * 6 * 7 * itemsize)))
    src_axis, dst_axis = axes
    sources = [
        memory_of([(whole, slices_of(box))], 1_000_000 * (rank + 1), [3], [False])
        for rank, box in enumerate(shards(whole.shape, (2, 2), (src_axis, None)))
    ]
    dst = memory_of(
        [(whole, slices_of(shards(whole.shape, (3,), (dst_axis,))[1]))], 9_000_000, [0], [False]
    )
    ways = {
        name: plan_of(Resharding([whole], sources, dst, costs))
        for name, costs in {
            "straight": STRAIGHT,
            "staged": Costs(read_nbytes=1_000_000, copied=0, staged_nbytes=1_000_000),
            "in small buffers": Costs(read_nbytes=1_000_000, copied=0, staged_nbytes=40),
            "strided": Costs(strided=True),
        }.items()
    }
    for spans in ways.values():
        assert_filled([whole], Resharding([whole], sources, dst, STRAIGHT), spans)
        assert all(len(some.srcs) == (4 if src_axis is None else 2) for some in spans)
    strided = dst_axis not in (None, 0) or src_axis not in (None, 0)
    assert not any(some.lines for some in ways["straight"])
    assert all(some.read_nbytes == some.payload for some in ways["strided"])
    assert len(ways["strided"]) <= 4
    assert any(some.lines for some in ways["staged"]) == (
        strided and (src_axis != dst_axis or dst_axis != 0)
    )
    assert len(ways["staged"]) <= len(ways["in small buffers"]) <= len(ways["straight"])


def replaced(some: Lines, data: st.DataObject) -> list[list[Lines]]:
    """What a mistake would make of them: other distances here, runs of another length, or one run
    instead of another.
    """
    runs = [Lines(src, dst, some.nbytes) for src, dst in lines_one_by_one(some)]
    victim, instead = (data.draw(st.integers(0, len(runs) - 1)) for _ in range(2))
    wrong = [
        [some._replace(dst=some.dst + 1)],
        [*runs[:victim], *runs[victim + 1 :]],
        [*runs, runs[victim]],
    ]
    if victim != instead:
        wrong.append([*runs[:victim], runs[instead], *runs[victim + 1 :]])
    if some.counts:
        axis = data.draw(st.integers(0, len(some.counts) - 1))
        steps = list(some.dst_steps)
        steps[axis] += data.draw(st.sampled_from([-1, 1]))
        wrong.append([some._replace(dst_steps=tuple(steps))])
    return wrong


@given(reshardings(), st.data())
def test_any_plan_with_one_read_dropped_doubled_shifted_or_resized_fails_the_proof(
    ranks: Resharding, data: st.DataObject
) -> None:
    spans, tensors = list(plan_of(ranks)), ranks.dst.manifest.tensors
    if not spans:
        return
    check_coverage(spans, tensors)
    place = data.draw(st.integers(0, len(spans) - 1))
    victim = spans[place]
    by = data.draw(st.integers(1, 50)) * data.draw(st.sampled_from([-1, 1]))
    wrongs: list[list[Span]] = [[], [victim, victim]]
    if victim.lines:
        at = data.draw(st.integers(0, len(victim.lines) - 1))
        some = victim.lines
        wrongs += [
            [victim._replace(lines=(*some[:at], *others, *some[at + 1 :]))]
            for others in replaced(some[at], data)
        ]
    else:
        wrongs.append([victim._replace(dst_addr=victim.dst_addr + by)])
        wrongs.append(
            [
                victim._replace(
                    nbytes=victim.nbytes + by if victim.nbytes + by > 0 else victim.nbytes + 1
                )
            ]
        )
    for instead in wrongs:
        with pytest.raises(ValueError, match="the plan "):
            check_coverage([*spans[:place], *instead, *spans[place + 1 :]], tensors)


# -- plans that are kept
# --------------------------------------------------------------------------------------------------


def test_a_plan_is_made_once_for_the_same_ranks_and_the_same_memory_and_anew_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    monkeypatch.setattr("engine_loader.planning.plan.check_coverage", lambda *_: made.append(1))
    src, moved = origin(an_entry(addr=1000)), origin(an_entry(addr=2000))
    here, there = a_manifest(an_entry(addr=5000)), a_manifest(an_entry(addr=6000))
    first = Planner(here).plan([src])
    assert Planner(a_manifest(an_entry(addr=5000))).plan([src]) is first
    assert Planner(here).differences([src]) == []
    assert len(made) == 1
    assert {span.dst_addr for span in Planner(there).plan([src])} == {6000}
    assert {span.srcs for span in Planner(here).plan([moved])} == {((0, 2000),)}
    assert {span.srcs for span in Planner(here).plan([moved, src])} == {((0, 2000), (1, 1000))}
    assert (
        Planner(here, partial=True).plan([src])
        == Planner(here, Costs(read_nbytes=1)).plan([src])
        == Planner(here).plan([src])
    )
    assert len(made) == 7  # of those that are kept there are few
    assert plan([src], here) == first
    assert len(made) == 8  # which keeps none
    with pytest.raises(WeightsMismatch):
        Planner(here).plan([replace(src, own=False)])
