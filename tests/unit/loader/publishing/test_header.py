"""The header's bytes, and what a reader makes of what it finds at a source's address."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

import pytest
import torch

from engine_loader import InProcessEngine
from engine_loader.errors import ReadFailed, SourceLost
from engine_loader.publishing.header import NBYTES, Header, HeaderCell, fetch_header
from engine_registry import RankRecord
from engine_registry.schema.record import implied_content
from tests.support.builders import CONTENT, INCARNATION, OTHER_INCARNATION, a_record


@pytest.fixture
def cell() -> HeaderCell:
    return HeaderCell(torch.device("cpu"))


def memory(cell: HeaderCell) -> bytes:
    return ctypes.string_at(cell.region.addr, cell.region.nbytes)


def overwrite(cell: HeaderCell, value: bytes) -> None:
    ctypes.memmove(cell.region.addr, value, len(value))


def test_a_header_is_64_bytes_of_magic_incarnation_little_endian_sequence_and_content(
    cell: HeaderCell,
) -> None:
    assert (NBYTES, cell.region.nbytes) == (64, 64)
    cell.write(Header(INCARNATION, 0x0102030405060708, CONTENT))
    assert memory(cell) == b"ENGREG01" + bytes.fromhex(INCARNATION) + bytes(
        [8, 7, 6, 5, 4, 3, 2, 1]
    ) + bytes.fromhex(CONTENT) + bytes(16)


@pytest.mark.parametrize("sequence", [0, 1, 2**64 - 1])
def test_what_is_written_is_what_is_read(cell: HeaderCell, sequence: int) -> None:
    header = Header(INCARNATION, sequence, CONTENT)
    cell.write(header)
    assert cell.read() == header


@pytest.mark.parametrize(
    ("sequence", "version", "updating"), [(0, 0, False), (1, 0, True), (2, 1, False), (7, 3, True)]
)
def test_the_sequence_is_twice_the_version_and_odd_during_an_update(
    sequence: int, version: int, updating: bool
) -> None:
    header = Header(INCARNATION, sequence, CONTENT)
    assert (header.version, header.updating) == (version, updating)


def test_fresh_and_erased_memory_is_no_header(cell: HeaderCell) -> None:
    assert cell.read() is None
    cell.write(Header(INCARNATION, 2, CONTENT))
    cell.erase()
    assert memory(cell) == bytes(64)
    assert cell.read() is None


def test_a_header_that_is_retired_stays_erased_whatever_is_written(cell: HeaderCell) -> None:
    cell.write(Header(INCARNATION, 1, CONTENT))
    cell.retire()
    cell.write(Header(INCARNATION, 2, CONTENT))
    assert memory(cell) == bytes(64)


@pytest.mark.parametrize("magic", [b"ENGREG02", b"engreg01", b"\0ENGREG0", bytes(8)])
def test_another_magic_is_no_header(cell: HeaderCell, magic: bytes) -> None:
    cell.write(Header(INCARNATION, 2, CONTENT))
    overwrite(cell, magic)
    assert cell.read() is None


def test_a_later_writer_may_use_the_bytes_that_are_zero_now(cell: HeaderCell) -> None:
    content = bytes.fromhex(CONTENT)
    overwrite(
        cell,
        b"ENGREG01" + bytes.fromhex(INCARNATION) + struct.pack("<Q", 6) + content + b"\xff" * 16,
    )
    assert cell.read() == Header(INCARNATION, 6, CONTENT)


def test_a_header_that_states_no_content_has_another_in_each_version_and_each_launch(
    cell: HeaderCell,
) -> None:
    """As those of older releases, whose records are read in the same way."""
    seen = set()
    for incarnation, version in ((INCARNATION, 0), (INCARNATION, 1), (OTHER_INCARNATION, 0)):
        overwrite(
            cell,
            b"ENGREG01" + bytes.fromhex(incarnation) + struct.pack("<Q", 2 * version) + bytes(32),
        )
        header = cell.read()
        assert header is not None
        assert header.content == implied_content(incarnation, version)
        seen.add(header.content)
    assert len(seen) == 3


def test_marks_lie_behind_the_header_and_neither_disturbs_the_other() -> None:
    cell = HeaderCell(torch.device("cpu"), marks=5)
    assert cell.region.nbytes == NBYTES + 5
    cell.write(Header(INCARNATION, 2, CONTENT))
    cell.mark(b"\1\0\1\1\0")
    assert memory(cell)[NBYTES:] == b"\1\0\1\1\0" == cell.read_marks()
    assert cell.read() == Header(INCARNATION, 2, CONTENT)
    cell.erase()
    assert (cell.read(), cell.read_marks()) == (None, b"\1\0\1\1\0")


# -- over an engine
# --------------------------------------------------------------------------------------------------


class Source:
    """A header that peers can read, and the record that leads to it."""

    def __init__(self) -> None:
        self.engine = InProcessEngine()
        self.cell = HeaderCell(torch.device("cpu"))
        self.engine.register(self.cell.region)
        self.cell.write(Header(INCARNATION, 6, CONTENT))

    @property
    def record(self) -> RankRecord:
        return a_record(session_id=self.engine.session_id, header_addr=self.cell.region.addr)


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    with source.engine:
        yield source


@pytest.fixture
def reader(cell: HeaderCell) -> Iterator[InProcessEngine]:
    with InProcessEngine() as engine:
        engine.lend(cell.region)
        yield engine


def test_the_header_of_a_live_source_is_fetched(
    source: Source, reader: InProcessEngine, cell: HeaderCell
) -> None:
    assert fetch_header(reader, source.record, cell) == Header(INCARNATION, 6, CONTENT)
    source.cell.write(Header(INCARNATION, 7, CONTENT))
    assert fetch_header(reader, source.record, cell) == Header(INCARNATION, 7, CONTENT)


@pytest.mark.parametrize(
    "found", [bytes(64), b"\xff" * 64, b"ENGREG01" + bytes.fromhex(OTHER_INCARNATION) + bytes(40)]
)
def test_whoever_else_answers_at_the_address_is_not_the_source(
    source: Source, reader: InProcessEngine, cell: HeaderCell, found: bytes
) -> None:
    overwrite(source.cell, found)
    with pytest.raises(
        SourceLost, match="is not the process that registered /engines/qwen/0"
    ) as caught:
        fetch_header(reader, source.record, cell)
    assert caught.value.details == {"key": "/engines/qwen/0"}


def test_a_source_that_cannot_be_read_leaves_no_earlier_header_to_be_taken_for_its_own(
    source: Source, reader: InProcessEngine, cell: HeaderCell
) -> None:
    fetch_header(reader, source.record, cell)
    source.engine.close()
    with pytest.raises(ReadFailed):
        fetch_header(reader, source.record, cell)
    assert cell.read() is None
