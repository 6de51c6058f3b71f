"""Sources by content: what a search finds, and a selection chooses from. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine_registry import RankRecord
from engine_registry.holders.query import Holders


@dataclass(frozen=True)
class Group:
    """Sources of one content, the best first: single ranks that hold what the rank to be filled
    holds, or all ranks of instances.

    No more than `at_once` of them should be read from at the same time. `content` is what the
    tensors will hold in the end. With `free_since`, a revision of etcd, the order holds as long as
    nobody else has begun to read from them since.
    """

    content: str
    teams: list[tuple[RankRecord, ...]]
    at_once: int
    free_since: int | None = None


@dataclass(frozen=True)
class Found:
    """The best group first, in each list. `holders` are those that were found, if ranks of a model
    were looked for.
    """

    alike: list[Group]
    instances: list[Group]
    holders: Holders | None = None

    def __bool__(self) -> bool:
        return bool(self.alike or self.instances)


def grouped(teams: Sequence[tuple[tuple[RankRecord, ...], str]], at_once: int) -> list[Group]:
    """Teams with their contents, the best first: by content."""
    groups: dict[str, Group] = {}
    for team, content in teams:
        groups.setdefault(content, Group(content, [], at_once)).teams.append(team)
    return list(groups.values())
