"""What lies between RDMA devices and their peers, and between them and GPUs: addresses, packet
sizes, the driver. In each a pure judge makes a Finding of facts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine_cli.doctor.finding import Finding, fail, ok, skipped, warn

if TYPE_CHECKING:
    from engine_loader.engines.mooncake.devices import Device, Slot

_HEADERS_NBYTES = 96  # that the kernel leaves for RoCE's headers in a packet of the interface
_PAYLOADS = (4096, 2048, 1024, 512, 256)  # bytes that a packet of RDMA may carry
_DMABUF_KERNEL = (5, 12)
_PEERMEM = "WITH_NVIDIA_PEERMEM"  # of Mooncake's settings
_OFF = ("0", "off", "false", "no")


def judge_gids(usable: Sequence[Device]) -> Finding:
    """The address by which peers find each device."""
    name = "rdma.gid"
    mend = "show_gids, or rdma link; choose one with MC_GID_INDEX, the same kind on both sides"
    said, missing, local = [], [], []
    for device in usable:
        port = device.port
        gid = port.gid if port else None
        if port is None or gid is None:
            missing.append(device.name)
            continue
        where = f", {gid.netdev}" if gid.netdev else ""
        said.append(f"{device.name} index {gid.index}: {gid.host} ({gid.kind}{where})")
        if port.link == "Ethernet" and (gid.address.is_link_local or gid.kind != "RoCE v2"):
            local.append(device.name)
    what = "; ".join(said)
    if missing:
        index = os.environ.get("MC_GID_INDEX")
        which = f"no GID at the index {index} of MC_GID_INDEX" if index else "no GID"
        return fail(
            name,
            f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} {which}"
            f"{what and f'; {what}'}",
            mend,
        )
    if local:
        return warn(
            name,
            f"{what}: {', '.join(local)} cannot be reached through routers",
            "give the interface an IP address: ip addr",
        )
    return ok(name, what)


def mtu_of_interfaces(usable: Sequence[Device], root: Path) -> dict[str, int]:
    """Of the interfaces of devices on Ethernet, in bytes, by the device."""
    from engine_loader.engines.mooncake.gids import text_of

    found = {}
    for device in usable:
        port = device.port
        if port is not None and port.link == "Ethernet" and port.gid is not None:
            mtu = text_of(root / "sys/class/net" / port.gid.netdev / "mtu")
            if port.gid.netdev and mtu.isdecimal():
                found[device.name] = int(mtu)
    return found


def judge_mtu(usable: Sequence[Device], mtus: Mapping[str, int]) -> Finding:
    """`mtus`: of the interfaces, by the device."""
    name = "rdma.mtu"
    if not mtus:
        kind = "of no device here is the interface in sight"
        if all(device.port and device.port.link == "InfiniBand" for device in usable):
            kind = "InfiniBand's is not in sysfs"
        return skipped(name, f"{kind}: ibv_devinfo shows active_mtu")
    said = ", ".join(
        f"{device} {payload_of(mtu):,} bytes a packet (its interface: {mtu:,})"
        for device, mtu in mtus.items()
    )
    if any(payload_of(mtu) < _PAYLOADS[0] for mtu in mtus.values()):
        return warn(
            name,
            f"{said}: small packets cost speed",
            "ip link set IFACE mtu 9000, on both ends and at every switch between",
        )
    return ok(name, said)


def payload_of(mtu: int) -> int:
    """Bytes that a packet of RoCE carries where the interface's carries `mtu`."""
    room = mtu - _HEADERS_NBYTES
    return next((nbytes for nbytes in _PAYLOADS if nbytes <= room), 0)


@dataclass(frozen=True)
class Driver:
    """What cards need to reach the memory of NVIDIA's GPUs."""

    version: str  # of NVIDIA's driver, as it describes itself; empty where there is none
    peermem: bool  # the module nvidia_peermem is loaded
    kernel: str


def look_at_driver(root: Path) -> Driver:
    from engine_loader.engines.mooncake.gids import text_of

    modules = [line.split()[0] for line in text_of(root / "proc/modules").splitlines()]
    version = text_of(root / "proc/driver/nvidia/version").splitlines()
    kernel = text_of(root / "proc/sys/kernel/osrelease")
    peermem = not {"nvidia_peermem", "nv_peer_mem"}.isdisjoint(modules)
    return Driver(version[0] if version else "", peermem, kernel)


def judge_gpudirect(gpus: Sequence[Slot], driver: Driver) -> Finding:
    """Whether cards reach the memory of GPUs, by one of the two ways that Mooncake has."""
    name = "rdma.gpudirect"
    if not gpus or not driver.version:
        lack = "no driver of NVIDIA is loaded" if gpus else "no GPU is here"
        return skipped(name, f"{lack}; memory of the host needs none of it")
    setting = os.environ.get(_PEERMEM, "")
    if setting.lower() not in _OFF:
        if driver.peermem:
            return ok(name, "nvidia_peermem is loaded")
        other = "" if _has_dmabuf(driver) else ", which this driver or kernel has not"
        return warn(
            name,
            "nvidia_peermem is not loaded: the memory of GPUs cannot be registered",
            f"modprobe nvidia_peermem; or use dma-buf with {_PEERMEM}=0{other}",
        )
    if _has_dmabuf(driver):
        return ok(name, f"{_PEERMEM}={setting}: dma-buf, which kernel and driver have")
    return warn(
        name,
        f"{_PEERMEM}={setting} asks for dma-buf, which needs Linux 5.12 and NVIDIA's open kernel "
        f"module; here are Linux {driver.kernel} and {driver.version}",
        f"modprobe nvidia_peermem, and unset {_PEERMEM}",
    )


def _has_dmabuf(driver: Driver) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", driver.kernel)
    recent = numbers is not None and (int(numbers[1]), int(numbers[2])) >= _DMABUF_KERNEL
    return recent and "Open Kernel Module" in driver.version
