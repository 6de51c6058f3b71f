"""Which state tables, JSON and the board show of an instance. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from engine_registry import InstanceStatus, RankRecord, RankState

LOADING = RankState.LOADING.value


def any_loads(records: Iterable[RankRecord]) -> bool:
    """Whether a rank is among them whose weights are not complete yet."""
    return any(record.state is RankState.LOADING for record in records)


def state_of(status: InstanceStatus) -> str:
    """An instance is loading while one of its ranks is; else it has the state of the registry."""
    return LOADING if any_loads(status.records) else status.state.value
