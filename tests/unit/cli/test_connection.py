"""From where a command takes how to reach etcd: options, the environment, or a context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from engine_cli.connection import SOCKET_VARIABLES, VARIABLES
from engine_cli.main import engines
from engine_loader.engines.sockets import credentials, engine
from engine_registry import Registry
from engine_registry.errors import EtcdUnavailable, InvalidField

TOML = """
current = "here"

[contexts.here]
etcd = "10.0.0.1:2379"

[contexts.prod]
etcd = ["https://10.0.0.5:2379", "https://10.0.0.6:2379"]
namespace = "prod"
cacert = "ca.pem"
key = "/etc/key.pem"
user = "reader"
timeout = 2.5
"""


class Connections:
    """What `Registry.connect` was asked for by commands that ran with these arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._asked: list[dict[str, Any]] = []
        monkeypatch.setattr(Registry, "connect", self._connect)

    def _connect(self, endpoints: str, **settings: Any) -> Registry:
        self._asked.append({"etcd": endpoints, **settings})
        raise EtcdUnavailable("it is away")

    def of(self, *args: str) -> dict[str, Any]:
        with pytest.raises(EtcdUnavailable):
            engines.main(list(args), standalone_mode=False)
        return self._asked[-1]


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    return Connections(monkeypatch)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(TOML)
    monkeypatch.setenv("ENGINES_CONFIG", str(path))
    return path


def test_without_anything_it_is_an_etcd_of_this_machine(connections: Connections) -> None:
    assert connections.of("list") == {
        "etcd": "127.0.0.1:2379",
        "namespace": "",
        "timeout_s": 5.0,
        "cacert": None,
        "cert": None,
        "key": None,
        "user": None,
        "password": None,
    }


def test_each_option_has_a_variable(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "ENGINES_ETCD": "h:1",
        "ENGINES_NAMESPACE": "n",
        "ENGINES_CACERT": "ca",
        "ENGINES_CERT": "c",
        "ENGINES_KEY": "k",
        "ENGINES_USER": "u",
        "ENGINES_ETCD_PASSWORD": "p",
        "ENGINES_TIMEOUT": "2",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert list(connections.of("list").values()) == ["h:1", "n", 2.0, "ca", "c", "k", "u", "p"]


def test_the_current_context_has_the_defaults(connections: Connections, config: Path) -> None:
    assert connections.of("list")["etcd"] == "10.0.0.1:2379"


@pytest.mark.parametrize("before", [True, False])
def test_a_context_that_is_named_has_the_defaults(
    connections: Connections, config: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    monkeypatch.setenv("ENGINES_ETCD_PASSWORD", "p")
    monkeypatch.setenv("ENGINES_CONTEXT", "here")
    name = ["--context", "prod"]
    assert connections.of(*(name if before else []), "list", *([] if before else name)) == {
        "etcd": "https://10.0.0.5:2379,https://10.0.0.6:2379",
        "namespace": "prod",
        "timeout_s": 2.5,
        "cacert": str(config.parent / "ca.pem"),
        "cert": None,
        "key": "/etc/key.pem",
        "user": "reader",
        "password": "p",
    }


def test_options_go_before_variables_and_these_before_the_context(
    connections: Connections, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINES_ETCD", "variable:1")
    assert connections.of("list")["etcd"] == "variable:1"
    assert connections.of("--etcd", "before:1", "list")["etcd"] == "before:1"
    after = connections.of("--etcd", "before:1", "--namespace", "n", "list", "--etcd", "after:1")
    assert (after["etcd"], after["namespace"]) == ("after:1", "n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("current = ", "is not valid: Invalid value"),
        ("[contexts.a]\netdc = 'h:1'", "unknown field `etdc`"),
        ("[contexts.a]\npassword = 'p'", "unknown field `password`"),
        ("[contexts.a]\ntimeout = 'long'", "Expected `float | null`, got `str`"),
        (
            "current = 'prd'\n[contexts.prod]\netcd = 'h:1'",
            "no context 'prd' in .*: known are prod",
        ),
        ("current = 'a'", r"no context 'a' in .*: write it there, as a table \[contexts.NAME\]"),
        (b"\xff", "cannot be read: it is no UTF-8"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(
    connections: Connections, config: Path, text: str | bytes, problem: str
) -> None:
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidField, match=problem):
        connections.of("list")


def test_a_context_that_is_not_there_is_refused(connections: Connections, config: Path) -> None:
    with pytest.raises(InvalidField, match=r"no context 'prodd' in .*: known are prod"):
        connections.of("list", "--context", "prodd")


def test_a_variable_that_means_nothing_is_named(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ENGINES_NAMSPACE", "prod")
    connections.of("list")
    assert caplog.messages == [
        "ENGINES_NAMSPACE means nothing to engines: did you mean ENGINES_NAMESPACE?"
    ]


def test_no_variable_that_engines_sets_or_reads_is_unknown(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert [*credentials.VARIABLES.values(), engine._SAME_HOST] == SOCKET_VARIABLES
    assert {"ENGINES_EVENT", "ENGINES_GATEWAY_TOKEN", "ENGINES_CONFIG"} <= VARIABLES
    for name in VARIABLES - {"ENGINES_CONTEXT", "ENGINES_TIMEOUT", "ENGINES_USER"}:
        monkeypatch.setenv(name, "x:1")
    connections.of("list")
    assert caplog.messages == []


def test_contexts_are_listed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines.main(["context", "list"], standalone_mode=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["*", "here", "10.0.0.1:2379", "-", "-"]
    assert lines[2][0] == "prod"
    engines.main(["context", "list", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["file"], found["current"]) == (str(config), "here")
    assert [one["name"] for one in found["contexts"]] == ["here", "prod"]


def test_without_a_file_the_place_of_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ENGINES_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    engines.main(["context", "list"], standalone_mode=False)
    assert capsys.readouterr().out == (
        f"there is no context: {tmp_path}/engines/config.toml has none\n"
    )


def test_the_longest_time_in_the_help_is_taken(connections: Connections) -> None:
    assert connections.of("list", "--timeout", "3600")["timeout_s"] == 3600
    with pytest.raises(click.BadParameter, match="0<x<=3600"):
        engines.main(["list", "--timeout", "3601"], standalone_mode=False)
