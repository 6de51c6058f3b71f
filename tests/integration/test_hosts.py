"""Ranks on separate hosts, with links that are slow, cut and mended: namespaces, the real
transfer engine, a real etcd.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hosts import Host, HostsUnavailable, Network, etcd_on, missing
from engine_registry.watching.tracker import EXPIRED
from tests.integration.conftest import Processes, line_of
from tests.support.checkout import ROOT
from tests.support.waiting import wait_until

NBYTES = 32 << 20
UNAVAILABLE = missing()
needs_hosts = pytest.mark.skipif(UNAVAILABLE is not None, reason=UNAVAILABLE or "")


class Cluster:
    """Etcd on a host, and whatever instances and loads a test starts on others."""

    def __init__(self, network: Network, processes: Processes) -> None:
        self.network = network
        self.control = network.host("control")
        self._processes = processes
        self._env: dict[str, str] = {}
        self._etcd = etcd_on(self.control)

    def __enter__(self) -> Cluster:
        self._env = {"ENGINES_ETCD": self._etcd.__enter__(), "TEST_NAMESPACE": ""}
        return self

    def __exit__(self, *exc: Any) -> None:
        self._etcd.__exit__(*exc)

    def source(self, instance: str, mbit: float, ttl_s: float = 2) -> Host:
        """The host of an instance that is ready."""
        host = self.network.host(instance, mbit)
        args = (
            "-m",
            "tests.support.processes.source",
            instance,
            str(NBYTES),
            host.address,
            str(ttl_s),
        )
        assert (
            line_of(self._processes.on(host).start(*args, cwd=ROOT, **self._env)) == "version 0\n"
        )
        return host

    def load(self, *instances: str, patience_s: float = 20) -> subprocess.Popen[str]:
        """On another host; half of it has come."""
        host = self.network.host("loader", 1000)
        args = (
            "-m",
            "tests.support.processes.load",
            host.address,
            str(NBYTES),
            str(patience_s),
            *instances,
        )
        process = self._processes.on(host).start(*args, cwd=ROOT, **self._env)
        assert line_of(process) == "half\n"
        return process

    def engines(self, *args: str) -> subprocess.Popen[str]:
        return self._processes.on(self.control).engines(*args, **self._env)


def outcome_of(load: subprocess.Popen[str]) -> dict[str, Any]:
    """It is asked to go on."""
    assert load.stdin is not None
    load.stdin.write("\n")
    load.stdin.flush()
    outcome: dict[str, Any] = json.loads(line_of(load))
    return outcome


@pytest.fixture
def cluster(processes: Processes) -> Iterator[Cluster]:
    with Network() as network, Cluster(network, processes) as cluster:
        yield cluster


@needs_hosts
@pytest.mark.slow
def test_weights_go_from_host_to_host_once(cluster: Cluster) -> None:
    source = cluster.source("a", 400)
    before = source.sent_nbytes
    assert outcome_of(cluster.load("a")) == {
        "nbytes": {"/engines/a/0": NBYTES},
        "lost": [],
        "exact": True,
    }
    assert NBYTES <= source.sent_nbytes - before < 1.1 * NBYTES


@needs_hosts
@pytest.mark.slow
def test_a_host_that_is_cut_off_in_the_middle_is_done_without(cluster: Cluster) -> None:
    host = cluster.source("a", 200)
    cluster.source("b", 200)
    load = cluster.load("a", "b")
    host.cut()
    outcome = outcome_of(load)
    assert (outcome["lost"], outcome["exact"]) == (["/engines/a/0"], True)


@needs_hosts
@pytest.mark.slow
def test_the_only_source_cut_off_is_a_stall_that_is_reported_before_its_lease_ends(
    cluster: Cluster,
) -> None:
    host = cluster.source("a", 200, ttl_s=60)
    load = cluster.load("a", patience_s=1)
    host.cut()
    outcome = outcome_of(load)
    assert outcome["error"] == "Stalled"
    assert "the network between is cut" in outcome["message"]


@needs_hosts
@pytest.mark.slow
def test_a_link_that_is_mended_in_time_costs_no_load(cluster: Cluster) -> None:
    host = cluster.source("a", 200, ttl_s=60)
    load = cluster.load("a")
    host.cut()
    assert load.stdin is not None
    load.stdin.write("\n")
    load.stdin.flush()
    sent = host.sent_nbytes
    wait_until(lambda: host.sent_nbytes > sent)  # again what nobody has acknowledged
    host.mend()
    assert json.loads(line_of(load))["exact"]


@needs_hosts
@pytest.mark.slow
def test_most_is_taken_from_the_faster_of_two_links(cluster: Cluster) -> None:
    cluster.source("fast", 200)  # far less than two busy processes can move
    # Four chunks at once take 0.4 s there, which is less than the load takes for a stall.
    cluster.source("slow", 20)
    outcome = outcome_of(cluster.load("fast", "slow"))
    assert (outcome["lost"], outcome["exact"]) == ([], True)
    assert outcome["nbytes"]["/engines/fast/0"] > 3 * outcome["nbytes"]["/engines/slow/0"] > 0


@needs_hosts
@pytest.mark.slow
def test_a_host_that_vanishes_is_a_lease_that_ends(cluster: Cluster) -> None:
    """Nobody is left to report its rank's death."""
    host = cluster.source("a", 200)
    watch = cluster.engines("watch", "--json")
    while json.loads(line_of(watch))["event"] != "instance_ready":
        pass
    host.vanish()
    while (event := json.loads(line_of(watch)))["event"] != "rank_lost":
        pass
    assert (event["instance"], event["reason"]) == ("a", EXPIRED)


MAKES_A_HOST = """
from benchmarks.hosts import Network
with Network() as network:
    host = network.host("h")
    inside = host.popen(["sleep", "600"])
    print(host.run(["stat", "-Lc", "%i", "/proc/self/ns/net"]), end="", flush=True)
    {then}
"""


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_hosts_whose_maker_is_gone(
    processes: Processes, number: signal.Signals
) -> None:
    maker = processes.start("-c", MAKES_A_HOST.format(then="inside.wait()"))
    namespace = int(line_of(maker))
    maker.send_signal(number)
    maker.wait(60)
    wait_until(lambda: not _processes_in(namespace))


@needs_hosts
def test_nothing_is_left_of_hosts_whose_block_fails(processes: Processes) -> None:
    maker = processes.start("-c", MAKES_A_HOST.format(then="input()\n    1 / 0"))
    namespace = int(line_of(maker))
    _, err = maker.communicate("\n", timeout=100)
    assert "ZeroDivisionError" in err
    assert not _processes_in(namespace)


def _processes_in(namespace: int) -> list[str]:
    """But for such as have ended and were not waited for."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns/net").stat().st_ino == namespace:
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


ECHOES = """
import socket
with socket.create_server(({address!r}, 4000)) as server:
    print("listens", flush=True)
    peer, _ = server.accept()
    while part := peer.recv(1 << 20):
        peer.sendall(part)
"""
ASKS = """
import socket, threading, time
sent = bytes(range(256)) * {count}
with socket.create_connection(({address!r}, 4000)) as peer:
    start = time.monotonic()
    peer.sendall(b"!")
    peer.recv(1)
    print(time.monotonic() - start)
    sending = threading.Thread(target=peer.sendall, args=(sent,))
    sending.start()
    came = bytearray()
    while len(came) < len(sent):
        came += peer.recv(1 << 20)
    sending.join()
    print(came == sent)
"""


@needs_hosts
def test_a_delay_holds_back_each_packet_and_changes_none(processes: Processes) -> None:
    with Network() as network:
        far, near = network.host("far", mbit=400, delay_ms=50), network.host("near", mbit=400)
        server = processes.on(far).start("-c", ECHOES.format(address=far.address))
        assert line_of(server) == "listens\n"
        code = ASKS.format(address=far.address, count=1 << 16)
        there_and_back_s, equal = near.run([sys.executable, "-c", code]).split()
        assert float(there_and_back_s) >= 0.05
        assert equal == "True"


@needs_hosts
def test_hosts_have_names_addresses_and_links_of_their_own() -> None:
    with Network() as network:
        one, two = network.host("one"), network.host("two")
        assert one.run(["cat", "/proc/sys/kernel/hostname"]) == "one\n"
        assert one.address != two.address
        with pytest.raises(HostsUnavailable, match="failed"):
            one.run(["false"])


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("programs", r"need the program ip \(iproute2\), .*: install it"),
        ("root", "only root may make: run it as root"),
    ],
)
def test_what_is_missing_for_hosts_is_reported(
    monkeypatch: pytest.MonkeyPatch, lacking: str, words: str
) -> None:
    monkeypatch.setattr(
        shutil, "which", lambda name: None if lacking == "programs" else f"/bin/{name}"
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostsUnavailable, match=words):
        Network().__enter__()


@needs_hosts
def test_a_host_whose_namespace_has_ended_does_not_take_this_machine_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []
    with Network() as network:
        namespace = network.host("a")._namespace
        namespace._holder.kill()
        namespace._holder.wait()
        namespace.pid = os.getpid()  # as when its id is another process's by now
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", lambda pid, number: killed.append(pid))
            with pytest.raises(HostsUnavailable, match="has ended before its processes"):
                namespace.kill_all()
    assert killed == []
