"""What people and programs are told of ranks that are held."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from engine_cli.commands.show import chosen
from engine_cli.render.documents import event_json, instance_json, rank_json
from engine_cli.render.held import left, ranks_held
from engine_cli.render.listing import Changes, Choice
from engine_cli.render.states import rank_state_of, state_of
from engine_cli.render.texts import event_text, instance_row, rank_row
from engine_registry import InstanceGone, InstanceStatus, RankLost, RankRecord
from engine_registry.errors import InstanceIncomplete
from engine_registry.schema.labels import EVERYTHING
from engine_registry.schema.moment import utc
from engine_registry.schema.record import ManifestRef
from tests.support.assessment import assess
from tests.support.builders import a_record

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
UNTIL = utc(NOW + timedelta(seconds=290))
LARGE = ManifestRef(digest="ab" * 32, parts=1, tensors=9, nbytes=4_700_000_000)


def held(rank: int = 0, until: str = UNTIL) -> RankRecord:
    ended = {"ended": "process ended", "held_until": until}
    return a_record(rank=rank, world_size=max(2, rank + 1), manifest=LARGE, **ended)


def status(*records: RankRecord) -> InstanceStatus:
    return assess("qwen", records)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "its time is over"),
        (0, "its time is over"),
        (0.2, "10 s left"),
        (289.4, "290 s left"),
        (290, "290 s left"),
        (599, "600 s left"),
        (900, "15 min left"),
        (7200, "2 h left"),
        (86_400, "24 h left"),
    ],
)
def test_the_time_that_is_left_is_rounded_as_clocks_differ(seconds: float, text: str) -> None:
    assert left(utc(NOW + timedelta(seconds=seconds)), NOW) == text


@pytest.mark.parametrize(
    ("until", "text"),
    [
        ("2026-01-02T03:05:05", "60 s left"),  # no zone: it is UTC
        ("tomorrow", "until tomorrow"),
        ("9999-12-31T23:59:59+00:00", "69898605 h left"),
    ],
)
def test_a_time_that_another_program_wrote_makes_no_error(until: str, text: str) -> None:
    assert left(until, NOW) == text


def test_of_several_ranks_all_bytes_are_told_and_the_first_that_goes() -> None:
    later = utc(NOW + timedelta(seconds=600))
    assert ranks_held([held(3)], NOW) == "rank 3 held 4.7 GB, 290 s left"
    assert ranks_held([held(0, later), held(1)], NOW) == "ranks 0-1 held 9.4 GB, 290 s left"
    assert ranks_held([], NOW) == ""


def test_an_instance_whose_ranks_are_all_held_is_listed_with_what_it_was() -> None:
    far = utc(datetime.now(timezone.utc) + timedelta(hours=5, minutes=5))
    row = instance_row(status(held(0, far), held(1, far)))
    why = "missing ranks 0-1 of 2; ranks 0-1 held 9.4 GB, 5 h left"
    assert row == ["qwen", "held", "0/2", "qwen@r1", "-", "0 B", why]
    assert rank_row(held(0, far))[:2] == ["0", "held (5 h left)"]


def test_states_of_instances_and_ranks_say_that_they_are_held() -> None:
    assert state_of(status(held(0), held(1))) == "held"
    assert state_of(status(held(0), a_record(rank=1))) == "degraded"
    assert rank_state_of(held()) == "held"


def test_the_object_of_an_instance_names_ranks_that_are_held_and_until_when() -> None:
    data = instance_json(status(held(1), a_record(rank=0)))
    assert (data["state"], data["present"], data["missing"]) == ("degraded", [0], [1])
    assert data["held"] == [
        {
            "rank": 1,
            "held_until": UNTIL,
            "nbytes": 4_700_000_000,
            "host": "node-1",
            "device": "cpu",
        }
    ]
    data = instance_json(status(held(0), held(1)))
    assert (data["state"], data["world_size"], data["present"]) == ("held", 2, [])
    assert (data["model"]["name"], data["generation"], data["nbytes"]) == ("qwen", "launch-1", 0)
    assert instance_json(status(a_record(rank=0)))["held"] == []


def test_the_object_of_a_rank_says_until_when_it_is_held() -> None:
    assert (rank_json(held())["state"], rank_json(held())["held_until"]) == ("held", UNTIL)
    assert (rank_json(a_record())["state"], rank_json(a_record())["held_until"]) == ("ready", None)


def test_a_loss_says_until_when_the_memory_is_held() -> None:
    event = RankLost(a_record(), "process ended", None, UNTIL)
    assert event_text(event) == (
        f"qwen/0 lost: process ended, held until {UNTIL} (host node-1, pid 4711)"
    )
    data = event_json(event)
    assert (data["held_until"], data["reason"], data["state"]) == (UNTIL, "process ended", "ready")
    assert event_json(RankLost(a_record(), "withdrawn"))["held_until"] is None


def test_the_end_of_an_instance_names_its_ranks_that_are_held() -> None:
    gone = InstanceGone(status(held(0), held(1)))
    assert event_text(gone) == (
        f"qwen gone: ranks 0-1 are held until {UNTIL}: their processes have ended"
    )
    assert event_text(InstanceGone(status())) == "qwen gone"


def test_the_ranks_of_an_instance_are_shown_with_those_that_are_held() -> None:
    some = status(held(0), a_record(rank=1))
    assert chosen(some, None) == [held(0), a_record(rank=1)]
    assert chosen(some, 0) == [held(0)]
    assert chosen(status(held(0), held(1)), None) == [held(0), held(1)]
    with pytest.raises(InstanceIncomplete, match="rank 2"):
        chosen(some, 2)


def test_a_list_chooses_instances_that_are_held_and_tells_when_they_are_not_any_more() -> None:
    changes = Changes(Choice(EVERYTHING, "qwen", "held", "name"))
    assert changes.since([status(a_record())]) == []
    (came,) = changes.since([status(held())])
    assert came.held == (held(),)
    (left_it,) = changes.since([])
    assert state_of(left_it) == "gone"
