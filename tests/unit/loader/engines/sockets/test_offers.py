"""The table of what an engine offers, beside a model that asks each region in turn."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.engines.sockets.offers import (
    ADDRESS,
    AS_IT_WAS,
    CHANGES,
    HEAD_WORDS,
    ROWS,
    Held,
    Offers,
)
from engine_registry import Region

TOP = 1 << 64


def pieces(*some: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.array(some, np.uint64).reshape(-1, 2)


@st.composite
def regions(draw: st.DrawFn) -> list[Region]:
    """That do not overlap, in any order; some touch, and the last may end at the top."""
    at, found = draw(st.sampled_from([0, 1, 4096, TOP - 200])), []
    for gap, nbytes in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), max_size=9)):
        at += gap
        if at + nbytes >= TOP:
            break
        found.append(Region(at, nbytes))
        at += nbytes
    return draw(st.permutations(found))


@given(data=st.data(), offered=regions())
def test_a_piece_is_held_if_one_region_has_all_of_its_bytes(
    data: st.DataObject, offered: list[Region]
) -> None:
    edges = [edge for region in offered for edge in (region.addr, region.end)] or [0]
    near = st.sampled_from(edges).flatmap(
        lambda edge: st.integers(max(0, edge - 3), min(TOP - 1, edge + 3))
    )
    address = near | st.integers(0, TOP - 1)
    length = st.integers(0, 40) | st.integers(0, TOP - 1)
    wanted = data.draw(st.lists(st.tuples(address, length), max_size=20))
    held = Held.of(pieces(*[(region.addr, region.nbytes) for region in offered]))
    assert held.holds(pieces(*wanted)).tolist() == [
        any(
            region.addr <= addr
            and addr + nbytes <= region.end
            # of no bytes, what it touches from below is its region
            and (nbytes > 0 or addr == region.addr or not _starts_at(offered, addr))
            for region in offered
        )
        for addr, nbytes in wanted
    ]


def _starts_at(offered: Sequence[Region], addr: int) -> bool:
    return any(region.addr == addr for region in offered)


@given(
    st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=300),
)
def test_the_table_has_what_was_added_and_not_removed(changes: list[tuple[int, bool]]) -> None:
    offers = Offers()
    model: dict[int, Region] = {}
    for number, add in changes:
        region = Region(4096 * number, 100 + number)
        if add and number not in model:
            offers.add(region)
            model[number] = region
        elif not add and number in model:
            offers.remove(region)
            del model[number]
        assert rows_of(offers) == sorted((one.addr, one.nbytes) for one in model.values())
        asked = pieces(*[(4096 * each, 100) for each in range(201)])
        assert offers.held().holds(asked).tolist() == [each in model for each in range(201)]


def rows_of(offers: Offers) -> list[tuple[int, int]]:
    """As a reader of the same host finds them: by the head alone."""
    count = int(offers.head[ROWS])
    words = (ctypes.c_uint64 * (2 * count)).from_address(int(offers.head[ADDRESS]) or 1)
    return sorted(zip(words[0::2], words[1::2], strict=True))


def test_only_what_takes_something_away_is_a_change() -> None:
    offers = Offers()
    some = [Region(4096 * number, 4096) for number in range(1, 65)]
    offers.add(some[0])
    before = offers.head[AS_IT_WAS].tobytes()
    for region in some[1:]:
        offers.add(region)
    assert offers.head[AS_IT_WAS].tobytes() == before
    offers.remove(some[5])
    assert offers.head[AS_IT_WAS].tobytes() != before
    assert int(offers.head[CHANGES]) % 2 == 0


def test_rows_that_move_are_a_change() -> None:
    offers = Offers()
    for number in range(64):
        offers.add(Region(4096 * number, 1))
    before = int(offers.head[CHANGES])
    offers.add(Region(1 << 40, 1))
    assert int(offers.head[CHANGES]) == before + 2


def test_the_head_stays_where_it_is() -> None:
    offers = Offers()
    addr = offers.head.ctypes.data
    for number in range(1000):
        offers.add(Region(4096 * number, 1))
    offers.end()
    assert offers.head.ctypes.data == addr
    assert len(offers.head) == HEAD_WORDS


def test_after_the_end_nothing_is_offered_and_the_table_has_another_name() -> None:
    offers = Offers()
    name = offers.id
    offers.add(Region(4096, 4096))
    offers.end()
    assert not offers.held().holds(pieces((4096, 1))).any()
    assert offers.id != name
    assert not offers.head.any()


def test_two_tables_have_different_names() -> None:
    assert Offers().id != Offers().id


def test_what_was_not_added_cannot_be_removed() -> None:
    with pytest.raises(KeyError):
        Offers().remove(Region(4096, 1))
