"""What happens after a loss: eviction by one of several watchers, hooks, and ranks that leave
without hurting their readers.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch

from engine_loader import InProcessEngine, load, publish
from engine_loader.errors import SourceLost
from engine_registry import (
    CleaningWatch,
    Event,
    InstanceCleaned,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    ModelIdentity,
    RankLost,
    RankState,
    Registration,
    Registry,
    failpoints,
)
from engine_registry.errors import InstanceIncomplete
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.follow import Follower
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.keys import eviction_note_key, record_key
from engine_registry.schema.keyvalue import Delete, Put
from engine_registry.watching.election import Election
from tests.integration.conftest import Processes, line_of
from tests.support.engines import Interrupted
from tests.support.ranks import MODEL, put_ranks, register
from tests.support.waiting import wait_until


class Collected:
    """Events of a cleaning watch, gathered by a thread; `wait_for` blocks until one of them is what
    the test waits for.
    """

    def __init__(self, watch: CleaningWatch) -> None:
        self.events: list[Event | InstanceCleaned] = []
        self.watch = watch
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._collect, args=(watch,))
        self._thread.start()

    def _collect(self, watch: CleaningWatch) -> None:
        for event in watch:
            with self._changed:
                self.events.append(event)
                self._changed.notify_all()

    def wait_for(
        self, wanted: Callable[[Event | InstanceCleaned], bool], timeout_s: float = 60.0
    ) -> Event | InstanceCleaned:
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(wanted, self.events)), timeout_s), (
                self.events
            )
            return next(filter(wanted, self.events))

    def join(self) -> None:
        self._thread.join()


@pytest.fixture
def watching(registry: Registry) -> Iterator[Callable[..., Collected]]:
    with ExitStack() as stack:

        def watch(grace_s: float, dry_run: bool = False) -> Collected:
            cleaning = stack.enter_context(
                registry.cleaning_watch("a", grace_s=grace_s, dry_run=dry_run)
            )
            collected = Collected(cleaning)
            stack.callback(collected.join)
            stack.callback(cleaning.stop)
            return collected

        yield watch


def two_ranks(registry: Registry, stack: ExitStack) -> tuple[Registration, Registration]:
    first, second = (
        stack.enter_context(register(registry, rank=rank, world_size=2)) for rank in range(2)
    )
    return first, second


def is_a(kind: type) -> Callable[[object], bool]:
    return lambda event: isinstance(event, kind)


def nothing_is_due(watch: CleaningWatch) -> bool:
    """No eviction lies before it. It may go on in another thread, so this only looks."""
    return all(known.due is None for known in list(watch._grace._instances.values()))


class GraceClock:
    """Of watches that clean. It stands, so that no grace period ends, until it is let go."""

    def __init__(self) -> None:
        self._stands_at: float | None = time.monotonic()

    def monotonic(self) -> float:
        return time.monotonic() + 60 if self._stands_at is None else self._stands_at

    def go_on(self) -> None:
        """All grace periods that have begun are over."""
        self._stands_at = None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> GraceClock:
    clock = GraceClock()
    monkeypatch.setattr("engine_registry.watching.cleanup.time", clock)
    return clock


def test_what_a_lost_rank_leaves_is_evicted_once_by_three_watchers(
    registry: Registry, watching: Callable[..., Collected]
) -> None:
    with ExitStack() as stack:
        first, second = two_ranks(registry, stack)
        watchers = [watching(grace_s=0.3) for _ in range(3)]
        for watcher in watchers:
            watcher.wait_for(is_a(InstanceReady))
        second.withdraw()
        for watcher in watchers:
            watcher.wait_for(
                lambda event: (
                    isinstance(event, RankLost)
                    and event.reason == "evicted"
                    and event.eviction is not None
                    and event.eviction.reason.startswith("rank 1 did not come back within ")
                )
            )
        cleaned = [
            event
            for watcher in watchers
            for event in watcher.events
            if isinstance(event, InstanceCleaned)
        ]
        assert [
            (event.lost.rank, [record.rank for record in event.evicted]) for event in cleaned
        ] == [(1, [0])]
        assert registry.instances() == ()
        assert first.record.rank == 0


def test_a_dry_run_reports_and_evicts_nothing(
    registry: Registry, watching: Callable[..., Collected]
) -> None:
    with ExitStack() as stack:
        _, second = two_ranks(registry, stack)
        watcher = watching(grace_s=0.2, dry_run=True)
        watcher.wait_for(is_a(InstanceReady))
        second.withdraw()
        cleaned = watcher.wait_for(is_a(InstanceCleaned))
        assert isinstance(cleaned, InstanceCleaned)
        assert cleaned.dry_run
        assert [record.rank for record in registry.ranks("a")] == [0]


def test_a_rank_that_comes_back_within_the_grace_period_saves_the_others(
    registry: Registry, watching: Callable[..., Collected], clock: GraceClock
) -> None:
    with ExitStack() as stack:
        _, second = two_ranks(registry, stack)
        watcher = watching(grace_s=0.3)
        watcher.wait_for(is_a(InstanceReady))
        second.withdraw()
        watcher.wait_for(is_a(RankLost))
        assert not nothing_is_due(watcher.watch)
        stack.enter_context(register(registry, rank=1, world_size=2))
        watcher.wait_for(lambda _: sum(map(is_a(InstanceReady), watcher.events)) == 2)
        clock.go_on()
        assert nothing_is_due(watcher.watch)
        assert not any(map(is_a(InstanceCleaned), watcher.events))
        assert len(registry.resolve("a")) == 2


def test_ranks_of_a_new_launch_are_not_taken_for_what_the_old_one_left(
    registry: Registry, watching: Callable[..., Collected], clock: GraceClock
) -> None:
    with ExitStack() as stack:
        first = register(registry, rank=0, world_size=3, generation="old")
        second = register(registry, rank=1, world_size=3, generation="old")
        watcher = watching(grace_s=0.3)
        watcher.wait_for(lambda event: getattr(getattr(event, "record", None), "rank", None) == 1)
        second.withdraw()
        watcher.wait_for(is_a(RankLost))
        first.withdraw()
        watcher.wait_for(is_a(InstanceGone))
        stack.enter_context(register(registry, rank=0, world_size=3, generation="new"))
        watcher.wait_for(lambda _: is_a(InstanceDegraded)(watcher.events[-1]))
        clock.go_on()
        wait_until(lambda: nothing_is_due(watcher.watch))  # what it found has been looked at
        assert [record.generation for record in registry.ranks("a")] == ["new"]
        assert not any(map(is_a(InstanceCleaned), watcher.events))


def test_the_next_watcher_evicts_when_the_leading_one_is_killed(
    registry: Registry, processes: Processes, namespace: str
) -> None:
    leader = processes.engines(
        "watch", "a", "--namespace", namespace, "--cleanup", "--grace", "1", "--json"
    )
    with ExitStack() as stack:
        _, second = two_ranks(registry, stack)
        assert json.loads(line_of(leader))["event"] == "rank_joined"
        follower = processes.engines(
            "watch", "a", "--namespace", namespace, "--cleanup", "--grace", "1", "--json"
        )
        assert json.loads(line_of(follower))["event"] == "rank_joined"
        leader.kill()
        leader.wait()
        second.withdraw()
        events = (json.loads(line_of(follower)) for _ in range(100))
        cleaned = next(event for event in events if event["event"] == "instance_cleaned")
        assert cleaned["evicted"] == [0]


def wait_for_leader(etcd: Etcd) -> None:
    leaders = Follower(etcd, "/elections/", deadline=time.monotonic() + 60)
    assert any(etcd.snapshot("/elections/").items for _ in leaders)


@pytest.fixture
def etcd(shared_etcd: LocalEtcd, namespace: str) -> Iterator[Etcd]:
    with closing(Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))) as etcd:
        yield etcd


def lose_a_rank_while_one_watches_that_is_then_killed(
    registry: Registry, etcd: Etcd, processes: Processes, namespace: str, lost: Registration
) -> None:
    watch = processes.engines(
        "watch", "a", "--namespace", namespace, "--cleanup", "--grace", "600", "--json"
    )
    while json.loads(line_of(watch))["event"] != "instance_ready":
        pass
    wait_for_leader(etcd)
    lost.withdraw()
    while json.loads(line_of(watch))["event"] != "rank_lost":
        pass
    # it notes the loss as soon as it knows that it leads
    wait_until(lambda: etcd.get(eviction_note_key("a")) is not None)
    watch.kill()
    watch.wait()


def test_a_watcher_that_starts_later_cleans_up_after_a_loss_that_another_saw(
    registry: Registry,
    etcd: Etcd,
    processes: Processes,
    namespace: str,
    watching: Callable[..., Collected],
) -> None:
    with ExitStack() as stack:
        first, second = two_ranks(registry, stack)
        lose_a_rank_while_one_watches_that_is_then_killed(
            registry, etcd, processes, namespace, second
        )
        cleaned = watching(grace_s=0.3).wait_for(is_a(InstanceCleaned))
        assert isinstance(cleaned, InstanceCleaned)
        assert (cleaned.lost.incarnation, [record.rank for record in cleaned.evicted]) == (
            second.record.incarnation,
            [0],
        )
        assert registry.instances() == ()
        assert first.record.rank == 0


def test_what_a_watcher_noted_evicts_no_rank_of_a_later_launch(
    registry: Registry, etcd: Etcd, processes: Processes, namespace: str
) -> None:
    with ExitStack() as stack:
        first, second = two_ranks(registry, stack)
        lose_a_rank_while_one_watches_that_is_then_killed(
            registry, etcd, processes, namespace, second
        )
        first.withdraw()
        stack.enter_context(register(registry, rank=0, world_size=2))
        cleaning = stack.enter_context(registry.cleaning_watch("a", grace_s=0.3))
        reader = threading.Thread(target=lambda: seen.extend(cleaning))
        seen: list[Event | InstanceCleaned] = []
        reader.start()
        # what it found degraded has been looked at
        wait_until(lambda: len(seen) == 2 and nothing_is_due(cleaning))
        cleaning.stop()
        reader.join(60)
        assert not any(map(is_a(InstanceCleaned), seen))
        assert [record.rank for record in registry.ranks("a")] == [0]


def test_an_instance_that_was_never_complete_is_left_alone_by_a_watcher_that_finds_it_so(
    registry: Registry, etcd: Etcd, watching: Callable[..., Collected]
) -> None:
    with ExitStack() as stack:
        stack.enter_context(register(registry, rank=0, world_size=2))
        cleaning = stack.enter_context(registry.cleaning_watch("a", grace_s=0.1))
        reader = threading.Thread(target=list, args=(cleaning,))
        reader.start()
        wait_for_leader(etcd)
        wait_until(lambda: bool(cleaning._grace._instances) and nothing_is_due(cleaning))
        cleaning.stop()
        reader.join(60)
        assert [record.rank for record in registry.ranks("a")] == [0]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], None]:
    """Gives a point of the code an action."""
    return lambda point, action: monkeypatch.setitem(failpoints.ACTIONS, point, action)


def test_an_instance_that_becomes_complete_just_before_the_eviction_is_spared(
    registry: Registry, watching: Callable[..., Collected], at: Callable[..., None]
) -> None:
    with ExitStack() as stack:
        _, second = two_ranks(registry, stack)
        back = threading.Event()

        def come_back() -> None:
            if not back.is_set():
                stack.enter_context(register(registry, rank=1, world_size=2))
                back.set()

        at("cleanup.before_evict", come_back)
        watcher = watching(grace_s=0.3)
        watcher.wait_for(is_a(InstanceReady))
        second.withdraw()
        assert back.wait(60)
        watcher.wait_for(lambda _: sum(map(is_a(InstanceReady), watcher.events)) == 2)
        assert not any(map(is_a(InstanceCleaned), watcher.events))
        assert [record.rank for record in registry.resolve("a")] == [0, 1]


def a_large_instance_that_loses_its_last_rank(
    registry: Registry, etcd: Etcd, stack: ExitStack, watching: Callable[..., Collected]
) -> Collected:
    put_ranks(etcd, "a", 100)
    etcd.commit([], [Delete(record_key("a", 99))])
    last = stack.enter_context(register(registry, rank=99, world_size=100, model=MODEL))
    watcher = watching(grace_s=0.3)
    watcher.wait_for(is_a(InstanceReady))
    last.withdraw()
    return watcher


def test_a_large_instance_is_evicted_in_few_transactions_each_with_one_lease_for_its_marks(
    registry: Registry, etcd: Etcd, watching: Callable[..., Collected]
) -> None:
    with ExitStack() as stack:
        watcher = a_large_instance_that_loses_its_last_rank(registry, etcd, stack, watching)
        cleaned = watcher.wait_for(is_a(InstanceCleaned))
        assert isinstance(cleaned, InstanceCleaned)
        assert [record.rank for record in cleaned.evicted] == list(range(99))
        marks = etcd.snapshot("/evicted/").items
        assert Counter(Counter(mark.mod_revision for mark in marks).values()) == {40: 2, 19: 1}
        assert len({mark.lease_id for mark in marks}) == 3
        assert registry.instances() == ()


def handled(server: LocalEtcd) -> Counter[str]:
    """How many requests of each kind etcd has answered."""
    with urllib.request.urlopen(f"http://{server.endpoint}/metrics") as answer:
        found = re.findall(
            r'^grpc_server_handled_total\{grpc_code="OK",grpc_method="(\w+)".* (\d+)$',
            answer.read().decode(),
            re.MULTILINE,
        )
    return Counter({method: int(count) for method, count in found})


def test_an_operator_evicts_a_large_instance_in_few_requests(own_etcd: LocalEtcd) -> None:
    with (
        Registry.connect(own_etcd.endpoint, timeout_s=60) as registry,
        closing(Etcd(EtcdConfig(parse_endpoints(own_etcd.endpoint), timeout_s=60))) as etcd,
    ):
        put_ranks(etcd, "a", 100)
        ranks = registry.ranks("a")
        before = handled(own_etcd)
        assert registry.evict_each(ranks) == (True,) * 100
        # 40 ranks each: a lease for their marks, to end and mark them, to delete them
        assert handled(own_etcd) - before == {"LeaseGrant": 3, "Txn": 1 + 3 + 3}
        assert registry.instances() == ()
        assert len(etcd.snapshot("/evicted/").items) == 100
        assert registry.evict_each(ranks) == (False,) * 100


def test_an_eviction_stops_when_the_missing_rank_comes_back_half_way(
    registry: Registry, etcd: Etcd, watching: Callable[..., Collected], at: Callable[..., None]
) -> None:
    with ExitStack() as stack:
        batches = itertools.count()

        def come_back_before_the_second_batch() -> None:
            if next(batches) == 1:
                stack.enter_context(register(registry, rank=99, world_size=100, model=MODEL))

        at("cleanup.before_evict", come_back_before_the_second_batch)
        watcher = a_large_instance_that_loses_its_last_rank(registry, etcd, stack, watching)
        cleaned = watcher.wait_for(is_a(InstanceCleaned))
        assert isinstance(cleaned, InstanceCleaned)
        assert [record.rank for record in cleaned.evicted] == list(range(40))


def test_an_eviction_that_was_held_up_is_done_while_another_rank_is_still_missing(
    registry: Registry,
    watching: Callable[..., Collected],
    at: Callable[..., None],
    clock: GraceClock,
) -> None:
    with ExitStack() as stack:
        _, second, third = (
            stack.enter_context(register(registry, rank=rank, world_size=3)) for rank in range(3)
        )
        back = threading.Event()

        def one_comes_back() -> None:
            if not back.is_set():
                stack.enter_context(register(registry, rank=1, world_size=3))
                back.set()

        at("cleanup.before_evict", one_comes_back)
        watcher = watching(grace_s=0.3)
        watcher.wait_for(is_a(InstanceReady))
        second.withdraw()
        third.withdraw()
        watcher.wait_for(lambda _: sum(map(is_a(RankLost), watcher.events)) == 2)
        clock.go_on()
        cleaned = watcher.wait_for(is_a(InstanceCleaned))
        assert isinstance(cleaned, InstanceCleaned)
        assert [record.rank for record in cleaned.evicted] == [0]
        assert [record.rank for record in registry.ranks("a")] == [1]


def test_a_rank_whose_record_was_damaged_counts_as_lost(
    registry: Registry, etcd: Etcd, watching: Callable[..., Collected]
) -> None:
    with ExitStack() as stack:
        _, second = two_ranks(registry, stack)
        watcher = watching(grace_s=0.3)
        watcher.wait_for(is_a(InstanceReady))
        second.withdraw()
        etcd.commit([], [Put(record_key("a", 1), b"not a record", 0)])
        cleaned = watcher.wait_for(is_a(InstanceCleaned))
        assert isinstance(cleaned, InstanceCleaned)
        assert [record.rank for record in cleaned.evicted] == [0]


def test_a_cleaning_watch_that_is_left_is_over(registry: Registry) -> None:
    with registry.cleaning_watch("a", grace_s=1.0) as watch:
        pass
    assert list(watch) == []


def test_elections_whose_names_begin_alike_do_not_wait_for_each_other(
    shared_etcd: LocalEtcd, namespace: str
) -> None:
    with (
        closing(Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))) as etcd,
        ExitStack() as stack,
    ):
        elections = [
            stack.enter_context(Election(etcd.sibling(), name))
            for name in ("cleanup/a.draft", "cleanup/a", "cleanup-all")
        ]
        leaders = Follower(etcd, "/elections/", deadline=time.monotonic() + 60)
        assert any(len(etcd.snapshot("/elections/").items) == 3 for _ in leaders)
        wait_until(lambda: all(election.leading for election in elections))


def test_hooks_get_each_event_and_a_failing_one_does_not_stop_the_watch(
    registry: Registry, processes: Processes, namespace: str, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    hook = (
        f'echo "$ENGINES_EVENT $ENGINES_INSTANCE $ENGINES_RANK $ENGINES_REASON" >>{seen}; cat '
        f">>{seen}; echo >>{seen}; exit 3"
    )
    watch = processes.engines("watch", "--namespace", namespace, "--exec", hook)
    with register(registry):
        for _ in range(2):
            line_of(watch)
    for _ in range(2):
        line_of(watch)
    # else the signal would keep some from running
    wait_until(lambda: seen.exists() and len(seen.read_text().splitlines()) == 8)
    watch.send_signal(signal.SIGTERM)
    _, err = watch.communicate(timeout=100)
    assert watch.returncode == 0
    assert err.count("failed with code 3") == 4
    lines = seen.read_text().splitlines()
    assert lines[::2] == [
        "rank_joined a 0 ",
        "instance_ready a  ",
        "rank_lost a 0 withdrawn",
        "instance_gone a  ",
    ]
    assert [json.loads(line)["event"] for line in lines[1::2]] == [
        "rank_joined",
        "instance_ready",
        "rank_lost",
        "instance_gone",
    ]


@pytest.mark.parametrize("patient", [True, False])
def test_a_draining_rank_waits_for_its_reader_but_not_for_ever(
    registry: Registry, patient: bool
) -> None:
    source = {"w": torch.rand(1024)}
    target = {"w": torch.zeros(1024)}
    publication = publish(
        registry,
        InProcessEngine(),
        instance="a",
        rank=0,
        world_size=1,
        tensors=source,
        model=ModelIdentity("m"),
    )
    reading, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        reading.set()
        assert go_on.wait(60)

    engine = Interrupted(wait)
    outcome: list[object] = []

    def read() -> None:
        try:
            outcome.append(load(registry, engine, "a", rank=0, tensors=target))
        except SourceLost as exc:
            outcome.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(60)
    drained: list[bool] = []
    drainer = threading.Thread(
        target=lambda: drained.append(publication.drain(60.0 if patient else 0.2))
    )
    with registry.watch("a") as watch:
        drainer.start()
        while any(record.state is not RankState.DRAINING for record in registry.ranks("a")):
            watch.next(0.05)
        if patient:
            with pytest.raises(InstanceIncomplete, match="rank 0 draining"):
                load(
                    registry,
                    InProcessEngine(),
                    "a",
                    rank=0,
                    tensors={"w": torch.zeros(1024)},
                    timeout_s=0.0,
                )
            assert drainer.is_alive()
        else:
            drainer.join(60)
    go_on.set()
    reader.join(60)
    drainer.join(60)
    assert drained == [patient]
    assert registry.instances() == ()
    if patient:
        assert torch.equal(target["w"], source["w"])
    else:
        assert isinstance(outcome[0], SourceLost)
