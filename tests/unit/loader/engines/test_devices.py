"""Which RDMA devices an engine uses, on machines as the kernel shows them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.engines.mooncake.choice import choose, nearest_to, rails_of
from engine_loader.engines.mooncake.devices import (
    Device,
    Port,
    Slot,
    gpu_slots,
    rdma_devices,
    usable_devices,
)
from engine_loader.errors import EngineUnavailable
from tests.support.machines import Machine, cloud_vm, dgx_h100, hgx

NO_GPU = ""


def names(root: Path, wanted: str = "auto", gpu: str = NO_GPU) -> list[str]:
    return [device.name for device in choose(wanted, gpu, root)]


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The CPUs that this process may use: those that a test adds."""
    cpus: set[int] = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus)
    return cpus


def refusal(root: Path, wanted: str, gpu: str = NO_GPU) -> EngineUnavailable:
    with pytest.raises(EngineUnavailable) as caught:
        choose(wanted, gpu, root)
    return caught.value


# -- the nearest
# --------------------------------------------------------------------------------------------------


def test_each_gpu_of_a_dgx_has_the_card_that_shares_its_switch(tmp_path: Path) -> None:
    beside = dgx_h100(tmp_path)
    assert {gpu: names(tmp_path, gpu=gpu) for gpu in beside} == {
        gpu: [card] for gpu, card in beside.items()
    }
    assert [slot.address for slot in gpu_slots(tmp_path)] == sorted(beside)


def test_two_cards_that_share_the_switch_of_a_gpu_are_both_taken(tmp_path: Path) -> None:
    near = hgx(tmp_path)
    assert {gpu: set(names(tmp_path, gpu=gpu)) for gpu in near} == near


def test_memory_of_the_host_has_the_fastest_cards_of_the_nodes_that_its_cpus_are_on(
    tmp_path: Path, affinity: set[int]
) -> None:
    dgx_h100(tmp_path)
    affinity.update(range(60, 64))
    assert names(tmp_path) == ["mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11"]
    affinity.add(0)
    assert len(names(tmp_path)) == 8  # and none of the four for storage


def test_a_machine_that_shows_no_places_gives_all_its_cards(
    tmp_path: Path, affinity: set[int]
) -> None:
    gpu = cloud_vm(tmp_path)
    affinity.add(0)
    assert names(tmp_path, gpu=gpu) == names(tmp_path) == ["mlx5_0", "mlx5_1"]


def test_without_a_common_bridge_the_node_decides(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.nic("a", "pci0000:10", "0000:10:00.0", node=0)
    machine.nic("b", "pci0001:20", "0001:20:00.0", node=1)
    gpu = machine.gpu("pci0002:00", "0002:00:00.0", node=1)
    assert names(tmp_path, gpu=gpu) == ["b"]


def test_a_common_bridge_comes_before_the_node(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.nic("bridge", "pci0000:10", "0000:10:01.0", "0000:11:00.0")
    machine.nic("node", "pci0000:20", "0000:20:00.0", node=0)
    gpu = machine.gpu("pci0000:10", "0000:10:01.0", "0000:12:00.0", node=0)
    assert names(tmp_path, gpu=gpu) == ["bridge"]


def test_of_equally_near_cards_the_fastest_are_taken(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for name, rate in (("a", "25 Gb/sec (1X EDR)"), ("b", "100 Gb/sec"), ("c", "100 Gb/sec")):
        machine.nic(name, "pci0000:00", f"0000:00:0{ord(name) - 96}.0", rate=rate)
    gpu = machine.gpu("pci0000:00", "0000:00:0f.0")
    assert names(tmp_path, gpu=gpu) == ["b", "c"]


def test_a_gpu_that_the_kernel_does_not_show_is_as_none(tmp_path: Path, affinity: set[int]) -> None:
    dgx_h100(tmp_path)
    affinity.add(0)
    assert names(tmp_path, gpu="0000:ff:00.0") == names(tmp_path)


PLACES = st.builds(
    Slot,
    st.lists(st.sampled_from("abc"), max_size=4).map(tuple),
    st.integers(-1, 2),
)
DEVICES = st.builds(
    Device,
    st.uuids().map(str),
    PLACES,
    st.sampled_from(["25 Gb/sec", "400 Gb/sec", "?"]).map(
        lambda rate: (Port(1, "ACTIVE", "Ethernet", rate, None, ""),)
    ),
    st.just("/dev/infiniband/uverbs0"),
    st.just(True),
)


@given(PLACES, st.lists(DEVICES, min_size=1, max_size=6))
def test_some_card_is_always_chosen_and_none_beside_it_is_nearer(
    gpu: Slot, devices: list[Device]
) -> None:
    def distance(device: Device) -> tuple[int, bool]:
        common = 0
        while device.slot.pci[: common + 1] == gpu.pci[: common + 1] != gpu.pci[:common]:
            common += 1
        return -common, not (device.slot.numa_node == gpu.numa_node >= 0)

    chosen = nearest_to(gpu, devices)
    nearest = min(map(distance, devices))
    assert chosen
    assert {distance(device) for device in chosen} == {nearest}
    equally_near = [device for device in devices if distance(device) == nearest]
    speed = {device.name: device.ports[0].gbit_per_s for device in devices}
    fastest = max(speed[device.name] for device in equally_near)
    assert chosen == [device for device in equally_near if speed[device.name] == fastest]


# -- what cannot be used
# --------------------------------------------------------------------------------------------------


def test_a_port_that_is_down_is_left_out_also_where_it_is_the_nearest(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    way = ("pci0000:10", "0000:10:01.0")
    machine.nic("mlx5_0", *way, "0000:11:00.0", states=["DOWN"])
    machine.nic("mlx5_1", *way, "0000:11:00.1")
    machine.nic("mlx5_2", "pci0000:20", "0000:20:01.0", "0000:21:00.0", states=["INIT"])
    gpu = machine.gpu(*way, "0000:12:00.0")
    assert names(tmp_path, gpu=gpu) == names(tmp_path, "") == ["mlx5_1"]


def test_of_a_device_with_two_ports_only_the_one_that_mooncake_uses_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path)
    machine.nic("mlx4_0", "pci0000:10", "0000:11:00.0", states=["ACTIVE", "DOWN"])
    machine.nic("mlx4_1", "pci0000:10", "0000:12:00.0", states=["DOWN", "ACTIVE"])
    assert names(tmp_path, "") == ["mlx4_0"]
    monkeypatch.setenv("MC_IB_PORT", "2")
    assert names(tmp_path, "") == ["mlx4_1"]
    monkeypatch.setenv("MC_IB_PORT", "3")
    assert refusal(tmp_path, "mlx4_0").what.endswith("cannot be used: it has no port 3")


def test_a_device_whose_file_a_container_lacks_is_left_out(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.nic("mlx5_0", "pci0000:10", "0000:11:00.0", node_file=False)
    machine.nic("mlx5_1", "pci0000:10", "0000:12:00.0")
    assert names(tmp_path, "") == ["mlx5_1"]
    assert "cannot open a file of it in /dev/infiniband" in refusal(tmp_path, "mlx5_0").what


def test_a_machine_where_no_device_works_is_refused_as_mooncake_would_take_tcp(
    tmp_path: Path,
) -> None:
    machine = Machine(tmp_path)
    machine.nic("mlx5_0", "pci0000:10", "0000:11:00.0", states=["DOWN"])
    for wanted in ("", "auto"):
        error = refusal(tmp_path, wanted)
        assert "(mlx5_0: its port 1 is DOWN), and Mooncake would fall back to tcp" in error.what
    assert usable_devices(tmp_path) == ()


@pytest.mark.parametrize("wanted", ["", "auto", "mlx5_0"])
def test_a_machine_without_a_device_is_refused(tmp_path: Path, wanted: str) -> None:
    assert refusal(tmp_path, wanted).what.startswith("no RDMA device is here")


# -- names
# --------------------------------------------------------------------------------------------------


def test_devices_that_are_named_are_taken_in_that_order_and_once(tmp_path: Path) -> None:
    dgx_h100(tmp_path)
    assert names(tmp_path, " mlx5_4, mlx5_0,mlx5_4,") == ["mlx5_4", "mlx5_0"]


@pytest.mark.parametrize("wanted", ["mlx5_9", "mlx5_0,mlx5_9", "auto,mlx5_0", "MLX5_0"])
def test_a_name_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, wanted: str
) -> None:
    cloud_vm(tmp_path)
    error = refusal(tmp_path, wanted)
    assert error.what.endswith("this machine has mlx5_0, mlx5_1")
    assert "`device`" in error.remedy


def test_a_device_that_is_named_and_down_is_refused_with_the_reason(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.nic("mlx5_0", "pci0000:10", "0000:11:00.0")
    machine.nic("mlx5_1", "pci0000:10", "0000:12:00.0", states=["DOWN"])
    assert refusal(tmp_path, "mlx5_0,mlx5_1").what == (
        "the RDMA device mlx5_1 cannot be used: its port 1 is DOWN"
    )


def test_devices_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    dgx_h100(tmp_path)
    numbers = [int(device.name.partition("_")[2]) for device in rdma_devices(tmp_path)]
    assert numbers == list(range(12))


# -- rails
# --------------------------------------------------------------------------------------------------


def test_the_rail_of_a_card_on_ethernet_is_the_network_of_its_interface(tmp_path: Path) -> None:
    hgx(tmp_path)
    rails = rails_of(choose("mlx5_4,mlx5_0", NO_GPU, tmp_path))
    assert rails == {"mlx5_4": "10.1.0.0/24", "mlx5_0": "10.1.4.0/24"}


@pytest.mark.parametrize(
    ("link", "address", "subnet"),
    [
        ("InfiniBand", "", ""),  # the default prefix, which all networks have
        ("InfiniBand", "fec0:0:0:7::1", "fec0:0:0:7::/64"),
        ("Ethernet", "", ""),  # link-local addresses only
        ("Ethernet", "192.168.7.9/20", "192.168.0.0/20"),
        ("Ethernet", "fd00:0:0:3::9/64", "fd00:0:0:3::/64"),
    ],
)
def test_a_subnet_is_known_where_addresses_tell_it(
    tmp_path: Path, link: str, address: str, subnet: str
) -> None:
    machine = Machine(tmp_path)
    machine.nic("x", link=link, address=address, netdev="eth0")
    digits = "fd000000000000030000000000000009"
    (tmp_path / "proc/net/if_inet6").write_text(f"{digits} 02 40 00 80     eth0\n")
    assert rails_of(rdma_devices(tmp_path)) == {"x": subnet}


def test_an_interface_of_another_network_namespace_has_no_known_subnet(tmp_path: Path) -> None:
    Machine(tmp_path).nic("x", link="Ethernet", address="10.0.0.7/24", netdev="eth0")
    (tmp_path / "proc/net/route").unlink()
    assert rails_of(rdma_devices(tmp_path)) == {"x": ""}
