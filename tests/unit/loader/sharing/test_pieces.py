"""What an export by descriptors says, and what of it is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader import CudaIpcEngine
from engine_loader.errors import EngineFailed, ReadFailed
from engine_loader.sharing.pieces import (
    Allocation,
    Pieces,
    exports_of,
    is_by_descriptors,
    is_on_host,
)
from engine_registry import Manifest, Region
from engine_registry.registration.descriptors import DescriptorPlace
from engine_registry.schema.manifest import Export
from engine_registry.schema.manifest_format import MAX_HANDLE_NBYTES, decode, encode
from tests.support.host_gpus import HostGpus

PLACE = DescriptorPlace(b"n" * 16, b"s" * 16)
PAGE = 4096


def by_descriptors(addr: int, nbytes: int = PAGE) -> Allocation:
    return Allocation(addr, nbytes, b"")


def decoded(export: Export) -> tuple[int, tuple[int, ...]]:
    pieces = Pieces.decode(export)
    assert pieces.place == PLACE
    return pieces.first, pieces.sizes


def test_neighbours_are_one_export_whose_descriptors_are_numbered_by_address() -> None:
    exports = exports_of(
        [by_descriptors(3 * PAGE), by_descriptors(PAGE), by_descriptors(2 * PAGE)] * 2
        + [by_descriptors(8 * PAGE, 5 * PAGE), by_descriptors(13 * PAGE)],
        PLACE,
    )
    assert [(one.addr, one.nbytes) for one in exports] == [(PAGE, 3 * PAGE), (8 * PAGE, 6 * PAGE)]
    assert [decoded(one) for one in exports] == [(0, (PAGE,) * 3), (3, (5 * PAGE, PAGE))]


def test_memory_with_a_handle_is_an_export_of_its_own() -> None:
    handle = bytes(range(64))
    exports = exports_of(
        [
            by_descriptors(PAGE),
            Allocation(2 * PAGE, PAGE, handle),
            Allocation(3 * PAGE, PAGE, handle),
            by_descriptors(4 * PAGE),
        ],
        PLACE,
    )
    assert [one.nbytes for one in exports] == [PAGE] * 4
    assert [is_by_descriptors(one) for one in exports] == [True, False, False, True]
    assert [decoded(exports[number]) for number in (0, 3)] == [(0, (PAGE,)), (1, (PAGE,))]


def test_memory_of_the_host_is_an_export_of_its_own_and_says_so() -> None:
    exports = exports_of(
        [
            by_descriptors(PAGE),
            Allocation(2 * PAGE, PAGE, b"", on_host=True),
            Allocation(3 * PAGE, 2 * PAGE, b"", on_host=True),
            by_descriptors(5 * PAGE),
            by_descriptors(6 * PAGE),
        ],
        PLACE,
    )
    assert [is_on_host(one) for one in exports] == [False, True, True, False]
    assert all(map(is_by_descriptors, exports))
    assert [decoded(one) for one in exports] == [
        (0, (PAGE,)),
        (1, (PAGE,)),
        (2, (2 * PAGE,)),
        (3, (PAGE, PAGE)),
    ]


def test_seven_thousand_pieces_of_a_segment_take_one_short_handle() -> None:
    nbytes = 20 << 20
    (export,) = exports_of([by_descriptors(n * nbytes, nbytes) for n in range(7000)], PLACE)
    assert len(export.handle) == 49
    assert decoded(export) == (0, (nbytes,) * 7000)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=60))
def test_exports_have_every_piece_once_whatever_their_sizes(steps: list[tuple[int, int]]) -> None:
    allocations, at = [], PAGE
    for gap, pages in steps:
        at += gap // 2 * PAGE
        allocations.append(by_descriptors(at, pages * PAGE))
        at += pages * PAGE
    exports = exports_of(reversed(allocations), PLACE)
    found, number = [], 0
    for export in exports:
        first, sizes = decoded(export)
        assert first == number
        assert 64 != len(export.handle) <= MAX_HANDLE_NBYTES
        number += len(sizes)
        at = export.addr
        for nbytes in sizes:
            found.append(by_descriptors(at, nbytes))
            at += nbytes
    assert found == allocations
    manifest = Manifest((), (Region(PAGE, 1),), exports=exports)
    ref, parts = encode(manifest)
    assert decode("/engines/a/0", ref, parts).exports == exports


GOOD = Pieces(PLACE, 0, (PAGE, PAGE)).encode()


@pytest.mark.parametrize(
    ("handle", "nbytes"),
    [
        (b"", PAGE),
        (b"\1", PAGE),
        (GOOD[:-1], 2 * PAGE),
        (GOOD + b"\0", 2 * PAGE),
        (b"\2" + GOOD[1:], 2 * PAGE),  # the host's have an export each
        (b"\3" + GOOD[1:], 2 * PAGE),
        (GOOD, 2 * PAGE + 1),
        (GOOD, PAGE),
        (GOOD[:37], PAGE),
        (GOOD[:37] + struct.pack("<QI", 0, 5), PAGE),
        (GOOD[:37] + struct.pack("<QI", 1, 2**32 - 1), 2**32 - 1),
        (GOOD[:37] + struct.pack("<QI", 2**64 - 1, 2), PAGE),
    ],
)
def test_a_handle_that_is_none_is_refused_and_makes_nothing(handle: bytes, nbytes: int) -> None:
    with pytest.raises(EngineFailed, match=r"handle of|are exported of|more than"):
        Pieces.decode(Export(PAGE, nbytes, handle))


def test_where_no_keeper_hands_descriptors_out_a_contact_says_so() -> None:
    """The process is there, its keeper is not."""
    with CudaIpcEngine(gpus=HostGpus()) as source, CudaIpcEngine(gpus=HostGpus()) as reader:
        export = Export(PAGE, 2 * PAGE, Pieces(DescriptorPlace.new(), 0, (PAGE, PAGE)).encode())
        del source._here[source.session_id]  # so that it is another process's
        with pytest.raises(ReadFailed, match="the keeper that hands out the memory has ended"):
            reader.connect(source.session_id, [export])


def test_a_process_that_can_have_no_more_descriptors_says_how_many_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus = HostGpus()
    addr = gpus.allocate_pieces(*[PAGE] * 3)

    def none_left(_: int) -> int:
        raise OSError(24, "Too many open files")

    with CudaIpcEngine(gpus=gpus) as engine:
        (export,) = engine.exports([Region(addr, 3 * PAGE)])
        assert engine.descriptors([]) is None
        monkeypatch.setattr(gpus, "descriptor", none_left)
        with pytest.raises(
            EngineFailed, match=r"3 allocations need a file descriptor each: no file descriptors"
        ):
            engine.descriptors([export])
