"""Whatever order regions begin and end in: no byte twice, all bytes of each, and nothing in the
end.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.engines.base import with_regions
from engine_loader.engines.region_book import Begun, RegionBook, Regions
from engine_loader.errors import EngineFailed, TensorsUnusable
from engine_loader.planning.plan import ReadOp
from engine_registry import Manifest, Region, TensorEntry

REGIONS = st.builds(Region, st.integers(0, 40), st.integers(1, 20))
STEPS = st.lists(st.one_of(REGIONS, st.integers(0, 100)), max_size=40)


def bytes_of(parts: Regions) -> list[int]:
    return [byte for part in parts for byte in range(part.addr, part.end)]


class Library:
    """Holds what the book says that it has to; a byte at most once."""

    def __init__(self) -> None:
        self.book = RegionBook()
        self.held: set[Region] = set()

    def begin(self, region: Region) -> Begun:
        begun = self.book.begin(region)
        self.held |= set(begun.new)
        assert sum(one.nbytes for one in self.held) == len(set(bytes_of(tuple(self.held))))
        return begun

    def end(self, region: Region) -> None:
        unused = self.book.end(region)
        assert set(unused) <= self.held
        self.held -= set(unused)


@given(STEPS)
def test_tiles_cover_each_region_and_lie_in_what_the_library_holds_as_long_as_it_is_in_use(
    steps: list[Region | int],
) -> None:
    """A step begins a region, or ends one of those that have begun, by its number."""
    library = Library()
    begun: list[tuple[Region, Regions]] = []
    for step in steps:
        if isinstance(step, Region):
            begun.append((step, library.begin(step).parts))
        elif begun:
            library.end(begun.pop(step % len(begun))[0])
        assert set(library.book) == library.held
        for region, parts in begun:
            assert bytes_of(parts) == list(range(region.addr, region.end))
            for part in parts:
                holder = library.book.holder_of(part.addr, part.nbytes)
                assert holder is not None
                assert holder in library.held
    for region, _ in begun:
        library.end(region)
    assert library.held == set()
    assert len(library.book) == 0


@given(st.lists(REGIONS, min_size=1, max_size=12))
def test_the_parts_of_parts_are_the_same_parts(regions: list[Region]) -> None:
    """So whoever lends parts that were lent, or offers what was offered, changes nothing."""
    book = RegionBook()
    for region in regions:
        for part in book.begin(region).parts:
            assert book.begin(part) == Begun((part,), ())


def test_a_region_that_never_began_ends_without_any_effect() -> None:
    book = RegionBook()
    book.begin(Region(0, 10))
    for region in (Region(0, 5), Region(5, 10), Region(20, 1)):
        assert book.end(region) == ()
    assert list(book) == [Region(0, 10)]
    assert book.end(Region(0, 10)) == (Region(0, 10),)
    assert book.end(Region(0, 10)) == ()


def test_a_registered_region_stays_whole_as_long_as_anybody_uses_a_part_of_it() -> None:
    book = RegionBook()
    book.begin(Region(0, 10))
    assert book.begin(Region(5, 10)) == Begun((Region(5, 5), Region(10, 5)), (Region(10, 5),))
    assert book.end(Region(0, 10)) == ()
    assert book.holder_of(0, 10) == Region(0, 10)
    assert book.end(Region(5, 10)) == (Region(0, 10), Region(10, 5))


def test_a_destination_lies_in_one_region() -> None:
    book = RegionBook()
    book.begin(Region(0, 10))
    book.begin(Region(10, 10))
    book.check_destination(ReadOp("a/0", 0, 12, 8))
    for start, nbytes in ((5, 10), (15, 6), (30, 1)):
        with pytest.raises(EngineFailed, match="lend the destination first"):
            book.check_destination(ReadOp("a/0", 0, start, nbytes))


# -- the parts of a manifest
# --------------------------------------------------------------------------------------------------


def entry(name: str, addr: int, nbytes: int) -> TensorEntry:
    return TensorEntry(name, "uint8", (nbytes,), addr, nbytes, (nbytes,), (0,))


MANIFEST = Manifest(
    (entry("a", 100, 50), entry("empty", 0, 0), entry("b", 150, 50)), (Region(100, 100),)
)


def test_a_manifest_whose_regions_are_its_tiles_stays_as_it_is() -> None:
    assert with_regions(MANIFEST, (Region(100, 100),)) is MANIFEST


@pytest.mark.parametrize("order", list(itertools.permutations((Region(100, 50), Region(150, 50)))))
def test_the_parts_become_the_regions_of_a_manifest(order: Regions) -> None:
    assert with_regions(MANIFEST, order).regions == (Region(100, 50), Region(150, 50))
    assert with_regions(MANIFEST, order).tensors == MANIFEST.tensors


def test_a_tensor_that_a_tile_cuts_is_named() -> None:
    with pytest.raises(
        TensorsUnusable, match=r"1 tensors lie partly in memory .*: b: publish or load tensors"
    ) as refused:
        with_regions(MANIFEST, (Region(100, 60), Region(160, 40)))
    assert refused.value.details == {"problems": ["b"]}
