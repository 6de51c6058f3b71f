"""RDMA as the kernel shows it: devices, which of them `auto` takes, locked memory, the library.

`doctor.rdma_paths` looks at what lies between a device and memory or peers.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine_cli.doctor import rdma_paths
from engine_cli.doctor.finding import Finding, Status, fail, ok, skipped, warn
from engine_cli.doctor.python import WITHOUT_MOONCAKE
from engine_cli.doctor.runner import Skip
from engine_cli.render.tables import size

if TYPE_CHECKING:
    from engine_loader.engines.mooncake.devices import Device, Slot

_LITTLE_NBYTES = 1 << 30
_IPC_LOCK = 14  # the number of the capability


def check_devices(wanted: bool, root: Path = Path("/")) -> Iterator[Finding]:
    """With `wanted`, the user asks for rdma, also what a transfer over them depends on."""
    from engine_loader.engines.mooncake.devices import gpu_slots, numa_nodes, rdma_devices

    devices = rdma_devices(root)
    yield judge_devices(devices, wanted)
    usable = [device for device in devices if not device.obstacle]
    if wanted and usable:
        gpus = gpu_slots(root)
        yield judge_auto(usable, gpus, numa_nodes(os.sched_getaffinity(0), root))
        yield rdma_paths.judge_gids(usable)
        yield rdma_paths.judge_mtu(usable, rdma_paths.mtu_of_interfaces(usable, root))
        yield rdma_paths.judge_gpudirect(gpus, rdma_paths.look_at_driver(root))


def judge_devices(devices: Sequence[Device], wanted: bool) -> Finding:
    name = "rdma.devices"
    if not devices:
        if wanted:
            return fail(
                name,
                "no RDMA device is here, and Mooncake would fall back to tcp",
                "say --protocol tcp; or load the driver (rdma link; in a container: --device "
                "/dev/infiniband)",
            )
        return skipped(name, "no RDMA device is here; not needed over tcp")
    bad = Status.FAIL if wanted else Status.WARN
    good = ", ".join(_described(device) for device in devices if not device.obstacle)
    unusable = [device for device in devices if device.obstacle]
    why = "; ".join(f"{device.name}: {device.obstacle}" for device in unusable)
    if not good:
        return Finding(name, bad, f"no RDMA device can be used: {why}", _mend(unusable))
    if unusable:
        return warn(name, f"{good}; not used: {why}", f"unless that is meant: {_mend(unusable)}")
    return ok(name, good)


def _described(device: Device) -> str:
    port, node = device.port, device.slot.numa_node
    link = f" {port.link} {port.rate}" if port else ""
    return f"{device.name}{link}{f' on NUMA node {node}' if node >= 0 else ''}"


def _mend(unusable: Collection[Device]) -> str:
    if all(device.port and device.port.state == "ACTIVE" for device in unusable):
        return "run as a user who may; in a container: --device /dev/infiniband"
    return "look at cable, switch and subnet manager: ibstat, or ip link"


def judge_auto(usable: Sequence[Device], gpus: Sequence[Slot], nodes: Collection[int]) -> Finding:
    """`nodes`: the NUMA nodes whose CPUs this process may use."""
    from engine_loader.engines.mooncake.choice import nearest_to, nearest_to_cpus

    taken = [("memory of the host", nearest_to_cpus(nodes, usable))]
    taken += [(f"the GPU {gpu.address}", nearest_to(gpu, usable)) for gpu in gpus]
    said = [f"{', '.join(each.name for each in some)} for {where}" for where, some in taken]
    return ok("rdma.auto", f"--device auto takes {'; '.join(said)}")


def check_memlock(wanted: bool, root: Path = Path("/")) -> Iterator[Finding]:
    yield judge_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], lifted(root), wanted)


def lifted(root: Path = Path("/")) -> bool:
    """Whether this process has a capability for which the kernel does not look at the limit. Those
    of a user namespace do not count.
    """
    status = (root / "proc/self/status").read_text().splitlines()
    bits = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    whole = (root / "proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]
    return whole and bool(bits >> _IPC_LOCK & 1)


def judge_memlock(limit: int, lifted: bool, wanted: bool) -> Finding:
    name = "rdma.memlock"
    if limit == resource.RLIM_INFINITY:
        return ok(name, "locked memory is not limited")
    what = f"locked memory is limited to {size(limit)}"
    if not wanted:
        return ok(name, f"{what}; tcp locks none")
    if lifted:
        return ok(name, f"{what}, but not for this process: it has CAP_IPC_LOCK")
    mend = (
        "ulimit -l unlimited (limits.conf: memlock; systemd: LimitMEMLOCK=infinity; docker: "
        "--ulimit memlock=-1, or --cap-add IPC_LOCK)"
    )
    if limit < _LITTLE_NBYTES:
        return fail(name, f"{what}: no weights can be registered for RDMA", mend)
    return warn(
        name, f"{what}: weights count against it once for each RDMA device that is used", mend
    )


def check_libibverbs(protocol: str) -> Iterator[Finding]:
    if protocol in WITHOUT_MOONCAKE:
        raise Skip(f"{protocol} does not need it")
    error = ""
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as exc:
        error = str(exc)
    yield judge_libibverbs(error)


def judge_libibverbs(error: str) -> Finding:
    name = "rdma.libibverbs"
    if error:
        return fail(
            name,
            f"libibverbs.so.1 cannot be loaded ({error}); the transfer engine needs it, over "
            "tcp too",
            "apt-get install libibverbs1 (rdma-core on other systems)",
        )
    return ok(name, "libibverbs.so.1 can be loaded")
