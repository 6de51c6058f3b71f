"""The watch of a registration's key, over a real etcd: it shows each change of the key without a
beat, and after any fault the key is looked at and watched again.
"""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from engine_registry import RegistrationState, Registry
from engine_registry.errors import EtcdUnavailable, Evicted
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.local_cluster import LocalCluster
from engine_registry.registration.eviction import evict
from engine_registry.registration.keeper.holder import Keeper
from engine_registry.registration.keeper.key_watch import KeyWatch
from engine_registry.registration.manifests import encode_manifest
from engine_registry.schema.record_format import decode_item
from tests.support.builders import a_record
from tests.support.faults import Proxy, etcdctl
from tests.support.ranks import MANIFEST, register
from tests.support.waiting import wait_until

TTL_S = 60.0


def renewals(etcd: LocalEtcd) -> int:
    """That etcd has been asked for."""
    with urllib.request.urlopen(f"http://{etcd.endpoint}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    name = 'grpc_server_msg_received_total{grpc_method="LeaseKeepAlive"'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


def connect(endpoints: str) -> closing[Etcd]:
    return closing(Etcd(EtcdConfig(parse_endpoints(endpoints), timeout_s=3.0)))


@contextmanager
def a_keeper(etcd: Etcd) -> Iterator[Keeper]:
    """One that has registered, and beats when the test says so."""
    ref, parts = encode_manifest(MANIFEST)
    record = a_record(manifest=ref)
    keeper = Keeper(
        etcd,
        record,
        parts,
        TTL_S,
        lambda report: None,
        KeyWatch(etcd, record.key, lambda: None),
    )
    keeper.register()
    try:
        yield keeper
    finally:
        keeper.end("withdrawn")


def beat_until_quiet(keeper: Keeper) -> None:
    def beats() -> bool:
        keeper.beat()
        return not keeper.suspended and keeper.is_quiet()

    wait_until(beats)


def evict_the_rank(etcd: Etcd) -> None:
    (item,) = etcd.snapshot("/engines/").items
    assert evict(etcd, decode_item(item))


def revoke_its_lease(etcd: Etcd) -> None:
    (item,) = etcd.snapshot("/engines/").items
    etcd.revoke(item.lease_id)


@pytest.mark.parametrize("by", ["eviction", "deletion of the key"])
def test_a_rank_learns_of_its_end_when_it_comes_and_not_with_a_beat(
    own_etcd: LocalEtcd, by: str
) -> None:
    lost = threading.Event()
    with Registry.connect(own_etcd.endpoint) as registry:
        registration = register(
            registry,
            ttl_s=TTL_S,
            on_state=lambda state, why: lost.set() if state is RegistrationState.LOST else None,
        )
        with registration:
            (record,) = registry.ranks("a")
            if by == "eviction":
                assert registry.evict(record)
            else:
                etcdctl(own_etcd.endpoint, "del", record.key)
            assert lost.wait(60)
            assert isinstance(registration.lost, Evicted)
            # The claim is as good as a renewal. This one shows that the lease lives, and so that
            # the key has not expired.
            assert renewals(own_etcd) == 1


def kill(etcd: LocalEtcd, proxy: Proxy, keeper: Keeper) -> None:
    etcd.kill()
    keeper.beat()
    etcd.start()


def stop(etcd: LocalEtcd, proxy: Proxy, keeper: Keeper) -> None:
    etcd.pause()
    try:
        keeper.beat()
    finally:
        etcd.resume()


def cut(etcd: LocalEtcd, proxy: Proxy, keeper: Keeper) -> None:
    proxy.cut()
    keeper.beat()
    proxy.mend()


def break_after_compaction(etcd: LocalEtcd, proxy: Proxy, keeper: Keeper) -> None:
    with connect(etcd.endpoint) as raw:
        revision = raw.snapshot("/").revision
    etcdctl(etcd.endpoint, "compaction", str(revision))
    proxy.break_connections()
    wait_until(lambda: not keeper.is_quiet())


@pytest.mark.parametrize("fault", [kill, stop, cut, break_after_compaction])
def test_after_a_fault_a_key_is_watched_again(
    own_etcd: LocalEtcd, fault: Callable[[LocalEtcd, Proxy, Keeper], None]
) -> None:
    with (
        closing(Proxy(own_etcd.endpoint)) as proxy,
        connect(proxy.endpoint) as etcd,
        connect(own_etcd.endpoint) as outside,
        a_keeper(etcd) as keeper,
    ):
        keeper.beat()
        assert keeper.is_quiet()
        fault(own_etcd, proxy, keeper)
        beat_until_quiet(keeper)
        evict_the_rank(outside)
        wait_until(lambda: not keeper.is_quiet())
        with pytest.raises(Evicted):
            keeper.beat()


def test_an_eviction_while_the_way_is_cut_is_found_with_the_first_beat_afterwards(
    own_etcd: LocalEtcd,
) -> None:
    with (
        closing(Proxy(own_etcd.endpoint)) as proxy,
        connect(proxy.endpoint) as etcd,
        connect(own_etcd.endpoint) as outside,
        a_keeper(etcd) as keeper,
    ):
        keeper.beat()
        proxy.cut()
        evict_the_rank(outside)
        assert keeper.is_quiet()  # as far as it can know
        keeper.beat()
        assert keeper.suspended
        proxy.mend()
        with pytest.raises(Evicted):
            beat_until_quiet(keeper)


def test_a_key_is_watched_at_another_member_when_theirs_is_stopped(binary: str) -> None:
    with (
        LocalCluster(binary) as cluster,
        connect(cluster.endpoints) as etcd,
        a_keeper(etcd) as keeper,
    ):
        keeper.beat()
        theirs = cluster.members[etcd._next_endpoint % 3]
        others = [member.endpoint for member in cluster.members if member is not theirs]
        theirs.pause()
        try:
            beat_until_quiet(keeper)
            with connect(",".join(others)) as outside:
                wait_until(lambda: can_evict(outside))
            wait_until(lambda: not keeper.is_quiet())
            with pytest.raises(Evicted):
                beat_until_quiet(keeper)
        finally:
            theirs.resume()


def can_evict(etcd: Etcd) -> bool:
    """Not while the others elect a leader."""
    try:
        evict_the_rank(etcd)
    except EtcdUnavailable:
        return False
    return True


def test_a_lease_that_has_expired_is_told_by_the_watch_and_the_new_claim_is_watched(
    own_etcd: LocalEtcd,
) -> None:
    with connect(own_etcd.endpoint) as etcd, a_keeper(etcd) as keeper:
        revoke_its_lease(etcd)
        wait_until(lambda: not keeper.is_quiet())
        keeper.beat()
        assert keeper.is_quiet()
        evict_the_rank(etcd)
        wait_until(lambda: not keeper.is_quiet())


def test_a_watch_from_a_revision_that_is_compacted_does_not_stand(own_etcd: LocalEtcd) -> None:
    with connect(own_etcd.endpoint) as etcd, a_keeper(etcd):
        revision = etcd.snapshot("/").revision
        etcdctl(own_etcd.endpoint, "compaction", str(revision))
        watch = KeyWatch(etcd, "/engines/x/0", lambda: None)
        watch.begin(1)
        wait_until(lambda: not watch.stands)
        assert not watch.is_quiet(revision)
        watch.begin(revision + 1)
        assert watch.is_quiet(revision)
        watch.end()
        assert not watch.stands


def test_an_end_leaves_no_thread_of_the_watch(own_etcd: LocalEtcd) -> None:
    with connect(own_etcd.endpoint) as etcd, a_keeper(etcd) as keeper:
        keeper.beat()
        keeper.end("withdrawn")
        wait_until(lambda: "key watch" not in [thread.name for thread in threading.enumerate()])
