"""Memory that outlives its process: real ranks that are killed, their keepers, and processes that
take, share or let go of what these hold.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine_registry import (
    Hold,
    RankLost,
    Registry,
    keepers_here,
    let_go,
    let_go_of_device,
)
from engine_registry.errors import InvalidField, KeeperFailed, RankConflict
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration import held
from engine_registry.registration.descriptors import DescriptorPlace
from engine_registry.registration.held import Kept, share, take
from engine_registry.registration.keeper import desk
from engine_registry.registration.keeper.passing import BEGIN
from tests.integration.conftest import Processes, events_until, line_of
from tests.integration.test_descriptors import Kept as InThisProcess
from tests.integration.test_descriptors import (
    are_handed_out,
    descriptors_of,
    expected,
    kept_by,
    run_as_other_user,
    texts,
)
from tests.support.ranks import MANIFEST, register
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

LONG_S = 600.0  # longer than any test

PROGRAM = ("-m", "tests.support.processes.leaving_memory")


@dataclass
class Rank:
    process: subprocess.Popen[str]
    place: DescriptorPlace
    keeper: int

    def do(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return line_of(self.process)

    def die(self) -> None:
        signal_and_wait(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def kept(self) -> Kept | None:
        """What its keeper says."""
        return next((one for one in keepers_here() if one.name == self.place.name), None)

    @property
    def is_held(self) -> bool:
        return (kept := self.kept) is not None and kept.held

    def die_and_be_held(self) -> Kept:
        self.die()
        wait_until(lambda: self.is_held)
        kept = self.kept
        assert kept is not None
        return kept

    def wait_for_the_end(self) -> None:
        wait_until(lambda: has_ended(self.keeper))


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


Start = Callable[..., Rank]


@pytest.fixture
def device() -> str:
    """Of this test alone: others run at the same time."""
    return f"GPU-{uuid.uuid4()}"


@pytest.fixture
def start(processes: Processes, shared_etcd: LocalEtcd, namespace: str, device: str) -> Start:
    def run(hold_s: float = LONG_S, etcd: LocalEtcd = shared_etcd, instance: str = "a") -> Rank:
        place = DescriptorPlace.new()
        where = (etcd.endpoint, namespace, place.encode().hex(), str(hold_s))
        process = processes.start(*PROGRAM, "rank", *where, device, instance)
        return Rank(process, place, int(line_of(process)))

    return run


@pytest.fixture
def own_registry(own_etcd: LocalEtcd, namespace: str) -> Iterator[Registry]:
    with Registry.connect(own_etcd.endpoint, namespace=namespace, timeout_s=60) as registry:
        yield registry


# -- a rank dies
# --------------------------------------------------------------------------------------------------


def test_the_memory_of_a_rank_that_is_killed_goes_to_the_process_that_takes_it(
    start: Start, registry: Registry, device: str
) -> None:
    rank = start()
    (record,) = registry.ranks("a")
    alive = rank.kept
    assert alive is not None
    assert (alive.key, alive.incarnation, alive.pid) == (
        "/engines/a/0",
        record.incarnation,
        rank.keeper,
    )
    assert (alive.held, alive.left_s, alive.devices) == (False, 0.0, ("host", device))
    with pytest.raises(KeeperFailed, match="the rank's process lives"):
        take(rank.place)
    with pytest.raises(KeeperFailed, match="the rank's process lives"):
        let_go(alive)
    with registry.watch("a") as watch:
        kept = rank.die_and_be_held()
        assert kept.nbytes == record.manifest.nbytes
        assert LONG_S - 60 < kept.left_s <= LONG_S
        (lost,) = [one for one in events_until(watch, is_lost) if isinstance(one, RankLost)]
        assert (lost.reason, lost.held_until) == ("process ended", kept.held_until)
    wait_until(lambda: len(registry.held("a")) == 1)
    assert [one.records for one in registry.instances()] == [()]
    (held,) = registry.held("a")
    assert (held.incarnation, held.held_until) == (record.incarnation, kept.held_until)
    assert registry.manifest(held).tensors == registry.manifest(record).tensors
    with take(rank.place) as taken:
        assert texts(rank.place, 0, 3) == expected(0, 3)
        taken.finish()
        assert not are_handed_out(rank.place)
        taken.finish()
    taken.finish()
    rank.wait_for_the_end()
    assert registry.held("a") == ()


def is_lost(event: object) -> bool:
    return isinstance(event, RankLost)


def is_held(event: object) -> bool:
    return isinstance(event, RankLost) and bool(event.held_until)


def test_nothing_is_held_for_longer_than_it_was_to_be(start: Start, registry: Registry) -> None:
    rank = start(1.0)
    with registry.watch("a") as watch:
        rank.die()
        assert any(is_held(event) for event in events_until(watch, is_lost))
    rank.wait_for_the_end()
    assert (registry.held("a"), rank.kept) == ((), None)


def test_a_process_that_takes_the_memory_late_has_what_it_got_and_nobody_else_gets_it(
    start: Start,
) -> None:
    rank = start(5.0)
    rank.die_and_be_held()
    with take(rank.place) as taken:
        rank.wait_for_the_end()
        taken.finish()


@pytest.mark.parametrize(
    "last",
    ["withdraw", "drop", "update updating", "update draining", "update loading"],
)
def test_the_memory_of_a_rank_that_has_left_or_cannot_be_read_is_not_held(
    start: Start, registry: Registry, last: str
) -> None:
    rank = start()
    rank.do(last)
    rank.die()
    rank.wait_for_the_end()
    assert (registry.held("a"), registry.ranks("a"), rank.kept) == ((), (), None)


def test_the_memory_of_a_registration_that_was_forgotten_is_not_held(
    start: Start, registry: Registry
) -> None:
    rank = start()
    rank.do("forget")
    rank.wait_for_the_end()
    assert (registry.held("a"), registry.ranks("a"), rank.kept) == ((), (), None)


def test_a_rank_that_is_ready_again_is_held(start: Start) -> None:
    rank = start()
    rank.do("update updating")
    rank.do("update ready")
    rank.die_and_be_held()
    let_go(rank.place.name)


def test_the_memory_that_was_offered_last_is_held(start: Start, registry: Registry) -> None:
    rank = start()
    other = DescriptorPlace.new()
    rank.do(f"offer {other.encode().hex()}")
    (record,) = registry.ranks("a")
    first, rank.place = rank.place, other
    kept = rank.die_and_be_held()
    assert kept.incarnation == record.incarnation
    assert not are_handed_out(first)
    with take(other):
        assert texts(other, 0, 3) == expected(0, 3, "n")
    let_go(kept)


def test_a_rank_that_becomes_another_program_leaves_its_memory(start: Start) -> None:
    rank = start()
    assert rank.process.stdin is not None
    rank.process.stdin.write("exec\n")
    rank.process.stdin.flush()
    wait_until(lambda: rank.is_held)
    let_go(rank.place.name)


def test_children_that_hold_all_of_a_dead_rank_open_change_nothing(start: Start) -> None:
    rank = start(5.0)
    child = int(rank.do("spawn"))
    try:
        rank.die_and_be_held()
        assert kept_by(child) == 3  # as it was not forked by Python
        rank.wait_for_the_end()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_keeper_that_took_the_place_of_a_dead_one_holds_the_memory(
    start: Start, registry: Registry
) -> None:
    rank = start()
    signal_and_wait(rank.keeper, signal.SIGKILL)
    wait_until(lambda: (kept := rank.kept) is not None and kept.pid != rank.keeper)
    rank.do("update ready")
    kept = rank.die_and_be_held()
    with take(rank.place):
        assert texts(rank.place, 0, 3) == expected(0, 3)
    wait_until(lambda: len(registry.held("a")) == 1)
    let_go(kept)
    wait_until(lambda: has_ended(kept.pid))


def test_a_keeper_that_is_killed_lets_go(start: Start) -> None:
    rank = start()
    rank.die_and_be_held()
    with take(rank.place) as taken:
        signal_and_wait(rank.keeper, signal.SIGKILL)
        wait_until(lambda: rank.kept is None)
        taken.finish()
    with pytest.raises(KeeperFailed, match="has ended"):
        take(rank.place)
    with pytest.raises(KeeperFailed, match="has ended"):
        let_go(rank.place.name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["idle", "updating", "offering"])
def test_whenever_a_rank_is_killed_what_is_held_is_what_its_record_says(
    processes: Processes, shared_etcd: LocalEtcd, namespace: str, registry: Registry, how: str
) -> None:
    chance = random.Random(how)
    outcomes = Counter[str]()
    for _ in range(12):
        process = processes.start(*PROGRAM, "changing", shared_etcd.endpoint, namespace, how)
        keeper = int(line_of(process))
        threading.Event().wait(chance.uniform(0.0, 0.1))
        process.kill()
        process.wait()
        wait_until(lambda: not registry.ranks("a"))
        ours = [kept for kept in keepers_here() if kept.held and kept.pid == keeper]
        if records := registry.held("a"):
            (record,), (kept,) = records, ours
            assert kept.incarnation == record.incarnation
            assert registry.manifest(record) == MANIFEST
            place = DescriptorPlace(kept.name, bytes.fromhex(record.incarnation))
            with take(place) as taken:
                assert texts(place, 0, 200) == expected(0, 200, record.incarnation)
                taken.finish()
        else:
            assert ours == []
        outcomes["held" if records else "gone"] += 1
        wait_until(lambda: has_ended(keeper))  # noqa: B023
        assert registry._etcd.count("/") == 0
    assert outcomes["held"]
    assert how != "idle" or not outcomes["gone"]


# -- etcd
# --------------------------------------------------------------------------------------------------


def test_memory_is_held_while_etcd_is_away_and_the_record_follows(
    start: Start, own_etcd: LocalEtcd, own_registry: Registry
) -> None:
    rank = start(etcd=own_etcd)
    own_etcd.pause()
    rank.die_and_be_held()
    own_etcd.resume()
    wait_until(lambda: len(own_registry.held("a")) == 1)
    assert own_registry.ranks("a") == ()
    let_go(rank.place.name)
    rank.wait_for_the_end()
    assert own_registry.held("a") == ()


def test_memory_is_let_go_in_time_though_etcd_has_gone_for_good(
    start: Start, own_etcd: LocalEtcd
) -> None:
    rank = start(8.0, own_etcd)
    own_etcd.kill()
    rank.die_and_be_held()
    wait_until(lambda: rank.kept is None)
    wait_until(lambda: kept_by(rank.keeper) == 0)


def test_a_rank_is_held_on_after_etcd_has_lost_all(
    start: Start, own_etcd: LocalEtcd, own_registry: Registry
) -> None:
    rank = start(etcd=own_etcd)
    rank.die_and_be_held()
    wait_until(lambda: len(own_registry.held("a")) == 1)
    own_etcd.kill()
    own_etcd.wipe()
    own_etcd.start()
    wait_until(lambda: len(own_registry.held("a")) == 1)
    assert own_registry._etcd.count("/holders/") == 0
    let_go(rank.place.name)


def test_a_rank_that_is_held_is_let_go_through_etcd(start: Start, registry: Registry) -> None:
    rank = start()
    rank.die_and_be_held()
    wait_until(lambda: len(registry.held("a")) == 1)
    assert registry.let_go_of_held("b") == ()
    assert registry.let_go_of_held("a", 1) == ()
    (gone,) = registry.let_go_of_held("a", 0, "we need the GPU")
    assert gone.held
    rank.wait_for_the_end()
    assert (registry.held("a"), registry.let_go_of_held("a"), rank.kept) == ((), (), None)


def test_ranks_that_live_are_left_alone(start: Start, registry: Registry) -> None:
    start()
    assert (registry.held("a"), registry.let_go_of_held("a")) == ((), ())
    assert len(registry.ranks("a")) == 1
    with pytest.raises(InvalidField):
        registry.let_go_of_held("no name")


def test_another_process_takes_the_rank_and_the_memory_is_let_go(
    start: Start, registry: Registry
) -> None:
    rank = start()
    rank.die_and_be_held()
    wait_until(lambda: len(registry.held("a")) == 1)
    with register(registry) as successor:
        rank.wait_for_the_end()
        assert registry.ranks("a") == (successor.record,)
        assert registry.held("a") == ()


def test_a_process_that_has_taken_the_memory_registers_though_its_keeper_cannot_write(
    start: Start, own_etcd: LocalEtcd, own_registry: Registry
) -> None:
    rank = start(etcd=own_etcd)
    (record,) = own_registry.ranks("a")
    own_etcd.pause()
    rank.die_and_be_held()
    signal_and_wait(rank.keeper, signal.SIGSTOP)
    own_etcd.resume()
    with pytest.raises(RankConflict):
        register(own_registry)
    with register(own_registry, replaces=record.incarnation) as adopter:
        os.kill(rank.keeper, signal.SIGCONT)
        rank.wait_for_the_end()
        assert own_registry.ranks("a") == (adopter.record,)


# -- those that take, share and let go
# --------------------------------------------------------------------------------------------------


def test_one_at_a_time_takes_memory_and_one_that_gives_up_leaves_it_to_the_next(
    start: Start,
) -> None:
    rank = start()
    rank.die_and_be_held()
    with take(rank.place):
        with pytest.raises(KeeperFailed, match=f"process {os.getpid()} is taking the memory"):
            take(rank.place)
        with pytest.raises(KeeperFailed, match="is taking the memory"):
            share(rank.place)
    with take(rank.place) as taken:  # its keeper has heard of the end of the one before
        assert texts(rank.place, 0, 3) == expected(0, 3)
        taken.finish()


def a_taker(processes: Processes, place: DescriptorPlace, how: str = "take") -> Rank:
    """Which has forked a child that lives longer."""
    process = processes.start(*PROGRAM, "taker", how, place.encode().hex())
    taker = Rank(process, place, int(line_of(process)))
    assert taker.do("") == "forked\n"
    return taker


def test_memory_is_held_on_when_the_process_that_takes_it_is_killed(
    start: Start, processes: Processes
) -> None:
    rank = start()
    rank.die_and_be_held()
    taker = a_taker(processes, rank.place)
    with pytest.raises(KeeperFailed, match=f"process {taker.keeper} is taking the memory"):
        take(rank.place)
    taker.die()

    def can_be_taken() -> bool:
        try:
            take(rank.place).finish()
        except KeeperFailed:
            return False
        return True

    wait_until(can_be_taken)
    rank.wait_for_the_end()


def test_sharers_are_counted_until_their_end(start: Start, processes: Processes) -> None:
    rank = start()

    def sharers() -> int:
        kept = rank.kept
        assert kept is not None
        return kept.sharers

    with share(rank.place), share(rank.place):
        assert sharers() == 2
        other = a_taker(processes, rank.place, "share")
        assert sharers() == 3
        rank.die_and_be_held()
        assert sharers() == 3
        other.die()
        wait_until(lambda: sharers() == 2)
    wait_until(lambda: sharers() == 0)
    with share(rank.place):
        assert sharers() == 1
        let_go(rank.place.name)
    rank.wait_for_the_end()


def test_memory_can_be_let_go_though_a_process_takes_it_and_stops(
    start: Start, processes: Processes
) -> None:
    rank = start()
    kept = rank.die_and_be_held()
    taker = a_taker(processes, rank.place)
    signal_and_wait(taker.process.pid, signal.SIGSTOP)
    let_go(kept)
    rank.wait_for_the_end()


def test_all_that_is_held_on_a_device_is_let_go(start: Start, device: str) -> None:
    ours, alive = start(), start(instance="b")
    ours.die_and_be_held()
    assert let_go_of_device("GPU-of-nobody", timeout_s=60) == 0
    assert ours.is_held
    assert let_go_of_device(device, timeout_s=60) == 16
    assert ours.kept is None
    assert let_go_of_device(device, timeout_s=60) == 0
    assert alive.kept is not None
    ours.wait_for_the_end()


def test_a_keeper_that_does_not_answer_may_hold_memory(
    start: Start, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "_LOOK_S", 0.2)
    rank = start()
    rank.die_and_be_held()
    signal_and_wait(rank.keeper, signal.SIGSTOP)
    try:
        assert rank.kept is None
        with pytest.raises(KeeperFailed, match="keepers of this user do not answer"):
            let_go_of_device(device, timeout_s=0.5)
    finally:
        os.kill(rank.keeper, signal.SIGCONT)
    assert let_go_of_device(device, timeout_s=60) == 16


# -- a desk in this process
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(stack: ExitStack) -> InThisProcess:
    return InThisProcess(stack)


def test_what_is_no_request_ends_the_connection(kept: InThisProcess) -> None:
    kept.rank.close()
    assert kept.desk.hold(kept.place.name, LONG_S)
    before = descriptors_of(os.getpid())
    secret = kept.place.secret
    for packet in (
        held.TAKE + bytes(16),
        held.TAKE,
        held.TAKE + secret + b"?",
        held.SHARE + bytes(16),
        held.SHARE + secret[:-1],
        held.FINISH,
        held.FINISH + secret,
        held.LOOK + b"?",
        held.LET_GO + secret,
        b"ERX1",
        b"+",
        bytes(1 << 16),
    ):
        assert kept.answer(packet) == b""
    assert texts(kept.place, 0, 3) == expected(0, 3)
    wait_until(lambda: descriptors_of(os.getpid()) == before)


def test_a_connection_takes_fetches_and_finishes(kept: InThisProcess) -> None:
    kept.rank.close()
    assert kept.desk.hold(kept.place.name, LONG_S)
    with closing(kept.connect()) as taker:
        for packet in (held.TAKE + kept.place.secret, held.TAKE + kept.place.secret, held.FINISH):
            taker.send(packet)
            assert taker.recv(64) == b"+"
        assert taker.recv(64) == b""
    kept.given.close()
    assert kept_by(os.getpid()) == 0


def test_only_what_has_all_been_handed_over_is_held(kept: InThisProcess) -> None:
    assert kept.desk.hold(bytes(16), LONG_S) is None
    assert kept.desk.hold(kept.place.name, 0.0) is None
    assert kept.desk.hold(kept.place.name, LONG_S) is not None


@pytest.mark.parametrize("half", ["", "+"], ids=["of another", "of some"])
def test_memory_that_was_on_its_way_when_the_rank_died_is_not_held(
    kept: InThisProcess, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_DEAD_S", 0.1)
    place = DescriptorPlace.new()
    kept.rank.send(BEGIN.pack(b"ERD1", place.encode(), 4))
    if half:
        assert kept.rank.recv(64) == b"+"
        kept.given.send(kept.rank, 0, 3)
    kept.rank.close()
    assert kept.desk.hold(kept.place.name, LONG_S) is None
    assert kept.desk.hold(place.name, LONG_S) is None
    kept.given.close()
    wait_until(lambda: kept_by(os.getpid()) == 0)


def test_the_time_counts_from_the_death(kept: InThisProcess) -> None:
    kept.rank.close()
    threading.Event().wait(0.3)
    assert kept.desk.hold(kept.place.name, 0.2) is None
    until = kept.desk.hold(kept.place.name, LONG_S)
    assert until is not None


def test_too_many_do_not_share(kept: InThisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_registry.registration.keeper.stock._MOST_SHARERS", 2)
    with share(kept.place), share(kept.place):
        with pytest.raises(KeeperFailed, match="2 processes share the memory already"):
            share(kept.place)
    share(kept.place).close()


def test_those_that_take_or_share_stay_and_keep_nobody_out(
    kept: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_MOST_READERS", 1)
    monkeypatch.setattr(desk, "_READER_S", 0.1)
    kept.rank.close()
    assert kept.desk.hold(kept.place.name, LONG_S)
    with share(kept.place), share(kept.place), take(kept.place) as taken:
        with closing(kept.connect()) as silent:
            assert silent.recv(1) == b""
        assert texts(kept.place, 0, 3) == expected(0, 3)
        taken.finish()
    with pytest.raises(KeeperFailed):
        take(kept.place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_keepers_of_others_are_not_asked(kept: InThisProcess) -> None:
    with run_as_other_user("serves") as keeper:
        assert keeper.stdout is not None
        place = DescriptorPlace.decode(bytes.fromhex(keeper.stdout.readline()))
        found = {one.name for one in keepers_here()}
        assert place.name not in found
        for call in (take, share, lambda place: let_go(place.name)):
            with pytest.raises(KeeperFailed, match="a process of another user"):
                call(place)
        keeper.communicate(timeout=60)


@pytest.mark.parametrize(
    "answer", [b"", b"-", b"+", b"+[]", b"+{}", b"+\xff", b'+{"key": 1}', b"nonsense"]
)
def test_a_socket_at_which_something_else_answers_is_no_keeper(answer: bytes) -> None:
    place = DescriptorPlace.new()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(place.address)
        listener.listen()

        def answers() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                if answer:
                    connection.send(answer)

        thread = threading.Thread(target=answers)
        thread.start()
        assert place.name not in {one.name for one in keepers_here()}
        thread.join(60)


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": -1.0},
        {"seconds": 1e6},
        {"seconds": "1"},
        {"seconds": 1.0, "devices": "host"},
        {"seconds": 1.0, "devices": ("a\n",)},
        {"seconds": 1.0, "devices": (1,)},
    ],
)
def test_a_hold_that_is_not_valid_is_an_error(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidField, match=r"hold\."):
        Hold(**fields)  # type: ignore[arg-type]
