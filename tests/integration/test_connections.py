"""How few connections to etcd there are: one that nobody uses is closed, and opened again with the
next call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from engine_registry import RegistrationState, Registry
from engine_registry.etcd import channel, connection, lease_stream
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.pulls.ticket import PullTicket
from tests.support.connections import all_connections, connections
from tests.support.faults import a_grpc_proxy
from tests.support.keepers import pid_of_keeper
from tests.support.ranks import register
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a call is idle after a second, and a stream of renewals after two."""
    options = {**dict(channel.CHANNEL_OPTIONS), "grpc.client_idle_timeout_ms": 1_000}
    monkeypatch.setattr(channel, "CHANNEL_OPTIONS", tuple(options.items()))
    monkeypatch.setattr(connection, "IDLE_S", 1.0)
    monkeypatch.setattr(lease_stream, "_IDLE_S", 2.0)


@pytest.fixture
def etcd(own_etcd: LocalEtcd) -> Iterator[Etcd]:
    with closing(Etcd(EtcdConfig(parse_endpoints(own_etcd.endpoint)))) as etcd:
        yield etcd


def ours(server: LocalEtcd) -> int:
    """Connections of this process."""
    return connections(os.getpid(), server.endpoint)


def test_a_connection_without_calls_is_closed_and_the_next_call_connects_again(
    own_etcd: LocalEtcd, etcd: Etcd
) -> None:
    for restart in (False, True):
        etcd.get("/k")
        assert ours(own_etcd) == 1
        wait_until(lambda: not ours(own_etcd))
        if restart:
            own_etcd.kill()
            own_etcd.start()
    etcd.get("/k")


def test_a_watch_keeps_its_connection(own_etcd: LocalEtcd, etcd: Etcd) -> None:
    stream = etcd.watch("/k", 1)
    with closing(Etcd(etcd.config)) as idle:
        idle.get("/k")
        assert ours(own_etcd) == 2
        wait_until(lambda: ours(own_etcd) == 1)
    stream.cancel()
    wait_until(lambda: not ours(own_etcd))


def test_a_stream_of_renewals_holds_its_connection_only_while_leases_are_renewed(
    own_etcd: LocalEtcd, etcd: Etcd
) -> None:
    lease_id = etcd.grant(60)
    assert etcd.keep_alive(lease_id) == 60.0
    wait_until(lambda: not ours(own_etcd))
    assert etcd.keep_alive(lease_id) == 60.0


def test_a_rank_that_serves_holds_the_connection_of_its_keeper_alone(own_etcd: LocalEtcd) -> None:
    with Registry.connect(own_etcd.endpoint) as registry, register(registry) as registration:
        with Registry.connect(own_etcd.endpoint) as loader:
            (record,) = loader.ranks("a")
            ticket = loader.pull(record)
            assert isinstance(ticket, PullTicket)
            ticket.close()
        wait_until(lambda: not ours(own_etcd))
        assert connections(pid_of_keeper(registration), own_etcd.endpoint) == 1
        registration.update(version=1)
        assert [found.version for found in registry.ranks("a")] == [1]


def of_clients(server: LocalEtcd) -> int:
    """All connections but what etcd has to itself."""
    return all_connections(server.endpoint) - connections(server.pid, server.endpoint)


def test_the_ranks_of_a_host_share_one_connection_behind_a_proxy(own_etcd: LocalEtcd) -> None:
    with (
        a_grpc_proxy(own_etcd) as proxy,
        Registry.connect(proxy) as registry,
        ExitStack() as stack,
    ):
        ranks = [
            stack.enter_context(register(registry, rank=rank, world_size=3)) for rank in range(3)
        ]
        wait_until(lambda: of_clients(own_etcd) == 1)
        assert registry.evict(registry.ranks("a")[0])
        wait_until(lambda: ranks[0].state is RegistrationState.LOST)
        assert [record.rank for record in registry.ranks("a")] == [1, 2]
