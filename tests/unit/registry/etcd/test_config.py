"""How to reach etcd: every form of address, every senseless mix of credentials."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine_registry.errors import InvalidField
from engine_registry.etcd.config import Endpoint, EtcdConfig, parse_endpoints

HERE = (Endpoint("127.0.0.1", 2379),)


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        ("127.0.0.1:2379", [("127.0.0.1", 2379)]),
        ("etcd-0.etcd:1", [("etcd-0.etcd", 1)]),
        ("http://h:65535", [("h", 65535)]),
        ("http://h:2379/", [("h", 2379)]),
        ("[::1]:2379", [("::1", 2379)]),
        ("http://[fe80::1]:2379", [("fe80::1", 2379)]),
        ("a:1,b:2, http://c:3 ", [("a", 1), ("b", 2), ("c", 3)]),
        ("a:1,,", [("a", 1)]),
        (["a:1", "[::1]:2"], [("a", 1), ("::1", 2)]),
        ("", []),
    ],
)
def test_endpoints_are_host_and_port_in_every_usual_form(
    text: str | list[str], endpoints: list[tuple[str, int]]
) -> None:
    assert [(endpoint.host, endpoint.port) for endpoint in parse_endpoints(text)] == endpoints


@pytest.mark.parametrize(
    "text",
    [
        "h",
        "h:",
        ":2379",
        "[]:2379",
        "h:0",
        "h:65536",
        "h:-1",
        "h:+1",
        "h:x",
        "h:٢",
        "h: 1",
        "http://",
        "http://h",
        "h:1/path",
        "ftp://h:1",
        "::1:2379",
        "a:1,b",
        "[::1:2379",
        "[::1]]:2379",
        "h]:2379",
        "[h]x:2379",
        "my host:2379",
        "h\n:2379",
        "root@h:2379",
        "http://https://h:1",
    ],
)
def test_an_address_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidField, match=r"etcd endpoint '.*' is not valid: ") as caught:
        parse_endpoints(text)
    assert caught.value.details == {"field": "endpoints"}


@pytest.mark.parametrize(
    "text",
    [
        "root:hunter2@h:1",
        "https://root:hunter2@h:1",
        "https://root:hunter2,hunter2@h:1,g:2",
        ["root:hunter2", "@h:1"],
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(text: str | list[str]) -> None:
    with pytest.raises(
        InvalidField, match=r"etcd endpoint '…@h:1.*' is not valid: the user goes into `user`"
    ) as caught:
        parse_endpoints(text)
    assert "hunter2" not in str(caught.value)


def test_the_scheme_says_whether_tls_is_on_and_without_one_the_ca_does() -> None:
    assert parse_endpoints("https://h:2379,https://[::1]:1") == (
        Endpoint("h", 2379, tls=True),
        Endpoint("::1", 1, tls=True),
    )
    assert parse_endpoints("http://h:2379,g:1") == (
        Endpoint("h", 2379, tls=False),
        Endpoint("g", 1),
    )
    assert [
        EtcdConfig(parse_endpoints(text)).tls for text in ("https://h:1", "http://h:1", "h:1")
    ] == [True, False, False]
    assert EtcdConfig(HERE, cacert="ca").tls
    assert EtcdConfig(parse_endpoints("https://h:1"), cert="c", key="k").tls


@pytest.mark.parametrize(
    "text", ["https://h:2379,g:2379", "https://h:2379,http://g:2379", "h:1,https://g:1"]
)
def test_endpoints_with_and_without_tls_do_not_mix(text: str) -> None:
    with pytest.raises(InvalidField, match="some etcd endpoints are https:// and some are not"):
        EtcdConfig(parse_endpoints(text))


@pytest.mark.parametrize("endpoint", [Endpoint("h", 1), Endpoint("::1", 2379)])
def test_an_endpoint_prints_as_what_is_parsed_into_it(endpoint: Endpoint) -> None:
    assert parse_endpoints(str(endpoint)) == (endpoint,)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"endpoints": ()}, "endpoints"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": 1e30}, "timeout_s"),
        ({"namespace": "\udcff"}, "namespace"),
        ({"namespace": "a\nb"}, "namespace"),
        ({"user": "\udcff", "password": "p"}, "user"),
        ({"user": "u", "password": "\udcff"}, "password"),
        ({"cacert": "ca", "cert": "c"}, "cert"),
        ({"cacert": "ca", "key": "k"}, "cert"),
        ({"cert": "c", "key": "k"}, "cacert"),
        ({"endpoints": (Endpoint("h", 1, tls=False),), "cacert": "ca"}, "cacert"),
        ({"user": "u:p", "password": "p"}, "user"),
        ({"user": "u"}, "user"),
        ({"password": "p"}, "user"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_by_its_field(
    fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        EtcdConfig(**{"endpoints": HERE, **fields})
    assert caught.value.details == {"field": field}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cacert": "ca"},
        {"cacert": "ca", "cert": "c", "key": "k"},
        {"user": "root", "password": "hunter2"},
    ],
)
def test_a_config_goes_through_a_pipe_and_comes_out_equal(fields: dict[str, Any]) -> None:
    config = EtcdConfig(HERE, namespace="/ns", timeout_s=1.5, **fields)
    assert EtcdConfig.from_wire(json.loads(json.dumps(config.to_wire()))) == config


def test_the_password_is_in_no_printed_form() -> None:
    config = EtcdConfig(HERE, user="root", password="hunter2")
    assert "hunter2" not in f"{config!r} {config}"
    with pytest.raises(InvalidField) as caught:
        EtcdConfig(HERE, user="root:hunter2", password="hunter2")  # as etcdctl takes it
    assert "hunter2" not in str(caught.value)
    assert config.to_wire()["password"] == "hunter2"
