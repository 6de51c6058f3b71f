"""How fast memory of a rank is read, and what that is compared with."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from engine_cli.doctor import peer_reads
from engine_cli.doctor.finding import Finding, Status
from engine_cli.doctor.peer_reads import read_weights
from engine_cli.doctor.speed import Link, judge_speed, link_to
from engine_loader import InProcessEngine
from engine_registry import Region
from engine_registry.schema.record_format import encode
from tests.support.builders import a_record
from tests.support.machines import Machine


def judged(gb_per_s: float, protocol: str, link: Link | None) -> Finding:
    fact = {"error": "", "nbytes": int(gb_per_s * 1e9), "seconds": 1.0}
    return judge_speed("q/0", protocol, fact, 0.0005, link)


NDR, SLOW, FAST = Link("mlx5_0", 50e9), Link("eth0", 1.25e8), Link("eth0", 12.5e9)


@pytest.mark.parametrize(
    ("gb_per_s", "protocol", "link", "status"),
    [
        (45.0, "rdma", NDR, Status.OK),
        (20.0, "rdma", NDR, Status.WARN),
        (0.11, "tcp", SLOW, Status.OK),
        (0.05, "tcp", SLOW, Status.WARN),
        (1.4, "tcp", FAST, Status.OK),  # the transfer engine is no quicker over tcp
        (0.5, "tcp", FAST, Status.WARN),
        (0.001, "tcp", None, Status.OK),  # no verdict
    ],
)
def test_a_speed_is_judged_by_the_link_where_that_is_known(
    gb_per_s: float, protocol: str, link: Link | None, status: Status
) -> None:
    finding = judged(gb_per_s, protocol, link)
    assert finding.status is status
    assert bool(finding.mend) == (status is Status.WARN)
    assert f"read over {protocol} at " in finding.what
    assert "a small read takes 0.5 ms" in finding.what


def test_weights_that_cannot_be_read_are_to_be_looked_at() -> None:
    finding = judge_speed("q/0", "tcp", {"error": "no answer within 2 s"}, 0.1, None)
    assert (finding.status, "no answer within 2 s" in finding.what) == (Status.WARN, True)


def test_the_link_of_rdma_is_the_fastest_device_that_is_used(tmp_path: Path) -> None:
    machine, record = Machine(tmp_path), a_record(protocol="rdma")
    assert link_to(record, "", tmp_path) is None
    machine.nic("mlx5_0", rate="100 Gb/sec (4X EDR)")
    machine.nic("mlx5_1", rate="400 Gb/sec (4X NDR)")
    assert link_to(record, "", tmp_path) == Link("mlx5_1", 50e9)
    assert link_to(record, "mlx5_0", tmp_path) == Link("mlx5_0", 12.5e9)


def test_the_link_of_tcp_is_the_interface_on_the_way(tmp_path: Path) -> None:
    machine, record = Machine(tmp_path), a_record(session_id="10.1.4.9:15000")
    assert link_to(record, "", tmp_path) is None
    for netdev, address in (("eth0", "10.1.4.7/24"), ("eth1", "10.1.0.7/16")):
        machine.nic(netdev, link="Ethernet", address=address, netdev=netdev)
    assert link_to(record, "", tmp_path) is None
    machine.write("sys/class/net/eth0/speed", "10000")
    machine.write("sys/class/net/eth1/speed", "-1")
    assert link_to(record, "", tmp_path) == Link("eth0", 1.25e9)
    assert link_to(a_record(session_id="10.1.5.9:15000"), "", tmp_path) is None
    assert link_to(a_record(session_id="[fd00::9]:1"), "", tmp_path) is None


@pytest.mark.parametrize("nbytes", [1, 10 << 20])
def test_the_bytes_that_are_named_are_read_and_no_others(
    monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    class Over(Exception):
        pass

    monkeypatch.setattr(peer_reads, "_SPEED_NBYTES", 20 << 20)
    memory = ctypes.create_string_buffer(nbytes)
    facts: list[dict[str, Any]] = []
    with InProcessEngine() as source, InProcessEngine() as engine:
        source.register(Region(ctypes.addressof(memory), nbytes))
        record = a_record(session_id=source.session_id, protocol="in_process")
        asked = [
            {
                "rank": f"{record.key} {encode(record).decode()}",
                "addr": ctypes.addressof(memory),
                "nbytes": nbytes,
            }
        ]

        def speeds() -> dict[str, Any]:
            if not asked:
                raise Over
            return asked.pop()

        with pytest.raises(Over):
            read_weights(engine, speeds, lambda fact, **fields: facts.append(fields))
    (fact,) = facts
    assert fact["error"] == ""
    assert fact["nbytes"] > 0
