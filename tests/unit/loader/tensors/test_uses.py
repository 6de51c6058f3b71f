"""Which memory is published, and which is being filled: what may be at the same time, and what is
refused.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.errors import MemoryInUse
from engine_loader.tensors.uses import Use, _Uses, runs_of
from tests.support.builders import an_entry

HERE, BESIDE = [(100, 200)], [(200, 300)]


@pytest.fixture
def uses() -> _Uses:
    return _Uses()


def test_two_loads_do_not_fill_the_same_memory(uses: _Uses) -> None:
    with uses.fill("a load of a", HERE):
        with pytest.raises(
            MemoryInUse,
            match="a load of b cannot fill memory that a load of a fills: wait for its end",
        ):
            uses.fill("a load of b", [(150, 151)]).__enter__()
        with uses.fill("a load of c", BESIDE):
            pass
    with uses.fill("a load of b", HERE):
        pass


def test_published_memory_is_filled_only_while_its_publication_says_that_it_changes(
    uses: _Uses,
) -> None:
    published = uses.serve("a/0", HERE)
    with pytest.raises(
        MemoryInUse,
        match="cannot fill memory that is published as a/0: load inside that publication's update",
    ):
        uses.fill("a load", HERE).__enter__()
    uses.change(published)
    with uses.fill("a load", HERE):
        pass
    uses.keep(published)
    with pytest.raises(MemoryInUse):
        uses.fill("a load", HERE).__enter__()
    uses.end(published)
    uses.end(published)
    with uses.fill("a load", HERE):
        pass


def test_an_update_does_not_end_while_a_load_still_fills_the_memory(uses: _Uses) -> None:
    published = uses.serve("a/0", HERE)
    uses.change(published)
    with uses.fill("a load", HERE):
        with pytest.raises(MemoryInUse, match="a/0 is not complete: a load still fills its memory"):
            uses.keep(published)
        with pytest.raises(MemoryInUse):  # another one still
            uses.fill("another load", HERE).__enter__()
    uses.keep(published)


def test_what_a_load_fills_is_published_by_that_load_alone(uses: _Uses) -> None:
    with uses.fill("a load", HERE) as filling:
        with pytest.raises(MemoryInUse, match="b/0 cannot be published: a load fills its memory"):
            uses.serve("b/0", HERE)
        published = uses.serve("a/0", HERE, filling)
        assert published.changing
        with pytest.raises(MemoryInUse, match="b/0 cannot be published: a"):
            uses.serve("b/0", HERE)
        uses.keep(published, filling)
    with pytest.raises(MemoryInUse):
        uses.fill("a load", HERE).__enter__()


def test_memory_that_two_publish_is_not_updated_by_one_of_them(uses: _Uses) -> None:
    first, second = uses.serve("a/0", HERE), uses.serve("b/0", HERE)
    with pytest.raises(
        MemoryInUse,
        match=r"a/0 cannot be updated: b/0 publishes the same memory.*close that publication first",
    ):
        uses.change(first)
    assert not first.changing
    uses.end(second)
    uses.change(first)
    with pytest.raises(
        MemoryInUse, match="c/0 cannot be published: a/0 is changing the same memory"
    ):
        uses.serve("c/0", HERE)


def test_a_use_that_is_forgotten_ends(uses: _Uses) -> None:
    """Its memory may be another tensor's by now."""
    published: Use | None = uses.serve("a/0", HERE)
    assert published is not None
    del published
    with uses.fill("a load", HERE):
        pass


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12).map(
    lambda pairs: runs_of(
        an_entry(f"t{at}", start, nbytes) for at, (start, nbytes) in enumerate(pairs)
    )
)


@given(RUNS, RUNS)
def test_two_uses_overlap_if_they_share_a_byte(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    def those(runs: list[tuple[int, int]]) -> set[int]:
        return {byte for start, end in runs for byte in range(start, end)}

    some, others = Use("a", one, served=True), Use("b", other, served=True)
    assert some.overlaps(others) == others.overlaps(some) == bool(those(one) & those(other))


@given(RUNS)
def test_runs_neither_overlap_nor_touch_and_are_in_order(runs: list[tuple[int, int]]) -> None:
    assert all(one[1] < following[0] for one, following in itertools.pairwise(runs))
    assert all(start < end for start, end in runs)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["fill", "serve", "change", "keep", "end"]), st.integers(0, 3), RUNS
        ),
        max_size=20,
    )
)
def test_whatever_is_refused_no_byte_is_ever_filled_twice_or_while_somebody_vouches_for_it(
    steps: list[tuple[str, int, list[tuple[int, int]]]],
) -> None:
    uses, fills, served = _Uses(), {}, {}
    for what, number, runs in steps:
        try:
            if what == "fill" and number not in fills:
                stack = ExitStack()
                fills[number] = (stack, stack.enter_context(uses.fill(str(number), runs)))
            elif what == "serve" and number not in served:
                served[number] = uses.serve(str(number), runs)
            elif what == "change" and number in served:
                uses.change(served[number])
            elif what == "keep" and number in served:
                uses.keep(served[number])
            elif what == "end":
                fills.pop(number, (ExitStack(), None))[0].close()
                uses.end(served.pop(number, Use("", [], served=True)))
        except MemoryInUse:
            pass
        filling = [use for _, use in fills.values()]
        for at, one in enumerate(filling):
            assert not any(one.overlaps(other) for other in filling[at + 1 :])
            assert not any(one.overlaps(other) for other in served.values() if not other.changing)
    for stack, _ in fills.values():
        stack.close()


def test_memory_is_held_for_one_publication_alone() -> None:
    """Two processes would adopt it."""
    uses = _Uses()
    first = uses.serve("first", [(0, 10)], held=True)
    others = [uses.serve("beside", [(0, 10)]), uses.serve("elsewhere", [(20, 30)], held=True)]
    with pytest.raises(MemoryInUse, match="second cannot be held: first is held"):
        uses.serve("second", [(5, 15)], held=True)
    uses.end(first)
    with pytest.raises(MemoryInUse, match="elsewhere is held"):
        uses.serve("second", [(5, 25)], held=True)
    assert uses.serve("second", [(5, 15)], held=True) not in others
