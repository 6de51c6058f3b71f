"""What may befall etcd, a keeper or the way between them, and what a registration and a watcher
make of it.

Every registration here is a real keeper process; leases are as short as etcd grants them (2 s).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from engine_registry import (
    Event,
    InstanceReady,
    ModelIdentity,
    RankJoined,
    RankLost,
    RankUpdated,
    Registration,
    RegistrationState,
    Registry,
    Watch,
)
from engine_registry.errors import EtcdFull, EtcdUnavailable, KeeperFailed, RankConflict, Superseded
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from engine_registry.etcd.local_cluster import LocalCluster
from engine_registry.registration.keeper.protocol import ANSWER_S
from engine_registry.schema.keyvalue import Put
from tests.integration.conftest import Processes, events_until, keepers_of, line_of
from tests.support.checkout import ROOT
from tests.support.connections import connections
from tests.support.faults import DivisibleCluster, Proxy, etcdctl, fill_until_no_space
from tests.support.keepers import pid_of_keeper
from tests.support.ranks import MANIFEST, register
from tests.support.waiting import wait_until

TTL_S = 2.0


@pytest.fixture
def etcd(binary: str) -> Iterator[LocalEtcd]:
    with LocalEtcd(binary=binary) as etcd:
        yield etcd


class States:
    """The states of a registration as they come; `wait_for` blocks until one is reached again."""

    def __init__(self) -> None:
        self.seen: list[RegistrationState] = []
        self.why = ""
        self._changed = threading.Condition()

    def __call__(self, state: RegistrationState, why: str) -> None:
        with self._changed:
            self.seen.append(state)
            self.why = why
            self._changed.notify_all()

    def wait_for(self, state: RegistrationState, timeout_s: float = 60.0) -> None:
        with self._changed:
            reached = self._changed.wait_for(
                lambda: bool(self.seen) and self.seen[-1] is state, timeout_s
            )
        assert reached, self.seen


def hold(registry: Registry, **fields: Any) -> tuple[Registration, States]:
    states = States()
    return register(registry, **{"ttl_s": TTL_S, "on_state": states, **fields}), states


def joined_again(registration: Registration) -> Callable[[Event], bool]:
    return lambda event: (
        isinstance(event, RankJoined)
        and event.record.incarnation == registration.record.incarnation
    )


def pause_for(seconds: float) -> None:
    """For faults that are a length of time."""
    threading.Event().wait(seconds)


def losses(events: list[Event]) -> list[str]:
    return [event.reason for event in events if isinstance(event, RankLost)]


def returns(events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, RankJoined)]


def events_up_to_now(watch: Watch) -> list[Event]:
    """What comes until nothing has come for longer than a blip is waited for."""
    events: list[Event] = []
    while (event := watch.next(1.5)) is not None:
        events.append(event)
    return events


def test_an_etcd_that_is_away_for_longer_than_the_lease_costs_nothing(etcd: LocalEtcd) -> None:
    with Registry.connect(etcd.endpoint, timeout_s=20) as registry, registry.watch() as watch:
        registration, states = hold(registry)
        with registration:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            etcd.kill()
            states.wait_for(RegistrationState.SUSPENDED)
            pause_for(TTL_S + 0.5)
            etcd.start()
            states.wait_for(RegistrationState.REGISTERED)
            assert registry.resolve("a", 60)[0].incarnation == registration.record.incarnation
            assert losses(events_up_to_now(watch)) == []
            assert states.seen == [RegistrationState.SUSPENDED, RegistrationState.REGISTERED]


def test_an_etcd_that_stalls_for_longer_than_the_lease_has_the_rank_back_afterwards(
    etcd: LocalEtcd,
) -> None:
    with Registry.connect(etcd.endpoint, timeout_s=20) as registry, registry.watch() as watch:
        registration, _ = hold(registry)
        with registration:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            etcd.pause()
            pause_for(2 * TTL_S)
            etcd.resume()
            # the lease may expire only now, and the rank be away for a moment
            events = events_up_to_now(watch)
            if len(losses(events)) > len(returns(events)):
                events += events_until(watch, joined_again(registration))
            (record,) = registry.resolve("a", 60)
            assert record.incarnation == registration.record.incarnation
            assert registry.manifest(record) == MANIFEST
        # Whether the lease outlived the stall is etcd's affair; a loss that was seen must have been
        # followed by a return.
        assert len(losses(events)) == len(returns(events))


def test_the_loss_of_the_data_of_etcd_is_a_blip_for_no_rank_of_many(etcd: LocalEtcd) -> None:
    with Registry.connect(etcd.endpoint, timeout_s=20) as registry, ExitStack() as stack:
        for rank in range(6):
            stack.enter_context(hold(registry, rank=rank, world_size=6)[0])
        before = {record.incarnation for record in registry.resolve("a", 60)}
        etcd.kill()
        etcd.wipe()
        etcd.start()
        after = registry.resolve("a", 60)
        assert {record.incarnation for record in after} == before
        assert all(registry.manifest(record) == MANIFEST for record in after)


def test_killing_the_leader_of_a_cluster_loses_no_registration(binary: str) -> None:
    with (
        LocalCluster(binary) as cluster,
        Registry.connect(cluster.endpoints, timeout_s=20) as registry,
    ):
        with registry.watch() as watch, ExitStack() as stack:
            for rank in range(4):
                stack.enter_context(hold(registry, rank=rank, world_size=4)[0])
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            for _ in range(2):
                leader = cluster.leader()
                leader.kill()
                assert len(registry.resolve("a", 60)) == 4
                assert losses(events_up_to_now(watch)) == []
                leader.start()
                cluster.wait_until_healthy()
            with register(registry, "b"):
                assert events_until(watch, lambda event: isinstance(event, RankJoined))


def test_a_cluster_without_a_quorum_suspends_and_has_everything_back_with_it(binary: str) -> None:
    with (
        LocalCluster(binary) as cluster,
        Registry.connect(cluster.endpoints, timeout_s=20) as registry,
    ):
        registration, states = hold(registry)
        with registration, registry.watch() as watch:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            for member in cluster.members[1:]:
                member.kill()
            states.wait_for(RegistrationState.SUSPENDED)
            pause_for(TTL_S)
            for member in cluster.members[1:]:
                member.launch()
            states.wait_for(RegistrationState.REGISTERED)
            registration.update(version=1)
            assert [record.version for record in registry.resolve("a", 60)] == [1]
            events = events_until(
                watch, lambda event: isinstance(event, RankUpdated) and event.record.version == 1
            )
            assert losses(events) == []


@pytest.mark.slow
def test_a_keeper_whose_member_is_cut_off_from_the_others_goes_to_one_that_is_not(
    binary: str,
) -> None:
    with (
        DivisibleCluster(binary) as cluster,
        Registry.connect(cluster.endpoints, timeout_s=20) as registry,
    ):
        registration = held_through(cluster.members[0].endpoint, registry)
        with (
            registration,
            Registry.connect(cluster.members[1].endpoint) as outside,
            outside.watch() as watch,
        ):
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            cluster.cut_off_the_first()
            with (
                pytest.raises(EtcdUnavailable),
                closing(raw_at(cluster.members[0].endpoint, timeout_s=1)) as alone,
            ):
                alone.get("/")
            pause_for(2 * TTL_S)
            registration.update(version=1)
            events = events_until(
                watch, lambda event: isinstance(event, RankUpdated) and event.record.version == 1
            )
            assert losses(events) == []
            assert [record.version for record in registry.resolve("a", 60)] == [1]


def held_through(endpoint: str, registry: Registry) -> Registration:
    """A registration whose keeper is connected to that member: it begins with any of them."""
    for _ in range(50):
        registration, _ = hold(registry)
        if connections(pid_of_keeper(registration), endpoint):
            return registration
        registration.close()
    raise AssertionError(f"no keeper began with {endpoint}")


def raw_at(endpoints: str, timeout_s: float = 5.0) -> Etcd:
    return Etcd(EtcdConfig(parse_endpoints(endpoints), timeout_s=timeout_s))


def test_a_keeper_in_a_black_hole_loses_the_rank_by_its_lease_and_brings_it_back(
    etcd: LocalEtcd,
) -> None:
    with (
        closing(Proxy(etcd.endpoint)) as proxy,
        Registry.connect(etcd.endpoint) as outside,
        outside.watch() as watch,
    ):
        with Registry.connect(proxy.endpoint) as registry:
            registration, states = hold(registry)
        with registration:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            proxy.cut()
            states.wait_for(RegistrationState.SUSPENDED)
            seen = events_until(watch, lambda event: isinstance(event, RankLost))
            assert losses(seen) == ["lease expired or key deleted"]
            proxy.mend()
            events_until(watch, joined_again(registration))
            states.wait_for(RegistrationState.REGISTERED)
            assert outside.manifest(outside.ranks("a")[0]) == MANIFEST


def test_a_watcher_in_a_black_hole_reports_afterwards_what_it_missed_even_if_that_was_compacted(
    etcd: LocalEtcd,
) -> None:
    with (
        closing(Proxy(etcd.endpoint)) as proxy,
        Registry.connect(etcd.endpoint) as outside,
        ExitStack() as stack,
    ):
        kept, _ = hold(outside, rank=0, world_size=2)
        gone, _ = hold(outside, rank=1, world_size=2)
        stack.enter_context(kept)
        with Registry.connect(proxy.endpoint, timeout_s=2) as registry, registry.watch() as watch:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            proxy.cut()
            gone.withdraw()
            kept.update(version=5)
            new = stack.enter_context(hold(outside, rank=1, world_size=2, version=5)[0])
            etcdctl(etcd.endpoint, "compaction", etcdctl_revision(etcd.endpoint))
            proxy.mend()
            events = events_until(watch, lambda event: isinstance(event, RankJoined))
    assert losses(events) == ["replaced by another process"]
    assert [event.record.version for event in events if isinstance(event, RankUpdated)] == [5]
    assert [event.record.incarnation for event in events if isinstance(event, RankJoined)] == [
        new.record.incarnation
    ]


def etcdctl_revision(endpoint: str) -> str:
    found = re.search(r'"revision":(\d+)', etcdctl(endpoint, "get", "/", "-w", "json"))
    assert found
    return found[1]


@contextmanager
def without_space(binary: str) -> Iterator[tuple[Registry, Etcd]]:
    """An etcd that can be filled soon."""
    with (
        LocalEtcd(binary=binary, extra_args=["--quota-backend-bytes", str(8 << 20)]) as etcd,
        Registry.connect(etcd.endpoint, timeout_s=60) as registry,
        closing(raw_at(etcd.endpoint, timeout_s=60)) as raw,
    ):
        yield registry, raw


def test_an_etcd_without_space_keeps_the_rank_and_takes_its_update_when_it_has_space_again(
    binary: str,
) -> None:
    with (
        LocalEtcd(binary=binary, extra_args=["--quota-backend-bytes", str(8 << 20)]) as etcd,
        Registry.connect(etcd.endpoint) as registry,
        closing(Etcd(EtcdConfig(parse_endpoints(etcd.endpoint)))) as raw,
    ):
        registration, states = hold(registry)
        with registration:
            fill_until_no_space(raw)
            registration.update(version=1)
            assert registration.state is RegistrationState.SUSPENDED
            pause_for(TTL_S + 1)
            assert [record.version for record in registry.ranks("a")] == [0]
            etcdctl(etcd.endpoint, "del", "--prefix", "/fill/")
            etcdctl(etcd.endpoint, "compaction", etcdctl_revision(etcd.endpoint))
            etcdctl(etcd.endpoint, "defrag")
            etcdctl(etcd.endpoint, "alarm", "disarm")
            states.wait_for(RegistrationState.REGISTERED)
            assert [record.version for record in registry.ranks("a")] == [1]


def test_an_authentication_token_that_etcd_has_forgotten_is_renewed(etcd: LocalEtcd) -> None:
    for command in ("user add root:secret", "user grant-role root root", "auth enable"):
        etcdctl(etcd.endpoint, *command.split())
    with (
        Registry.connect(etcd.endpoint, timeout_s=20, user="root", password="secret") as registry,
        registry.watch() as watch,
    ):
        registration, states = hold(registry)
        with registration:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            etcd.kill()
            etcd.launch()
            registration.update(version=1)
            events = events_until(watch, lambda event: isinstance(event, RankUpdated))
            assert losses(events) == []
            assert [record.version for record in registry.ranks("a")] == [1]
            # the watch may see the keeper's write before the handle has its report
            wait_until(lambda: states.seen[-1:] in ([], [RegistrationState.REGISTERED]))


def test_a_keeper_that_dies_while_etcd_is_away_leaves_its_successor_to_say_that_etcd_is_back(
    etcd: LocalEtcd,
) -> None:
    with Registry.connect(etcd.endpoint, timeout_s=20) as registry:
        registration, states = hold(registry)
        with registration:
            etcd.pause()
            states.wait_for(RegistrationState.SUSPENDED)
            os.kill(pid_of_keeper(registration), signal.SIGKILL)
            etcd.resume()
            states.wait_for(RegistrationState.REGISTERED)
            assert len(registry.resolve("a", 60)) == 1


@pytest.mark.parametrize("call", ["os.memfd_create", "subprocess.Popen"])
@pytest.mark.usefixtures("product_keepers")
def test_a_keeper_that_cannot_be_replaced_now_is_replaced_when_it_can(
    shared_etcd: LocalEtcd, namespace: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Registry.connect(shared_etcd.endpoint, namespace=namespace) as registry:
        registration, states = hold(registry)
        with registration:
            with monkeypatch.context() as exhausted:
                exhausted.setattr(f"engine_registry.registration.keeper.process.{call}", refuse)
                os.kill(pid_of_keeper(registration), signal.SIGKILL)
                states.wait_for(RegistrationState.SUSPENDED)
                assert "no keeper: cannot start a keeper" in states.why
                assert "no file descriptors are left" in states.why
                # 0 as a pid would be the process group of whoever sends that keeper a signal
                assert registration.keeper_pid is None
                registration.update(version=1)  # is for the next keeper to write
                pause_for(TTL_S)
            states.wait_for(RegistrationState.REGISTERED)
            assert [record.version for record in registry.resolve("a", 60)] == [1]


@pytest.mark.usefixtures("product_keepers")
def test_a_first_keeper_that_cannot_be_started_is_an_error_that_says_so(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(
        KeeperFailed, match=r"cannot start a keeper of /engines/a/0 .*No such file or directory"
    ):
        register(registry)


@pytest.mark.parametrize("without", ["a folder that can be written", "memory files"])
@pytest.mark.usefixtures("product_keepers")
def test_a_keeper_needs_either_a_folder_that_can_be_written_or_memory_files(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    if without == "memory files":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with register(registry) as registration:
        os.kill(pid_of_keeper(registration), signal.SIGKILL)
        registration.update(version=1)
        wait_until(lambda: [record.version for record in registry.ranks("a")] == [1])


FEW_DESCRIPTORS = """
import os, resource, sys
from engine_registry import Registry, RegistryError
from tests.support.ranks import register

def with_left(count, call):
    highest = max(map(int, os.listdir("/proc/self/fd")))
    fill = [os.open("/dev/null", os.O_RDONLY)]
    while fill[-1] < highest:
        fill.append(os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fill[-1] + 1 + count, hard))
    try:
        call()
        print(count, "done")
    except RegistryError as exc:
        print(count, type(exc).__name__, exc)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in fill:
            os.close(descriptor)

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
left = int(sys.argv[4])
# a connection that lacks descriptors is tried for as long as it has time
timeout_s = 0.5 if sys.argv[3] == "connect" and left < 8 else 60
connect = lambda: Registry.connect(sys.argv[1], namespace=sys.argv[2], timeout_s=timeout_s)
if sys.argv[3] == "connect":
    with_left(left, lambda: connect().close())
else:
    with connect() as registry:
        with_left(left, lambda: register(registry).withdraw())
"""


@pytest.mark.parametrize("left", [0, 1, 3, 5, 7, 9, 10, 40])
@pytest.mark.parametrize(
    ("call", "error", "enough"),
    [("connect", "EtcdUnavailable", 8), ("register", "KeeperFailed", 10)],
)
def test_a_process_without_descriptors_gets_an_error_that_says_so(
    shared_etcd: LocalEtcd, namespace: str, call: str, error: str, enough: int, left: int
) -> None:
    command = [
        sys.executable,
        "-c",
        FEW_DESCRIPTORS,
        shared_etcd.endpoint,
        namespace,
        call,
        str(left),
    ]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr
    count, _, said = ran.stdout.strip().partition(" ")
    assert count == str(left)
    if left >= enough:  # as many as it looks for
        assert said == "done"
    else:
        assert said.startswith(f"{error} ")
        assert "no file descriptors are left (limit " in said
        assert "raise the limit (ulimit -n)" in said


def test_a_keeper_that_hangs_is_replaced(registry: Registry) -> None:
    registration, states = hold(registry)
    with registration:
        first = pid_of_keeper(registration)
        os.kill(first, signal.SIGSTOP)
        states.wait_for(RegistrationState.SUSPENDED)
        assert f"(pid {first}) did not answer and was killed" in states.why
        states.wait_for(RegistrationState.REGISTERED)
        assert registration.keeper_pid != first
        assert registry.resolve("a", 60)[0].incarnation == registration.record.incarnation


def test_no_caller_waits_without_end_for_a_keeper_that_hangs_with_its_pipe_full(
    registry: Registry,
) -> None:
    registration, states = hold(registry, model=ModelIdentity("tiny", extra={"note": "x" * 3000}))
    with registration, ThreadPoolExecutor(64) as callers:
        os.kill(pid_of_keeper(registration), signal.SIGSTOP)
        for call in [
            callers.submit(registration.update, version=version) for version in range(1, 65)
        ]:  # 200 KB
            call.result(60)
        registration.update(version=65)
        states.wait_for(RegistrationState.REGISTERED)
        assert [record.version for record in registry.resolve("a", 60)] == [65]


def test_a_withdrawal_is_carried_out_though_the_keeper_hangs(registry: Registry) -> None:
    with registry.watch("a") as watch:
        registration, _ = hold(registry, ttl_s=60.0)
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        os.kill(pid_of_keeper(registration), signal.SIGSTOP)
        registration.withdraw()
        assert registration.withdrawn
        assert losses(events_until(watch, lambda event: isinstance(event, RankLost))) == [
            "withdrawn"
        ]


def test_a_keeper_is_not_taken_for_hung_while_etcd_is_silent(etcd: LocalEtcd) -> None:
    with Registry.connect(etcd.endpoint, timeout_s=20) as registry:
        registration, states = hold(registry)
        with registration:
            first = pid_of_keeper(registration)
            etcd.pause()
            states.wait_for(RegistrationState.SUSPENDED)
            pause_for(2 * (TTL_S / 3 + ANSWER_S))
            etcd.resume()
            states.wait_for(RegistrationState.REGISTERED)
            assert registration.keeper_pid == first


@pytest.mark.usefixtures("product_keepers")
def test_a_keeper_is_not_taken_for_hung_by_a_rank_that_was_stopped_itself(
    registry: Registry, processes: Processes
) -> None:
    with registry.watch("a") as watch:
        process = processes.rank("a", 0, 1, "withdraw")
        (before,) = keepers_of(process.pid)
        process.send_signal(signal.SIGSTOP)
        pause_for(2 * ANSWER_S)
        process.send_signal(signal.SIGCONT)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert line_of(process) == f"withdraws {before}\n"
        assert losses(events_until(watch, lambda event: isinstance(event, RankLost))) == [
            "withdrawn"
        ]


def test_a_first_claim_over_a_slow_way_to_many_endpoints_has_the_time_that_the_user_gives_it(
    etcd: LocalEtcd,
) -> None:
    with ExitStack() as stack:
        ways = [stack.enter_context(closing(Proxy(etcd.endpoint))) for _ in range(4)]
        for way in ways:
            way.delay_s = (
                0.3  # each way: more than the keeper's own 2 s leave each of four endpoints
            )
        with (
            Registry.connect(",".join(way.endpoint for way in ways), timeout_s=40) as registry,
            hold(registry, ttl_s=60.0)[0],
        ):
            assert len(registry.ranks("a")) == 1
            for way in ways:
                way.delay_s = 0.0


def test_a_rank_that_dies_in_an_outage_longer_than_its_lease_is_gone_soon_after_it(
    etcd: LocalEtcd, processes: Processes
) -> None:
    process = processes.start(
        "-m",
        "tests.support.processes.rank",
        "a",
        "0",
        "1",
        ENGINES_ETCD=etcd.endpoint,
        TEST_NAMESPACE="/n",
    )
    line_of(process)
    with (
        Registry.connect(etcd.endpoint, namespace="/n", timeout_s=20) as registry,
        registry.watch("a") as watch,
    ):
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        etcd.kill()
        process.kill()
        pause_for(3.0 + 1.0)  # the rank's time to live, and more
        etcd.start()
        assert losses(events_until(watch, lambda event: isinstance(event, RankLost))) == [
            "process ended"
        ]


def test_a_rank_that_etcd_remembers_otherwise_after_a_restored_backup_writes_itself_again(
    etcd: LocalEtcd,
) -> None:
    with Registry.connect(etcd.endpoint) as registry, closing(raw_at(etcd.endpoint)) as raw:
        registration, _ = hold(registry)
        with registration, registry.watch() as watch:
            old = raw.get(registration.record.key)
            assert old is not None
            registration.update(version=1)
            # as the key would be after the restoration
            raw.commit([], [Put(old.key, old.value, old.lease_id)])
            seen = events_until(
                watch, lambda event: isinstance(event, RankUpdated) and event.record.version == 0
            )
            seen += events_until(
                watch, lambda event: isinstance(event, RankUpdated) and event.record.version == 1
            )
            assert losses(seen) == []


def test_an_etcd_without_space_reports_a_death_without_waiting_for_the_lease(binary: str) -> None:
    with without_space(binary) as (registry, raw):
        registration, _ = hold(registry, ttl_s=600.0)
        with registry.watch() as watch:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            fill_until_no_space(raw)
            registration.withdraw()
            assert registration.withdrawn
            events_until(watch, lambda event: isinstance(event, RankLost))
            assert raw.snapshot("/engines/").items == ()


@pytest.mark.slow
@pytest.mark.parametrize("binary", ["debian"], indirect=True)
def test_an_etcd_without_space_lets_a_rank_be_evicted_and_its_keeper_notices(binary: str) -> None:
    with without_space(binary) as (registry, raw):
        registration, states = hold(registry)
        fill_until_no_space(raw)
        assert registry.evict(registry.ranks("a")[0])
        states.wait_for(RegistrationState.LOST)
        assert raw.snapshot("/engines/").items == ()
        registration.withdraw()


@pytest.mark.parametrize("binary", ["embedded"], indirect=True)
def test_an_etcd_without_space_that_takes_no_transaction_at_all_evicts_nobody(binary: str) -> None:
    with without_space(binary) as (registry, raw):
        with hold(registry)[0]:
            fill_until_no_space(raw)
            with pytest.raises(EtcdFull):
                registry.evict(registry.ranks("a")[0])
            assert len(registry.ranks("a")) == 1


def test_a_keeper_that_wakes_up_after_another_took_the_rank_leaves_it_alone(
    etcd: LocalEtcd,
) -> None:
    with Registry.connect(etcd.endpoint) as registry, registry.watch() as watch:
        old, states = hold(registry)
        events_until(watch, lambda event: isinstance(event, InstanceReady))
        os.kill(pid_of_keeper(old), signal.SIGSTOP)
        events_until(watch, lambda event: isinstance(event, RankLost))
        with hold(registry)[0] as new:
            os.kill(pid_of_keeper(old), signal.SIGCONT)
            states.wait_for(RegistrationState.LOST)
            assert isinstance(old.lost, Superseded)
            assert [record.incarnation for record in registry.ranks("a")] == [
                new.record.incarnation
            ]
            old.withdraw()
            assert [record.incarnation for record in registry.ranks("a")] == [
                new.record.incarnation
            ]


def test_a_rank_whose_host_is_dead_is_refused_to_others_until_its_lease_is_over(
    etcd: LocalEtcd,
) -> None:
    with Registry.connect(etcd.endpoint) as registry, registry.watch() as watch:
        old, states = hold(registry)
        # as if host and keeper were gone: nobody revokes the lease
        os.kill(pid_of_keeper(old), signal.SIGSTOP)
        with pytest.raises(RankConflict):
            hold(registry)
        events_until(watch, lambda event: isinstance(event, RankLost))
        with hold(registry)[0]:
            os.kill(pid_of_keeper(old), signal.SIGCONT)
            states.wait_for(RegistrationState.LOST)
        old.withdraw()


def test_a_rank_that_holds_the_gil_for_three_times_the_lease_stays_registered(
    etcd: LocalEtcd,
) -> None:
    with Registry.connect(etcd.endpoint) as registry, registry.watch() as watch:
        registration, states = hold(registry)
        with registration:
            events_until(watch, lambda event: isinstance(event, InstanceReady))
            start = time.monotonic()
            while time.monotonic() - start < 3 * TTL_S:
                # unlike CDLL, PyDLL keeps the lock: no thread of this process runs meanwhile
                ctypes.PyDLL(None).sleep(1)
            assert losses(events_up_to_now(watch)) == []
            assert states.seen == []


def test_thousands_of_ranks_are_each_reported_once_and_in_order(etcd: LocalEtcd) -> None:
    with (
        Registry.connect(etcd.endpoint) as registry,
        closing(Etcd(EtcdConfig(parse_endpoints(etcd.endpoint)))) as raw,
    ):
        with registry.watch() as watch, register(registry, "first"):
            events_until(watch, lambda event: isinstance(event, RankJoined))  # it watches by now
            lease_id = claim_many(raw, instances=4, ranks=500)
            events = list(_next_of(watch, 2_000, RankJoined))
            assert {(event.record.instance, event.record.rank) for event in events} == {
                (f"i{instance}", rank) for instance in range(4) for rank in range(500)
            }
            for instance in range(4):
                assert [
                    event.record.rank for event in events if event.record.instance == f"i{instance}"
                ] == list(range(500))
            raw.revoke(lease_id)
            assert len({event.record.key for event in _next_of(watch, 2_000, RankLost)}) == 2_000


def claim_many(raw: Etcd, instances: int, ranks: int) -> int:
    """Ranks that no process stands behind, all under one lease, which is returned."""
    from dataclasses import replace

    from engine_registry.schema import manifest_format
    from engine_registry.schema.keyvalue import Put
    from engine_registry.schema.record import RankRecord
    from engine_registry.schema.record_format import encode
    from tests.support.ranks import MODEL

    ref, _ = manifest_format.encode(MANIFEST)
    lease_id = raw.grant(60)
    record = RankRecord(
        incarnation="0" * 32,
        instance="i0",
        rank=0,
        world_size=ranks,
        model=MODEL,
        session_id="h:1",
        protocol="tcp",
        manifest=ref,
        header_addr=0,
        registered_at="2026-01-01T00:00:00+00:00",
    )
    for instance in range(instances):
        records = [replace(record, instance=f"i{instance}", rank=rank) for rank in range(ranks)]
        for start in range(0, ranks, 100):
            raw.commit(
                [], [Put(each.key, encode(each), lease_id) for each in records[start : start + 100]]
            )
    return lease_id


def _next_of(watch: Watch, count: int, kind: type) -> Iterator[Any]:
    while count:
        event = watch.next(60)
        assert event is not None
        if isinstance(event, kind):
            count -= 1
            yield event
