"""Watches over a real etcd: many ranks that change, and stopping while etcd hangs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from engine_registry import (
    CleaningWatch,
    Event,
    InstanceDegraded,
    InstanceReady,
    RankJoined,
    RankUpdated,
    Registry,
    Watch,
)
from engine_registry.errors import EtcdError
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.local import LocalEtcd
from tests.support.ranks import put_ranks
from tests.support.waiting import wait_until

RANKS = 1_000


def read_until(watch: Watch, version: int) -> Iterator[Event]:
    """Until the last rank has that version.

    How many events of the instance come before depends on etcd: a watch that etcd has to catch up
    with gets the changes of many transactions as one.
    """
    for event in watch:
        yield event
        if isinstance(event, RankUpdated) and place(event) == (version, RANKS - 1):
            return


def place(event: RankUpdated) -> tuple[int, int]:
    return event.record.version, event.record.rank


def test_thousands_of_changes_reach_a_reader_that_comes_late_each_once_and_in_order(
    shared_etcd: LocalEtcd, namespace: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_registry.watching.inbox._MAX_QUEUED", 10)
    with closing(Etcd(EtcdConfig(parse_endpoints(shared_etcd.endpoint), namespace))) as raw:
        put_ranks(raw, "a", RANKS)
        with registry.watch("a") as watch:
            assert [type(watch.next(60)) for _ in range(RANKS + 1)] == [RankJoined] * RANKS + [
                InstanceReady
            ]
            put_ranks(raw, "a", RANKS, version=1)
            events = list(read_until(watch, 1))  # now etcd sends each transaction by itself
            for version in (2, 3, 4):
                put_ranks(raw, "a", RANKS, version=version, at_once=25)
            wait_until(lambda: watch._inbox.full)
            assert len(watch._inbox) == 10
            events += read_until(watch, 4)
    updates = [place(event) for event in events if isinstance(event, RankUpdated)]
    assert updates == [(version, rank) for version in (1, 2, 3, 4) for rank in range(RANKS)]
    states = [type(event) for event in events if not isinstance(event, RankUpdated)]
    assert states == ([InstanceDegraded, InstanceReady] * 4)[: len(states)]


@pytest.mark.parametrize("kind", ["watch", "cleaning watch", "callback"])
def test_a_watch_stops_although_etcd_hangs(
    own_etcd: LocalEtcd, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry.connect(own_etcd.endpoint, timeout_s=100) as registry:
        watch: Watch | CleaningWatch = (
            registry.cleaning_watch(grace_s=1) if kind == "cleaning watch" else registry.watch()
        )
        before = set(threading.enumerate())
        own_etcd.pause()
        try:
            with caplog.at_level(logging.WARNING), watch:
                if isinstance(watch, Watch) and kind == "callback":
                    watch.call(lambda _: None)
                    reader = watch._caller
                else:
                    reader = threading.Thread(target=list, args=(watch,))
                    reader.start()
                watch.stop()
            assert reader is not None
            reader.join(60)
            ours = [
                thread
                for thread in {*threading.enumerate(), *before}
                if thread.name.startswith(("registry", "election"))
            ]
            assert not [thread.name for thread in [reader, *ours] if thread.is_alive()]
            assert caplog.messages == []
        finally:
            own_etcd.resume()


def test_a_watch_ends_with_an_error_and_no_warning_when_its_registry_is_closed(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with registry.watch() as watch:
        wait_until(lambda: watch._follower._stream is not None)
        registry.close()
        with pytest.raises(EtcdError, match="closed"):
            watch.next(60)
    assert caplog.messages == []
