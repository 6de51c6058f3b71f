"""The proof of plans: one byte written twice, left out, or taken from beside what was read is
found, whatever way it is written.
"""

from __future__ import annotations

import pytest

from engine_loader.planning.boxes import Lines
from engine_loader.planning.coverage import check_coverage
from engine_loader.planning.reads import Span
from tests.support.builders import an_entry


def span(src_addr: int, dst_addr: int, nbytes: int) -> Span:
    return Span(dst_addr, nbytes, ((0, src_addr),))


def staged(*lines: Lines, nbytes: int = 1 << 20) -> Span:
    return Span(0, nbytes, ((0, 0),), lines)


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param([], id="nothing"),
        pytest.param([span(0, 100, 8)], id="too short"),
        pytest.param([span(0, 100, 17)], id="too long"),
        pytest.param([span(0, 99, 16)], id="too early"),
        pytest.param([span(0, 100, 16), span(0, 100, 16)], id="twice"),
        pytest.param([span(0, 100, 10), span(10, 109, 7)], id="one byte twice"),
        pytest.param([span(0, 100, 7), span(8, 108, 8)], id="a gap"),
        pytest.param([span(0, 100, 16), span(0, 300, 1)], id="elsewhere as well"),
        pytest.param([staged(Lines(0, 100, 2, (4,), (4,), (4,)))], id="only every other run"),
        pytest.param([staged(Lines(0, 100, 4, (4,), (4,), (0,)))], id="all runs to one place"),
        pytest.param(
            [staged(*[Lines(0, 100, 2, (4,), (4,), (4,))] * 2)],
            id="the same runs twice, the others not",
        ),
        pytest.param(
            [
                staged(
                    Lines(0, 100, 2, (2, 2), (8, 4), (8, 4)),
                    Lines(0, 102, 2, (2, 2), (8, 4), (4, 4)),
                )
            ],
            id="a run twice, another not",
        ),
        pytest.param(
            [staged(Lines(0, 100, 2, (4,), (4,), (4,))), span(0, 102, 8)],
            id="runs twice, straight and staged",
        ),
        pytest.param(
            [staged(Lines(0, 100, 2, (4,), (4,), (4,)), Lines(0, 98, 2, (4,), (4,), (4,)))],
            id="runs beside it",
        ),
        pytest.param([staged(Lines(8, 100, 16), nbytes=23)], id="from beside what was read"),
        pytest.param(
            [staged(Lines(0, 100, 4, (4,), (5,), (4,)), nbytes=18)],
            id="runs from beside what was read",
        ),
    ],
)
def test_a_plan_that_does_not_write_every_byte_once_is_refused(spans: list[Span]) -> None:
    with pytest.raises(ValueError, match="the plan "):
        check_coverage(spans, [an_entry(addr=100)])


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param([span(900, 100, 5), span(0, 105, 11)], id="in runs"),
        pytest.param(
            [
                staged(Lines(0, 102, 2, (4,), (4,), (4,))),
                staged(Lines(0, 100, 2, (4,), (4,), (4,))),
            ],
            id="in runs between runs",
        ),
        pytest.param(
            [
                staged(Lines(0, 105, 11), Lines(20, 100, 1)),
                staged(Lines(0, 101, 2, (2,), (9,), (2,))),
            ],
            id="by all ways",
        ),
    ],
)
def test_a_tensor_may_be_written_in_pieces(spans: list[Span]) -> None:
    check_coverage(spans, [an_entry(addr=100)])


def test_the_tensors_that_a_proof_is_of_must_not_overlap() -> None:
    with pytest.raises(ValueError, match="two tensors share memory"):
        check_coverage([span(0, 100, 24)], [an_entry("a", 100), an_entry("b", 108)])
