"""Which instances a list shows, and which of them have changed."""

from __future__ import annotations

from engine_cli.render.listing import Changes, Choice
from engine_registry import InstanceState, InstanceStatus
from engine_registry.schema.labels import EVERYTHING
from engine_registry.schema.record import RankState
from tests.support.assessment import assess
from tests.support.builders import a_record


def an_instance(name: str, **fields: object) -> InstanceStatus:
    return assess(name, [a_record(instance=name, world_size=1, **fields)])


def names(statuses: list[InstanceStatus]) -> list[tuple[str, InstanceState]]:
    return [(status.instance, status.state) for status in statuses]


def test_changes_are_what_came_changed_left_the_choice_or_is_gone() -> None:
    changes = Changes(Choice(EVERYTHING, None, "ready", "name"))
    a, b, c = an_instance("a"), an_instance("b"), an_instance("c", state=RankState.UPDATING)
    assert names(changes.since([a, b, c])) == [
        ("a", InstanceState.READY),
        ("b", InstanceState.READY),
    ]
    assert changes.since([an_instance("a"), b, c]) == []
    updating = an_instance("a", state=RankState.UPDATING)
    assert names(changes.since([updating, c])) == [
        ("a", InstanceState.DEGRADED),
        ("b", InstanceState.GONE),
    ]
    assert changes.since([updating, c]) == []
    assert names(changes.since([a, an_instance("c", version=2)])) == [
        ("a", InstanceState.READY),
        ("c", InstanceState.READY),
    ]


def test_those_that_come_are_in_the_order_that_is_asked_for() -> None:
    changes = Changes(Choice(EVERYTHING, None, None, "version"))
    found = changes.since([an_instance("a", version=2), an_instance("b", version=1)])
    assert [status.instance for status in found] == ["b", "a"]
