"""GIDs, the addresses of an RDMA port: which there are, which one Mooncake takes, and the network
that it lies in.

Reads files of the kernel, and nothing else. Used for devices and by `engines doctor`.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Net = ipaddress.IPv4Network
_OVERLAYS = ("flannel", "cni", "calico", "vxlan", "docker")  # how names of such interfaces begin
_PRIVATE = [ipaddress.IPv4Network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "100.64.0.0/10")]
_USED = ("RoCE v2", "IB/RoCE v1")  # what the kernel calls the types that Mooncake prefers


@dataclass(frozen=True)
class Gid:
    """An address of a port.

    `kind` is "RoCE v2" or "IB/RoCE v1". `netdev` is the network interface, or empty.
    """

    index: int
    address: ipaddress.IPv6Address
    kind: str
    netdev: str

    @property
    def host(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The address of IPv4 that it stands for, or itself."""
        return self.address.ipv4_mapped or self.address


def read_gids(port: Path) -> tuple[Gid, ...]:
    """Those of a port, a folder in sysfs, that are set; by index."""
    found = []
    for path in sorted((port / "gids").glob("*"), key=lambda path: int(path.name)):
        text = text_of(path)
        address = ipaddress.IPv6Address(text) if text else None
        if address is not None and int(address) % (1 << 64):  # else it is not set
            kind, netdev = (
                text_of(port / "gid_attrs" / attribute / path.name)
                for attribute in ("types", "ndevs")
            )
            found.append(Gid(int(path.name), address, kind, netdev))
    return tuple(found)


def chosen_gid(gids: tuple[Gid, ...], link: str) -> Gid | None:
    """The one that Mooncake takes: that of MC_GID_INDEX, else as in its `rdma_gid_probe.h`.

    `link` is the port's link layer.
    """
    named = os.environ.get("MC_GID_INDEX", "")
    if named.isdecimal():
        return next((gid for gid in gids if gid.index == int(named)), None)
    roce = link == "Ethernet"
    fitting = [gid for gid in gids if gid.kind == _USED[0 if roce else 1]] or list(gids)
    return min(fitting, key=lambda gid: (_rank(gid) if roce else 0, gid.index), default=None)


def _rank(gid: Gid) -> int:
    """Of RoCE v2; the lowest is taken."""
    mapped = gid.address.ipv4_mapped
    if gid.netdev.startswith(_OVERLAYS) or gid.netdev == "tunl0" or gid.address.is_link_local:
        return 3 if gid.netdev else 5
    if mapped is not None and any(mapped in net for net in _PRIVATE):
        return 2 if gid.netdev else 4
    return 0 if gid.netdev else 1


def subnet_of(gid: Gid | None, link: str, root: Path) -> str:
    """The network that the address lies in, as in 10.1.4.0/24; empty where nothing tells.

    InfiniBand's default prefix, and link-local addresses, are the same in every network.
    """
    if gid is None or gid.address.is_link_local:
        return ""
    if link == "InfiniBand":
        return str(ipaddress.IPv6Network((int(gid.address) >> 64 << 64, 64)))
    if isinstance(gid.host, ipaddress.IPv4Address):
        return _subnet_of_ipv4(gid.host, gid.netdev, root)
    return _subnet_of_ipv6(gid.host, gid.netdev, root / "proc/net/if_inet6")


def routes_of_ipv4(root: Path, *, direct: bool = False) -> Iterator[tuple[Net, str]]:
    """Each network that this machine has a way to, and the interface; `direct`: no gateway."""
    for line in text_of(root / "proc/net/route").splitlines()[1:]:
        name, target, gateway, *_, mask = line.split()[:8]
        if not direct or int(gateway, 16) == 0:
            start, bits = (int.from_bytes(bytes.fromhex(each), "little") for each in (target, mask))
            yield ipaddress.IPv4Network((start, bits.bit_count())), name


def _subnet_of_ipv4(address: ipaddress.IPv4Address, netdev: str, root: Path) -> str:
    nets = [
        net
        for net, name in routes_of_ipv4(root, direct=True)
        if name == netdev and net.prefixlen and address in net
    ]
    return str(max(nets, key=lambda net: net.prefixlen, default=""))


def _subnet_of_ipv6(address: ipaddress.IPv6Address, netdev: str, table: Path) -> str:
    for line in text_of(table).splitlines():
        digits, _, length, *_, name = line.split()
        if name == netdev and int(digits, 16) == int(address):
            return str(ipaddress.IPv6Network((int(address), int(length, 16)), strict=False))
    return ""


def text_of(path: Path) -> str:
    """What a file of the kernel says; empty where it says nothing."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
