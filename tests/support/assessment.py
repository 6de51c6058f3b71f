"""What is to be said of an instance, worked out from all of its records at once. A roster says the
same, and looks only at what has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine_registry import InstanceState, InstanceStatus, RankRecord, RankState
from engine_registry.schema.printable import short
from engine_registry.schema.status import named


def assess(
    instance: str, records: Iterable[RankRecord], damaged: Sequence[str] = ()
) -> InstanceStatus:
    """`damaged` are complaints about keys of this instance that hold no good record.

    Ended registrations do not count, but that those are remembered that are held.
    """
    by_rank = sorted(records, key=lambda record: record.rank)
    held = tuple(record for record in by_rank if record.held)
    present = tuple(record for record in by_rank if not record.ended)
    problems = list(damaged)
    if not present:
        state = InstanceState.DEGRADED if problems else InstanceState.GONE
        missing = tuple(range(held[0].world_size)) if held else ()
        return InstanceStatus(instance, state, (), missing, tuple(problems), held)
    first = present[0]
    agreed = first.agreed()
    for record in present[1:]:
        for field, value in record.agreed().items():
            if value != agreed[field]:
                ours, theirs = short(repr(value)), short(repr(agreed[field]))
                problems.append(
                    f"rank {record.rank} has {field} {ours}, rank {first.rank} has {theirs}"
                )
    if len({(record.state, record.alike) for record in present}) == 1:
        present = _in_one_version(present)
    problems.extend(_of_versions(present))
    problems.extend(_of_states(present))
    ranks = {record.rank for record in present}
    missing = tuple(rank for rank in range(first.world_size) if rank not in ranks)
    state = InstanceState.DEGRADED if missing or problems else InstanceState.READY
    return InstanceStatus(instance, state, present, missing, tuple(problems), held)


def _in_one_version(records: tuple[RankRecord, ...]) -> tuple[RankRecord, ...]:
    """In the newest that each of them has, or as they are."""
    versions = {one.version for one in records}
    versions |= {each.version for one in records for each in one.retained}
    for version in sorted(versions, reverse=True):
        some = [past for record in records if (past := record.as_of(version)) is not None]
        if len(some) == len(records):
            return tuple(some)
    return records


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
