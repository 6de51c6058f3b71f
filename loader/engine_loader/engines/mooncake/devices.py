"""RDMA devices as the kernel shows them: where each sits in the machine, its port, its network.

Reads files of the kernel, and nothing else. Used by engines, and by `engines doctor`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine_loader.engines.mooncake.gids import Gid, chosen_gid, read_gids, subnet_of, text_of

ROOT = Path("/")
ACTIVE = "ACTIVE"
_PCI = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}|[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_DISPLAY = "0x03"  # how the classes of GPUs begin
_GPU_VENDORS = ("0x10de", "0x1002")  # NVIDIA, AMD


@dataclass(frozen=True)
class Slot:
    """A place in the machine: the PCI bridges on the way to it and itself, and its NUMA node.

    Both may be unknown: an empty path, and -1.
    """

    pci: tuple[str, ...]
    numa_node: int

    @property
    def address(self) -> str:
        """As in 0000:1b:00.0; empty where it is not on PCI."""
        return self.pci[-1] if self.pci else ""


@dataclass(frozen=True)
class Port:
    """`state`, `link` and `rate` as the kernel writes them, as in ACTIVE, InfiniBand and
    400 Gb/sec (4X NDR).
    """

    number: int
    state: str
    link: str
    rate: str
    gid: Gid | None  # that Mooncake takes
    subnet: str  # of that GID; empty where nothing tells

    @property
    def gbit_per_s(self) -> float:
        """0 where it is not known."""
        number = re.match(r"[0-9.]+", self.rate)
        return float(number[0]) if number else 0.0


@dataclass(frozen=True)
class Device:
    """An RDMA device."""

    name: str
    slot: Slot
    ports: tuple[Port, ...]
    node: str  # its file, such as /dev/infiniband/uverbs0; empty where there is none
    openable: bool  # that file, by this process

    @property
    def port(self) -> Port | None:
        """The one that Mooncake uses."""
        return next((port for port in self.ports if port.number == port_number()), None)

    @property
    def obstacle(self) -> str:
        """Why Mooncake cannot use it; empty where it can."""
        if self.port is None:
            return f"it has no port {port_number()}"
        if self.port.state != ACTIVE:
            return f"its port {self.port.number} is {self.port.state}"
        if not self.openable:
            return f"this process cannot open {self.node or 'a file of it in /dev/infiniband'}"
        return ""


def port_number() -> int:
    """Of each device Mooncake uses this port, and no other."""
    text = os.environ.get("MC_IB_PORT", "")
    return int(text) if text.isdecimal() and 0 < int(text) < 256 else 1


def rdma_devices(root: Path = ROOT) -> tuple[Device, ...]:
    """All, by name."""
    paths = _entries(root / "sys/class/infiniband")
    nodes = {
        text_of(path / "ibdev"): root / "dev/infiniband" / path.name
        for path in _entries(root / "sys/class/infiniband_verbs")
        if path.name.startswith("uverbs")
    }
    return tuple(_device(path, nodes.get(path.name), root) for path in sorted(paths, key=_natural))


def usable_devices(root: Path = ROOT) -> tuple[Device, ...]:
    """Those that Mooncake can use."""
    return tuple(device for device in rdma_devices(root) if not device.obstacle)


def _device(path: Path, node: Path | None, root: Path) -> Device:
    ports = sorted(_entries(path / "ports"), key=_natural)
    return Device(
        path.name,
        slot_of(path.resolve().parent.parent),
        tuple(_port(port, root) for port in ports),
        f"/{node.relative_to(root)}" if node is not None and node.exists() else "",
        node is not None and os.access(node, os.R_OK | os.W_OK),
    )


def _port(path: Path, root: Path) -> Port:
    state = text_of(path / "state").rpartition(": ")[2]  # after its number
    link = text_of(path / "link_layer")
    gid = chosen_gid(read_gids(path), link)
    return Port(
        int(path.name),
        state or "?",
        link or "?",
        text_of(path / "rate") or "?",
        gid,
        subnet_of(gid, link, root),
    )


def slot_of(path: Path) -> Slot:
    """Where something sits whose folder in sysfs, without links, is `path`."""
    numa_node = text_of(path / "numa_node")
    return Slot(
        tuple(part for part in path.parts if _PCI.fullmatch(part)),
        int(numa_node) if numa_node else -1,
    )


def pci_slot(address: str, root: Path = ROOT) -> Slot | None:
    """Of a PCI address; None where nothing has it."""
    path = root / "sys/bus/pci/devices" / address
    return slot_of(path.resolve()) if address and path.exists() else None


def gpu_slots(root: Path = ROOT) -> tuple[Slot, ...]:
    """Of all GPUs, by PCI address. Also where no driver is loaded."""
    return tuple(
        slot_of(path.resolve())
        for path in sorted(_entries(root / "sys/bus/pci/devices"))
        if text_of(path / "class").startswith(_DISPLAY) and text_of(path / "vendor") in _GPU_VENDORS
    )


def numa_nodes(cpus: set[int], root: Path = ROOT) -> set[int]:
    """The nodes that have some of these CPUs."""
    return {
        int(path.name.removeprefix("node"))
        for path in _entries(root / "sys/devices/system/node")
        if re.fullmatch("node[0-9]+", path.name)
        and not cpus.isdisjoint(_listed(text_of(path / "cpulist")))
    }


def _listed(text: str) -> Iterator[int]:
    """The numbers of a list such as 0-3,8."""
    for span in filter(None, text.split(",")):
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _natural(path: Path) -> list[tuple[int, str]]:
    """mlx5_2 before mlx5_10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split("([0-9]+)", path.name)
    ]
