"""Ranks at addresses of IPv6: registered, listed, examined and loaded, with a real etcd that is
reached over IPv6 as well.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch

from engine_cli.exits import Exit
from engine_loader.files.weights import read_weights, write_weights
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.address import family_of, host_of
from tests.integration.conftest import Processes, line_of
from tests.support.faults import Proxy

WEIGHTS = {
    f"t{number}": torch.full((1 << 18,), number, dtype=torch.int32) for number in range(1, 5)
}


def _no_ipv6() -> str:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return ""
    except OSError as exc:
        return f"this machine has no IPv6: {exc}"


pytestmark = pytest.mark.skipif(bool(_no_ipv6()), reason=_no_ipv6())


class Ranks:
    """What commands do that reach etcd there."""

    def __init__(self, processes: Processes, etcd: str, namespace: str, folder: Path) -> None:
        self._processes = processes
        self._etcd = "--etcd", etcd, "--namespace", namespace
        self._folder = folder
        write_weights(WEIGHTS, folder / "weights.safetensors")

    def register(self, *options: str) -> str:
        """Returns where it is read from."""
        weights = str(self._folder / "weights.safetensors")
        process = self._processes.engines(
            "register",
            "a",
            "--rank",
            "0",
            "--world-size",
            "1",
            "--weights",
            weights,
            *options,
            *self._etcd,
        )
        found = re.search(r" at (\S+) \(tcp\)", line_of(process))
        assert found is not None
        return found[1]

    def load(self, *options: str) -> tuple[int, str]:
        """The exit code and what is complained about."""
        out = str(self._folder / "out")
        done = self._processes.run(
            "load", "a", "--rank", "0", "--out", out, "--force", *options, *self._etcd
        )
        return done.returncode, done.stderr

    def loaded(self) -> dict[str, torch.Tensor]:
        return read_weights([self._folder / "out" / "rank-0.safetensors"])

    def run(self, *args: str) -> str:
        done = self._processes.run(*args, *self._etcd)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def ranks(processes: Processes, shared_etcd: LocalEtcd, namespace: str, tmp_path: Path) -> Ranks:
    return Ranks(processes, shared_etcd.endpoint, namespace, tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_rank_is_at_an_address_of_the_family_by_which_it_reaches_etcd_and_is_loaded_over_it(
    processes: Processes, shared_etcd: LocalEtcd, namespace: str, tmp_path: Path, host: str
) -> None:
    proxy = Proxy(shared_etcd.endpoint, at=host)
    ranks = Ranks(processes, proxy.endpoint, namespace, tmp_path)
    session_id = ranks.register()
    assert host_of(session_id) == host
    assert ranks.load() == (0, "")
    loaded = ranks.loaded()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in WEIGHTS.items())
    assert session_id in ranks.run("show", "a", "--json")
    proxy.close()


@pytest.mark.parametrize(
    "hosts", [("::1", "127.0.0.1"), ("[::1]", "127.0.0.1"), ("127.0.0.1", "::1")]
)
def test_a_reader_of_the_other_family_learns_why_it_cannot_read_and_how_it_can(
    ranks: Ranks, hosts: tuple[str, str]
) -> None:
    theirs, ours = hosts
    session_id = ranks.register("--host", theirs)
    served, speaks = family_of(host_of(session_id)), family_of(ours)
    code, said = ranks.load("--host", ours)
    assert code == Exit.INSTANCE
    assert (
        f"rank 0 of instance a is served over {served}, this engine speaks {speaks}: use a "
        f"--host of {served}" in said
    )
    assert ranks.load("--host", theirs) == (0, "")


def test_the_doctor_reads_a_rank_at_an_address_of_ipv6(ranks: Ranks) -> None:
    session_id = ranks.register("--host", "::1")
    said = ranks.run("doctor", "--peer", "a", "--host", "::1")
    assert re.search(
        rf"a/0 at {re.escape(session_id)}: header read in .*it is who its record says", said
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "255.255.255.255", "224.0.0.1", "ff02::1"])
@pytest.mark.parametrize("command", ["register", "load"])
def test_commands_refuse_a_host_that_leads_nobody_to_this_machine(
    processes: Processes, command: str, host: str
) -> None:
    given = {"register": ("--world-size", "1", "--weights", "nowhere")}.get(command, ())
    done = processes.run(command, "a", "--rank", "0", "--host", host, *given)
    assert done.returncode == Exit.USAGE
    assert f"Invalid value for '--host': {host} " in done.stderr
