"""A watch of chosen instances tells all of them, and nothing of the others."""

from __future__ import annotations

from engine_registry import (
    Event,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    RankJoined,
    RankLost,
    RankUpdated,
    VersionReleased,
)
from engine_registry.schema.labels import Selector
from engine_registry.watching.events import InstanceEvent, RankEvent
from engine_registry.watching.selection import Selection
from tests.support.assessment import assess
from tests.support.builders import a_record, a_release

OURS = a_record(world_size=1, topology={}, labels={"team": "search"})
THEIRS = a_record(instance="llama", world_size=1, topology={}, labels={"team": "ads"})
SILENT = a_record(instance="tiny", world_size=1, topology={})


def life() -> list[Event]:
    """Of each instance from its first event to its last."""
    return [
        event
        for record in (OURS, THEIRS, SILENT)
        for event in (
            RankJoined(record),
            InstanceReady(assess(record.instance, [record])),
            VersionReleased(a_release(instance=record.instance)),
            RankUpdated(record, record),
            RankLost(record, "withdrawn"),
            InstanceGone(assess(record.instance, [])),
        )
    ]


def chosen(text: str, events: list[Event]) -> list[str]:
    selection = Selection(Selector.parse(text))
    return [
        event.record.instance
        if isinstance(event, RankEvent)
        else event.status.instance
        if isinstance(event, InstanceEvent)
        else event.instance
        for event in events
        if selection.takes(event)
    ]


def test_an_instance_is_told_from_its_first_event_to_its_last() -> None:
    assert chosen("team=search", life()) == ["qwen"] * 6
    assert chosen("team", life()) == ["qwen"] * 6 + ["llama"] * 6
    assert chosen("team!=search", life()) == ["llama"] * 6 + ["tiny"] * 6
    assert chosen("!team", life()) == ["tiny"] * 6


def test_without_a_selector_everything_is_told() -> None:
    assert len(chosen("", life())) == 18


def test_an_instance_that_gets_other_labels_is_told_once_more() -> None:
    relabelled = a_record(world_size=1, topology={}, labels={"team": "ads"})
    events: list[Event] = [
        InstanceReady(assess("qwen", [OURS])),
        InstanceDegraded(assess("qwen", [relabelled])),
        InstanceReady(assess("qwen", [relabelled])),
    ]
    assert chosen("team=search", events) == ["qwen"] * 2
