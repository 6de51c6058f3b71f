"""Which of the ranks that keepers have is adopted, or shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader import find_held
from engine_loader.adopting import finding
from engine_loader.adopting.finding import find_each
from engine_loader.sharing.pieces import Pieces
from engine_registry import Manifest, ModelIdentity, RankRecord, RankState, Registry
from engine_registry.errors import InvalidField, RecordDamaged
from engine_registry.registration.descriptors import DescriptorPlace
from engine_registry.registration.held import Kept
from engine_registry.schema.manifest import Export
from tests.support.builders import a_record

MODEL = ModelIdentity("m")
UNTIL = "2026-11-30T00:00:00Z"


@dataclass(frozen=True)
class Rank:
    """One that a keeper of this host has."""

    order: int = 1
    model: ModelIdentity = MODEL
    rank: int = 0
    world_size: int = 2
    tp: int = 0  # the index along an axis; 0: the rank states none
    state: RankState = RankState.READY
    held: bool = True
    is_written: bool = True  # that it is held, into its record
    has_left: bool = False
    is_other: bool = False  # another process has registered the rank since
    is_damaged: bool = False  # the manifest
    is_elsewhere: bool = False  # the keeper is not the one that the manifest names

    @property
    def topology(self) -> dict[str, tuple[int, int]]:
        return {"tp": (self.tp - 1, 2)} if self.tp else {}

    def is_wanted(self, shared: bool) -> bool:
        good = self.held or (shared and self.state is RankState.READY)
        wrong = self.is_other or self.is_damaged or self.is_elsewhere or self.has_left
        return good and not wrong


class Etcd:
    """As a Registry."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.kept: list[Kept] = []
        self.records: dict[str, RankRecord] = {}
        self._manifests: dict[str, Manifest | RecordDamaged] = {}
        for number, one in enumerate(ranks):
            record = a_record(
                instance=f"i{number}",
                rank=one.rank,
                world_size=one.world_size,
                incarnation=f"{number:032x}",
                model=one.model,
                topology=one.topology,
                state=one.state,
                order=one.order,
                ended="process ended" if one.has_left or (one.held and one.is_written) else "",
                held_until=UNTIL if one.held and one.is_written and not one.has_left else "",
            )
            place = DescriptorPlace(bytes([number]) * 16, bytes(16))
            handle = Pieces(place, 0, (4096,), on_host=True).encode()
            self.records[record.key] = record
            self._manifests[record.key] = (
                RecordDamaged("gone", key=record.key)
                if one.is_damaged
                else Manifest((), (), exports=(Export(4096, 4096, handle),))
            )
            name = bytes([99]) * 16 if one.is_elsewhere else place.name
            incarnation = "f" * 32 if one.is_other else record.incarnation
            until = UNTIL if one.held else ""
            self.kept.append(Kept(name, record.key, incarnation, 1, ("host",), 0, until, 9.0, 0))

    def record_at(self, key: str) -> RankRecord | None:
        return self.records.get(key)

    def manifests(self, records: Sequence[RankRecord]) -> list[Manifest | RecordDamaged]:
        return [self._manifests[record.key] for record in records]


def find(monkeypatch: pytest.MonkeyPatch, ranks: Sequence[Rank], shared: bool, wanted: Rank) -> int:
    """The number of the rank that is found; -1 where none is."""
    etcd = Etcd(ranks)
    monkeypatch.setattr(finding, "keepers_here", lambda: etcd.kept)
    each = find_each(
        cast(Registry, etcd),
        wanted.model,
        wanted.rank,
        wanted.world_size,
        wanted.topology or None,
        shared,
    )
    found = next(each, None)
    if found is None:
        return -1
    assert found.record is etcd.records[found.record.key]
    assert found.place.name == found.kept.name
    return int(found.record.instance[1:])


RANKS = st.builds(
    Rank,
    order=st.integers(1, 1000),
    model=st.sampled_from([MODEL, ModelIdentity("m", revision="2")]),
    rank=st.integers(0, 1),
    world_size=st.integers(2, 3),
    tp=st.integers(0, 2),
    state=st.sampled_from([RankState.READY, RankState.UPDATING, RankState.LOADING]),
    held=st.booleans(),
    is_written=st.booleans(),
    has_left=st.booleans(),
    is_other=st.booleans(),
    is_damaged=st.booleans(),
    is_elsewhere=st.booleans(),
)


@given(st.lists(RANKS, max_size=8, unique_by=lambda one: one.order), RANKS, st.booleans())
def test_the_newest_that_is_like_the_wanted_one_is_found_and_no_other(
    ranks: list[Rank], wanted: Rank, shared: bool
) -> None:
    good = [
        number
        for number, one in enumerate(ranks)
        if one.is_wanted(shared)
        and (one.model, one.rank, one.world_size, one.topology)
        == (wanted.model, wanted.rank, wanted.world_size, wanted.topology)
    ]
    expected = max(good, key=lambda number: ranks[number].order, default=-1)
    with pytest.MonkeyPatch.context() as patch:
        assert find(patch, ranks, shared, wanted) == expected


def test_a_rank_whose_record_is_gone_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    etcd = Etcd([Rank()])
    etcd.records.clear()
    monkeypatch.setattr(finding, "keepers_here", lambda: etcd.kept)
    assert find_held(cast(Registry, etcd), MODEL, rank=0, world_size=2) is None


def test_a_rank_that_is_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidField):
        find(monkeypatch, [Rank()], False, Rank(rank=2))
