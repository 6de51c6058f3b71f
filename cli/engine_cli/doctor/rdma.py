"""RDMA as the kernel shows it: devices and the state of their ports, locked memory, the library,
the device files.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine_cli.doctor.finding import Finding, Status, fail, ok, skipped, warn
from engine_cli.render.tables import size

_DEVICES = Path("/sys/class/infiniband")
_NODES = Path("/dev/infiniband")
_LITTLE_NBYTES = 1 << 30


@dataclass(frozen=True)
class Port:
    device: str
    number: str
    state: str  # ACTIVE, DOWN, …
    link: str  # InfiniBand, Ethernet
    rate: str


def check_devices(
    wanted: bool, devices: Path = _DEVICES, nodes: Path = _NODES
) -> Iterator[Finding]:
    names = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    ports = [
        _port(name, path) for name in names for path in sorted((devices / name / "ports").glob("*"))
    ]
    verbs = sorted(nodes.glob("uverbs*")) if nodes.is_dir() else []
    usable = any(os.access(node, os.R_OK | os.W_OK) for node in verbs)
    yield judge_devices(ports, usable, wanted)


def _port(device: str, path: Path) -> Port:
    state = _text(path / "state").rpartition(": ")[2]  # after its number
    return Port(device, path.name, state, _text(path / "link_layer"), _text(path / "rate"))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "?"


def judge_devices(ports: Sequence[Port], usable: bool, wanted: bool) -> Finding:
    """`usable`: one of the device files can be opened; `wanted`: the user asks for rdma."""
    name = "rdma.devices"
    if not ports:
        if wanted:
            return fail(
                name,
                "no RDMA device is here, and Mooncake would fall back to tcp",
                "say --protocol tcp; or load the driver (rdma link; in a container: --device "
                "/dev/infiniband)",
            )
        return skipped(name, "no RDMA device is here; not needed over tcp")
    active = [port for port in ports if port.state == "ACTIVE"]
    down = [f"{port.device}/{port.number} {port.state}" for port in ports if port.state != "ACTIVE"]
    links = ", ".join(f"{port.device}/{port.number} {port.link} {port.rate}" for port in active)
    bad = Status.FAIL if wanted else Status.WARN
    if not active:
        return Finding(
            name,
            bad,
            f"no port is active: {', '.join(down)}",
            "look at cable, switch and subnet manager: ibstat, or ip link",
        )
    if not usable:
        return Finding(
            name,
            bad,
            f"{links}; but no /dev/infiniband/uverbs* can be opened",
            "run as a user who may; in a container: --device /dev/infiniband",
        )
    if down:
        return warn(
            name,
            f"{links}; down: {', '.join(down)}",
            "if those are not meant to be down, look at cable and switch: ibstat",
        )
    return ok(name, links)


def check_memlock(wanted: bool) -> Iterator[Finding]:
    yield judge_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], wanted)


def judge_memlock(limit: int, wanted: bool) -> Finding:
    name = "rdma.memlock"
    if limit == resource.RLIM_INFINITY:
        return ok(name, "locked memory is not limited")
    what = f"locked memory is limited to {size(limit)}"
    if not wanted:
        return ok(name, f"{what}; tcp locks none")
    mend = (
        "ulimit -l unlimited (limits.conf: memlock; systemd: LimitMEMLOCK=infinity; docker: "
        "--ulimit memlock=-1)"
    )
    if limit < _LITTLE_NBYTES:
        return fail(name, f"{what}: no weights can be registered for RDMA", mend)
    return warn(name, f"{what}: weights that are larger cannot be registered for RDMA", mend)


def check_libibverbs() -> Iterator[Finding]:
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
