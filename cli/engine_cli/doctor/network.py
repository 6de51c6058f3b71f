"""This machine as its peers see it: its name, the address that a rank would register, ports, file
descriptors.
"""

from __future__ import annotations

import ipaddress
import resource
import socket
from collections.abc import Iterator, Sequence

from engine_cli.doctor.dial import Trouble, dial
from engine_cli.doctor.finding import Finding, Status, duration, fail, ok, warn
from engine_registry.schema.address import is_loopback

_FEW_FILES = 1024  # a loader has five for each peer, and more
_LIMIT_S = 1.5


def check_hostname() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        addresses = sorted(
            {str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
        )
    except OSError as exc:
        yield judge_hostname(name, [], exc.strerror or str(exc))
        return
    yield judge_hostname(name, addresses)


def judge_hostname(name: str, addresses: Sequence[str], error: str = "") -> Finding:
    check = "network.hostname"
    if not addresses:
        return warn(
            check,
            f"the name of this machine, {name}, leads to no address ({error})",
            "put it into /etc/hosts or DNS, and give --host",
        )
    if all(is_loopback(address) for address in addresses):
        why = ", as Debian's installer sets it up" if "127.0.1.1" in addresses else ""
        return warn(
            check,
            f"the name of this machine, {name}, leads to {', '.join(addresses)}{why}: others "
            "would reach themselves",
            "put the address of a network card beside it in /etc/hosts; do not give the name "
            "as --host",
        )
    return ok(check, f"{name} leads to {', '.join(addresses)}")


def check_address(address: str, given: bool, etcd_here: bool) -> Iterator[Finding]:
    """The one that a rank would register, `given` with --host or not, and whether a port there can
    be reached from here.
    """
    address = address.strip("[]")
    error = _bind(address)
    yield judge_address(address, given, etcd_here, error, _why_not_advertised(address))
    if not error:
        yield _port(address)


def check_files() -> Iterator[Finding]:
    yield judge_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _why_not_advertised(address: str) -> str:
    """Why nobody would find us by it, as far as it shows itself; empty where it may do."""
    try:
        from engine_registry.schema.address import why_not_advertised
    except ImportError:  # python.etcd3 says so
        return ""
    return why_not_advertised(address)


def _bind(address: str) -> str:
    """Why we cannot listen there; empty where we can."""
    try:
        family, kind, number, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.bind(place)
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


def judge_address(
    address: str, given: bool, etcd_here: bool, error: str, problem: str = ""
) -> Finding:
    """`error` is why we cannot listen there, `problem` why nobody would find us by it."""
    check = "network.address"
    if problem:
        return fail(
            check,
            problem,
            "give one of this machine with --host that peers can reach: ip -brief address",
        )
    if error:
        return fail(
            check,
            f"{address} is no address of this machine ({error})",
            "give one with --host that peers can reach: ip -brief address",
        )
    if not given and etcd_here and is_loopback(address):
        return ok(
            check,
            f"{address}, as etcd is at a loopback address: only this machine can read there; "
            "for others give --host",
        )
    if is_loopback(address):
        return warn(
            check,
            f"{address} is reached from this machine only",
            "for others give another --host: ip -brief address",
        )
    try:
        link_local = ipaddress.ip_address(address).is_link_local
    except ValueError:
        link_local = False
    if link_local:
        return warn(
            check,
            f"{address} is link-local: it does not leave its network segment",
            "give another --host: ip -brief address",
        )
    return ok(
        check,
        f"{address}, where peers would find us"
        + ("" if given else " (the way to etcd begins there)"),
    )


def _port(address: str) -> Finding:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, 0), family=family) as server:
            port = server.getsockname()[1]
            dialled = dial(address, port, _LIMIT_S)
    except OSError as exc:
        return fail(
            "network.ports",
            f"no port can be opened at {address}: {exc.strerror or exc}",
            "look at ip_local_port_range and at limits of this container",
        )
    return judge_port(
        f"[{address}]:{port}" if ":" in address else f"{address}:{port}",
        dialled.trouble,
        dialled.seconds,
    )


def judge_port(where: str, trouble: Trouble | None, seconds: float) -> Finding:
    check = "network.ports"
    if trouble is None:
        return ok(check, f"a port can be opened and reached from here ({duration(seconds)})")
    return fail(
        check,
        f"a port was opened at {where}, but a connection from here ends with: {trouble.value}",
        "a firewall of this machine is in the way: iptables -S INPUT, nft list ruleset. "
        "Peers need all unprivileged ports",
    )


def judge_files(limit: int) -> Finding:
    check = "network.files"
    if limit != resource.RLIM_INFINITY and limit < _FEW_FILES:
        return Finding(
            check,
            Status.WARN,
            f"at most {limit} open files",
            "ulimit -n 65536: a loader has some five for each peer",
        )
    return ok(
        check,
        "open files are not limited"
        if limit == resource.RLIM_INFINITY
        else f"at most {limit:,} open files",
    )
