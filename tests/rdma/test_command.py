"""The command `engines` on hosts with RDMA."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from engine_registry.etcd.local import LocalEtcd
from tests.rdma.guest import Guest, Program, etcd_from_guests
from tests.rdma.hosts import LOAD_S, finish, source

pytestmark = pytest.mark.rdma

NBYTES = 2 << 20


@pytest.fixture
def common(etcd: LocalEtcd, namespace: str) -> list[str]:
    return [
        *("--etcd", etcd_from_guests(etcd.endpoint)),
        *("--namespace", namespace, "--timeout", "60"),
    ]


def document(program: Program, exit_codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """What a command with `--json` has printed when it has ended."""
    out, err = program.finish(LOAD_S)
    assert program.returncode in exit_codes, out + err
    found: dict[str, Any] = json.loads(out)
    return found


def test_what_register_serves_load_writes_over_rdma_without_being_told(
    guests: list[Guest], common: list[str]
) -> None:
    here, there = guests
    finish(there.start("tests.rdma.programs.file", "weights.safetensors", str(NBYTES)))
    served = there.engines(
        *("register", "q", "--rank", "0", "--world-size", "1"),
        *("--weights", "weights.safetensors"),
        *("--host", there.address, "--protocol", "rdma", *common),
    )
    served.wait_for("q/0")
    listed = document(here.engines("list", "--json", *common))
    assert "q" in json.dumps(listed)
    load = here.engines(
        *("load", "q", "--rank", "0", "--out", "out", "--force", "--json"),
        *("--host", here.address, *common),
    )
    loaded = document(load)
    assert loaded["protocol"] == "rdma"
    check = here.start("tests.rdma.programs.file", "--check", "out/rank-0.safetensors")
    out, err = check.finish()
    assert (check.returncode, out) == (0, f"{NBYTES} bytes\n"), err
    served.kill()


# -- doctor
# --------------------------------------------------------------------------------------------------


Checks = dict[str, tuple[str, str]]  # a result and what it says, by the check's name


def examine(guest: Guest, common: list[str], *args: str) -> Checks:
    """What `engines doctor` finds there. Its probe, which imports torch, is a fork of it."""
    program = guest.start(
        "tests.support.processes.doctor",
        *("doctor", "--host", guest.address, "--protocol", "rdma", "--json", *args, *common),
    )
    found = document(program, exit_codes=(0, 1))
    return {check["check"]: (check["status"], check["what"]) for check in found["checks"]}


@pytest.fixture
def bare(guests: list[Guest]) -> Iterator[Guest]:
    """A host whose device a test may take away."""
    guest = guests[0]
    yield guest
    guest.shell("ip link set eth1 up; rdma link show rxe0/1 || " + guest.add_device)


def test_doctor_finds_a_device_whose_port_is_active(guests: list[Guest], common: list[str]) -> None:
    checks = examine(guests[0], common)
    assert checks["rdma.devices"] == ("ok", "rxe0 Ethernet 2.5 Gb/sec (1X SDR)")
    assert checks["rdma.gid"] == ("ok", "rxe0 index 1: 10.9.0.1 (RoCE v2, eth1)")
    assert checks["rdma.mtu"] == ("ok", "rxe0 4,096 bytes a packet (its interface: 4,500)")
    assert checks["rdma.memlock"] == ("ok", "locked memory is not limited")


def test_doctor_measures_how_fast_a_peer_is_read_and_says_what_the_link_could_bring(
    guests: list[Guest], common: list[str]
) -> None:
    here, there = guests
    served = source(there, "a", launch=1)
    checks = examine(here, common, "--peer", "a")
    status, what = checks["peer.speed"]
    assert status == "warn", what  # of 313 MB/s
    assert re.match(
        r"a/0: .+B of its weights read over rdma at .+B/s; a small read takes .+s; "
        r"rxe0 has 312\.5 MB/s: slow",
        what,
    ), what
    finish(served)


def test_doctor_says_that_the_port_is_down(bare: Guest, common: list[str]) -> None:
    bare.shell("ip link set eth1 down")
    what = "no RDMA device can be used: rxe0: its port 1 is DOWN"
    assert examine(bare, common)["rdma.devices"] == ("fail", what)


def test_doctor_says_that_there_is_no_device(bare: Guest, common: list[str]) -> None:
    bare.shell("rdma link del rxe0")
    status, what = examine(bare, common)["rdma.devices"]
    assert status == "fail"
    assert what.startswith("no RDMA device is here")
