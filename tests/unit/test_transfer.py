"""Batches within the engine's bounds, and what is known of a transfer that breaks off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import Engine, Progress
from loader.engine import MAX_BATCH, MAX_BATCH_NBYTES
from loader.errors import ReadFailed
from loader.plan import ReadOp
from loader.transfer import batches, transfer


def ops(sizes: Iterable[int]) -> list[ReadOp]:
    """Far apart, so that no two follow each other."""
    return [ReadOp("a/0", number << 40, (number + 1) << 50, nbytes) for number, nbytes in enumerate(sizes)]


SIZES = st.lists(st.integers(1, 3) | st.integers(1, 3 * MAX_BATCH_NBYTES), max_size=20) | st.lists(
    st.just(1), min_size=MAX_BATCH - 2, max_size=2 * MAX_BATCH + 2
)


@given(SIZES)
def test_batches_keep_within_both_bounds_and_hold_every_byte_in_order(sizes: list[int]) -> None:
    wanted = ops(sizes)
    found = list(batches(wanted))
    assert all(1 <= len(batch) <= MAX_BATCH and sum(op.nbytes for op in batch) <= MAX_BATCH_NBYTES for batch in found)
    pieces = iter([op for batch in found for op in batch])
    for op in wanted:
        done = 0
        while done < op.nbytes:
            piece = next(pieces)
            assert (piece.src_addr, piece.dst_addr) == (op.src_addr + done, op.dst_addr + done)
            done += piece.nbytes
        assert done == op.nbytes
    assert next(pieces, None) is None


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ([], []),
        ([MAX_BATCH_NBYTES], [1]),
        ([MAX_BATCH_NBYTES, 1], [1, 1]),
        ([MAX_BATCH_NBYTES + 1], [1, 1]),
        ([MAX_BATCH_NBYTES - 1, 1, 1], [2, 1]),
        ([1] * MAX_BATCH, [MAX_BATCH]),
        ([1] * (MAX_BATCH + 1), [MAX_BATCH, 1]),
        ([0, 1, 0], [1]),
    ],
)
def test_a_batch_is_as_long_as_the_bounds_allow(sizes: list[int], lengths: list[int]) -> None:
    assert [len(batch) for batch in batches(ops(sizes))] == lengths


def test_a_long_read_is_cut_into_as_few_pieces_as_possible() -> None:
    nbytes = 5 * MAX_BATCH_NBYTES + 7
    assert len(list(batches(ops([nbytes])))) == ceil(nbytes / MAX_BATCH_NBYTES)


class Peer:
    """An engine that reads `good` batches and fails in the next."""

    def __init__(self, good: int) -> None:
        self._good = good
        self.read_from: list[str] = []

    def read(self, session_id: str, ops: Sequence[ReadOp]) -> None:
        if len(self.read_from) == self._good:
            raise ReadFailed("the peer has gone")
        self.read_from.append(session_id)


def test_a_transfer_reports_its_progress_up_to_the_last_byte() -> None:
    peer, done, heard = Peer(good=9), list[ReadOp](), list[Progress]()
    wanted = ops([MAX_BATCH_NBYTES, 10, MAX_BATCH_NBYTES])
    transfer(cast(Engine, peer), "h:1", wanted, done, heard.append)
    assert done == wanted
    total = 2 * MAX_BATCH_NBYTES + 10
    assert heard == [Progress(nbytes, total) for nbytes in (MAX_BATCH_NBYTES, MAX_BATCH_NBYTES + 10, total)]
    assert peer.read_from == ["h:1"] * 3


def test_a_transfer_that_breaks_off_has_noted_what_arrived() -> None:
    done: list[ReadOp] = []
    wanted = ops([MAX_BATCH_NBYTES] * 3)
    with pytest.raises(ReadFailed):
        transfer(cast(Engine, Peer(good=2)), "h:1", wanted, done, lambda _: None)
    assert done == wanted[:2]
