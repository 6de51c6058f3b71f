"""Who reads from whom, as `engines list` and `show` print it: of loads that are going on, and of
those who may not see tickets.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from engine_loader import LoadOptions, MooncakeEngine, Pace, Progress, load
from engine_registry import Pull, RankRecord, RankState, Registry
from engine_registry.schema.keyvalue import Put
from engine_registry.schema.pull_ticket import Reader
from tests.integration.conftest import Processes, line_of
from tests.integration.test_cli import Engines
from tests.integration.test_cli import engines as engines
from tests.support.processes.source import content, empty
from tests.support.ranks import register
from tests.support.waiting import wait_until

NBYTES = 8 << 20
PACE = Pace(64 << 10, 2)
HERE = f"{socket.gethostname()} pid {os.getpid()}"


@contextmanager
def half_way(
    registry: Registry, processes: Processes, publish: str | None = None
) -> Iterator[None]:
    """A real load from a/0 that has come to its half, waits there as long as the block lasts, and
    then comes to its end.

    With `publish` it is one into a rank of that instance.
    """
    source = processes.start("-m", "tests.support.processes.source", "a", str(NBYTES))
    assert line_of(source) == "version 0\n"
    tensors, reached, go_on = empty(NBYTES), threading.Event(), threading.Event()

    def wait_at_half(progress: Progress) -> None:
        if progress.nbytes * 2 >= progress.total_nbytes and not reached.is_set():
            reached.set()
            go_on.wait(60)

    def run() -> None:
        with MooncakeEngine("127.0.0.1") as engine:
            report = load(
                registry,
                engine,
                "a",
                rank=0,
                tensors=tensors,
                options=LoadOptions(pace=PACE, progress=wait_at_half),
                publish=publish or False,
            )
            if report.publication is not None:
                report.publication.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert reached.wait(60)
        yield
    finally:
        go_on.set()
        thread.join(60)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in content(0, NBYTES).items())
    assert registry.all_pulls() == ()


def reported(registry: Registry) -> Pull:
    """The only ticket, once it says that its load has come to the half, where it waits."""
    wait_until(lambda: any((pull.fraction or 0) >= 0.5 for pull in registry.all_pulls("a")))
    (pull,) = registry.all_pulls("a")
    assert (pull.fraction or 0) < 1
    return pull


def the_rank(registry: Registry, instance: str) -> RankRecord:
    (record,) = registry.ranks(instance)
    return record


def test_a_load_into_a_process_that_is_no_rank_is_seen_with_its_progress(
    engines: Engines, registry: Registry, processes: Processes
) -> None:
    with half_way(registry, processes):
        pull = reported(registry)
        assert (pull.reader, registry.readers(the_rank(registry, "a"))) == (None, (pull,))
        percent = f"{int(100 * (pull.fraction or 0))} %"
        shown = engines("show", "a").stdout.splitlines()
        assert shown[2].rstrip().endswith(f"{HERE} {percent}")
        assert shown[3:] == ["who reads from whom:", "a/0  ready", f"  {HERE}  {percent}"]
        (rank,) = json.loads(engines("show", "a", "--json").stdout)["ranks"]
        assert (rank["progress"], rank["reads_from"]) == (None, [])
        (reader,) = rank["readers"]
        assert (reader["reader"], reader["host"], reader["pid"]) == (
            None,
            socket.gethostname(),
            os.getpid(),
        )
        assert (reader["nbytes"], reader["total_nbytes"]) == (pull.nbytes, pull.total_nbytes)
    assert "who reads" not in engines("show", "a").stdout


def test_a_load_into_a_rank_that_is_registered_is_its_progress(
    engines: Engines, registry: Registry, processes: Processes
) -> None:
    with half_way(registry, processes, publish="b"):
        pull = reported(registry)
        assert pull.reader == Reader.of(the_rank(registry, "b"))
        loading = f"loading {int(100 * (pull.fraction or 0))} %"
        progress = {"nbytes": pull.nbytes, "total_nbytes": pull.total_nbytes}
        assert f"b         {loading}" in engines("list").stdout
        listed = json.loads(engines("list", "--json").stdout)["instances"]
        assert [each["loading"] for each in listed] == [[], [{"rank": 0, "progress": progress}]]
        for name in ("a", "b"):
            assert engines("show", name).stdout.splitlines()[-2:] == [
                "a/0  ready",
                f"  b/0  {loading}",
            ]
        shown = json.loads(engines("show", "b", "--json").stdout)
        (rank,) = shown["ranks"]
        assert (rank["state"], rank["progress"], rank["readers"]) == ("loading", progress, [])
        assert shown["pulls"] == rank["reads_from"]
        assert [each["source"]["instance"] for each in shown["pulls"]] == ["a"]


def test_a_chain_is_a_tree_and_with_a_rank_only_what_it_belongs_to(
    engines: Engines, registry: Registry
) -> None:
    with (
        register(registry, "a", rank=0, world_size=2),
        register(registry, "a", rank=1, world_size=2),
        register(registry, "b", state=RankState.LOADING),
        register(registry, "c", state=RankState.LOADING),
    ):
        first, second = registry.ranks("a")
        b, c = the_rank(registry, "b"), the_rank(registry, "c")
        tickets = [registry.pull(first, b), registry.pull(b, c), registry.pull(second)]
        tree = ["a/0  ready", "  b/0  loading", "    c/0  loading"]
        rest = ["a/1  ready", f"  {HERE}"]
        assert engines("show", "b").stdout.splitlines()[-6:] == [
            "who reads from whom:",
            *tree,
            *rest,
        ]
        assert engines("show", "a", "--rank", "0").stdout.splitlines()[-4:] == [
            "who reads from whom:",
            *tree,
        ]
        assert engines("show", "a", "--rank", "1").stdout.splitlines()[-3:] == [
            "who reads from whom:",
            *rest,
        ]
        for ticket in tickets:
            assert ticket is not None
            ticket.close()


def test_tickets_that_lie_and_nonsense_are_shown_as_what_they_say_or_not_at_all(
    engines: Engines, registry: Registry
) -> None:
    with register(registry, "a"):
        record = the_rank(registry, "a")
        ours = {"instance": "a", "rank": 0, "incarnation": record.incarnation}
        etcd = registry._etcd
        lease_id = etcd.grant(60)
        for name, value in (
            (
                "circle",
                json.dumps(
                    {
                        "incarnation": record.incarnation,
                        "reader": ours,
                        "nbytes": 9,
                        "total_nbytes": 1,
                    }
                ).encode(),
            ),
            ("escape", json.dumps({"incarnation": record.incarnation, "host": "\x1b[2J"}).encode()),
            ("deep", b"[" * 3_000),
            ("long", b"[" + b"1," * 300_000 + b"1]"),
        ):
            assert etcd.commit([], [Put(f"/pulls/a/0/{name}", value, lease_id)])
        shown = engines("show", "a")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.splitlines()[-3:] == [
            "who reads from whom:",
            "a/0  ready",
            ("  a/0  ready  (what reads from it stands elsewhere)"),
        ]
        assert len(json.loads(engines("show", "a", "--json").stdout)["pulls"]) == 1
        etcd.revoke(lease_id)


def test_an_expired_ticket_does_not_come_back_with_its_progress(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_registry.pulls.ticket._REPORT_S", 0.01)
    with register(registry, "a"):
        ticket = registry.pull(the_rank(registry, "a"))
        assert ticket is not None
        with ticket:
            ticket.report(1, 10)
            wait_until(lambda: [pull.nbytes for pull in registry.all_pulls()] == [1])
            registry._etcd.revoke(ticket._lease_id)
            ticket.report(2, 10)
            wait_until(lambda: not ticket._written or not ticket._thread.is_alive())
            assert registry._etcd.snapshot("/pulls/").items == ()
