"""The commands of `engines` over the protocol `socket`, with a token and certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine_cli.exits import Exit
from engine_registry.etcd.local import LocalEtcd
from tests.integration.conftest import Processes, line_of
from tests.integration.test_cli import assert_one_line
from tests.integration.test_cli import weights as weights
from tests.integration.test_doctor import doctor as doctor
from tests.support.authority import Authority
from tests.support.checkout import ROOT

SOCKET = ("--protocol", "socket")
HERE = ("--host", "127.0.0.1")
TOKEN, TLS = "ENGINES_SOCKET_TOKEN_FILE", ("ENGINES_SOCKET_CERT", "ENGINES_SOCKET_KEY")


@pytest.fixture
def credentials(tmp_path: Path) -> dict[str, str]:
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("engine")
    token = tmp_path / "token"
    token.write_text("the token of this fleet\n")
    token.chmod(0o600)
    return {
        TOKEN: str(token),
        **dict(zip(TLS, (cert, key), strict=True)),
        "ENGINES_SOCKET_CACERT": authority.cert,
    }


def serve(
    processes: Processes, weights: Path, credentials: dict[str, str], instance: str = "a"
) -> None:
    process = processes.engines(
        *("register", instance, "--rank", "0", "--world-size", "1", "--weights", str(weights)),
        *("--model", "tiny", *HERE, *SOCKET, "--namespace", processes._env["TEST_NAMESPACE"]),
        **credentials,
    )
    line = line_of(process)
    assert "(socket" in line


@pytest.mark.parametrize("protocol", ["auto", "socket"])
def test_weights_are_copied_over_it_and_auto_finds_it(
    processes: Processes,
    weights: Path,
    credentials: dict[str, str],
    namespace: str,
    tmp_path: Path,
    protocol: str,
) -> None:
    serve(processes, weights, credentials)
    loaded = processes.run(
        *("load", "a", "--rank", "0", "--out", str(tmp_path / "out"), *HERE, "--json"),
        *("--protocol", protocol, "--namespace", namespace),
        **credentials,
    )
    assert json.loads(loaded.stdout)["protocol"] == "socket", loaded.stderr
    original, copy = load_file(weights), load_file(tmp_path / "out" / "rank-0.safetensors")
    assert all(torch.equal(original[name], copy[name]) for name in original)


def test_instances_are_compared_and_verified_over_it(
    processes: Processes, weights: Path, credentials: dict[str, str], namespace: str
) -> None:
    for instance in ("a", "b"):
        serve(processes, weights, credentials, instance)
    place = ("--namespace", namespace, *HERE)
    for command in (("verify", "a", "b"), ("diff", "a", "b")):
        done = processes.run(*command, *SOCKET, *place, **credentials)
        assert done.returncode == Exit.DONE, done.stderr


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({TOKEN: ""}, "it demands a token, and this engine has none"),
        ({TOKEN: "other"}, "it has another token than this engine"),
        (
            dict.fromkeys((*TLS, "ENGINES_SOCKET_CACERT"), ""),
            "or it demands a certificate, and this engine has none",
        ),
    ],
)
def test_who_may_not_read_learns_why_and_ends_as_if_the_source_were_away(
    processes: Processes,
    weights: Path,
    credentials: dict[str, str],
    namespace: str,
    tmp_path: Path,
    change: dict[str, str],
    why: str,
) -> None:
    serve(processes, weights, credentials)
    (tmp_path / "other").write_text("the token of another fleet\n")
    change = {
        name: str(tmp_path / value) if value == "other" else value for name, value in change.items()
    }
    refused = processes.run(
        *("load", "a", "--rank", "0", *HERE, *SOCKET, "--namespace", namespace),
        **{**credentials, **change},
    )
    assert_one_line(refused, Exit.INSTANCE, why)


def test_credentials_that_cannot_be_used_are_named_with_their_variable(
    processes: Processes, weights: Path, namespace: str
) -> None:
    refused = processes.run(
        *("register", "a", "--rank", "0", "--world-size", "1", "--weights", str(weights), *HERE),
        *(*SOCKET, "--namespace", namespace),
        ENGINES_SOCKET_TOKEN_FILE="/none",
    )
    assert_one_line(refused, Exit.FAILED, "No such file", TOKEN)


# -- the doctor
# -------------------------------------------------------------------------------------------------


def test_the_doctor_tries_it_without_mooncake(
    doctor: Any, shared_etcd: LocalEtcd, credentials: dict[str, str]
) -> None:
    seen = doctor(shared_etcd.endpoint, *SOCKET, **credentials)
    assert not seen.failed, seen.checks
    assert seen["engine.import"]["what"] == "socket needs no library"
    assert seen.status("rdma.libibverbs") == "skipped"
    assert seen.status("socket.token") == "ok"
    assert "is good for 1 more day" in seen["socket.tls"]["what"]
    assert "read over socket on this machine at" in seen["engine.loopback"]["what"]
    assert "without the network, at" in seen["socket.same_host"]["what"]
    apart = {**credentials, "ENGINES_SOCKET_SAME_HOST": "0"}
    seen = doctor(shared_etcd.endpoint, *SOCKET, **apart)
    assert not seen.failed, seen.checks
    assert (seen.status("socket.same_host"), seen["socket.same_host"]["what"][:10]) == (
        "skipped",
        "turned off",
    )


def test_the_doctor_says_which_credentials_are_bad(
    doctor: Any, shared_etcd: LocalEtcd, credentials: dict[str, str]
) -> None:
    key = credentials["ENGINES_SOCKET_KEY"]
    seen = doctor(
        shared_etcd.endpoint, *SOCKET, **{**credentials, TOKEN: "/none", "ENGINES_SOCKET_CERT": key}
    )
    assert seen.failed == {"socket.token", "socket.tls", "engine.loopback"}
    assert seen.status("socket.same_host") == "skipped"


@pytest.mark.parametrize(
    ("change", "way"),
    [
        ({}, "within this host, without the network"),
        ({"ENGINES_SOCKET_SAME_HOST": "0"}, "lets nobody read"),
    ],
)
def test_the_doctor_says_how_a_rank_is_read(
    doctor: Any,
    processes: Processes,
    shared_etcd: LocalEtcd,
    namespace: str,
    credentials: dict[str, str],
    change: dict[str, str],
    way: str,
) -> None:
    source = processes.start(
        *("-m", "tests.support.processes.source", "a", "1000000"),
        cwd=ROOT,
        **{"TEST_PROTOCOL": "socket", **change, **credentials},
    )
    assert line_of(source) == "version 0\n"
    where = ("--namespace", namespace, "--peer", "a")
    seen = doctor(shared_etcd.endpoint, *SOCKET, *where, **credentials)
    assert not seen.failed, seen.checks
    assert way in seen["peer.rank"]["what"]
    assert "read over socket at" in seen["peer.speed"]["what"]
    token = Path(credentials[TOKEN])
    other = token.with_name("other")
    other.write_text("the token of another fleet\n")
    refused = doctor(shared_etcd.endpoint, *SOCKET, *where, **{**credentials, TOKEN: str(other)})
    assert "it has another token than this engine" in refused["peer.rank"]["what"]
