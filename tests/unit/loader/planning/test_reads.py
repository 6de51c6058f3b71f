"""How spans are joined, gathered and cut so that few, long reads bring all: what costs least by
`Costs`.
"""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.errors import LoaderError
from engine_loader.planning.boxes import Lines
from engine_loader.planning.reads import Costs, Span, bundle, coalesce, cut_lines, gather, span_of
from engine_loader.transfer.chunks import Chunks
from engine_registry import Region
from tests.support.meshes import any_costs, lines_one_by_one

SRC, DST = [[Region(0, 1 << 30)]], [Region(0, 1 << 30)]
KIB = 1 << 10


def span(src_addr: int, dst_addr: int, nbytes: int, source: int = 0) -> Span:
    return Span(dst_addr, nbytes, ((source, src_addr),))


def rows(count: int, nbytes: int, step: int) -> Span:
    """Runs from every row of a tensor at 1000, which lie one after the other at 5000."""
    return span_of(((0, 1000),), Lines(0, 5000, nbytes, (count,), (step,), (nbytes,)))


def moved(spans: list[Span]) -> set[tuple[int, int, int]]:
    """(number of the source, address there, address here) of each byte."""
    found = []
    for some in spans:
        for number, addr in some.srcs:
            runs = [
                (src, dst, lines.nbytes)
                for lines in some.lines
                for src, dst in lines_one_by_one(lines)
            ]
            runs = runs or [(0, some.dst_addr, some.nbytes)]
            found += [
                (number, addr + src + at, dst + at)
                for src, dst, nbytes in runs
                for at in range(nbytes)
            ]
    assert len(set(found)) == len(found)
    return set(found)


# -- reads that stride
# --------------------------------------------------------------------------------------------------


@st.composite
def any_lines(draw: st.DrawFn) -> Lines:
    """From one to three axes, with gaps between the runs on either side or without."""
    nbytes = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    steps: list[list[int]] = [[], []]
    for side in range(2):
        extent = nbytes
        for count in reversed(counts):
            step = extent + draw(st.sampled_from([0, 0, 1, 7]))
            steps[side].insert(0, step)
            extent += (count - 1) * step
    return Lines(0, 5000, nbytes, tuple(counts), tuple(steps[0]), tuple(steps[1]))


def striding(some: Lines) -> Span:
    (span,) = cut_lines(Span(0, some.extent, ((0, 1000), (2, 9000)), (some,)), Costs(strided=True))
    return span


@given(any_lines(), st.integers(1, 200))
def test_a_read_that_strides_is_cut_into_pieces_of_the_same_bytes_in_their_order(
    some: Lines, most: int
) -> None:
    span = striding(some)
    assert span.read_nbytes == span.payload == some.payload
    assert (span.staged, span.nbytes) == (False, some.extent)
    pieces = list(span.cut(most))
    assert moved(pieces) == moved([span])
    assert sum(piece.read_nbytes for piece in pieces) == some.payload
    for piece in pieces:
        assert piece.read_nbytes <= max(most, some.nbytes)
        assert not piece.staged
        if piece.lines:
            (lines,) = piece.lines
            assert (lines.src, lines.dst, lines.extent) == (0, piece.dst_addr, piece.nbytes)
    starts = [piece.dst_addr for piece in pieces]
    assert starts == sorted(starts)


@given(any_lines(), st.integers(1, 200))
def test_pieces_of_lines_are_few_and_each_of_their_runs_once(some: Lines, most: int) -> None:
    pieces = list(some.pieces(most))
    runs = [run for piece in pieces for run in lines_one_by_one(piece)]
    assert runs == lines_one_by_one(some)
    assert all(piece.payload <= max(most, some.nbytes) for piece in pieces)
    if some.payload <= most:
        assert pieces == [some]


def test_runs_are_not_staged_for_an_engine_that_strides_however_dear_a_read_is() -> None:
    few = list(cut_lines(rows(100, 8, 64), Costs(read_nbytes=1 << 40, strided=True)))
    assert [(one.direct, one.staged, one.dst_addr) for one in few] == [(True, False, 5000)]
    assert [one.srcs for one in few] == [((0, 1000),)]


@given(st.lists(any_lines(), max_size=5), st.integers(1, 200))
def test_chunks_count_what_is_read_of_runs_and_balance(some: list[Lines], most: int) -> None:
    spans = [striding(one.at(0, 10_000 * number)) for number, one in enumerate(some)]
    chunks = Chunks([*spans, span(0, 0, 33)], most)
    total = 33 + sum(one.payload for one in some)
    assert chunks.left_nbytes == total
    assert chunks.progress(()).total_nbytes == total
    (queue, *_) = chunks.queues_of(0)
    chunk = queue.popleft()
    with pytest.raises(LoaderError, match="expects"):
        chunks.check_balance(0)
    chunks.check_balance(1)
    chunks.put_back([chunk])
    chunks.check_balance(0)


# -- neighbours
# --------------------------------------------------------------------------------------------------


def test_spans_that_follow_each_other_here_and_at_every_source_are_joined() -> None:
    spans = [Span(116, 16, ((0, 16), (2, 516))), Span(100, 16, ((0, 0), (2, 500)))]
    assert coalesce(spans, [[Region(0, 64)], [], [Region(500, 32)]], DST) == [
        Span(100, 32, ((0, 0), (2, 500)))
    ]


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(span(17, 116, 16), id="a gap in the source"),
        pytest.param(span(16, 117, 16), id="a gap in the destination"),
        pytest.param(span(0, 116, 16), id="the same source twice"),
        pytest.param(span(16, 116, 16, source=1), id="another source"),
        pytest.param(Span(116, 16, ((0, 16), (1, 16))), id="one source more"),
    ],
)
def test_spans_that_do_not_follow_each_other_stay_two(second: Span) -> None:
    first = span(0, 100, 16)
    assert coalesce([second, first], [[Region(0, 64)], [Region(0, 64)]], [Region(100, 64)]) == [
        first,
        second,
    ]


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ([], []),
        ([Region(0, 64)], []),
        ([], DST),
        ([Region(0, 24)], DST),
        ([Region(0, 16), Region(16, 16)], DST),
    ],
)
def test_spans_are_not_joined_beyond_the_regions_that_they_begin_in(
    src: list[Region], dst: list[Region]
) -> None:
    spans = [span(0, 100, 16), span(16, 116, 16)]
    assert coalesce(spans, [src], dst) == spans


# -- short spans
# --------------------------------------------------------------------------------------------------


def test_short_spans_near_each_other_at_the_source_become_one_read_into_a_buffer() -> None:
    spans = [span(1200, 9000, 50), span(1000, 5000, 100), span(1100, 7000, 80)]
    assert gather(spans, SRC, Costs()) == [
        Span(
            0,
            250,
            ((0, 1000),),
            (Lines(0, 5000, 100), Lines(100, 7000, 80), Lines(200, 9000, 50)),
            wanted=230,
        )
    ]


@pytest.mark.parametrize(
    ("gap", "costs", "reads"),
    [
        pytest.param(1000, Costs(read_nbytes=1121, copied=0.6), 1, id="less than a read costs"),
        pytest.param(1000, Costs(read_nbytes=1120, copied=0.6), 2, id="as much as a read costs"),
        pytest.param(1000, Costs(read_nbytes=2000, copied=10), 2, id="much for the copying"),
        pytest.param(
            1000,
            Costs(read_nbytes=2000, copied=0, staged_nbytes=1200),
            1,
            id="just what a buffer takes",
        ),
        pytest.param(
            1000,
            Costs(read_nbytes=2000, copied=0, staged_nbytes=1199),
            2,
            id="more than a buffer takes",
        ),
    ],
)
def test_two_spans_are_gathered_if_what_lies_between_and_the_copying_cost_less_than_a_read(
    gap: int, costs: Costs, reads: int
) -> None:
    spans = [span(1000, 5000, 100), span(1100 + gap, 7000, 100)]
    assert len(gather(spans, SRC, costs)) == reads


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([span(1100, 7000, 100, source=1)], id="elsewhere"),
        pytest.param(
            [Span(7000, 100, ((0, 1100), (1, 1101)))],
            id="with another layout at one of the sources",
        ),
        pytest.param([span(1000, 7000, 100)], id="the same bytes again"),
        pytest.param([span(1050, 7000, 100)], id="overlapping"),
        pytest.param([span(1 << 30, 7000, 100)], id="in another region"),
        pytest.param([span(1100, 7000, 1 << 20)], id="long"),
    ],
)
def test_spans_stay_apart_where_they_cannot_be_read_at_once(others: list[Span]) -> None:
    spans = [Span(5000, 100, tuple((number, 1000) for number, _ in others[0].srcs)), *others]
    if others[0].srcs == ((1, 1100),):
        spans[0] = span(1000, 5000, 100)
    regions = [[Region(0, 1 << 30), Region(1 << 30, 1 << 30)]] * 2
    assert sorted(gather(spans, regions, Costs())) == sorted(spans)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 30)), max_size=12), any_costs)
def test_whatever_is_gathered_brings_the_same_bytes(
    places: list[tuple[int, int]], costs: Costs
) -> None:
    spans = [
        span(src, 1000 * (at + 1), nbytes, source=src % 2)
        for at, (src, nbytes) in enumerate(places)
    ]
    regions = [[Region(0, 150), Region(150, 400)], [Region(0, 600)]]
    gathered = gather(spans, regions, costs)
    assert moved(gathered) == moved(spans)
    assert len(gathered) <= len(spans)
    for some in gathered:
        ((number, addr),) = some.srcs
        assert len(some.lines) != 1
        assert not some.lines or some.nbytes <= costs.staged_nbytes
        assert not some.lines or any(
            region.addr <= addr and addr + some.nbytes <= region.end for region in regions[number]
        )


def test_short_spans_of_one_region_become_one_read_to_their_places() -> None:
    spans = [span(900_000, 9000, 50), span(1000, 5000, 100), span(2000, 7000, 1 << 20)]
    assert bundle(spans, SRC, Costs()) == [
        spans[2],
        Span(
            5000,
            899_050,
            ((0, 1000),),
            (Lines(0, 5000, 100), Lines(899_000, 9000, 50)),
            direct=True,
            wanted=150,
        ),
    ]


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 30)), max_size=40), any_costs)
def test_whatever_is_bundled_brings_the_same_bytes(
    places: list[tuple[int, int]], costs: Costs
) -> None:
    spans = [
        span(src, 1000 * (at + 1), nbytes, source=src % 2)
        for at, (src, nbytes) in enumerate(places)
    ]
    regions = [[Region(0, 150), Region(150, 400)], [Region(0, 600)]]
    bundled = bundle(spans, regions, costs)
    assert moved(bundled) == moved(spans)
    for some in bundled:
        ((number, addr),) = some.srcs
        assert len(some.lines) != 1
        assert some.direct == bool(some.lines)
        assert some.read_nbytes == some.payload == some._replace(wanted=None).payload
        assert list(some.cut(1)) == [some] if some.lines else True
        assert not some.lines or some.payload < costs.staged_nbytes + some.lines[-1].nbytes
        assert not some.lines or any(
            region.addr <= addr and addr + some.nbytes <= region.end for region in regions[number]
        )


def test_a_bundle_has_no_more_runs_than_one_call_of_the_kernel_takes() -> None:
    spans = [span(2 * at, 10_000 + 3 * at, 1) for at in range(2500)]
    assert [len(some.lines) for some in bundle(spans, SRC, Costs())] == [1000, 1000, 500]


# -- runs at equal distances
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "costs", "reads", "staged"),
    [
        pytest.param(rows(100, 10, 20), Costs(), 1, 1, id="short runs near each other"),
        pytest.param(
            rows(4, 200 * KIB, 400 * KIB), Costs(), 4, 0, id="long runs far from each other"
        ),
        pytest.param(rows(4, 200 * KIB, 201 * KIB), Costs(), 1, 1, id="long runs near each other"),
        pytest.param(
            rows(4, 200 * KIB, 201 * KIB),
            Costs(copied=0.5),
            4,
            0,
            id="long runs whose copying is slow",
        ),
        pytest.param(rows(4, 10, 1 << 20), Costs(), 4, 0, id="short runs far from each other"),
        pytest.param(
            rows(4, 10, 1 << 20),
            Costs(read_nbytes=3 << 20),
            1,
            1,
            id="the same where a read costs much",
        ),
        pytest.param(
            rows(100, 10, 20), Costs(read_nbytes=0), 100, 0, id="where reads cost nothing"
        ),
        pytest.param(
            rows(100, 10, 20),
            Costs(staged_nbytes=199),
            10,
            10,
            id="as much as a buffer takes at once",
        ),
        pytest.param(
            rows(101, 10, 20),
            Costs(staged_nbytes=199),
            11,
            10,
            id="one that is left over is read straight",
        ),
        pytest.param(
            rows(3, 100, 150), Costs(staged_nbytes=249), 3, 0, id="buffers that take only one run"
        ),
        pytest.param(
            span_of(((0, 0),), Lines(0, 0, 10, (3, 100), (1 << 24, 20), (1000, 10))),
            Costs(),
            3,
            3,
            id="each of the far axis at once",
        ),
    ],
)
def test_runs_are_read_through_a_buffer_where_that_costs_less(
    span: Span, costs: Costs, reads: int, staged: int
) -> None:
    cut = list(cut_lines(span, costs))
    assert (len(cut), sum(bool(some.lines) for some in cut)) == (reads, staged)


def cost(spans: list[Span], costs: Costs) -> float:
    return sum(
        costs.read_nbytes + some.nbytes + costs.copied * some.payload * bool(some.lines)
        for some in spans
    )


@st.composite
def strided(draw: st.DrawFn) -> Lines:
    counts = tuple(draw(st.lists(st.integers(2, 6), min_size=1, max_size=3)))
    nbytes = draw(st.integers(1, 20))
    src, dst = [nbytes + draw(st.integers(0, 30))], [nbytes + draw(st.integers(0, 30))]
    for count in reversed(counts[1:]):
        src.append(src[-1] * count + draw(st.integers(0, 100)))
        dst.append(dst[-1] * count + draw(st.integers(0, 100)))
    return Lines(
        draw(st.integers(0, 50)), 5000, nbytes, counts, tuple(reversed(src)), tuple(reversed(dst))
    )


@given(strided(), any_costs)
def test_runs_however_read_bring_the_same_bytes_for_no_more_than_one_by_one(
    some: Lines, costs: Costs
) -> None:
    srcs = ((0, 1000), (3, 700))
    whole = span_of(srcs, some)
    cut, one_by_one = (
        list(cut_lines(whole, costs)),
        [span_of(srcs, line) for line in some.along(len(some.counts))],
    )
    assert len(one_by_one) == prod(some.counts)
    assert moved(cut) == moved([whole]) == moved(one_by_one)
    assert all(span.nbytes <= costs.staged_nbytes for span in cut if span.lines)
    assert cost(cut, costs) <= cost(one_by_one, costs)
    if some.extent <= costs.staged_nbytes:
        assert cost(cut, costs) <= cost([whole], costs)


@given(strided(), any_costs)
def test_a_span_counts_as_payload_what_is_wanted_of_it(some: Lines, costs: Costs) -> None:
    cut = list(cut_lines(span_of(((0, 0),), some), costs))
    assert sum(span.payload for span in cut) == some.payload
    assert all(span.payload <= span.nbytes for span in cut)
