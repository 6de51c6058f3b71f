"""Whom a load reads from, of those that were found: ranks that hold the same, else teams that hold
it together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest

from engine_loader import InProcessEngine
from engine_loader.errors import DigestsMissing, SourceLost, WeightsMismatch
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import Planner
from engine_loader.sources.groups import Found, Group
from engine_loader.sources.selection import Choice, Fetched, Selection
from engine_loader.sources.source import SourceRank
from engine_registry import Location, Manifest, RankRecord, TensorEntry
from engine_registry.errors import RecordDamaged
from tests.support.builders import CONTENT, OTHER_CONTENT, a_manifest, a_record, an_entry


@dataclass
class Offering:
    record: RankRecord
    manifest: Manifest
    digests: str

    @property
    def origin(self) -> Origin:
        return Origin(
            f"{self.record.instance}/{self.record.rank}", self.manifest, self.record.rank == 0
        )

    @property
    def algorithm(self) -> str:
        if not self.digests:
            raise DigestsMissing(f"{self.record.key} offers no digests")
        return self.digests


def half(number: int, addr: int = 1000) -> TensorEntry:
    return an_entry("w", addr, 8, global_shape=(16,), offsets=(8 * number,), opaque=False)


WHOLE = an_entry("w", 5000, 16, opaque=False)


class Ranks:
    """Those of an instance that hold these tensors; `gone` have ended, `silent` do not answer.
    `zones` has the zone of each.
    """

    def __init__(
        self,
        instance: str,
        *tensors: TensorEntry,
        digests: Sequence[str] = (),
        gone: Sequence[int] = (),
        silent: Sequence[int] = (),
        zones: str = "",
    ) -> None:
        self.records = tuple(
            a_record(
                instance=instance,
                rank=rank,
                world_size=len(tensors),
                incarnation=f"{instance}{rank:031}",
                unresponsive_since="2026-01-02T03:05:00.000+00:00" if rank in silent else "",
                location=Location(zones[rank] if zones else ""),
            )
            for rank in range(len(tensors))
        )
        self.offerings = {
            record.key: Offering(record, a_manifest(tensor), digests[rank] if digests else "")
            for rank, (record, tensor) in enumerate(zip(self.records, tensors, strict=True))
            if rank not in gone
        }


def selection_of(teams: Sequence[Ranks], wanted: Manifest, **options: Any) -> Selection:
    offerings: Mapping[str, Offering] = {
        key: one for team in teams for key, one in team.offerings.items()
    }

    def sources_of(records: Sequence[RankRecord]) -> list[Fetched]:
        fetched.append([record.key for record in records])
        return [
            cast(SourceRank, offerings[record.key])
            if record.key in offerings
            else SourceLost(f"{record.key} is gone")
            for record in records
        ]

    fetched: list[list[str]] = options.pop("fetched", [])
    planner = Planner(wanted, partial=options.pop("partial", True))
    return Selection(
        wanted,
        sources_of,
        planner,
        **{"digests": False, "max_sources": 2, "engine": InProcessEngine(), **options},
    )


def chosen(
    teams: Sequence[Ranks],
    alike: Sequence[RankRecord] = (),
    dst: TensorEntry = WHOLE,
    **options: Any,
) -> list[str]:
    selection = selection_of(teams, a_manifest(dst), **options)
    return names_of(selection.choose(found_of(teams, alike)))


def found_of(teams: Sequence[Ranks], alike: Sequence[RankRecord] = ()) -> Found:
    """All of one content."""
    singles = [Group(CONTENT, [(record,) for record in alike], 9)] if alike else []
    return Found(singles, [Group(CONTENT, [team.records for team in teams], 9)] if teams else [])


def names_of(choice: Choice) -> list[str]:
    return [source.origin.name for source in choice.sources]


def test_ranks_that_hold_the_same_are_chosen_the_first_ones_first() -> None:
    teams = [Ranks(name, WHOLE) for name in "abc"]
    alike = [team.records[0] for team in teams]
    assert chosen(teams, alike) == ["a/0", "b/0"]
    assert chosen(teams, alike, max_sources=9) == ["a/0", "b/0", "c/0"]


def test_sources_of_two_contents_are_never_chosen_together_and_a_misfit_group_gives_way() -> None:
    teams = [Ranks(name, WHOLE) for name in "abc"]
    selection = selection_of(teams, a_manifest(WHOLE), max_sources=9)
    first, second, third = (team.records[0] for team in teams)
    alike = [Group(CONTENT, [(first,)], 9), Group(OTHER_CONTENT, [(second,), (third,)], 9)]
    choice = selection.choose(Found(alike, []))
    assert (choice.content, names_of(choice)) == (CONTENT, ["a/0"])
    teams[0].offerings[first.key].manifest = a_manifest(an_entry("another"))
    choice = selection.choose(Found(alike, []))
    assert (choice.content, names_of(choice)) == (OTHER_CONTENT, ["b/0", "c/0"])


def test_ranks_that_do_not_answer_are_chosen_only_where_no_others_have_it() -> None:
    teams = [Ranks(name, WHOLE, silent=[0] if name in "ac" else []) for name in "abc"]
    alike = [team.records[0] for team in teams]
    assert chosen(teams, alike, max_sources=9) == ["b/0"]
    assert chosen([teams[0], teams[2]], [alike[0], alike[2]], max_sources=9) == ["a/0", "c/0"]
    teams[1].offerings.clear()
    assert chosen(teams, alike, max_sources=9) == ["a/0", "c/0"]


def test_an_instance_whose_ranks_answer_is_better_than_one_rank_that_does_not() -> None:
    silent, halves = Ranks("a", WHOLE, silent=[0]), Ranks("b", half(0), half(1))
    assert sorted(chosen([silent, halves], silent.records)) == ["b/0", "b/1"]


def test_of_an_instance_the_ranks_that_answer_are_read_where_others_hold_the_same() -> None:
    replicas = Ranks("a", half(0), half(0), half(1), half(1), silent=[0, 3])
    assert sorted(chosen([replicas], max_sources=1)) == ["a/1", "a/2"]


def test_no_more_are_chosen_than_a_group_allows_at_once() -> None:
    teams = [Ranks(name, WHOLE) for name in "abc"]
    selection = selection_of(teams, a_manifest(WHOLE), max_sources=9)
    found = Found([Group(CONTENT, [(team.records[0],) for team in teams], 2)], [])
    assert names_of(selection.choose(found)) == ["a/0", "b/0"]


def test_one_that_does_not_fit_is_passed_over() -> None:
    teams = [
        Ranks("a", an_entry("w", dtype="int8", opaque=False)),
        Ranks("b", WHOLE, gone=[0]),
        Ranks("c", WHOLE),
    ]
    assert chosen(teams, [team.records[0] for team in teams]) == ["c/0"]


def test_one_in_which_memory_is_shared_otherwise_than_here_is_passed_over() -> None:
    tied, apart = (
        a_manifest(an_entry("embed", 1000), an_entry("head", addr)) for addr in (1000, 2000)
    )
    teams = [Ranks("a", WHOLE), Ranks("b", WHOLE)]
    for team, manifest in zip(teams, (apart, tied), strict=True):
        team.offerings[team.records[0].key].manifest = manifest
    selection = selection_of(teams, tied)
    assert names_of(selection.choose(found_of([], [team.records[0] for team in teams]))) == ["b/0"]


def test_manifests_are_fetched_together_and_no_more_than_may_be_chosen() -> None:
    teams = [Ranks(name, WHOLE, gone=[0] if name in "bc" else []) for name in "abcdef"]
    fetched: list[list[str]] = []
    alike = [team.records[0] for team in teams]
    assert chosen(teams, alike, max_sources=3, fetched=fetched) == ["a/0", "d/0", "e/0"]
    keys = [record.key for record in alike]
    assert fetched == [keys[:3], keys[3:5]]
    halves = [Ranks(name, half(0), half(1)) for name in "ab"]
    fetched.clear()
    assert len(chosen(halves, fetched=fetched)) == 4
    assert [len(some) for some in fetched] == [4]


def test_a_damaged_manifest_of_a_rank_that_is_there_is_the_error() -> None:
    selection = selection_of([], a_manifest(WHOLE))
    damage = RecordDamaged("it cannot be read")
    selection._sources_of = lambda records: [damage for _ in records]
    with pytest.raises(RecordDamaged) as caught:
        selection.choose(found_of([], Ranks("a", WHOLE).records))
    assert caught.value is damage
    assert selection.gone == []


def test_where_nobody_holds_the_same_all_that_hold_a_part_are_chosen() -> None:
    team = Ranks("a", half(0), half(1))
    assert sorted(chosen([team], [team.records[0]])) == ["a/0", "a/1"]
    assert chosen(
        [team], dst=an_entry("w", 5000, 4, global_shape=(16,), offsets=(10,), opaque=False)
    ) == ["a/1"]


def test_of_equal_ranks_loaders_choose_different_ones_and_no_more_than_are_wanted() -> None:
    team = Ranks("a", *[half(number % 2) for number in range(8)])
    choices = [sorted(chosen([team], engine=InProcessEngine(), max_sources=1)) for _ in range(10)]
    assert all(len(some) == 2 for some in choices)
    assert len({tuple(some) for some in choices}) > 2


def test_of_equal_ranks_those_in_the_zone_of_the_loader_are_chosen_and_none_beside_them() -> None:
    team = Ranks("a", *[half(number % 2) for number in range(8)], zones="aaabbbab")
    some = chosen([team], engine=InProcessEngine(location="b"))
    assert len(some) == 3  # the first half has one rank there, and the second more than two
    assert set(some) < {"a/3", "a/4", "a/5", "a/7"}
    alone = Ranks("a", half(0), half(1), half(0), zones="aab")
    assert sorted(chosen([alone], engine=InProcessEngine(location="b"))) == ["a/1", "a/2"]


def test_an_instance_of_which_a_rank_is_gone_gives_way_to_another_and_is_remembered() -> None:
    teams = [Ranks("a", half(0), half(1), gone=[1]), Ranks("b", half(0), half(1))]
    selection = selection_of(teams, a_manifest(WHOLE))
    assert sorted(names_of(selection.choose(found_of(teams)))) == ["b/0", "b/1"]
    assert [record.key for record in selection.gone] == [teams[0].records[1].key]


def test_why_the_first_does_not_fit_is_raised_where_none_does() -> None:
    teams = [Ranks("a", half(0), half(0)), Ranks("b", half(0), half(1), gone=[0])]
    with pytest.raises(
        WeightsMismatch,
        match=r"the weights of a do not match.* w: no rank of the source holds the box at \[8\]",
    ):
        chosen(teams)
    with pytest.raises(SourceLost, match="qwen/0 is gone"):
        chosen([Ranks("qwen", WHOLE, gone=[0])])


def test_the_weights_of_one_rank_are_found_by_its_own_name() -> None:
    team = Ranks("a", half(0))
    with pytest.raises(WeightsMismatch, match="the weights of a/0 do not match"):
        selection_of([team], a_manifest(WHOLE)).choose(found_of([], [team.records[0]]))


def test_digests_of_all_that_are_chosen_are_of_one_kind() -> None:
    teams = [
        Ranks("a", half(0), half(1)),
        Ranks("b", half(0), half(1), digests=["x", "y"]),
        Ranks("c", half(0), half(1), digests=["y", "y"]),
        Ranks("d", half(0), half(1), digests=["x", "x"]),
    ]
    assert sorted(chosen(teams, digests=True)) == ["c/0", "c/1"]
    with pytest.raises(DigestsMissing, match=r"a/[01] offers no digests"):
        chosen(teams[:1], digests=True)
    with pytest.raises(
        DigestsMissing,
        match="the ranks of b have digests of different kinds, x and y: load with `verify=",
    ):
        chosen(teams[1:2], digests=True)


def test_what_is_not_wanted_counts_only_where_all_is_compared() -> None:
    team = Ranks("a", an_entry("other"))
    dst = an_entry("w", 0, 0)
    team.offerings[team.records[0].key].manifest = a_manifest(an_entry("other"), dst)
    assert chosen([team], [team.records[0]], dst=dst) == ["a/0"]
    with pytest.raises(WeightsMismatch, match="other: in the source, but not here"):
        chosen([team], [team.records[0]], dst=dst, partial=False)
