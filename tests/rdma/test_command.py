"""The command `engines` on hosts with RDMA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from engine_registry.etcd.local import LocalEtcd
from tests.rdma.guest import Guest, etcd_from_guests
from tests.rdma.hosts import LOAD_S, finish

pytestmark = pytest.mark.rdma

NBYTES = 2 << 20


@pytest.fixture
def common(etcd: LocalEtcd, namespace: str) -> list[str]:
    return [
        *("--etcd", etcd_from_guests(etcd.endpoint)),
        *("--namespace", namespace, "--timeout", "60"),
    ]


def run(guest: Guest, *args: str, exit_codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """The document that `engines ARGS --json` prints."""
    program = guest.engines(*args, "--json")
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
    listed = run(here, "list", *common)
    assert "q" in json.dumps(listed)
    loaded = run(
        here, *("load", "q", "--rank", "0", "--out", "out", "--force"),
        *("--host", here.address, *common),
    )  # fmt: skip
    assert loaded["protocol"] == "rdma"
    check = here.start("tests.rdma.programs.file", "--check", "out/rank-0.safetensors")
    out, err = check.finish()
    assert (check.returncode, out) == (0, f"{NBYTES} bytes\n"), err
    served.kill()


# -- doctor
# --------------------------------------------------------------------------------------------------


def device_finding(guest: Guest, common: list[str]) -> tuple[str, str]:
    """Other checks may fail: they import torch, which takes too long under emulation."""
    asked = ["doctor", "--host", guest.address, "--protocol", "rdma", *common]
    found = run(guest, *asked, exit_codes=(0, 1))
    (finding,) = [check for check in found["checks"] if check["check"] == "rdma.devices"]
    return finding["status"], finding["what"]


@pytest.fixture
def bare(guests: list[Guest]) -> Iterator[Guest]:
    """A host whose device a test may take away."""
    guest = guests[0]
    yield guest
    guest.shell("ip link set eth1 up; rdma link show rxe0/1 || " + guest.add_device)


def test_doctor_finds_a_device_whose_port_is_active(guests: list[Guest], common: list[str]) -> None:
    status, what = device_finding(guests[0], common)
    assert (status, what.split()[0]) == ("ok", "rxe0")


def test_doctor_says_that_the_port_is_down(bare: Guest, common: list[str]) -> None:
    bare.shell("ip link set eth1 down")
    status, what = device_finding(bare, common)
    assert (status, what) == ("fail", "no RDMA device can be used: rxe0: its port 1 is DOWN")


def test_doctor_says_that_there_is_no_device(bare: Guest, common: list[str]) -> None:
    bare.shell("rdma link del rxe0")
    status, what = device_finding(bare, common)
    assert status == "fail"
    assert what.startswith("no RDMA device is here")
