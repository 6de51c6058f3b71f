"""What an instance is: complete and consistent, or what is wrong with it. `roster` says so from its
records. Pure.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import chain
from typing import Any

from engine_registry.schema.record import ModelIdentity, RankRecord, RankState


class InstanceState(str, Enum):
    """What a loader or operator may expect of the instance."""

    READY = (
        "ready"  # every rank is there, of one generation and one version, and ready: load from it
    )
    DEGRADED = "degraded"  # `missing` and `problems` say why not: wait, or look at those ranks
    GONE = "gone"  # no rank is registered; some may be held


class Page(tuple[RankRecord, ...]):
    """Some records by rank, and what they say together, which is worked out once."""

    @cached_property
    def nbytes(self) -> int:
        return sum(record.manifest.nbytes for record in self)

    @cached_property
    def states(self) -> frozenset[RankState]:
        return frozenset(record.state for record in self)

    @cached_property
    def versions(self) -> frozenset[int]:
        return frozenset(record.version for record in self)

    @cached_property
    def unresponsive(self) -> tuple[int, ...]:
        return tuple(record.rank for record in self if record.unresponsive_since)


class Pages(tuple[Any, ...]):
    """All records of an instance, as pages. A status makes one tuple of them when somebody reads
    it: most events of a large instance are about one of its ranks, and few readers look at the
    others.
    """


class _Records:
    """The field of that name."""

    def __get__(self, status: InstanceStatus | None, owner: type) -> tuple[RankRecord, ...]:
        if status is None:
            return ()  # the default
        fields = vars(status)
        if "records" not in fields:
            fields["records"] = tuple(chain.from_iterable(status._pages))
        records: tuple[RankRecord, ...] = fields["records"]
        return records

    def __set__(self, status: InstanceStatus, records: tuple[RankRecord, ...]) -> None:
        fields = vars(status)
        if isinstance(records, Pages):
            fields["_pages"] = records
        else:
            fields["_pages"], fields["records"] = (Page(records),), records


@dataclass(frozen=True)
class InstanceStatus:
    """An instance as its records describe it.

    `missing` ranks and `problems` say why it is not ready. `held` are the last records of ranks
    that have ended, and whose keepers keep their memory for a process that takes their place. They
    are missing all the same.
    """

    instance: str
    state: InstanceState
    records: tuple[RankRecord, ...] = _Records()  # type: ignore[assignment]  # by rank
    missing: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()
    held: tuple[RankRecord, ...] = ()  # by rank

    @property
    def world_size(self) -> int:
        """How many ranks the instance has when it is complete. 0: none is registered or held."""
        return self._first.world_size if self._first else 0

    @property
    def model(self) -> ModelIdentity | None:
        """Which weights the instance serves; None where no rank is registered or held."""
        return self._first.model if self._first else None

    @property
    def labels(self) -> Mapping[str, str]:
        """What people have said of the instance; empty where no rank is registered or held."""
        return self._first.labels if self._first else {}

    @property
    def states(self) -> frozenset[RankState]:
        """The states that its ranks are in."""
        return frozenset[RankState]().union(*(page.states for page in self._pages))

    @property
    def version(self) -> int | None:
        """The version that all ranks have, or None where they differ."""
        versions = frozenset[int]().union(*(page.versions for page in self._pages))
        return next(iter(versions)) if len(versions) == 1 else None

    @property
    def contents(self) -> tuple[str, ...]:
        """What each rank holds, by rank.

        Two instances with equal contents hold the same weights.
        """
        return tuple(record.content for record in self.records)

    def as_of(
        self, version: int | None = None, contents: Sequence[str] | None = None
    ) -> InstanceStatus:
        """The instance as its ranks describe the version that is asked for, or the contents, by
        rank: the present one, or one that they have retained. As it is, where a rank has no such
        one.
        """
        if contents is not None and len(contents) != len(self.records):
            return self
        asked: Sequence[str | None] = contents or [None] * len(self.records)
        some = [
            past
            for record, content in zip(self.records, asked, strict=True)
            if (past := record.as_of(version, content)) is not None
        ]
        if len(some) < len(self.records) or all(map(operator.is_, some, self.records)):
            return self
        return replace(self, records=tuple(some))

    @property
    def unresponsive(self) -> tuple[int, ...]:
        """Ranks whose process does not answer its keeper: it is stopped, or holds the GIL.

        Their records stand, so the instance may be ready all the same.
        """
        return tuple(chain.from_iterable(page.unresponsive for page in self._pages))

    @property
    def nbytes(self) -> int:
        """The bytes of the weights of all registered ranks."""
        return sum(page.nbytes for page in self._pages)

    @property
    def _pages(self) -> tuple[Page, ...]:
        pages: tuple[Page, ...] = vars(self)["_pages"]
        return pages

    @property
    def _first(self) -> RankRecord | None:
        return next(chain(chain.from_iterable(self._pages), self.held), None)

    @property
    def summary(self) -> str:
        """Why it is not ready, for a message; empty where it is. `why` also has the ranks that are
        held.
        """
        reasons = list(self.problems)
        if self.missing:
            reasons.insert(
                0,
                f"missing {named(self.missing)} of {self.world_size}",
            )
        return "; ".join(reasons)

    @property
    def held_summary(self) -> str:
        """Which ranks are held, and the time until which all of them are; empty where none is."""
        if not self.held:
            return ""
        ranks = named([record.rank for record in self.held])
        until = min(record.held_until for record in self.held)
        if len(self.held) > 1:
            return f"{ranks} are held until {until}: their processes have ended"
        return f"{ranks} is {why_held(self.held[0])}"

    @property
    def why(self) -> str:
        """Why it is not ready, and which ranks are held, for a message."""
        return "; ".join(filter(None, [self.summary, self.held_summary]))


def why_held(record: RankRecord) -> str:
    """Of a rank that is held: for how long, and why. For a message that names the rank before."""
    return f"held until {record.held_until}: its process has ended"


def named(ranks: Sequence[int]) -> str:
    """`rank 7`, or `ranks 0-3,7`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)}"


def spans(ranks: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3 and 7."""
    pieces: list[list[int]] = []
    for rank in sorted(ranks):
        if pieces and rank == pieces[-1][1] + 1:
            pieces[-1][1] = rank
        else:
            pieces.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pieces)
