"""Hosts with two RDMA devices, of which only one leads to the other host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd
from tests.rdma.guest import Guest, etcd_from_guests
from tests.rdma.hosts import LOAD_S, Load, finish, source

pytestmark = pytest.mark.rdma


@pytest.fixture
def pair(guests: list[Guest]) -> Iterator[list[Guest]]:
    """Their `rxe1` is on the interface to the machine that runs them: it reaches no guest."""
    for guest in guests:
        guest.shell("rdma link add rxe1 type rxe netdev eth0")
    yield guests
    for guest in guests:
        guest.end_programs()
        guest.shell("rdma link del rxe1")


@pytest.mark.parametrize(
    ("device", "taken"),
    [("rxe0", ["rxe0"]), ("rxe1,rxe0", ["rxe1", "rxe0"]), ("auto", ["rxe0", "rxe1"])],
)
def test_the_record_names_the_devices_and_their_subnets(
    pair: list[Guest], registry: Registry, device: str, taken: list[str]
) -> None:
    pair[1].env["TEST_DEVICE"] = device
    served = source(pair[1], "a", launch=1)
    (record,) = registry.ranks("a")
    subnets = {"rxe0": "10.9.0.0/24", "rxe1": "10.0.2.0/24"}
    assert record.rails == {name: subnets[name] for name in taken}
    finish(served)


def test_a_load_goes_over_the_device_that_is_named_though_another_leads_nowhere(
    pair: list[Guest],
) -> None:
    here, there = pair
    for guest in pair:
        guest.env["TEST_DEVICE"] = "rxe0"
    served = source(there, "a", launch=1)
    load = Load(here, "a")
    outcome = load.outcome()
    assert (outcome.get("protocol"), outcome.get("origin")) == ("rdma", [1, 0, 0]), outcome
    finish(load.program, served)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    pair: list[Guest], etcd: LocalEtcd, namespace: str
) -> None:
    host = pair[1]
    finish(host.start("tests.rdma.programs.file", "weights.safetensors", "4096"))
    program = host.engines(
        *("register", "q", "--rank", "0", "--world-size", "1"),
        *("--weights", "weights.safetensors", "--host", host.address),
        *("--protocol", "rdma", "--device", "rxe0,rxe7"),
        *("--etcd", etcd_from_guests(etcd.endpoint), "--namespace", namespace),
    )
    _, err = program.finish(LOAD_S)
    assert program.returncode not in (0, None)
    assert "there is no RDMA device 'rxe7': this machine has rxe0, rxe1" in err
