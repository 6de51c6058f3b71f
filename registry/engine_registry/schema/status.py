"""From the records of an instance: is it complete and consistent, and if not, what is wrong.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from engine_registry.schema.printable import short
from engine_registry.schema.record import ModelIdentity, RankRecord, RankState


class InstanceState(str, Enum):
    """What a loader or operator may expect of the instance."""

    READY = (
        "ready"  # every rank is there, of one generation and one version, and ready: load from it
    )
    DEGRADED = "degraded"  # `missing` and `problems` say why not: wait, or look at those ranks
    GONE = "gone"  # nothing is registered


@dataclass(frozen=True)
class InstanceStatus:
    """An instance as its records describe it.

    `missing` ranks and `problems` say why it is not ready.
    """

    instance: str
    state: InstanceState
    records: tuple[RankRecord, ...] = ()  # by rank
    missing: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """How many ranks the instance has when it is complete; 0 where none is registered."""
        return self.records[0].world_size if self.records else 0

    @property
    def model(self) -> ModelIdentity | None:
        """Which weights the instance serves; None where no rank is registered."""
        return self.records[0].model if self.records else None

    @property
    def labels(self) -> Mapping[str, str]:
        """What people have said of the instance; empty where no rank is registered."""
        return self.records[0].labels if self.records else {}

    @property
    def version(self) -> int | None:
        """The version that all ranks have, or None where they differ."""
        versions = {record.version for record in self.records}
        return versions.pop() if len(versions) == 1 else None

    @property
    def contents(self) -> tuple[str, ...]:
        """What each rank holds, by rank.

        Two instances with equal contents hold the same weights.
        """
        return tuple(record.content for record in self.records)

    @property
    def unresponsive(self) -> tuple[int, ...]:
        """Ranks whose process does not answer its keeper: it is stopped, or holds the GIL.

        Their records stand, so the instance may be ready all the same.
        """
        return tuple(record.rank for record in self.records if record.unresponsive_since)

    @property
    def nbytes(self) -> int:
        """The bytes of the weights of all registered ranks."""
        return sum(record.manifest.nbytes for record in self.records)

    @property
    def summary(self) -> str:
        """Why it is not ready, for a message; empty where it is."""
        reasons = list(self.problems)
        if self.missing:
            reasons.insert(
                0,
                f"missing {named(self.missing)} of {self.world_size}",
            )
        return "; ".join(reasons)


def assess(
    instance: str, records: Iterable[RankRecord], damaged: Sequence[str] = ()
) -> InstanceStatus:
    """`damaged` are complaints about keys of this instance that hold no good record.

    Ended registrations do not count.
    """
    present = tuple(
        sorted((record for record in records if not record.ended), key=lambda record: record.rank)
    )
    problems = list(damaged)
    if not present:
        state = InstanceState.DEGRADED if problems else InstanceState.GONE
        return InstanceStatus(instance, state, problems=tuple(problems))
    first = present[0]
    agreed = first.agreed()
    for record in present[1:]:
        for field, value in record.agreed().items():
            if value != agreed[field]:
                ours, theirs = short(repr(value)), short(repr(agreed[field]))
                problems.append(
                    f"rank {record.rank} has {field} {ours}, rank {first.rank} has {theirs}"
                )
    problems.extend(_of_versions(present))
    problems.extend(_of_states(present))
    ranks = {record.rank for record in present}
    missing = tuple(rank for rank in range(first.world_size) if rank not in ranks)
    state = InstanceState.DEGRADED if missing or problems else InstanceState.READY
    return InstanceStatus(instance, state, present, missing, tuple(problems))


def _of_versions(records: Sequence[RankRecord]) -> list[str]:
    by_version: dict[int, list[int]] = {}
    for record in records:
        by_version.setdefault(record.version, []).append(record.rank)
    if len(by_version) == 1:
        return []
    held = ", ".join(f"{version} ({named(ranks)})" for version, ranks in sorted(by_version.items()))
    return [f"versions differ: {held}"]


def _of_states(records: Sequence[RankRecord]) -> list[str]:
    by_state: dict[RankState, list[int]] = {}
    for record in records:
        if record.state is not RankState.READY:
            by_state.setdefault(record.state, []).append(record.rank)
    return [f"{named(ranks)} {state.value}" for state, ranks in by_state.items()]


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
