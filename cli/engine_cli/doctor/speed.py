"""How fast memory of one rank is read from here, and how that compares with the link between."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine_cli.doctor.child import Died, Fact, Late, Probe
from engine_cli.doctor.engine import ENGINE_S
from engine_cli.doctor.finding import Finding, duration, ok, skipped, warn
from engine_cli.render.tables import size
from engine_registry.schema.address import host_of

if TYPE_CHECKING:
    from engine_registry.etcd.client import Etcd
    from engine_registry.schema.record import RankRecord

_NAME = "peer.speed"
_TCP = ("tcp", "socket")
_TCP_BYTES_S = 2e9  # what the transfer engines reach over these, however fast the link is
_ENOUGH = 0.5  # of what the link could bring


@dataclass(frozen=True)
class Link:
    """The slowest part of the way that is known here."""

    name: str
    bytes_per_s: float


def check_speed(
    etcd: Etcd, probe: Probe, record: RankRecord, header: Fact, device: str, limit_s: float
) -> Iterator[Finding]:
    """Reads from a rank whose header was read."""
    from engine_registry.errors import RegistryError
    from engine_registry.registration.manifests import fetch_manifest
    from engine_registry.schema.record_format import encode

    who = f"{record.instance}/{record.rank}"
    try:
        regions = fetch_manifest(etcd, record).regions
    except RegistryError as exc:
        yield skipped(_NAME, f"{who}: its manifest was not read: {exc.what}")
        return
    if not regions:
        yield skipped(_NAME, f"{who} has no memory to read")
        return
    largest = max(regions, key=lambda region: region.nbytes)
    with suppress(Died, Late):  # the transfer on this machine would slow this one
        probe.fact("loopback", ENGINE_S)
    probe.measure(record.key, encode(record), largest.addr, largest.nbytes)
    try:
        fact = probe.fact("speed", limit_s)
    except (Died, Late) as exc:
        fact = {"error": str(exc)}
    link = None if record.host == socket.gethostname() else link_to(record, device)
    yield judge_speed(who, record.protocol, fact, header["read_s"], link)


def judge_speed(who: str, protocol: str, fact: Fact, read_s: float, link: Link | None) -> Finding:
    """`read_s`: what the smallest read takes; `link` is None where it is not known."""
    if fact["error"]:
        return warn(
            _NAME,
            f"{who}: its weights could not be read: {fact['error']}",
            "run this again: an update may be under way; else look at peer.rank",
        )
    speed = fact["nbytes"] / fact["seconds"]
    what = (
        f"{who}: {size(fact['nbytes'])} of its weights read over {protocol} at {size(speed)}/s; a "
        f"small read takes {duration(read_s)}"
    )
    if link is None:
        return ok(_NAME, what)
    what += f"; {link.name} has {size(link.bytes_per_s)}/s"
    limit = min(link.bytes_per_s, _TCP_BYTES_S) if protocol in _TCP else link.bytes_per_s
    if speed >= _ENOUGH * limit:
        return ok(_NAME, what)
    mend = "is other traffic on the link? sar -n DEV 1, ethtool -S, iperf3"
    if protocol == "rdma":
        mend = "rdma.mtu and rdma.auto; ib_read_bw between both; docs/how-to/rdma.md has a list"
    return warn(_NAME, f"{what}: slow", mend)


def link_to(record: RankRecord, device: str, root: Path = Path("/")) -> Link | None:
    """What is known here of the way to a rank on another machine."""
    if record.protocol == "rdma":
        return _fastest_device(device, root)
    if record.protocol not in _TCP:
        return None
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host_of(record.session_id)))
    except (OSError, ValueError):
        return None
    return _interface_to(address, root) if isinstance(address, ipaddress.IPv4Address) else None


def _fastest_device(device: str, root: Path) -> Link | None:
    """One read goes over one device, so one counts though several are used."""
    from engine_loader.engines.mooncake.choice import choose
    from engine_loader.errors import EngineUnavailable

    try:
        ports = [(one.name, one.port) for one in choose(device, "", root)]
    except EngineUnavailable:
        return None
    rates = [(port.gbit_per_s * 1e9 / 8, name) for name, port in ports if port is not None]
    rate, name = max(rates, default=(0.0, ""))
    return Link(name, rate) if rate else None


def _interface_to(address: ipaddress.IPv4Address, root: Path) -> Link | None:
    from engine_loader.engines.mooncake.gids import routes_of_ipv4, text_of

    routes = [(net, name) for net, name in routes_of_ipv4(root) if address in net]
    if not routes:
        return None
    name = max(routes, key=lambda route: route[0].prefixlen)[1]
    speed = text_of(root / "sys/class/net" / name / "speed")  # in Mb/s; -1: not known
    return Link(name, int(speed) * 1e6 / 8) if speed.isdecimal() and int(speed) else None
