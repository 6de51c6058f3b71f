"""The prober over seeds: leases are renewed while seeds listen, ranks end when their seeds refuse,
and silence is left to others.
"""

from __future__ import annotations

import asyncio
import queue
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from engine_registry import RankRecord
from engine_registry.errors import EtcdError, EtcdRefused
from engine_registry.etcd.follow import Follower
from engine_registry.gateway.probe import Answer
from engine_registry.gateway.prober import Prober
from engine_registry.schema.keyvalue import Batch, Put, Snapshot
from engine_registry.schema.record import GATEWAY
from engine_registry.schema.record_format import decode, encode
from tests.support.builders import OTHER_INCARNATION, a_record, deleted, garbage
from tests.support.fake_etcd import FakeEtcd

SEED = a_record(kept_by=GATEWAY)
LISTENS, REFUSES, SILENT = Answer.LISTENS, Answer.REFUSES, Answer.SILENT


class Feed(Follower):
    """A follower that says what the test gives it."""

    def __init__(self) -> None:
        self._updates: queue.SimpleQueue[Snapshot | Batch | EtcdError | None] = queue.SimpleQueue()
        self.put = self._updates.put

    def __iter__(self) -> Iterator[Snapshot | Batch]:
        while (update := self._updates.get()) is not None:
            if isinstance(update, EtcdError):
                raise update
            yield update

    def stop(self) -> None:
        self._updates.put(None)


class World:
    """An etcd, seeds that answer as they are set, and a prober over them that looks without a
    pause.
    """

    def __init__(self, tolerance: int = 2) -> None:
        self.etcd = FakeEtcd()
        self.feed = Feed()
        self.answers: dict[str, Answer] = defaultdict(lambda: LISTENS)
        self.script: list[Answer] = []  # before those
        self.probed: list[str] = []
        self.prober = Prober(self.etcd, self.feed, self._probe, 0.0005, tolerance)

    async def _probe(self, session_id: str) -> Answer:
        self.probed.append(session_id)
        return self.script.pop(0) if self.script else self.answers[session_id]

    def register(self, record: RankRecord = SEED, ttl_s: float = 0.003) -> int:
        """With a lease so short that every look is due to renew it."""
        lease_id = self.etcd.grant(ttl_s)
        self.etcd.commit([], [Put(record.key, encode(record), lease_id)])
        return lease_id

    def show(self) -> None:
        """What is in etcd now reaches the prober."""
        self.feed.put(self.etcd.snapshot("/engines/"))

    async def until(self, reached: Callable[[], bool]) -> None:
        async def reach() -> None:
            while not reached():
                await asyncio.sleep(0)

        await asyncio.wait_for(reach(), 60)

    async def looks(self, number: int) -> None:
        """Until there have been so many more."""
        before = len(self.probed)
        await self.until(lambda: len(self.probed) >= before + number)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_registry.gateway.prober._AGAIN_S", 0.0)


def watched(story: Callable[[World], Any], world: World | None = None) -> World:
    """The story while the prober runs."""
    world = world or World()

    async def main() -> None:
        task = asyncio.create_task(world.prober.run())
        try:
            await story(world)
        finally:
            task.cancel()
            await asyncio.wait([task])
            world.prober.close()

    asyncio.run(main())
    return world


def test_the_lease_of_a_seed_that_listens_is_renewed_again_and_again() -> None:
    async def story(world: World) -> None:
        lease_id = world.register()
        world.show()
        await world.until(lambda: world.etcd.renewed.count(lease_id) >= 3)

    watched(story)


def test_a_lease_that_has_time_is_not_renewed_at_every_look() -> None:
    async def story(world: World) -> None:
        world.register(ttl_s=3600)
        world.show()
        await world.looks(50)
        assert len(world.etcd.renewed) == 1

    watched(story)


def test_a_seed_that_refuses_twice_ends_with_the_reason_and_leaves_nothing() -> None:
    async def story(world: World) -> None:
        world.register()
        world.answers[SEED.session_id] = REFUSES
        world.show()
        await world.until(lambda: not world.etcd.leases)
        assert world.etcd.keys == []
        ended = [
            decode(change.key, change.value)
            for change in world.etcd.history
            if hasattr(change, "value")
        ]
        assert [record.ended for record in ended] == ["", "process ended"]

    watched(story)


def test_one_refusal_between_answers_is_none() -> None:
    async def story(world: World) -> None:
        world.register()
        world.script = [REFUSES, LISTENS] * 10
        world.show()
        await world.looks(30)
        assert world.etcd.keys == [SEED.key]

    watched(story)


def test_silence_is_tolerated_for_a_while_and_then_the_lease_is_left_to_others() -> None:
    async def story(world: World) -> None:
        lease_id = world.register()
        world.answers[SEED.session_id] = SILENT
        world.show()
        await world.until(lambda: len(world.probed) >= 4)
        assert world.etcd.renewed == [lease_id] * len(world.etcd.renewed)
        renewed = len(world.etcd.renewed)
        assert renewed <= 2
        await world.looks(3)
        assert len(world.etcd.renewed) == renewed
        assert world.etcd.keys == [SEED.key]
        world.answers[SEED.session_id] = LISTENS
        await world.until(lambda: len(world.etcd.renewed) > renewed)

    watched(story)


def test_an_etcd_that_is_away_delays_the_end_and_does_not_prevent_it() -> None:
    async def story(world: World) -> None:
        world.register()
        world.answers[SEED.session_id] = REFUSES
        world.show()
        world.etcd.available = False
        await world.until(lambda: world.etcd.refused >= 3)
        world.etcd.available = True
        await world.until(lambda: world.etcd.keys == [])
        assert world.etcd.renewed == []

    watched(story)


@pytest.mark.parametrize(
    "record",
    [
        a_record(),  # of our library
        replace(SEED, ended="withdrawn"),
        replace(SEED, kept_by="something newer"),
        replace(SEED, session_id="127.0.0.1:1", host="another machine"),
    ],
)
def test_what_is_not_for_this_gateway_to_judge_is_left_alone(record: RankRecord) -> None:
    async def story(world: World) -> None:
        world.register(record)
        world.register(replace(SEED, rank=1, session_id="marker:1"))
        world.answers[record.session_id] = REFUSES
        world.show()
        await world.looks(5)
        assert set(world.probed) == {"marker:1"}

    watched(story)


def test_a_seed_at_a_loopback_address_is_for_the_gateways_of_its_machine() -> None:
    async def story(world: World) -> None:
        world.register(replace(SEED, session_id="127.0.0.1:1", host=socket.gethostname()))
        world.show()
        await world.looks(3)

    watched(story)


def test_changes_begin_replace_and_end_the_vigil_over_a_rank() -> None:
    async def story(world: World) -> None:
        world.feed.put(Snapshot(1, (garbage(),)))
        old = world.register(replace(SEED, session_id="old:1"))
        item = world.etcd.get(SEED.key)
        assert item is not None
        world.feed.put(Batch(2, (item,)))
        await world.until(lambda: "old:1" in world.probed)
        new = world.register(replace(SEED, incarnation=OTHER_INCARNATION, session_id="new:1"))
        item = world.etcd.get(SEED.key)
        assert item is not None
        world.feed.put(Batch(3, (item,)))
        await world.until(lambda: new in world.etcd.renewed)
        world.probed.clear()
        await world.looks(5)
        assert set(world.probed) == {"new:1"}
        assert old != new
        world.feed.put(Batch(4, (deleted(SEED),)))
        world.register(replace(SEED, rank=1, session_id="marker:1"))
        item = world.etcd.get(replace(SEED, rank=1).key)
        assert item is not None
        world.feed.put(Batch(5, (item,)))
        await world.until(lambda: "marker:1" in world.probed)
        world.probed.clear()
        await world.looks(5)
        assert set(world.probed) == {"marker:1"}

    watched(story)


def test_a_snapshot_after_a_gap_ends_the_vigil_over_what_has_gone() -> None:
    async def story(world: World) -> None:
        world.register()
        world.show()
        await world.looks(2)
        world.feed.put(Snapshot(9, ()))
        world.register(replace(SEED, rank=1, session_id="marker:1"))
        item = world.etcd.get(replace(SEED, rank=1).key)
        assert item is not None
        world.feed.put(Batch(10, (item,)))
        await world.until(lambda: "marker:1" in world.probed)
        world.probed.clear()
        await world.looks(5)
        assert set(world.probed) == {"marker:1"}

    watched(story)


def test_what_etcd_refuses_for_good_ends_the_vigil_with_it() -> None:
    world = World()
    world.feed.put(EtcdRefused("no permission"))

    async def main() -> None:
        with pytest.raises(EtcdRefused, match="no permission"):
            await asyncio.wait_for(world.prober.run(), 60)
        world.prober.close()

    asyncio.run(main())
