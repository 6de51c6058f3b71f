"""`engines watch` on a terminal: a table that is kept up to date, and the terminal as it was when
it ends.
"""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from engine_cli.exits import Exit
from engine_registry import RankRecord, RankState, Registry
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, line_of
from tests.support.ranks import put_ranks, register
from tests.support.terminal import (
    CURSOR,
    FIRST_SCREEN,
    NO_CURSOR,
    OTHER_SCREEN,
    Terminal,
    on_terminal,
)
from tests.support.waiting import wait_until

Watching = Callable[..., AbstractContextManager[Terminal]]


@pytest.fixture
def watching(shared_etcd: LocalEtcd, namespace: str) -> Watching:
    """`engines watch` with some options, on a terminal."""

    def start(*args: str, **size: int) -> AbstractContextManager[Terminal]:
        return on_terminal(
            "watch",
            "--namespace",
            namespace,
            *args,
            env={"ENGINES_ETCD": shared_etcd.endpoint},
            **size,
        )

    return start


def the_rank(registry: Registry, instance: str) -> RankRecord:
    (record,) = registry.ranks(instance)
    return record


def test_loads_are_seen_as_they_begin_go_on_and_end(watching: Watching, registry: Registry) -> None:
    with (
        register(registry),
        register(registry, "b", state=RankState.LOADING) as loading,
        watching() as terminal,
    ):
        terminal.wait_for("2 instances, 2 ranks: 1 loading, 1 ready")
        assert terminal.line("b").split()[:2] == ["b", "loading"]
        ticket = registry.pull(the_rank(registry, "a"), the_rank(registry, "b"))
        assert ticket is not None
        with ticket:
            terminal.wait_for("b ", "loading", "a/0")
            for nbytes in (10, 63):
                ticket.report(nbytes * 10**9, 100 * 10**9)
                terminal.wait_for("b ", "loading", f"{nbytes} %", "a/0")
            assert "━" in terminal.line("b")
            terminal.wait_for("b ", "63 %", "GB/s")
            assert terminal.line("a ").split()[:2] == ["a", "ready"]
            assert terminal.line("a ").endswith("b/0 63 %")
        loading.update(state=RankState.READY)
        terminal.wait_for("2 instances, 2 ranks: 2 ready")
        terminal.wait_for("b/0 updated: ready, version 0")
        wait_until(lambda: terminal.line("b").split() == ["b", "ready"])  # its pull has ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order_and_the_last_table_stays(
    watching: Watching, registry: Registry, number: signal.Signals
) -> None:
    with register(registry), watching() as terminal:
        terminal.wait_for("a/0 joined")
        terminal.process.send_signal(number)
        assert terminal.process.wait(60) == Exit.DONE
        wait_until(lambda: terminal.said.endswith("\n"))
        assert terminal.said.count(OTHER_SCREEN) == terminal.said.count(FIRST_SCREEN) == 1
        assert terminal.said.rindex(CURSOR) > terminal.said.rindex(NO_CURSOR)
        after = terminal.said.split(FIRST_SCREEN)[1]
        assert "a/0 joined" in after
        assert "Traceback" not in after


def test_a_second_signal_does_not_wait_for_a_terminal_that_takes_nothing(
    watching: Watching, registry: Registry
) -> None:
    with register(registry), watching() as terminal:
        terminal.wait_for("a/0 joined")
        terminal.reads.clear()
        put_ranks(registry._etcd, "big", 100)  # so that there is more to draw than fits between
        for _ in range(2):
            terminal.process.send_signal(signal.SIGINT)
        # done where the terminal had taken all of it before
        assert terminal.process.wait(60) in (
            Exit.INTERRUPTED,
            Exit.DONE,
        )


def test_a_closed_terminal_ends_it(watching: Watching, registry: Registry) -> None:
    with register(registry), watching() as terminal:
        terminal.wait_for("a/0 joined")
        terminal.close()
        assert terminal.process.wait(60) == Exit.DONE


def test_an_outage_of_etcd_is_shown_and_survived(own_etcd: LocalEtcd) -> None:
    with (
        Registry.connect(own_etcd.endpoint) as registry,
        register(registry, ttl_s=60),
        on_terminal("watch", columns=200, env={"ENGINES_ETCD": own_etcd.endpoint}) as terminal,
    ):
        terminal.wait_for("a ", "ready")
        own_etcd.kill()
        terminal.wait_for("etcd is away since", "this is how it was")
        terminal.wait_for("warning: ", "watching goes on as soon as it is back")
        assert terminal.line("a ").split() == ["a", "ready"]
        own_etcd.start()
        wait_until(lambda: not terminal.line("etcd is away"))
        with register(registry, "b"):
            terminal.wait_for("b/0 joined")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(60) == Exit.DONE


def test_what_is_cleaned_up_stands_among_the_events(watching: Watching, registry: Registry) -> None:
    with (
        register(registry, rank=0, world_size=2),
        register(registry, rank=1, world_size=2) as second,
        watching("--cleanup", "--dry-run", "--grace", "0.2") as terminal,
    ):
        terminal.wait_for("a ", "ready 2/2")
        second.withdraw()
        terminal.wait_for("a cleaned up: would evict rank 0, as rank 1 did not come back")
        assert terminal.line("a ").split() == ["a", "degraded", "1/2"]


def test_it_fits_whatever_size_the_terminal_has_or_gets(
    watching: Watching, registry: Registry
) -> None:
    put_ranks(registry._etcd, "big", 1_000, state=RankState.LOADING)
    with watching(columns=130, rows=30) as terminal:
        terminal.wait_for("1 instance, 1,000 ranks: 1,000 loading")
        terminal.wait_for("… and 9", " more", " loading")
        for columns, rows in ((60, 12), (20, 5), (200, 50)):
            terminal.resize(columns, rows)
            wait_until(lambda rows=rows: len(terminal.screen()) == rows)  # type: ignore[misc]
            assert max(map(len, terminal.screen())) <= columns
        terminal.wait_for("big ", "loading 1000/1000")
        assert terminal.line("big/0").split() == ["big/0", "loading"]


def test_it_costs_etcd_three_watches_and_no_question_however_often_it_draws(
    own_etcd: LocalEtcd,
) -> None:
    def metric(name: str) -> float:
        with urllib.request.urlopen(f"http://{own_etcd.endpoint}/metrics") as answer:
            found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    watches, questions = "etcd_debugging_mvcc_watcher_total", "etcd_debugging_mvcc_range_total"
    with Registry.connect(own_etcd.endpoint) as registry:
        put_ranks(registry._etcd, "a", 1)
        before = metric(watches)
        with on_terminal("watch", env={"ENGINES_ETCD": own_etcd.endpoint}) as terminal:
            terminal.wait_for("a ", "ready")
            wait_until(lambda: metric(watches) == before + 3)
            asked = metric(questions)
            frames = terminal.said.count("\x1b[H")
            wait_until(lambda: terminal.said.count("\x1b[H") > frames + 6)
            assert metric(questions) == asked


@pytest.mark.parametrize("args", [("--lines",), ("--json",), ("--exec", "true")])
def test_lines_are_to_be_had_on_a_terminal_too(
    watching: Watching, registry: Registry, args: tuple[str, ...]
) -> None:
    with register(registry), watching(*args) as terminal:
        wait_until(lambda: len(terminal.said.splitlines()) >= 2)
        first = terminal.said.splitlines()[0]
        if "--json" in args:
            assert json.loads(first)["event"] == "rank_joined"
        else:
            assert first.split("  ", 1)[1].startswith("a/0 joined: ready")
        assert "\x1b" not in terminal.said


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    shared_etcd: LocalEtcd, namespace: str, registry: Registry
) -> None:
    env = {"ENGINES_ETCD": shared_etcd.endpoint, "TERM": "dumb"}
    with register(registry), on_terminal("watch", "--namespace", namespace, env=env) as terminal:
        wait_until(lambda: "a ready: 1 rank" in terminal.said)
        assert "\x1b" not in terminal.said


def test_a_pipe_gets_lines_whatever_colours_are_asked_for(
    processes: Processes, namespace: str, registry: Registry
) -> None:
    with register(registry):
        watch = processes.engines("watch", "--namespace", namespace, FORCE_COLOR="1")
        assert line_of(watch).split("  ", 1)[1].startswith("a/0 joined: ready")
