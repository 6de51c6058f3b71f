"""Ranks that several processes want, beside evictions, lost leases, dead and stopped keepers and
restarts of etcd.

Every registration has a real keeper. The changes of each key are recorded from the first
revision on and checked afterwards: no two incarnations hold one rank, nobody takes it from a holder
that has not ended, and who was evicted stays away.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import pytest

from engine_registry import Registration, RegistrationState, Registry
from engine_registry.errors import EtcdError, InstanceMismatch, RankConflict, RegistrationLost
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.config import EtcdConfig, parse_endpoints
from engine_registry.etcd.follow import Follower
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.keys import record_key
from engine_registry.schema.keyvalue import Change, Put, Snapshot
from tests.support.history import evictions, faults
from tests.support.ranks import register
from tests.support.waiting import wait_until

RANKS = 2
CONTENDERS = 2  # for each
TTL_S = 2.0
LASTS_S = 20.0


class Recorder:
    """All changes of an etcd, in order."""

    def __init__(self, etcd: Etcd) -> None:
        self.changes: list[Change] = []
        self._follower = Follower(etcd, "/")
        self._thread = threading.Thread(target=self._record)
        self._thread.start()

    def _record(self) -> None:
        for update in self._follower:
            self.changes += update.items if isinstance(update, Snapshot) else update.changes

    def wait_for(self, revision: int) -> None:
        wait_until(lambda: bool(self.changes) and self.changes[-1].mod_revision >= revision)

    def stop(self) -> None:
        self._follower.stop()
        self._thread.join(60)


class Contender:
    """Registers for one rank again and again, changes the record, and leaves, or waits until it is
    made to.
    """

    def __init__(
        self, registry: Registry, rank: int, chance: random.Random, over: threading.Event
    ) -> None:
        self._registry = registry
        self._rank = rank
        self._chance = chance
        self._over = over
        self.handles: list[Registration] = []

    def run(self) -> None:
        # Some rests are longer than a keeper takes to find out that it was evicted, so that it
        # could take the rank back.
        while not self._over.wait(self._chance.choice([0.05, 3.0])):
            try:
                registration = register(
                    self._registry, rank=self._rank, world_size=RANKS, ttl_s=TTL_S
                )
            except (RankConflict, InstanceMismatch, EtcdError):
                continue
            self.handles.append(registration)
            self._hold(registration)

    def _hold(self, registration: Registration) -> None:
        stays = self._chance.random() < 0.5
        changes = self._chance.randint(0, 8)
        with suppress(RegistrationLost):
            while not self._over.wait(self._chance.uniform(0.0, 0.3)) and (stays or changes):
                changes -= 1
                registration.update(version=registration.record.version + 1)
            if self._over.is_set():
                return
        registration.withdraw()


class Nemesis:
    """Does one thing after the other to ranks, keepers, leases and etcd."""

    def __init__(
        self, etcd: Etcd, server: LocalEtcd, registry: Registry, chance: random.Random
    ) -> None:
        self._etcd = etcd
        self._server = server
        self._registry = registry
        self._chance = chance
        self._stopped: list[int] = []
        self.done: list[str] = []

    def act(self, keepers: list[int]) -> None:
        deeds = [
            self.evict,
            self.evict,
            self.end_lease,
            self.kill,
            self.stop,
            self.go_on,
            self.restart,
        ]
        deed = self._chance.choice(deeds)
        with suppress(EtcdError, OSError, IndexError):  # nobody is there, or is any more
            deed(keepers)
            self.done.append(deed.__name__)

    def evict(self, _: list[int]) -> None:
        self._registry.evict(self._chance.choice(self._registry.ranks("a")))

    def end_lease(self, _: list[int]) -> None:
        """As when it expires, or an operator revokes it."""
        self._etcd.revoke(self._chance.choice(self._etcd.snapshot("/engines/").items).lease_id)

    def kill(self, keepers: list[int]) -> None:
        os.kill(self._chance.choice(keepers), signal.SIGKILL)

    def stop(self, keepers: list[int]) -> None:
        pid = self._chance.choice(keepers)
        os.kill(pid, signal.SIGSTOP)
        self._stopped.append(pid)

    def go_on(self, _: list[int]) -> None:
        for pid in self._stopped:
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()

    def restart(self, _: list[int]) -> None:
        self._server.kill()
        self._server.start()


@pytest.fixture
def server() -> Iterator[LocalEtcd]:
    with LocalEtcd() as server:
        yield server


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.slow
def test_no_two_hold_one_rank_and_an_evicted_one_stays_away(server: LocalEtcd, seed: int) -> None:
    chance = random.Random(seed)
    over = threading.Event()
    with ExitStack() as stack:
        etcd = stack.enter_context(
            closing(Etcd(EtcdConfig(parse_endpoints(server.endpoint), timeout_s=20.0)))
        )
        recorder = Recorder(etcd.sibling())
        stack.callback(recorder.stop)
        registry = stack.enter_context(Registry.connect(server.endpoint, timeout_s=2.0))
        contenders = [
            Contender(registry, rank, random.Random(f"{seed} {rank} {number}"), over)
            for rank in range(RANKS)
            for number in range(CONTENDERS)
        ]

        def handles() -> list[Registration]:
            return [each for contender in contenders for each in list(contender.handles)]

        nemesis = Nemesis(etcd, server, registry, chance)
        stack.callback(nemesis.go_on, [])
        pool = stack.enter_context(ThreadPoolExecutor(len(contenders)))
        stack.callback(over.set)  # before the pool waits for its threads, also when a deed fails
        running = [pool.submit(contender.run) for contender in contenders]
        end = time.monotonic() + LASTS_S
        while time.monotonic() < end:
            nemesis.act([pid for handle in handles() if (pid := handle.keeper_pid)])
            time.sleep(chance.uniform(0.0, 0.7))
        nemesis.go_on([])
        over.set()
        for run in running:
            run.result(60)
        left = [handle for handle in handles() if handle.state is not RegistrationState.CLOSED]
        wait_until(lambda: settled(registry, left))
        for handle in left:
            handle.withdraw()
        wait_until(lambda: not registry.ranks("a"))
        recorder.wait_for(etcd.commit([], [Put("/the-end", b"", 0)]))
    for rank in range(RANKS):
        assert faults(recorder.changes, record_key("a", rank)) == [], nemesis.done
    assert len(handles()) > RANKS  # some have followed others
    for handle in handles():
        if (
            handle.record.incarnation in evictions(recorder.changes, handle.record.key)
            and not handle.withdrawn
        ):
            assert isinstance(handle.lost, RegistrationLost), nemesis.done


def settled(registry: Registry, handles: list[Registration]) -> bool:
    """Whether those who believe that they hold a rank are those who do, each in the version that it
    wants.
    """
    believe = [handle.record for handle in handles if handle.state is RegistrationState.REGISTERED]
    undecided = any(handle.state is RegistrationState.SUSPENDED for handle in handles)
    return not undecided and tuple(
        sorted(believe, key=lambda record: record.rank)
    ) == registry.ranks("a")
