"""Hosts and ports: how they are written, and which hosts lead nobody to this machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.errors import InvalidField
from engine_registry.schema.address import (
    family_of,
    host_of,
    is_loopback,
    join,
    parse_session,
    why_not_advertised,
)

ADDRESSES = st.ip_addresses().map(str)
PORTS = st.integers(1, 65535)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a-b.c:1", ("a-b.c", 1)),
        ("[fe80::1]:65535", ("fe80::1", 65535)),
        ("10.0.0.1:080", ("10.0.0.1", 80)),
    ],
)
def test_a_session_is_a_host_and_a_port(text: str, wanted: tuple[str, int]) -> None:
    assert parse_session(text) == wanted
    assert host_of(text) == wanted[0]


@pytest.mark.parametrize(
    "text",
    ["", "h", ":1", "h:0", "h:65536", "h:²", "::1:80", "[::1]", "[fe80::1%eth0]:1", "in-process:x"],
)
def test_what_is_no_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="it is host:port"):
        parse_session(text)
    assert host_of(text) == ""


@given(ADDRESSES, PORTS)
def test_a_session_that_was_put_together_is_taken_apart_again(host: str, port: int) -> None:
    assert parse_session(join(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.1.1", True),
        ("127.1", True),
        ("::1", True),
        ("LocalHost", True),
        ("10.0.0.1", False),
        ("etcd-0", False),
        ("", False),
    ],
)
def test_loopback_hosts_are_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("10.0.0.1", "IPv4"),
        ("fd00::2", "IPv6"),
        ("::ffff:10.0.0.1", "IPv6"),
        ("node-3", ""),
        ("", ""),
    ],
)
def test_the_family_of_an_address_is_known_and_that_of_a_name_is_not(
    host: str, family: str
) -> None:
    assert family_of(host) == family


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("0.0.0.0", "stands for all addresses"),
        ("0", "stands for all addresses"),
        ("0x0", "stands for all addresses"),
        ("::", "stands for all addresses"),
        ("0:0:0:0:0:0:0:0", "stands for all addresses"),
        ("::ffff:0.0.0.0", "stands for all addresses"),
        ("255.255.255.255", "is the broadcast address"),
        ("224.0.0.1", "is a multicast address"),
        ("239.255.255.255", "is a multicast address"),
        ("ff02::1", "is a multicast address"),
        ("fe80::1%eth0", "names a network interface"),
    ],
)
def test_a_host_that_leads_nobody_to_this_machine_is_not_advertised(host: str, why: str) -> None:
    assert why_not_advertised(host).startswith(host)
    assert why in why_not_advertised(host)


@given(
    ADDRESSES.filter(
        lambda text: not text.startswith(("0.0.0.0", "255.255.255.255", "22", "23", "::", "ff"))
    )
)
def test_any_other_address_may_be_advertised(host: str) -> None:
    assert why_not_advertised(host) == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "node-3.cluster", "localhost"])
def test_loopback_and_names_may_be_advertised(host: str) -> None:
    assert why_not_advertised(host) == ""
