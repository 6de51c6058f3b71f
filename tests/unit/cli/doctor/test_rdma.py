"""What `engines doctor` says of RDMA, on machines as the kernel shows them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from engine_cli.devices import complete_devices
from engine_cli.doctor.finding import Finding, Status
from engine_cli.doctor.rdma import check_devices, judge_libibverbs, judge_memlock, lifted
from engine_cli.doctor.rdma_paths import payload_of
from tests.support.machines import Machine, dgx_h100

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MC_IB_PORT", "MC_GID_INDEX", "WITH_NVIDIA_PEERMEM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def findings(machine: Machine, wanted: bool = True) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_devices(wanted, machine.root)}


def roce(machine: Machine, name: str = "mlx5_0", address: str = "10.1.4.7/24") -> None:
    machine.nic(name, link="Ethernet", address=address, netdev="eth0")


# -- devices
# --------------------------------------------------------------------------------------------------


def test_devices_are_shown_with_their_link_their_node_and_the_reason_why_one_is_not_used(
    machine: Machine,
) -> None:
    machine.nic("mlx5_0", "pci0000:10", "0000:11:00.0", node=1)
    machine.nic("mlx5_1", "pci0000:10", "0000:12:00.0", states=["DOWN"])
    found = findings(machine)["rdma.devices"]
    assert found.what == (
        "mlx5_0 InfiniBand 400 Gb/sec (4X NDR) on NUMA node 1; not used: mlx5_1: its port 1 is DOWN"
    )
    assert found.status is Status.WARN


def test_what_is_missing_is_a_failure_only_if_rdma_is_wanted(machine: Machine) -> None:
    def statuses() -> list[Status]:
        return [findings(machine, wanted)["rdma.devices"].status for wanted in (False, True)]

    assert statuses() == [Status.SKIPPED, Status.FAIL]
    machine.nic("mlx5_0", states=["DOWN"])
    assert statuses() == [Status.WARN, Status.FAIL]
    assert "ibstat" in findings(machine)["rdma.devices"].mend
    machine.nic("mlx5_1")
    assert statuses() == [Status.WARN, Status.WARN]


def test_a_device_file_that_a_container_lacks_is_put_down_to_the_container(
    machine: Machine,
) -> None:
    machine.nic("mlx5_0", node_file=False)
    found = findings(machine)["rdma.devices"]
    assert (found.status, "--device /dev/infiniband" in found.mend) == (Status.FAIL, True)


def test_without_rdma_wanted_nothing_is_said_of_how_it_would_go(machine: Machine) -> None:
    roce(machine)
    assert list(findings(machine, wanted=False)) == ["rdma.devices"]


def test_what_auto_would_take_is_shown_for_the_host_and_for_each_gpu(tmp_path: Path) -> None:
    beside = dgx_h100(tmp_path)
    (auto,) = [one for one in check_devices(True, tmp_path) if one.check == "rdma.auto"]
    assert auto.what.startswith(
        "--device auto takes mlx5_0, mlx5_3, mlx5_4, mlx5_5 for memory of the host; "
        "mlx5_0 for the GPU 0000:1b:00.0; "
    )
    assert all(f"{card} for the GPU {gpu}" in auto.what for gpu, card in beside.items())


def test_a_shell_completes_names_that_are_not_named_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dgx_h100(tmp_path)
    from engine_loader.engines.mooncake import devices

    there = devices.rdma_devices(tmp_path)
    monkeypatch.setattr(devices, "rdma_devices", lambda: there)

    def completed(text: str) -> list[str]:
        return complete_devices(None, None, text)  # type: ignore[arg-type]

    assert completed("a") == ["auto"]
    assert completed("mlx5_1") == ["mlx5_1", "mlx5_10", "mlx5_11"]
    assert completed("mlx5_1,mlx5_1") == ["mlx5_1,mlx5_10", "mlx5_1,mlx5_11"]


# -- addresses and packets
# --------------------------------------------------------------------------------------------------


def test_the_gid_that_mooncake_takes_is_the_one_of_roce_v2_with_an_ip_address(
    machine: Machine,
) -> None:
    roce(machine)
    found = findings(machine)["rdma.gid"]
    assert found.what == "mlx5_0 index 3: 10.1.4.7 (RoCE v2, eth0)"
    assert found.status is Status.OK


def test_a_gid_that_routers_do_not_pass_on_is_to_be_looked_at(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    roce(machine, "mlx5_0")
    roce(machine, "mlx5_1", address="")
    found = findings(machine)["rdma.gid"]
    assert found.status is Status.WARN
    assert found.what.endswith(": mlx5_1 cannot be reached through routers")
    monkeypatch.setenv("MC_GID_INDEX", "2")  # of version 1
    assert findings(machine)["rdma.gid"].what.startswith("mlx5_1 has no GID at the index 2 of MC_")


def test_an_index_that_no_device_has_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    roce(machine)
    monkeypatch.setenv("MC_GID_INDEX", "9")
    found = findings(machine)["rdma.gid"]
    assert (found.status, "MC_GID_INDEX" in found.mend) == (Status.FAIL, True)


def test_the_default_prefix_of_infiniband_is_no_fault(machine: Machine) -> None:
    machine.nic("mlx5_0")
    assert findings(machine)["rdma.gid"].status is Status.OK


@pytest.mark.parametrize(
    ("mtu", "payload", "status"),
    [(1500, 1024, Status.WARN), (4200, 4096, Status.OK), (9000, 4096, Status.OK)],
)
def test_the_size_of_packets_follows_from_the_interface(
    machine: Machine, mtu: int, payload: int, status: Status
) -> None:
    roce(machine)
    machine.write("sys/class/net/eth0/mtu", str(mtu))
    found = findings(machine)["rdma.mtu"]
    assert (payload_of(mtu), found.status) == (payload, status)
    assert f"mlx5_0 {payload:,} bytes a packet" in found.what


def test_a_packet_size_that_the_kernel_does_not_show_is_skipped(machine: Machine) -> None:
    machine.nic("mlx5_0")
    assert findings(machine)["rdma.mtu"].status is Status.SKIPPED
    roce(machine, "mlx5_1")
    assert findings(machine)["rdma.mtu"].status is Status.SKIPPED


# -- GPUs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "peermem", "version", "kernel", "status", "word"),
    [
        ("", True, CLOSED, "5.4.0", Status.OK, "is loaded"),
        ("", False, OPEN, "6.8.0-31-generic", Status.WARN, "WITH_NVIDIA_PEERMEM=0"),
        ("", False, CLOSED, "6.8.0", Status.WARN, "which this driver or kernel has not"),
        ("0", False, OPEN, "5.12.0", Status.OK, "dma-buf"),
        ("0", True, CLOSED, "6.8.0", Status.WARN, "unset WITH_NVIDIA_PEERMEM"),
        ("off", False, OPEN, "5.10.0", Status.WARN, "5.10.0"),
    ],
)
def test_memory_of_gpus_needs_the_module_or_dma_buf_as_mooncake_is_set(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    peermem: bool,
    version: str,
    kernel: str,
    status: Status,
    word: str,
) -> None:
    roce(machine)
    machine.gpu("pci0000:00", "0000:00:0f.0")
    machine.write("proc/driver/nvidia/version", f"{version}\nGCC version: 12")
    machine.write("proc/sys/kernel/osrelease", kernel)
    machine.write("proc/modules", f"nvidia 1 0 - Live\n{'nvidia_peermem 1 0 -' * peermem}")
    if setting:
        monkeypatch.setenv("WITH_NVIDIA_PEERMEM", setting)
    found = findings(machine)["rdma.gpudirect"]
    assert found.status is status
    assert word in f"{found.what} {found.mend}"


def test_gpudirect_is_skipped_without_a_gpu_or_its_driver(machine: Machine) -> None:
    roce(machine)
    assert findings(machine)["rdma.gpudirect"].what.startswith("no GPU is here")
    machine.gpu("pci0000:00", "0000:00:0f.0")
    assert findings(machine)["rdma.gpudirect"].what.startswith("no driver of NVIDIA")


# -- locked memory and the library
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "else_", "wanted"),
    [
        (8 << 20, Status.OK, Status.FAIL),
        (64 << 30, Status.OK, Status.WARN),
        (resource.RLIM_INFINITY, Status.OK, Status.OK),
    ],
)
def test_a_limit_on_locked_memory_matters_to_rdma_unless_a_capability_lifts_it(
    limit: int, else_: Status, wanted: Status
) -> None:
    assert judge_memlock(limit, False, wanted=False).status is else_
    assert judge_memlock(limit, False, wanted=True).status is wanted
    assert judge_memlock(limit, True, wanted=True).status is Status.OK


@pytest.mark.parametrize(
    ("capabilities", "uid_map", "is_lifted"),
    [
        ("000001ffffffffff", "0 0 4294967295", True),
        ("0000000000004000", "0 0 4294967295", True),
        ("00000000a80425fb", "0 0 4294967295", False),  # docker's default
        ("000001ffffffffff", "0 100000 65536", False),  # a user namespace
    ],
)
def test_the_capability_counts_outside_of_user_namespaces(
    machine: Machine, capabilities: str, uid_map: str, is_lifted: bool
) -> None:
    machine.write("proc/self/status", f"Name:\tpython\nCapEff:\t{capabilities}")
    machine.write("proc/self/uid_map", f"         {uid_map}")
    assert lifted(machine.root) is is_lifted


def test_libibverbs_is_needed_over_tcp_too() -> None:
    assert judge_libibverbs("").status is Status.OK
    assert judge_libibverbs("cannot open shared object file").mend.startswith(
        "apt-get install libibverbs1"
    )
