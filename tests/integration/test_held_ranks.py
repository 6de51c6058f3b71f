"""Ranks whose process has ended and whose memory is held, as operators, loads, watches and cleanup
meet them. The first tests write their records; the last ones have real keepers that hold memory.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from engine_cli.exits import Exit
from engine_registry import (
    InstanceCleaned,
    InstanceGone,
    InstanceReady,
    InstanceState,
    RankLost,
    RankRecord,
    Registry,
    let_go_of_device,
)
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.keyvalue import Delete, Put
from engine_registry.schema.moment import utc
from engine_registry.schema.record_format import encode
from engine_registry.telemetry import metrics
from tests.integration.conftest import Processes, events_until, line_of
from tests.support.ranks import put_ranks
from tests.support.waiting import wait_until

UNTIL = utc(datetime.now(timezone.utc) + timedelta(hours=5, minutes=5))
HELD: dict[str, Any] = {"ended": "process ended", "held_until": UNTIL}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def etcd(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Etcd]:
    config = EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace, timeout_s=60)
    with closing(Etcd(config)) as etcd:
        yield etcd


@pytest.fixture
def engines(processes: Processes, namespace: str) -> Run:
    def run(command: str, *args: str) -> subprocess.CompletedProcess[str]:
        return processes.run(command, "--namespace", namespace, *args)

    return run


def hold(etcd: Etcd, record: RankRecord) -> RankRecord:
    """Writes the rank's record as a keeper does when its process has died."""
    found = etcd.get(record.key)
    assert found is not None
    held = replace(record, ended="process ended", held_until=UNTIL)
    assert etcd.commit([], [Put(record.key, encode(held), found.lease_id)])
    return held


def half_held(etcd: Etcd, registry: Registry) -> RankRecord:
    """An instance of two ranks, of which rank 1 is held: its record."""
    put_ranks(etcd, "a", 2)
    return hold(etcd, registry.ranks("a")[1])


def test_a_list_shows_instances_of_which_ranks_are_held(
    engines: Run, etcd: Etcd, registry: Registry
) -> None:
    half_held(etcd, registry)
    put_ranks(etcd, "b", 2, **HELD)
    put_ranks(etcd, "c", 1, ended="withdrawn")
    rows = [line.split(None, 6) for line in engines("list").stdout.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["a", "degraded", "1/2"], ["b", "held", "0/2"]]
    assert rows[0][6].endswith("missing rank 1 of 2; rank 1 held 16 B, 5 h left")
    assert rows[1][6].endswith("missing ranks 0-1 of 2; ranks 0-1 held 32 B, 5 h left")
    (only,) = json.loads(engines("list", "--json", "--state", "held").stdout)["instances"]
    assert (only["instance"], only["present"]) == ("b", [])
    assert [(each["rank"], each["held_until"]) for each in only["held"]] == [(0, UNTIL), (1, UNTIL)]
    assert [status.instance for status in registry.instances()] == ["a", "b"]
    assert registry.instance("c").held == ()


def test_show_has_the_ranks_that_are_held_among_the_others(
    engines: Run, etcd: Etcd, registry: Registry
) -> None:
    half_held(etcd, registry)
    shown = engines("show", "a").stdout.splitlines()
    assert shown[1] == "not ready: missing rank 1 of 2; rank 1 held 16 B, 5 h left"
    assert [line.split()[:2] for line in shown[3:]] == [["0", "ready"], ["1", "held"]]
    ranks = json.loads(engines("show", "a", "--json").stdout)["ranks"]
    assert [(rank["rank"], rank["state"], rank["held_until"]) for rank in ranks] == [
        (0, "ready", None),
        (1, "held", UNTIL),
    ]
    put_ranks(etcd, "b", 1, **HELD)
    assert engines("show", "b", "--rank", "0").stdout.startswith("b: held, 0 B, model tiny")


def test_a_load_from_an_instance_says_which_ranks_are_held(
    engines: Run, etcd: Etcd, registry: Registry
) -> None:
    half_held(etcd, registry)
    put_ranks(etcd, "b", 1, **HELD)
    with pytest.raises(InstanceIncomplete, match=f"rank 1 is held until {UNTIL}: its process has"):
        registry.resolve("a")
    with pytest.raises(InstanceNotFound, match="is not registered: of 'b' rank 0 is held until"):
        registry.resolve("b")
    failed = engines("load", "b", "--rank", "0", "--wait", "0")
    assert (failed.returncode, "its process has ended" in failed.stderr) == (Exit.INSTANCE, True)
    assert registry.current(registry.instance("b").held[0]) is None
    assert engines("wait", "b", "--for", "gone").stdout == "b gone\n"


def test_a_watch_tells_of_one_loss_and_of_the_process_that_takes_the_place(
    etcd: Etcd, registry: Registry
) -> None:
    put_ranks(etcd, "a", 2)
    with registry.watch("a") as watch, registry.follow_instances() as instances:
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        one, other = registry.ranks("a")
        hold(etcd, other)
        lost = events_until(watch, lambda event: isinstance(event, RankLost))[-1]
        assert lost == RankLost(other, "process ended", None, UNTIL)
        wait_until(lambda: [each.held for each in instances.now()] == [(replace(other, **HELD),)])
        hold(etcd, one)
        gone = events_until(watch, lambda event: isinstance(event, InstanceGone))
        assert sum(isinstance(event, RankLost) for event in gone) == 1
        wait_until(lambda: [len(each.held) for each in instances.now()] == [2])
        etcd.commit([], [Delete(one.key)])  # its time is over
        wait_until(lambda: [len(each.held) for each in instances.now()] == [1])
        put_ranks(etcd, "a", 2, incarnation="1" * 32)
        joined = events_until(watch, lambda event: isinstance(event, InstanceReady))
        assert not any(isinstance(event, RankLost) for event in joined)
        wait_until(lambda: [each.state for each in instances.now()] == [InstanceState.READY])


def test_a_cleanup_leaves_alone_what_is_held(etcd: Etcd, registry: Registry) -> None:
    put_ranks(etcd, "a", 3)
    with registry.cleaning_watch("a", grace_s=0.1) as watch:
        events = iter(watch)
        assert any(isinstance(event, InstanceReady) for event in events)
        hold(etcd, registry.ranks("a")[1])
        cleaned = next(event for event in events if isinstance(event, InstanceCleaned))
    assert [record.rank for record in cleaned.evicted] == [0, 2]
    assert cleaned.lost.rank == 1
    status = registry.instance("a")
    assert (status.records, [record.rank for record in status.held]) == ((), [1])


def test_an_operator_evicts_what_is_held(engines: Run, etcd: Etcd, registry: Registry) -> None:
    half_held(etcd, registry)
    assert engines("evict", "a", "--rank", "1").stdout.startswith("evicted a/1 (host")
    assert registry.instance("a").held == ()
    put_ranks(etcd, "b", 2, **HELD)
    assert len(engines("evict", "b").stdout.splitlines()) == 2
    assert [status.instance for status in registry.instances()] == ["a"]


def test_an_operator_frees_what_is_held_and_nothing_else(
    engines: Run, etcd: Etcd, registry: Registry
) -> None:
    put_ranks(etcd, "a", 3)
    for record in registry.ranks("a")[1:]:
        hold(etcd, record)
    freed = engines("release", "a", "--held", "--rank", "2")
    assert (freed.returncode, freed.stdout) == (Exit.DONE, "freed a/2: 16 B on host ?\n")
    assert [record.rank for record in registry.instance("a").held] == [1]
    assert json.loads(engines("release", "a", "--held", "--json").stdout) == {
        "instance": "a",
        "freed": [{"rank": 1, "held_until": UNTIL, "nbytes": 16, "host": "", "device": ""}],
    }
    assert [record.rank for record in registry.ranks("a")] == [0]
    for args, why in [
        (("a", "--held"), "no rank is held: nothing of 'a' is to be freed"),
        (("a", "--held", "--rank", "0"), "rank 0 of 'a' is not held"),
        (("a", "--held", "--rank", "1"), "rank 1 of 'a' is not registered"),
        (("b", "--held"), "'b' is not registered"),
    ]:
        failed = engines("release", *args)
        assert (failed.returncode, why in failed.stderr) == (Exit.INSTANCE, True), failed.stderr
    for args in [("a", "--rank", "0"), ("a", "--held", "--version", "1")]:
        assert engines("release", *args).returncode == Exit.USAGE


# -- held by real keepers
# --------------------------------------------------------------------------------------------------


def killed(processes: Processes, instance: str, rank: int, device: str = "GPU-1") -> int:
    """A rank of two whose process has been killed and whose memory is held: its keeper's pid."""
    args = (instance, str(rank), "2", "600", device)
    process = processes.start("-m", "tests.support.processes.holding", *args)
    keeper = int(line_of(process).split()[1])
    process.kill()
    process.wait(60)
    return keeper


def test_a_list_names_ranks_as_soon_as_their_keepers_hold_them(
    engines: Run, processes: Processes, registry: Registry
) -> None:
    with registry.watch("a") as watch:
        killed(processes, "a", 0)
        lost = events_until(watch, lambda event: isinstance(event, RankLost))[-1]
        assert isinstance(lost, RankLost)
        assert (lost.reason, lost.held_until != "") == ("process ended", True)
        (listed,) = json.loads(engines("list", "--json").stdout)["instances"]
    assert (listed["state"], listed["held"][0]["held_until"]) == ("held", lost.held_until)


def test_what_an_operator_frees_is_let_go_by_its_keeper(
    engines: Run, processes: Processes, registry: Registry
) -> None:
    keepers = [killed(processes, "a", rank) for rank in range(2)]
    wait_until(lambda: len(registry.instance("a").held) == 2)
    assert engines("release", "a", "--held", "--rank", "1").stdout.startswith("freed a/1: 16 B")
    wait_until(lambda: not Path(f"/proc/{keepers[1]}").exists())
    assert [record.rank for record in registry.instance("a").held] == [0]
    assert engines("evict", "a").returncode == Exit.DONE
    wait_until(lambda: not Path(f"/proc/{keepers[0]}").exists())
    assert registry.instances() == ()


def test_the_doctor_finds_memory_that_is_held_here_and_says_how_to_free_it(
    engines: Run, processes: Processes, registry: Registry, namespace: str
) -> None:
    instance = f"a{namespace[1:]}"  # other tests run on this host
    keeper = killed(processes, instance, 0)
    wait_until(lambda: len(registry.instance(instance).held) == 1)
    checks = json.loads(engines("doctor", "--json").stdout)["checks"]
    (found,) = [each for each in checks if f"{instance}/0" in each["what"]]
    assert (found["check"], found["status"]) == ("memory.held", "warn")
    assert "holds 16 B on GPU-1: its process has ended; 600 s left" in found["what"]
    assert f"engines release {instance} --held --rank 0" in found["mend"]
    assert found["mend"].endswith(f"kill -KILL {keeper}")


def test_a_metric_has_the_bytes_that_are_held_by_device(
    processes: Processes, registry: Registry, namespace: str
) -> None:
    def shown() -> float | None:
        labels = {"device": device}
        return collectors.get_sample_value("engines_registry_held_bytes", labels)

    collectors, device = CollectorRegistry(), f"GPU{namespace}"  # other tests run on this host
    with metrics.counting(collectors):
        assert shown() is None
        killed(processes, "a", 0, device)
        killed(processes, "a", 1, device)
        wait_until(lambda: shown() == 32)
        registry.let_go_of_held("a", 0)
        wait_until(lambda: shown() == 16)
        assert let_go_of_device(device) == 16
        assert shown() is None
    wait_until(lambda: registry.instances() == ())
