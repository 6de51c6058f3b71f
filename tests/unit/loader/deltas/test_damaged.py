"""Bytes that are no delta, or one of something else: an error with a name, and our memory is as it
was.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import event, given
from hypothesis import strategies as st

from engine_loader.deltas.apply import apply_all
from engine_loader.deltas.format import (
    BLOCK,
    BYTES,
    DENSE,
    HEADER_NBYTES,
    SAME,
    SHORTS,
    DeltaHeader,
    Section,
    directory_of,
    header_of,
    packed_directory,
)
from engine_loader.deltas.stated import Change
from engine_loader.errors import DeltaDamaged
from engine_loader.tensors.regions import describe
from tests.support.builders import an_entry
from tests.support.deltas import (
    AFTER,
    BEFORE,
    Guarded,
    Route,
    as_bytes,
    blocks_of,
    bring,
    delta,
    routes,
    sections_of,
)

OLD = {"a": torch.zeros(300, dtype=torch.int16), "b": torch.zeros(5), "c": torch.zeros(40)}
NEW = {name: tensor.clone() for name, tensor in OLD.items()}
NEW["a"][::30] = 7
NEW["c"][:] = 1.5
ENTRIES = describe(NEW).tensors
DATA = delta(ENTRIES, OLD, NEW)
HEADER = header_of(DATA[:HEADER_NBYTES], ENTRIES)


@routes
@given(st.data())
def test_changed_or_missing_bytes_are_found_or_make_no_difference(
    route: Route, data: st.DataObject
) -> None:
    came = bytearray(DATA)
    for at in data.draw(st.lists(st.integers(0, len(came) - 1), min_size=1, max_size=4)):
        came[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del came[data.draw(st.integers(0, len(came))) :]
    ours = {name: Guarded(tensor) for name, tensor in OLD.items()}
    try:
        with route():
            bring(bytes(came), ENTRIES, {name: one.tensor for name, one in ours.items()})
    except DeltaDamaged:
        assert bytes(came) != DATA
    else:
        assert all(as_bytes(one.tensor) == as_bytes(NEW[name]) for name, one in ours.items())
    for name, one in ours.items():
        one.check()
        assert as_bytes(one.tensor) in (as_bytes(OLD[name]), as_bytes(NEW[name]))


@given(st.binary(min_size=HEADER_NBYTES, max_size=HEADER_NBYTES))
def test_any_bytes_are_no_header(data: bytes) -> None:
    if any(data):
        with pytest.raises(DeltaDamaged):
            header_of(data, ENTRIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": 2},
        {"sections": 4, "nbytes": len(DATA) + 96},
        {"directory_offset": 0, "nbytes": 96},
        {"directory_offset": len(DATA)},
        {"nbytes": 1 << 62, "directory_offset": (1 << 62) - 96},
        {"sections": 0},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_the_tensors_is_refused(changes: dict[str, Any]) -> None:
    assert HEADER is not None
    with pytest.raises(DeltaDamaged, match=r"sizes in the header|has 3"):
        header_of(replace(HEADER, **changes).packed(), ENTRIES)


@pytest.mark.parametrize("nbytes", [0, 1, HEADER_NBYTES - 1, HEADER_NBYTES + 1])
def test_a_header_of_another_length_is_refused(nbytes: int) -> None:
    for data in (DATA[:nbytes], bytes(nbytes)):
        with pytest.raises(DeltaDamaged, match="not the header"):
            header_of(data, ENTRIES)


def test_a_newer_format_is_named() -> None:
    packed = bytearray(DATA[: HEADER_NBYTES - 8])
    packed[8] = 2
    with pytest.raises(DeltaDamaged, match="has format 2, and this version reads 1"):
        header_of(
            bytes(packed) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(packed))), ENTRIES
        )


def test_a_delta_of_another_content_is_named() -> None:
    assert HEADER is not None
    HEADER.must_lead(BEFORE, AFTER)
    for before, after in ((AFTER, BEFORE), (BEFORE, BEFORE), (AFTER, AFTER)):
        with pytest.raises(DeltaDamaged, match=f"not from {before} to {after}"):
            HEADER.must_lead(before, after)


@routes
def test_a_reader_that_was_too_slow_sees_that_the_buffer_has_another_delta(route: Route) -> None:
    header = HEADER
    assert header is not None
    newer = {name: tensor.clone() for name, tensor in NEW.items()}
    newer["a"][1::30] = 8
    newer["c"][:] = 2.5
    came = delta(ENTRIES, NEW, newer)
    assert len(came) == len(DATA)
    with pytest.raises(DeltaDamaged, match="differs from its digest"):
        directory_of(header, came[header.directory_offset :], ENTRIES)
    data = torch.frombuffer(bytearray(came), dtype=torch.uint8)
    for name, section in GOOD.items():
        (entry,) = [entry for entry in ENTRIES if entry.name == name]
        ours = OLD[name].clone()
        with route(), pytest.raises(DeltaDamaged, match="differ from their digest"):
            apply_all(data, [Change(section, entry, ours, entry)])
        assert torch.equal(ours, OLD[name])


GOOD = sections_of(DATA, ENTRIES)


@pytest.mark.parametrize(
    "sections",
    [
        [replace(GOOD["a"], number=3), GOOD["c"]],
        [replace(GOOD["a"], number=2), GOOD["c"]],
        [replace(GOOD["a"], offset=0), GOOD["c"]],
        [replace(GOOD["a"], offset=GOOD["a"].offset + 8), GOOD["c"]],
        [replace(GOOD["a"], nbytes=GOOD["a"].nbytes + 8), GOOD["c"]],
        [GOOD["a"], replace(GOOD["c"], nbytes=1 << 40)],
        [GOOD["a"], replace(GOOD["c"], nbytes=GOOD["c"].nbytes - 1)],
        [GOOD["a"], replace(GOOD["c"], nbytes=GOOD["c"].nbytes - 8)],
        [GOOD["a"], replace(GOOD["c"], itemsize=2)],
        [GOOD["a"], replace(GOOD["c"], itemsize=0)],
        [GOOD["a"], replace(GOOD["c"], elements=39)],
        [GOOD["a"], replace(GOOD["c"], elements=1 << 63)],
    ],
    ids=str,
)
def test_a_directory_that_does_not_fit_the_tensors_is_refused(sections: list[Section]) -> None:
    assert HEADER is not None
    packed = packed_directory(sections)
    header = replace(HEADER, directory_digest=xxhash.xxh3_128_digest(packed))
    with pytest.raises(DeltaDamaged):
        directory_of(header, packed, ENTRIES)


def section_with(
    table: list[tuple[int, int]], content: bytes, elements: int = 100, itemsize: int = 2
) -> tuple[torch.Tensor, Section]:
    """With digests that are right."""
    packed = np.array([(*row, b"") for row in table], BLOCK).tobytes() + content
    section = Section(0, itemsize, 128, len(packed), elements, xxhash.xxh3_128_digest(packed))
    return torch.tensor(list(packed), dtype=torch.uint8), section


ENTRY = an_entry(nbytes=200, shape=(100,), dtype="int16")


def apply_to_zeros(route: Route, data: torch.Tensor, section: Section) -> bytes:
    """What 100 elements of 2 bytes are afterwards."""
    guarded = Guarded(torch.zeros(100, dtype=torch.int16))
    whole = torch.cat([torch.zeros(section.offset, dtype=torch.uint8), data])
    try:
        with route():
            apply_all(whole, [Change(section, ENTRY, guarded.tensor, ENTRY)])
    except DeltaDamaged:
        assert not any(as_bytes(guarded.tensor))
        raise
    finally:
        guarded.check()
    return as_bytes(guarded.tensor)


@routes
@pytest.mark.parametrize(
    ("table", "content"),
    [
        ([(1, BYTES)], bytes([100, *bytes(7)]) + bytes(8)),  # behind the last element
        ([(2, BYTES)], bytes([90, 10, *bytes(6)]) + bytes(8)),
        ([(2, BYTES)], bytes([90, 0, *bytes(6)]) + bytes(8)),  # twice the same
        ([(1, SHORTS)], b"\xff\xff" + bytes(6) + bytes(8)),
        ([(1, 4)], bytes(16)),  # a kind that there is not
        ([(1, 255)], bytes(16)),
        ([(1, SAME)], b""),
        ([(0, BYTES)], b""),
        ([(99, DENSE)], bytes(200)),
        ([(101, DENSE)], bytes(208)),
        ([(1 << 31, BYTES)], bytes(16)),
        ([(101, BYTES)], bytes(200)),
        ([(1, BYTES)], bytes(8)),  # cut short
        ([(1, BYTES)], bytes(24)),  # too long
        ([], b""),
        ([(1, BYTES), (1, BYTES)], bytes(32)),  # more blocks than the tensor has
    ],
    ids=str,
)
def test_a_section_that_does_not_fit_the_tensor_is_refused(
    route: Route, table: list[tuple[int, int]], content: bytes
) -> None:
    with pytest.raises(DeltaDamaged):
        apply_to_zeros(route, *section_with(table, content))


@routes
def test_a_good_block_before_a_bad_one_is_not_written_either(route: Route) -> None:
    good, bad = (bytes([gap, *bytes(7)]) + b"\7" * 2 + bytes(6) for gap in (0, 4))
    data, section = section_with([(1, BYTES)] * 4, good * 3 + bad)
    with blocks_of(64), pytest.raises(DeltaDamaged, match="outside of it"):
        apply_to_zeros(route, data, section)
    data, section = section_with([(1, BYTES)] * 4, good * 4)
    with blocks_of(64):
        assert apply_to_zeros(route, data, section)[::64] == b"\7" * 4


@routes
@given(st.data())
def test_a_hostile_section_is_refused_or_stays_in_the_tensor(
    route: Route, data: st.DataObject
) -> None:
    """Its digest is right."""
    kind = data.draw(st.sampled_from([BYTES, SHORTS, DENSE, SAME, 9]))
    count = data.draw(st.integers(0, 102))
    room = st.binary(max_size=400).map(lambda some: some + bytes(-len(some) % 8))
    nbytes = min(count, 100) * {BYTES: 1, SHORTS: 2}.get(kind, 0)
    gaps = bytearray(nbytes + -nbytes % 8)
    for at in range(len(gaps)):
        gaps[at] = data.draw(st.integers(0, 2))
    values = bytes((2 * min(count, 100) + 7) // 8 * 8)
    content = data.draw(room | st.just(bytes(gaps) + values))
    try:
        apply_to_zeros(route, *section_with([(count, kind)], content))
    except DeltaDamaged:
        event("refused")
    else:
        event("applied")


@routes
def test_a_section_of_another_tensor_is_refused(route: Route) -> None:
    data, section = section_with([(1, BYTES)], bytes(16), elements=200, itemsize=1)
    with pytest.raises(DeltaDamaged, match="does not fit a tensor"):
        apply_to_zeros(route, data, section)


def test_a_header_says_what_was_written() -> None:
    assert (
        DeltaHeader(
            BEFORE, AFTER, len(DATA), 3, 2, len(DATA) - 96, xxhash.xxh3_128_digest(DATA[-96:])
        )
        == HEADER
    )
    assert DATA[:8] == b"ENGDELTA"
