"""Machines as the kernel shows them in its files: GPUs, RDMA devices and NUMA nodes.

Addresses on PCI are those that such machines have. What is between them has the depth of theirs.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

MELLANOX, NVIDIA = "0x15b3", "0x10de"


class Machine:
    """A folder to be filled, which stands for the root of a machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("sys/class/infiniband", "sys/class/infiniband_verbs", "dev/infiniband"):
            (root / folder).mkdir(parents=True)
        self.write("proc/net/route", "Iface Destination Gateway Flags RefCnt Use Metric Mask")

    def cpus(self, *cpulists: str) -> None:
        """One NUMA node for each list."""
        for number, cpulist in enumerate(cpulists):
            self.write(f"sys/devices/system/node/node{number}/cpulist", cpulist)

    def gpu(self, *pci: str, node: int = -1, vendor: str = NVIDIA) -> str:
        """`pci`: the bridges on the way to it, and its address, which is returned."""
        self._function(pci, node, vendor, "0x030200")
        return pci[-1]

    def nic(
        self,
        name: str,
        *pci: str,
        node: int = -1,
        states: Sequence[str] = ("ACTIVE",),
        link: str = "InfiniBand",
        rate: str = "400 Gb/sec (4X NDR)",
        address: str = "",
        netdev: str = "",
        node_file: bool = True,
    ) -> None:
        """An RDMA device with a port for each of `states`; without `pci` it is made by software.

        `address` is an interface's with the length of its network, as in 10.1.0.7/24. An
        InfiniBand device without one has the default prefix.
        """
        where = self._function(pci, node, MELLANOX, "0x020700") if pci else "sys/devices/virtual"
        device = self.root / where / "infiniband" / name
        for number, state in enumerate(states, 1):
            port = device / "ports" / str(number)
            self._port(port, state, link, rate)
            self._gids(port, link, address, netdev)
        self._link(f"sys/class/infiniband/{name}", device)
        number = len(list((self.root / "sys/class/infiniband_verbs").iterdir()))
        self.write(f"sys/class/infiniband_verbs/uverbs{number}/ibdev", name)
        if node_file:
            self.write(f"dev/infiniband/uverbs{number}", "")

    def write(self, path: str | Path, text: str) -> None:
        """A file of the kernel, by its path below the root."""
        where = self.root / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(f"{text}\n")

    def _port(self, port: Path, state: str, link: str, rate: str) -> None:
        number = {"DOWN": 1, "INIT": 2, "ACTIVE": 4}[state]
        for name, text in (("state", f"{number}: {state}"), ("link_layer", link), ("rate", rate)):
            self.write(port / name, text)

    def _gids(self, port: Path, link: str, address: str, netdev: str) -> None:
        """Entries are set for link-local addresses and then `address`, all with both versions of
        RoCE; the last entry is not set.
        """
        local = ipaddress.IPv6Address("fe80::e9d:92ff:fe10:1")
        gids = [(local, "IB/RoCE v1")]
        if link == "InfiniBand" and address:
            gids = [(ipaddress.IPv6Address(address), "IB/RoCE v1")]
        elif link == "Ethernet":
            gids.append((local, "RoCE v2"))
            if address:
                interface = ipaddress.ip_interface(address)
                if isinstance(interface, ipaddress.IPv4Interface):
                    self._route(interface.network, netdev)
                prefix = "::ffff:" if interface.version == 4 else ""
                gid = ipaddress.IPv6Address(f"{prefix}{interface.ip}")
                gids += [(gid, "IB/RoCE v1"), (gid, "RoCE v2")]
        for index, (gid, kind) in enumerate(gids):
            self.write(port / f"gids/{index}", gid.exploded)
            self.write(port / f"gid_attrs/types/{index}", kind)
            if netdev:
                self.write(port / f"gid_attrs/ndevs/{index}", netdev)
        self.write(port / f"gids/{len(gids)}", ipaddress.IPv6Address(0).exploded)

    def _route(self, network: ipaddress.IPv4Network, netdev: str) -> None:
        target, mask = (
            f"{int.from_bytes(each.packed, 'little'):08X}"
            for each in (network.network_address, network.netmask)
        )
        path = self.root / "proc/net/route"
        gateway = f"{netdev} 00000000 0101010A 0003 0 0 0 00000000"
        path.write_text(
            f"{path.read_text()}{gateway}\n{netdev} {target} 00000000 0001 0 0 0 {mask}\n"
        )

    def _function(self, pci: Sequence[str], node: int, vendor: str, kind: str) -> str:
        path = "/".join(("sys/devices", *pci))
        for name, text in (("numa_node", str(node)), ("vendor", vendor), ("class", kind)):
            self.write(f"{path}/{name}", text)
        self._link(f"sys/bus/pci/devices/{pci[-1]}", self.root / path)
        return path

    def _link(self, path: str, target: Path) -> None:
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)


# On a DGX H100 each GPU shares a switch with one card of 400 Gb/s. The four ports for storage are
# functions of two cards, under a switch with no GPU.
_DGX = [
    # bus of the host bridge, of the GPU, of the card, name of the card
    ("15", "1b", "18", "mlx5_0"),
    ("37", "43", "40", "mlx5_3"),
    ("48", "52", "4f", "mlx5_4"),
    ("59", "61", "5e", "mlx5_5"),
    ("97", "9d", "9a", "mlx5_6"),
    ("b7", "c3", "c0", "mlx5_9"),
    ("c7", "d1", "ce", "mlx5_10"),
    ("d7", "df", "dc", "mlx5_11"),
]


def dgx_h100(root: Path) -> dict[str, str]:
    """The name of the card beside each GPU, by the GPU's address."""
    machine = Machine(root)
    machine.cpus("0-55,112-167", "56-111,168-223")
    beside = {}
    for number, (bridge, gpu, nic, name) in enumerate(_DGX):
        node = number // 4
        way = [f"pci0000:{bridge}", f"0000:{bridge}:01.0", f"0000:{bridge[0]}6:00.0"]
        switch = f"0000:{bridge[0]}7"
        address = machine.gpu(*way, f"{switch}:02.0", f"0000:{gpu}:00.0", node=node)
        machine.nic(name, *way, f"{switch}:00.0", f"0000:{nic}:00.0", node=node)
        beside[address] = name
    for bus, node, names in (
        ("29", 0, ("mlx5_1", "mlx5_2")),
        ("aa", 1, ("mlx5_7", "mlx5_8")),
    ):
        for function, name in enumerate(names):
            machine.nic(
                name,
                *(f"pci0000:{bus[0]}0", f"0000:{bus[0]}0:01.0", f"0000:{bus}:00.{function}"),
                node=node,
                link="Ethernet",
                rate="200 Gb/sec (4X HDR)",
            )
    return beside


def hgx(root: Path) -> dict[str, set[str]]:
    """Eight GPUs and eight cards, two of each under each switch: the names of the cards that are
    near each GPU. The order of the cards is not that of the GPUs.
    """
    machine = Machine(root)
    machine.cpus("0-31", "32-63")
    near = {}
    for number in range(8):
        pair, node = number // 2, number // 4
        way = [f"pci0000:{pair + 1}0", f"0000:{pair + 1}0:01.0", f"0000:{pair + 1}1:00.0"]
        slot = f"0000:{pair + 1}2:0{number % 2}.0"
        gpu = machine.gpu(*way, slot, f"0000:{pair + 1}{3 + number % 2}:00.0", node=node)
        name = f"mlx5_{(number + 4) % 8}"
        machine.nic(
            name,
            *way,
            f"0000:{pair + 1}2:0{2 + number % 2}.0",
            f"0000:{pair + 1}{5 + number % 2}:00.0",
            node=node,
            link="Ethernet",
            address=f"10.1.{number}.7/24",
            netdev=f"eth{number}",
        )
        near[gpu] = {f"mlx5_{(2 * pair + each + 4) % 8}" for each in (0, 1)}
    return near


def cloud_vm(root: Path, nics: int = 2) -> str:
    """Everything on one bus, and no NUMA node anywhere; the address of its GPU."""
    machine = Machine(root)
    machine.cpus("0-15")
    for number in range(nics):
        machine.nic(
            f"mlx5_{number}",
            *("pci0000:00", f"0000:00:0{number + 3}.0"),
            link="Ethernet",
            rate="100 Gb/sec (4X EDR)",
        )
    return machine.gpu("pci0000:00", "0000:00:0f.0")
