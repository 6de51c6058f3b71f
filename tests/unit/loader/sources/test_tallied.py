"""Digests of pieces as an engine has summed them up, also while others still come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine_loader.digests.table import NBYTES, digest_of_sums
from engine_loader.sources.proofs import Group
from engine_loader.sources.tallied import Tallied
from engine_registry import Region
from tests.support.builders import an_entry

Numbers = npt.NDArray[np.int64]
SIZES = {"a": 8, "b": 24, "c": 16}
SUMS = {"a": [11], "b": [21, 22], "c": [31]}  # of blocks


def a_group(apart: Sequence[int] = (0, 1, 2)) -> Group:
    """Of three tensors, in the order in which their digests are not."""
    pieces = [an_entry(name, 0, size) for name, size in SIZES.items()]
    regions = tuple(Region(100 * number, pieces[number].nbytes) for number in apart)
    return Group((0,), tuple(SIZES), tuple(pieces), (2, 0, 1), tuple(apart), (regions,))


class Sums:
    """Of all three, of which some bytes have come."""

    def __init__(self, *names: str) -> None:
        self.firsts = np.array([0, 1, 3], np.int64)
        self.news = True
        self.asked = 0
        self.came = dict.fromkeys(SIZES, 0)
        for name in names:
            self.came[name] = SIZES[name]

    def has_news(self) -> bool:
        return self.news

    def sums(self) -> tuple[Numbers, Numbers]:
        self.news = False
        self.asked += 1
        blocks = [(name, word) for name, words in SUMS.items() for word in words]
        words = [word if self.came[name] else 0 for name, word in blocks]
        nbytes = [self.came[name] // len(SUMS[name]) for name, _ in blocks]
        return np.array(words, np.int64), np.array(nbytes, np.int64)

    def close(self) -> None:
        pass


def table(**digests: bytes) -> bytes:
    """Of the sources: in the order of the group's slots."""
    found = {
        name: digest_of_sums(SIZES[name], np.array(SUMS[name], np.int64).tobytes())
        for name in SIZES
    } | digests
    return found["b"] + found["c"] + found["a"]


def test_pieces_that_have_come_are_equal_to_what_the_table_says() -> None:
    assert Tallied(a_group(), [Sums("a", "b", "c")]).equal_to(table()) == {0, 1, 2}
    assert Tallied(a_group(), [Sums("a", "c")]).equal_to(table()) == {0, 2}
    assert Tallied(a_group(), [Sums()]).equal_to(table()) == set()


def test_a_piece_that_differs_is_not_among_them() -> None:
    assert Tallied(a_group(), [Sums("a", "b")]).equal_to(table(b=bytes(NBYTES))) == {0}


def test_each_look_adds_what_has_come_since_the_one_before() -> None:
    sums = Sums("b")
    tallied = Tallied(a_group(), [sums])
    tallied.look()
    tallied.look()
    assert sums.asked == 1
    sums.came["c"], sums.news = SIZES["c"], True
    tallied.look()
    assert tallied._numbers == [1, 2]
    assert tallied.equal_to(table()) == {1, 2}
    assert sums.asked == 2


def test_a_piece_that_got_some_bytes_twice_has_no_digest() -> None:
    sums = Sums("a", "b")
    sums.came["b"] += 2
    assert Tallied(a_group(), [sums]).equal_to(table()) == {0}


def test_what_several_sources_have_brought_is_added_up() -> None:
    assert Tallied(a_group(), [Sums("a"), Sums("b", "c")]).equal_to(table()) == {0, 1, 2}


def test_where_no_piece_can_be_summed_up_nobody_is_asked() -> None:
    sums = Sums("a")
    assert Tallied(a_group(()), [sums]).equal_to(table()) == set()
    assert sums.asked == 0
