"""Which state tables, JSON, the board and the page show of an instance and of a rank. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from engine_registry import InstanceState, InstanceStatus, RankRecord, RankState

LOADING = RankState.LOADING.value
UNRESPONSIVE = "unresponsive"
HELD = "held"


def any_loads(records: Iterable[RankRecord]) -> bool:
    """Whether a rank is among them whose weights are not complete yet."""
    return any(record.state is RankState.LOADING for record in records)


def state_of(status: InstanceStatus) -> str:
    """An instance is loading while one of its ranks is, unresponsive while it is ready but for
    ranks that do not answer, and held where it is gone but for ranks that are held; else it has the
    state of the registry.
    """
    if status.state is InstanceState.GONE and status.held:
        return HELD
    if RankState.LOADING in status.states:
        return LOADING
    is_ready = status.state is InstanceState.READY
    return UNRESPONSIVE if is_ready and status.unresponsive else status.state.value


def rank_state_of(record: RankRecord) -> str:
    """A rank that does not answer is unresponsive, and one that has ended is held, whatever it did
    before.
    """
    if record.held:
        return HELD
    return UNRESPONSIVE if record.unresponsive_since else record.state.value


def zones_of(status: InstanceStatus) -> tuple[str, ...]:
    """Where its ranks stand, as far as that is known: by name."""
    zones = {record.location.zone for record in status.records} - {""}
    return tuple(sorted(zones))
