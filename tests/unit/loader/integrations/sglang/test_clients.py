"""A read from a seed counts only if the seed was the same, and unchanged, before and after."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_loader.errors import SourceLost, TornRead
from engine_loader.integrations.sglang.clients import Reading, read_header, weights_of
from engine_loader.publishing.header import Header, HeaderCell
from engine_registry import RankRecord
from tests.support.builders import a_manifest, a_record, an_entry

CONTENT = "c" * 32


class Library:
    """Mooncake within one process."""

    def __init__(self, code: int = 0, register_code: int = 0) -> None:
        self.registered: set[int] = set()
        self._code = code
        self._register_code = register_code

    def register_memory(self, addr: int, _: int) -> int:
        if not self._register_code:
            self.registered.add(addr)
        return self._register_code

    def unregister_memory(self, addr: int) -> int:
        self.registered.remove(addr)
        return 0

    def batch_transfer_sync_read(
        self, _: str, here: Sequence[int], there: Sequence[int], nbytes: Sequence[int]
    ) -> int:
        assert set(here) <= self.registered
        for one in zip(here, there, nbytes, strict=True):
            ctypes.memmove(*one)
        return self._code


class Ticket:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Seed:
    """One rank with a header, and the registry that knows it."""

    def __init__(self) -> None:
        self.header = HeaderCell(torch.device("cpu"))
        self.record: RankRecord = replace(a_record(), header_addr=self.header.region.addr)
        self.tickets: list[Ticket] = []
        self.is_current = True
        self.write(version=0)

    def write(self, version: int, changing: bool = False, content: str = CONTENT) -> None:
        sequence = 2 * version + changing
        self.header.write(Header(self.record.incarnation, sequence, content))

    def manifest(self, _: RankRecord) -> Any:
        return a_manifest(an_entry("w", 4096, 24, dtype="float32", shape=(2, 3)))

    def pull(self, _: RankRecord) -> Ticket | None:
        if not self.is_current:
            return None
        self.tickets.append(Ticket())
        return self.tickets[-1]

    def read(self, library: Library | None = None) -> Reading:
        registry: Any = self
        return Reading(registry, self.record, library or Library())


@pytest.fixture
def seed() -> Seed:
    return Seed()


def test_sglang_is_answered_with_the_session_and_the_table_of_the_seed(seed: Seed) -> None:
    with seed.read() as reading:
        assert reading.answer == (seed.record.session_id, {"w": (4096, 6, 4)})
        reading.check()


def test_the_ticket_is_held_while_sglang_reads(seed: Seed) -> None:
    with seed.read():
        assert [ticket.closed for ticket in seed.tickets] == [False]
    assert [ticket.closed for ticket in seed.tickets] == [True]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"version": 0, "changing": True},
        {"version": 0, "content": "d" * 32},
    ],
)
def test_weights_that_change_meanwhile_do_not_count(seed: Seed, change: dict[str, Any]) -> None:
    with seed.read() as reading:
        seed.write(**change)
        with pytest.raises(TornRead):
            reading.check()


def test_a_seed_that_is_being_changed_is_not_read(seed: Seed) -> None:
    seed.write(version=1, changing=True)
    with pytest.raises(TornRead, match="are being changed"):
        seed.read()
    assert seed.tickets[0].closed


def test_a_seed_that_another_process_has_replaced_is_not_read(seed: Seed) -> None:
    seed.header.erase()
    with pytest.raises(SourceLost, match="is not the one that registered"):
        seed.read()
    seed.header.write(Header("9" * 32, 0, CONTENT))
    with pytest.raises(SourceLost):
        seed.read()
    assert all(ticket.closed for ticket in seed.tickets)


def test_a_record_that_has_changed_since_is_not_read(seed: Seed) -> None:
    seed.is_current = False
    with pytest.raises(SourceLost, match="has changed since it was found"):
        seed.read()


@pytest.mark.parametrize("library", [Library(code=-1), Library(register_code=-5)])
def test_a_header_that_cannot_be_read_is_none_and_no_memory_stays_registered(
    seed: Seed, library: Library
) -> None:
    assert read_header(library, seed.record) is None
    assert library.registered == set()


def test_tensors_without_elements_have_a_place_in_the_table() -> None:
    manifest = a_manifest(an_entry("e", 0, 0, dtype="float32", shape=(0,)))
    assert weights_of(manifest) == {"e": (0, 0, 1)}
