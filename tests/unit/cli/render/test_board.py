"""What the live table shows: rows for what happens, as many as fit, and speeds of what has been
seen.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from engine_cli.render.board import MAX_NEWS, Board, Row, Speeds
from engine_cli.render.flows import Flows
from engine_registry import (
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    Pull,
    RankJoined,
    RankLost,
    RankRecord,
    RankUpdated,
)
from engine_registry.schema.record import RankState
from tests.support.assessment import assess
from tests.unit.cli.render.test_flows import pull, rank

AT = "12:00:00.000"


def a_board(*records: RankRecord, narrowed: bool = False) -> Board:
    """As after the first snapshot of a watch."""
    board = Board(narrowed)
    for record in records:
        board.see(RankJoined(record), AT)
    for name in sorted({record.instance for record in records}):
        status = assess(name, [record for record in records if record.instance == name])
        board.see(
            (InstanceDegraded if status.problems or status.missing else InstanceReady)(status), AT
        )
    return board


def shown(board: Board, *pulls: Pull, now: float = 0.0, room: int = 100) -> list[Row]:
    board.look(pulls, now)
    return board.rows(room)


def names(rows: list[Row]) -> list[str]:
    return [row.name.strip() for row in rows]


def test_a_rank_that_does_not_answer_is_unresponsive_and_so_is_its_instance() -> None:
    silent = rank("a/1", world_size=2, unresponsive_since="2026-01-02T03:05:00.000+00:00")
    board = a_board(rank("a/0", world_size=2), silent)
    assert [row.state for row in shown(board)] == ["unresponsive 2/2", "ready", "unresponsive"]
    assert board.summary() == "1 instance, 2 ranks: 1 ready, 1 unresponsive"
    board.see(RankUpdated(rank("a/1", world_size=2), silent), AT)
    assert [row.state for row in shown(board)] == ["ready 2/2", "ready", "ready"]


def test_an_instance_of_one_rank_is_one_row_with_all_of_it() -> None:
    board = a_board(rank("a/0", world_size=1), rank("b/0", loading=True, world_size=1))
    assert shown(board, pull("a/0", "b/0", 63), pull("a/0", "host", 5)) == [
        Row("a", "ready", read_by="b/0 63 %, host pid 7 5 %"),
        Row("b", "loading", 0.63, reads_from="a/0"),
        Row("host pid 7", "load", 0.05, reads_from="a/0"),
    ]


def test_an_instance_of_several_ranks_is_a_row_and_one_for_each_rank() -> None:
    ranks = [rank(f"b/{number}", loading=number > 0, world_size=2) for number in range(2)]
    board = a_board(*ranks)
    assert shown(board, pull("a/0", "b/1", 50), pull("b/0", "c/0", 5)) == [
        Row("b", "loading 2/2", 0.75, reads_from="a", read_by="1 load"),
        Row("  b/0", "ready", read_by="c/0 5 %"),
        Row("  b/1", "loading", 0.5, reads_from="a/0"),
        Row("c/0", "load", 0.05, reads_from="b/0"),
    ]


def test_rows_follow_the_events() -> None:
    first, second = (rank(f"a/{number}", world_size=2) for number in range(2))
    board = a_board(first, second)
    assert [(row.name, row.state) for row in shown(board)] == [
        ("a", "ready 2/2"),
        ("  a/0", "ready"),
        ("  a/1", "ready"),
    ]
    board.see(RankUpdated(replace(first, state=RankState.UPDATING), first), AT)
    assert shown(board)[1].state == "updating"
    board.see(RankLost(second, "evicted"), AT)
    board.see(InstanceDegraded(assess("a", [first])), AT)
    assert [(row.name, row.state) for row in shown(board)] == [
        ("a", "degraded 1/2"),
        ("  a/0", "updating"),
    ]
    board.see(RankLost(first, "evicted"), AT)
    board.see(InstanceGone(assess("a", [])), AT)
    assert shown(board) == []
    assert board.summary() == "0 instances, 0 ranks"


def test_an_instance_whose_records_cannot_be_read_is_a_row() -> None:
    board = Board()
    board.see(InstanceDegraded(assess("a", [], ["the record at /engines/a/0 is damaged"])), AT)
    assert shown(board) == [Row("a", "degraded 0/?")]


def test_only_loads_of_the_instances_are_shown_where_some_are_watched() -> None:
    board = a_board(rank("b/0", loading=True, world_size=1), narrowed=True)
    rows = shown(
        board,
        pull("a/0", "b/0", 63),
        pull("b/0", "c/0", 5),
        pull("a/0", "d/0", 7),
        pull("a/0", "host", 7),
    )
    assert names(rows) == ["b", "c/0"]


# -- room
# --------------------------------------------------------------------------------------------------


def test_ranks_at_rest_make_way_first() -> None:
    board = a_board(*(rank(f"a/{number}", world_size=9) for number in range(9)))
    assert names(shown(board, pull("a/4", "host", 1), room=11)) == [
        "a",
        *(f"a/{number}" for number in range(9)),
        "host pid 7",
    ]
    assert names(shown(board, pull("a/4", "host", 1), room=10)) == ["a", "a/4", "host pid 7"]


@pytest.mark.parametrize("room", range(1, 12))
def test_a_thousand_ranks_are_as_many_rows_as_there_is_room_for(room: int) -> None:
    """The instance, then those that load and say so; the last row counts the rest."""
    ranks = [rank(f"a/{number}", loading=True, world_size=1_000) for number in range(1_000)]
    board = a_board(*ranks, rank("z/0", world_size=1))
    rows = shown(board, *(pull("z/0", f"a/{number}", number) for number in (17, 500)), room=room)
    assert len(rows) == room
    assert set(["a", "a/17", "a/500", "z"][: room - 1]) <= set(names(rows))
    assert rows[-1].name == f"… and {1_002 - (room - 1):,} more"
    assert sum(
        int(count.replace(",", "")) for count in re.findall(r"[0-9,]*[0-9]", rows[-1].state)
    ) == 1_002 - (room - 1)


def test_the_summary_counts_all_of_them() -> None:
    board = a_board(
        *(rank(f"a/{number}", loading=number > 2, world_size=1_200) for number in range(1_200))
    )
    board.look([pull("a/0", f"a/{number}") for number in (5, 6)], 0)
    assert board.summary() == "1 instance, 1,200 ranks: 1,197 loading, 3 ready; 2 loads"


def test_news_are_the_last_ones_and_hold_nothing_that_a_terminal_would_act_on() -> None:
    board = a_board(rank("a/0", world_size=1))
    assert board.news[-1] == f"{AT}  a ready: 1 rank, 16 B, version 3"
    board.note("\x1b[2J", AT)
    assert board.news[-1] == f"{AT}  \\x1b[2J"
    for number in range(2 * MAX_NEWS):
        board.note(str(number), AT)
    assert len(board.news) == MAX_NEWS


# -- speeds
# --------------------------------------------------------------------------------------------------


def looked(speeds: Speeds, now: float, *pulls: Pull) -> None:
    speeds.see(Flows([], pulls), now)


def test_a_load_is_as_fast_as_its_tickets_over_the_last_seconds_say() -> None:
    speeds = Speeds()
    for now in range(20):
        looked(
            speeds,
            now,
            pull("a/0", "b/0", 100 * now if now < 10 else 1_000 + 300 * (now - 10), of=10_000),
        )
    assert speeds.of("b/0", 19.0) == pytest.approx(300)
    assert speeds.total(19.0) == pytest.approx(300)


def test_looking_more_often_than_tickets_are_written_changes_nothing() -> None:
    speeds = Speeds()
    for tenth in range(100):
        looked(speeds, tenth / 10, pull("a/0", "b/0", 500 * (tenth // 10), of=10_000))
    assert speeds.of("b/0", 9.9) == pytest.approx(500)


def test_a_load_that_is_silent_began_again_or_has_ended_has_no_speed() -> None:
    speeds = Speeds()
    looked(speeds, 0, pull("a/0", "b/0", 0))
    assert speeds.of("b/0", 0) == 0
    looked(speeds, 1, pull("a/0", "b/0", 50))
    assert speeds.of("b/0", 1.5) == 50
    assert speeds.of("b/0", 5) == 0
    looked(speeds, 2, pull("a/0", "b/0", 10))
    assert speeds.of("b/0", 2) == 0
    looked(speeds, 3)
    assert (speeds.of("b/0", 3), speeds.total(3)) == (0, 0)


def test_the_row_of_a_load_has_its_speed() -> None:
    board = a_board(rank("b/0", loading=True, world_size=1))
    for now in range(3):
        rows = shown(
            board,
            pull("a/0", "b/0", now * 10**9, of=10**10),
            pull("a/0", "host", now * 10**6, of=10**9),
            now=now,
        )
    assert [row.speed for row in rows] == ["1.0 GB/s", "1.0 MB/s"]
    assert board.summary() == "1 instance, 1 rank: 1 loading; 2 loads at 1.0 GB/s"
