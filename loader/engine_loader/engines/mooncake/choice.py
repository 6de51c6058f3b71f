"""Which RDMA devices an engine uses: those that its user names, all, or the nearest."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from engine_loader.engines.mooncake.devices import (
    ROOT,
    Device,
    Slot,
    numa_nodes,
    pci_slot,
    rdma_devices,
)
from engine_loader.errors import EngineUnavailable

AUTO = "auto"


def choose(wanted: str, gpu: str, root: Path = ROOT) -> tuple[Device, ...]:
    """The devices that an engine is to use, one at least.

    Args:
        wanted: Names with commas between them; AUTO, those nearest to the memory; or empty, all
            that can be used.
        gpu: The PCI address of the GPU that has the memory. Empty: the host has it.
        root: Where the files of the kernel lie.

    Raises:
        EngineUnavailable: No device can be used, or one that is named is not there or cannot.
    """
    devices = rdma_devices(root)
    if not devices:
        raise _unavailable(
            "no RDMA device is here (/sys/class/infiniband has none), and Mooncake would "
            "fall back to tcp",
            "say tcp",
        )
    names = [name for part in wanted.split(",") if (name := part.strip())]
    if names and names != [AUTO]:
        return tuple(_named(name, devices) for name in dict.fromkeys(names))
    usable = [device for device in devices if not device.obstacle]
    if not usable:
        found = "; ".join(f"{device.name}: {device.obstacle}" for device in devices)
        raise _unavailable(
            f"no RDMA device can be used ({found}), and Mooncake would fall back to tcp",
            "look at cable, switch and subnet manager (ibstat), or say tcp",
        )
    if not names:
        return tuple(usable)
    slot = pci_slot(gpu, root)
    if slot is not None:
        return tuple(nearest_to(slot, usable))
    return tuple(nearest_to_cpus(numa_nodes(os.sched_getaffinity(0), root), usable))


def _named(name: str, devices: Sequence[Device]) -> Device:
    for device in devices:
        if device.name == name:
            if device.obstacle:
                raise _unavailable(
                    f"the RDMA device {name} cannot be used: {device.obstacle}",
                    "leave it out of `device`, or mend that",
                )
            return device
    there = ", ".join(device.name for device in devices)
    raise _unavailable(
        f"there is no RDMA device {name!r}: this machine has {there}",
        f"give some of these as `device`, or {AUTO}",
    )


def nearest_to(slot: Slot, devices: Sequence[Device]) -> list[Device]:
    """Those that share the most PCI bridges with it; else those on its NUMA node; else all.

    Of several that are equally near, the fastest.
    """
    near = [(_shared(device.slot, slot), _same_node(device.slot, slot)) for device in devices]
    return _fastest([device for device, how in zip(devices, near, strict=True) if how == max(near)])


def nearest_to_cpus(nodes: Collection[int], devices: Sequence[Device]) -> list[Device]:
    """The fastest of those on these NUMA nodes, or of all where none is."""
    here = [device for device in devices if device.slot.numa_node in nodes]
    return _fastest(here or devices)


def _shared(one: Slot, other: Slot) -> int:
    pairs = zip(one.pci, other.pci, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _same_node(one: Slot, other: Slot) -> bool:
    return one.numa_node == other.numa_node != -1


def _fastest(devices: Sequence[Device]) -> list[Device]:
    """Mooncake shares the reads out evenly, so a slow one would slow all down."""
    rates = [device.port.gbit_per_s if device.port else 0.0 for device in devices]
    return [device for device, rate in zip(devices, rates, strict=True) if rate == max(rates)]


def rails_of(devices: Collection[Device]) -> Mapping[str, str]:
    """For the record: the subnet of each, or empty, by its name."""
    return {device.name: device.port.subnet if device.port else "" for device in devices}


def _unavailable(what: str, remedy: str) -> EngineUnavailable:
    return EngineUnavailable(what, remedy, field="device")
