"""`engines list --watch`: a table that is kept up to date on a terminal, and lines elsewhere."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from engine_cli.exits import Exit
from engine_registry import ModelIdentity, RankState, Registry
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, line_of
from tests.support.ranks import put_ranks, register
from tests.support.terminal import FIRST_SCREEN, OTHER_SCREEN, Terminal, on_terminal
from tests.support.waiting import wait_until

Listing = Callable[..., AbstractContextManager[Terminal]]
HEADING = ["INSTANCE", "STATE", "RANKS", "MODEL", "VERSION", "SIZE", "WHY", "NOT", "READY"]


@pytest.fixture
def listing(shared_etcd: LocalEtcd, namespace: str) -> Listing:
    """`engines list --watch` with some options, on a terminal."""

    def start(*args: str, **size: int) -> AbstractContextManager[Terminal]:
        env = {"ENGINES_ETCD": shared_etcd.endpoint}
        return on_terminal("list", "--watch", "--namespace", namespace, *args, env=env, **size)

    return start


@pytest.fixture
def lines(processes: Processes, namespace: str) -> Callable[..., Iterator[list[str]]]:
    """The words of each line that it prints into a pipe."""

    def start(*args: str) -> Iterator[list[str]]:
        process = processes.engines("list", "--watch", "--namespace", namespace, *args)
        while True:
            yield line_of(process).split()

    return start


def test_the_table_follows_what_comes_changes_and_goes(
    listing: Listing, registry: Registry
) -> None:
    with register(registry, "a"), listing() as terminal:
        terminal.wait_for("1 instance: 1 ready")
        assert terminal.line("INSTANCE").split() == HEADING
        with register(registry, "b", 0, world_size=2, labels={"team": "x"}):
            terminal.wait_for("b ", "degraded", "1/2", "team=x", "missing rank 1 of 2")
            with register(registry, "b", 1, world_size=2, labels={"team": "x"}):
                terminal.wait_for("b ", "ready", "2/2")
                terminal.wait_for("2 instances: 2 ready")
        terminal.wait_for("1 instance: 1 ready")
        assert terminal.line("b") == ""


def test_ranks_that_are_held_stay_in_the_table_with_the_time_that_is_left(
    listing: Listing, processes: Processes, registry: Registry
) -> None:
    args = ("-m", "tests.support.processes.holding", "a", "0", "1", "391", "host")
    rank = processes.start(*args)
    assert line_of(rank).startswith("registered")
    with listing() as terminal:
        terminal.wait_for("1 instance: 1 ready")
        rank.kill()
        terminal.wait_for("1 instance: 1 held")
        terminal.wait_for("missing rank 0 of 1; rank 0 held 16 B, 390 s left")
        registry.let_go_of_held("a")
        terminal.wait_for("no instance is registered")


def test_it_shows_how_far_loads_are(listing: Listing, registry: Registry) -> None:
    with (
        register(registry, "a"),
        register(registry, "b", state=RankState.LOADING),
        listing() as terminal,
    ):
        (source,), (reader,) = registry.ranks("a"), registry.ranks("b")
        ticket = registry.pull(source, reader)
        assert ticket is not None
        with ticket:
            for percent in (10, 63):
                ticket.report(percent, 100)
                terminal.wait_for("b ", f"loading {percent} %")


def test_only_what_is_chosen_is_listed_in_the_order_that_is_asked_for(
    listing: Listing, registry: Registry
) -> None:
    with (
        register(registry, "a", model=ModelIdentity("qwen"), version=1, labels={"team": "x"}),
        register(registry, "b", model=ModelIdentity("qwen"), version=3, labels={"team": "x"}) as b,
        register(registry, "c", model=ModelIdentity("qwen"), version=2, labels={"team": "y"}),
        register(registry, "d", model=ModelIdentity("llama"), version=2, labels={"team": "x"}),
        listing(
            *("--model", "qwen", "--label", "team=x", "--state", "ready", "--sort", "version")
        ) as terminal,
    ):

        def names() -> list[str]:
            screen = terminal.screen()
            start = next(at for at, line in enumerate(screen) if line.startswith("INSTANCE"))
            return [line.split()[0] for line in screen[start + 1 :] if line]

        terminal.wait_for("2 instances of 4: 2 ready")
        assert names() == ["a", "b"]
        b.update(version=0)
        wait_until(lambda: names() == ["b", "a"])
        b.update(state=RankState.UPDATING)
        terminal.wait_for("1 instance of 4: 1 ready")
        assert names() == ["a"]


def test_a_line_is_printed_for_each_instance_and_again_for_each_that_changes(
    lines: Callable[..., Iterator[list[str]]], registry: Registry
) -> None:
    printed = lines()
    with register(registry, "a") as a:
        assert next(printed) == HEADING
        assert next(printed)[:3] == ["a", "ready", "1/1"]
        a.update(version=7)
        assert next(printed)[4] == "7"
    assert next(printed)[:3] == ["a", "gone", "0/?"]


def test_a_heading_is_printed_again_when_there_is_a_first_label(
    lines: Callable[..., Iterator[list[str]]], registry: Registry
) -> None:
    with register(registry, "a"):
        printed = lines()
        assert [next(printed)[0] for _ in range(2)] == ["INSTANCE", "a"]
        with register(registry, "b", labels={"team": "x"}):
            assert "LABELS" in next(printed)
            assert next(printed)[0] == "b"


def test_what_is_not_chosen_any_more_gets_a_last_line(
    lines: Callable[..., Iterator[list[str]]], registry: Registry
) -> None:
    with register(registry, "a") as a, register(registry, "b", state=RankState.UPDATING):
        printed = lines("--state", "ready")
        assert [next(printed)[0] for _ in range(2)] == ["INSTANCE", "a"]
        a.update(state=RankState.UPDATING)
        assert next(printed)[:2] == ["a", "degraded"]
        a.update(state=RankState.READY)
        assert next(printed)[:2] == ["a", "ready"]


def test_json_is_one_object_for_each_instance_and_for_each_change(
    lines: Callable[..., Iterator[list[str]]], registry: Registry, processes: Processes
) -> None:
    def document() -> dict[str, Any]:
        return json.loads(" ".join(next(printed)))  # type: ignore[no-any-return]

    printed = lines("--json")
    with register(registry, "a"):
        first = document()
        whole = processes.run("list", "--json", "--namespace", registry.config.namespace)
        assert [first] == json.loads(whole.stdout)["instances"]
    assert (last := document())["state"] == "gone", last


def test_where_nothing_is_registered_it_says_so_and_waits(
    lines: Callable[..., Iterator[list[str]]], registry: Registry
) -> None:
    printed = lines()
    assert next(printed) == ["no", "instance", "is", "registered"]
    with register(registry, "a"):
        assert [next(printed)[0] for _ in range(2)] == ["INSTANCE", "a"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(
    listing: Listing,
    processes: Processes,
    registry: Registry,
    namespace: str,
    number: signal.Signals,
) -> None:
    with register(registry, "a"), listing() as terminal:
        terminal.wait_for("a ", "ready")
        piped = processes.engines("list", "--watch", "--namespace", namespace)
        assert line_of(piped).split() == HEADING
        for process in (terminal.process, piped):
            process.send_signal(number)
            assert process.wait(60) == Exit.DONE
        wait_until(lambda: terminal.said.endswith("\n"))
        assert terminal.said.count(OTHER_SCREEN) == terminal.said.count(FIRST_SCREEN) == 1
        assert "a " in terminal.said.split(FIRST_SCREEN)[1]
        assert piped.stderr is not None
        assert piped.stderr.read() == ""


def test_a_second_signal_does_not_wait_for_a_terminal_that_takes_nothing(
    listing: Listing, registry: Registry
) -> None:
    with register(registry, "a"), listing() as terminal:
        terminal.wait_for("a ", "ready")
        terminal.reads.clear()
        for number in range(100):  # so that there is more to draw than fits between
            put_ranks(registry._etcd, f"big-{number}", 1)
        for _ in range(2):
            terminal.process.send_signal(signal.SIGINT)
        # done where the terminal had taken all of it before
        assert terminal.process.wait(60) in (Exit.INTERRUPTED, Exit.DONE)


def test_a_closed_terminal_ends_it(listing: Listing, registry: Registry) -> None:
    with register(registry, "a"), listing() as terminal:
        terminal.wait_for("a ", "ready")
        terminal.close()
        assert terminal.process.wait(60) == Exit.DONE


def test_a_closed_pipe_ends_it_quietly_at_the_next_line(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    watch = processes.engines("list", "--watch", "--namespace", namespace)
    assert line_of(watch) == "no instance is registered\n"
    assert watch.stdout is not None
    assert watch.stderr is not None
    watch.stdout.close()
    with register(registry, "a"):
        assert watch.wait(60) == 128 + signal.SIGPIPE
    assert watch.stderr.read() == ""


def test_an_outage_of_etcd_is_said_and_survived(own_etcd: LocalEtcd, processes: Processes) -> None:
    env = {"ENGINES_ETCD": own_etcd.endpoint}
    with (
        Registry.connect(own_etcd.endpoint) as registry,
        register(registry, "a", ttl_s=60),
        on_terminal("list", "--watch", columns=200, env=env) as terminal,
    ):
        piped = processes.engines("list", "--watch", **env)
        assert [line_of(piped).split()[0] for _ in range(2)] == ["INSTANCE", "a"]
        terminal.wait_for("a ", "ready")
        own_etcd.kill()
        terminal.wait_for("etcd is away since", "this is how it was")
        assert terminal.line("a ").split()[:2] == ["a", "ready"]
        assert piped.stderr is not None
        assert "watching goes on as soon as it is back" in piped.stderr.readline()
        own_etcd.start()
        wait_until(lambda: not terminal.line("etcd is away"))
        with register(registry, "b"):
            terminal.wait_for("b ", "ready")
            assert line_of(piped).split()[:2] == ["b", "ready"]


def test_instances_that_do_not_fit_are_counted(listing: Listing, registry: Registry) -> None:
    for number in range(30):
        put_ranks(registry._etcd, f"a-{number:02}", 1)
    with listing(columns=60, rows=12) as terminal:
        terminal.wait_for("30 instances: 30 ready")
        terminal.wait_for("… and ", " more", " ready")
        terminal.resize(200, 50)
        terminal.wait_for("a-29 ", "ready")
        assert terminal.line("…") == ""


def test_without_etcd_it_ends_at_once_with_one_line(
    processes: Processes, dead_address: str
) -> None:
    done = processes.run("list", "--watch", "--etcd", dead_address, "--timeout", "0.5")
    assert (done.returncode, done.stderr.count("\n")) == (Exit.ETCD, 1)
