"""Renewals of leases over a real etcd: one stream for all of a connection, also behind etcd's
grpc-proxy.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from engine_registry import RankLost, RegistrationState, Registry
from engine_registry.errors import EtcdError, EtcdUnavailable, LeaseNotFound
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.local_cluster import LocalCluster
from tests.support.checkout import ROOT
from tests.support.faults import a_grpc_proxy
from tests.support.ranks import register
from tests.support.waiting import wait_until


@pytest.fixture
def own_etcd(binary: str) -> Iterator[LocalEtcd]:
    with LocalEtcd(binary=binary) as etcd:
        yield etcd


def connect(endpoints: str, timeout_s: float = 60.0) -> Etcd:
    return Etcd(EtcdConfig(parse_endpoints(endpoints), timeout_s=timeout_s))


def counted(etcd: LocalEtcd, what: str) -> int:
    """Of renewals, since etcd was started: streams that were `started`, requests that were
    `msg_received`.
    """
    with urllib.request.urlopen(f"http://{etcd.endpoint}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    ours = [
        line
        for line in lines
        if line.startswith(f"grpc_server_{what}_total") and 'grpc_method="LeaseKeepAlive"' in line
    ]
    return sum(int(float(line.split()[-1])) for line in ours)


def renewing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "etcd renewals"]


def test_all_leases_of_a_connection_are_renewed_by_one_stream(own_etcd: LocalEtcd) -> None:
    with closing(connect(own_etcd.endpoint)) as etcd, ThreadPoolExecutor(8) as pool:
        leases = [etcd.grant(10 + number) for number in range(30)]
        assert (
            list(pool.map(etcd.keep_alive, leases * 10))
            == [10.0 + number for number in range(30)] * 10
        )
        etcd.revoke(leases[0])
        with pytest.raises(LeaseNotFound, match="has expired or was revoked"):
            etcd.keep_alive(leases[0])
        assert etcd.keep_alive(leases[1]) == 11.0
        assert counted(own_etcd, "started") == 1


def test_a_registration_is_renewed_by_one_stream_however_long_it_lives(own_etcd: LocalEtcd) -> None:
    with Registry.connect(own_etcd.endpoint) as registry, register(registry, ttl_s=2.0):
        (before,) = registry.ranks("a")
        wait_until(lambda: counted(own_etcd, "msg_received") >= 8)  # four times the lease's time
        (now,) = registry.ranks("a")
        assert now.mod_revision == before.mod_revision
        assert counted(own_etcd, "started") == 1


@pytest.mark.parametrize(("ttl_s", "for_s"), [(2.0, 8.0), (10.0, 12.0), (60.0, 4.0)])
@pytest.mark.slow
def test_behind_a_grpc_proxy_a_registration_lives_on_and_is_changed_at_any_time(
    own_etcd: LocalEtcd, ttl_s: float, for_s: float
) -> None:
    states: list[RegistrationState] = []
    with (
        a_grpc_proxy(own_etcd) as proxy,
        Registry.connect(own_etcd.endpoint) as direct,
        Registry.connect(proxy) as registry,
        direct.watch("a") as watch,
        register(
            registry, ttl_s=ttl_s, on_state=lambda state, why: states.append(state)
        ) as registration,
    ):
        (first,) = direct.ranks("a")
        version = 0
        end = time.monotonic() + for_s
        while time.monotonic() < end:
            version += 1
            registration.update(version=version)
            event = watch.next(0.3)
            assert not isinstance(event, RankLost), event
        (last,) = direct.ranks("a")
        assert (last.version, last.create_revision) == (version, first.create_revision)
        assert states == []
        assert counted(own_etcd, "started") == 1


def test_behind_a_grpc_proxy_leases_that_are_gone_are_reported(own_etcd: LocalEtcd) -> None:
    with a_grpc_proxy(own_etcd) as proxy, closing(connect(proxy)) as etcd:
        lease_id = etcd.grant(6)
        assert etcd.keep_alive(lease_id) == 6.0
        etcd.revoke(lease_id)
        with pytest.raises(LeaseNotFound):
            etcd.keep_alive(lease_id)


@pytest.mark.slow
def test_behind_a_grpc_proxy_a_leader_leads_and_a_ticket_stays_for_longer_than_their_leases(
    own_etcd: LocalEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_registry.pulls.ticket.TTL_S", 3.0)
    with (
        a_grpc_proxy(own_etcd) as proxy,
        Registry.connect(proxy) as registry,
        register(registry),
        registry.election("x") as election,
    ):
        ticket = registry.pull(registry.ranks("a")[0])
        assert ticket is not None
        with ticket:
            wait_until(lambda: election.leading)
            end = time.monotonic() + 8.0
            while time.monotonic() < end:
                assert election.leading
                assert registry.pulls(registry.ranks("a")[0]) == 1
                threading.Event().wait(0.1)


def test_renewals_go_on_after_etcd_was_away(own_etcd: LocalEtcd) -> None:
    with closing(connect(own_etcd.endpoint, timeout_s=20.0)) as etcd:
        lease_id = etcd.grant(60)
        etcd.keep_alive(lease_id)
        own_etcd.kill()
        starter = threading.Timer(0.3, own_etcd.start)
        starter.start()
        try:
            etcd.keep_alive(lease_id)
        finally:
            starter.join()
        # less where the lease was only looked at
        wait_until(lambda: etcd.keep_alive(lease_id) == 60.0)
        assert counted(own_etcd, "started") == 1  # since it was started again
        wait_until(lambda: len(renewing_threads()) == 1)


def test_renewals_go_on_at_another_member_when_theirs_is_killed(binary: str) -> None:
    with (
        LocalCluster(binary) as cluster,
        closing(connect(cluster.endpoints, timeout_s=20.0)) as etcd,
    ):
        lease_id = etcd.grant(60)
        etcd.keep_alive(lease_id)
        cluster.members[0].kill()
        wait_until(lambda: etcd.keep_alive(lease_id) == 60.0)
        assert sum(counted(member, "started") for member in cluster.members[1:]) >= 1


def test_a_renewal_that_etcd_does_not_answer_fails_in_time_and_on_a_new_stream_the_next_succeeds(
    own_etcd: LocalEtcd,
) -> None:
    with closing(connect(own_etcd.endpoint, timeout_s=3.0)) as etcd:
        lease_id = etcd.grant(60)
        etcd.keep_alive(lease_id)
        own_etcd.pause()
        try:
            with pytest.raises(EtcdUnavailable, match="does not answer in time"):
                # it may answer while it is being stopped
                list(iter(lambda: etcd.keep_alive(lease_id), None))
        finally:
            own_etcd.resume()
        wait_until(lambda: etcd.keep_alive(lease_id) == 60.0)


def test_closing_ends_a_renewal_that_waits_and_leaves_no_thread(own_etcd: LocalEtcd) -> None:
    etcd = connect(own_etcd.endpoint, timeout_s=100.0)
    lease_id = etcd.grant(60)
    etcd.keep_alive(lease_id)
    own_etcd.pause()
    try:
        with ThreadPoolExecutor(1) as pool:
            renewal = pool.submit(etcd.keep_alive, lease_id)
            with (
                closing(connect(own_etcd.endpoint, timeout_s=0.5)) as probe,
                pytest.raises(EtcdUnavailable),
            ):
                probe.get("/k")  # when this has found out, the other has asked
            etcd.close()
            error = renewal.exception(60)
    finally:
        own_etcd.resume()
    assert isinstance(error, EtcdError)
    assert str(error) == "the connection to etcd is closed"
    wait_until(lambda: not renewing_threads())


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("how", ["closed", "forgotten", "lost"])
def test_a_connection_that_is_over_leaves_no_call_of_renewals_for_the_interpreters_end(
    own_etcd: LocalEtcd, how: str
) -> None:
    etcd = connect(own_etcd.endpoint, timeout_s=3.0)
    etcd.keep_alive(lease_id := etcd.grant(60))
    _, stream = etcd._renewals
    assert stream is not None
    call = weakref.ref(stream._asked.call)
    del stream
    if how == "closed":
        etcd.close()
    elif how == "lost":
        own_etcd.kill()
        with pytest.raises(EtcdUnavailable) as kept:
            etcd.keep_alive(lease_id)
        assert kept.value is not None
    else:
        del etcd
    wait_until(lambda: call() is None)
    wait_until(lambda: not renewing_threads())


NEVER_CLOSES = """
import sys
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.client import Etcd
etcd = Etcd(EtcdConfig(parse_endpoints(sys.argv[1])))
print(etcd.keep_alive(etcd.grant(60)))
"""


def test_a_process_that_never_closes_its_connection_ends_all_the_same(own_etcd: LocalEtcd) -> None:
    for _ in range(5):
        command = [sys.executable, "-W", "error", "-c", NEVER_CLOSES, own_etcd.endpoint]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "60.0\n", "")
