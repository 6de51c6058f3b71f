"""Descriptors that keepers hand out: real keepers, whose ranks are stopped and killed, and readers
that ask for what is not theirs.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest

from engine_registry import Manifest, Registration, Registry, new_incarnation
from engine_registry.errors import InvalidField, KeeperFailed, RankConflict
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.descriptors import (
    MAGIC,
    REQUEST,
    DescriptorPlace,
    Descriptors,
    fetch,
)
from engine_registry.registration.keeper import desk as keeping
from engine_registry.registration.keeper.desk import Desk
from engine_registry.registration.keeper.passing import pair, pass_on
from tests.integration.conftest import Processes
from tests.support.keepers import pid_of_keeper
from tests.support.ranks import MANIFEST, register
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until


def memory(text: bytes) -> int:
    fd = os.memfd_create("a test's")
    os.write(fd, text)
    return fd


def some(count: int, name: str = "m", place: DescriptorPlace | None = None) -> Descriptors:
    """Of memory, each with its number in it."""
    return Descriptors(
        place or DescriptorPlace.new(),
        [memory(f"{name}{number}".encode()) for number in range(count)],
    )


def texts(place: DescriptorPlace, first: int, count: int) -> list[bytes]:
    """What lies in the memory whose descriptors are handed out there."""
    found = fetch(place, first, count)
    try:
        assert not any(map(os.get_inheritable, found))
        return [os.pread(fd, 64, 0) for fd in found]
    finally:
        for fd in found:
            os.close(fd)


def expected(first: int, count: int, name: str = "m") -> list[bytes]:
    return [f"{name}{number}".encode() for number in range(first, first + count)]


def are_handed_out(place: DescriptorPlace) -> bool:
    try:
        texts(place, 0, 1)
    except KeeperFailed:
        return False
    return True


def descriptors_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def kept_by(pid: int) -> int:
    """How many of them are memory of these tests."""
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            found += "memfd:a test's" in os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


# -- ranks and keepers
# --------------------------------------------------------------------------------------------------


def test_a_keeper_hands_out_what_its_rank_has_given_it_until_the_rank_leaves(
    registry: Registry,
) -> None:
    given = some(3)
    with register(registry, descriptors=given) as registration:
        assert texts(given.place, 0, 3) == expected(0, 3)
        assert texts(given.place, 1, 1) == expected(1, 1)
        assert kept_by(pid_of_keeper(registration)) == 3
    assert not are_handed_out(given.place)
    assert kept_by(os.getpid()) == 0


def test_a_thousand_descriptors_are_handed_out(registry: Registry) -> None:
    given = some(1000)
    with register(registry, descriptors=given):
        assert texts(given.place, 0, 1000) == expected(0, 1000)
        assert texts(given.place, 871, 129) == expected(871, 129)


def test_a_rank_without_descriptors_has_a_keeper_that_hands_out_nothing(
    registry: Registry,
) -> None:
    with register(registry) as registration:
        assert kept_by(pid_of_keeper(registration)) == 0


def test_a_keeper_that_takes_the_place_of_a_dead_one_hands_out_the_same(
    registry: Registry,
) -> None:
    given = some(300)
    with register(registry, descriptors=given) as registration:
        for number in range(1, 3):
            signal_and_wait(pid_of_keeper(registration), signal.SIGKILL)
            registration.update(version=number)
            wait_until(lambda: are_handed_out(given.place))
            assert texts(given.place, 0, 300) == expected(0, 300)


def test_another_manifest_has_other_descriptors_or_none(registry: Registry) -> None:
    def offer(descriptors: Descriptors | None) -> None:
        registration.offer(
            MANIFEST,
            incarnation=new_incarnation(),
            header_addr=8192,
            version=1,
            content="c0" * 16,
            device="cpu",
            descriptors=descriptors,
        )

    first = some(2, "a")
    with register(registry, descriptors=first) as registration:
        keeper = pid_of_keeper(registration)
        second = some(200, "b")
        offer(second)
        assert not are_handed_out(first.place)
        assert texts(second.place, 0, 200) == expected(0, 200, "b")
        assert kept_by(os.getpid()) == kept_by(keeper) == 200
        registration.update(version=2)  # of the same manifest
        assert are_handed_out(second.place)
        registration.keep_memory_back()
        assert not are_handed_out(second.place)
        assert kept_by(os.getpid()) == kept_by(keeper) == 0
        registration.keep_memory_back()
        offer(some(3, "d"))
        assert kept_by(os.getpid()) == kept_by(keeper) == 3
        offer(None)
        assert kept_by(os.getpid()) == kept_by(keeper) == 0
        third = some(1, "c")
        offer(third)
        assert texts(third.place, 0, 1) == expected(0, 1, "c")
        assert pid_of_keeper(registration) == keeper


def test_a_keeper_that_hangs_when_descriptors_change_is_replaced_by_one_that_has_them(
    registry: Registry,
) -> None:
    first, second = some(2, "a"), some(200, "b")
    with register(registry, descriptors=first) as registration:
        hung = pid_of_keeper(registration)
        signal_and_wait(hung, signal.SIGSTOP)
        registration.offer(
            MANIFEST,
            incarnation=new_incarnation(),
            header_addr=8192,
            version=1,
            content="c0" * 16,
            device="cpu",
            descriptors=second,
        )
        wait_until(lambda: are_handed_out(second.place))
        assert texts(second.place, 0, 200) == expected(0, 200, "b")
        assert pid_of_keeper(registration) != hung
        wait_until(lambda: [record.version for record in registry.ranks("a")] == [1])


SMALL_KEEPER = """
import fcntl, os, resource, sys
from engine_registry import Registry
from engine_registry.errors import KeeperFailed
from engine_registry.registration.descriptors import DescriptorPlace, Descriptors
from tests.support.ranks import register

with Registry.connect(sys.argv[1], namespace=sys.argv[2], timeout_s=60) as registry:
    fds = [fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 1000) for _ in range(300)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    try:
        register(registry, descriptors=Descriptors(DescriptorPlace.new(), fds))
    except KeeperFailed as exc:
        print(exc)
    print(registry.instances(), sum(os.path.exists(f"/proc/self/fd/{fd}") for fd in fds))
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        print("no process is left")
"""


def test_where_the_keeper_cannot_hold_as_many_the_rank_is_not_registered(
    shared_etcd: LocalEtcd, namespace: str
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SMALL_KEEPER, shared_etcd.endpoint, namespace],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    said, left, processes = ran.stdout.splitlines()
    assert said.startswith("the keeper cannot hold the descriptors of the memory: no file")
    assert left == "() 0"
    assert processes == "no process is left"


def test_descriptors_of_a_registration_that_fails_are_closed(registry: Registry) -> None:
    with register(registry) as registration:
        for call in (
            lambda: register(registry, descriptors=some(2)),
            lambda: register(registry, instance="not valid", descriptors=some(2)),
            lambda: register(registry, ttl_s=-1.0, descriptors=some(2)),
            lambda: offer_invalid(registration, some(2)),
        ):
            with pytest.raises((InvalidField, RankConflict)):
                call()
            assert kept_by(os.getpid()) == 0
    with pytest.raises(Exception, match="is closed"):
        offer_invalid(registration, some(2))
    assert kept_by(os.getpid()) == 0


def offer_invalid(registration: Registration, descriptors: Descriptors) -> None:
    registration.offer(
        Manifest((), ()),
        incarnation="?",
        header_addr=-1,
        version=-1,
        content="",
        device="",
        descriptors=descriptors,
    )


RANK = """
import os, sys
from engine_registry import Registry
from engine_registry.registration.descriptors import DescriptorPlace
from tests.integration.test_descriptors import some
from tests.support.ranks import register

place = DescriptorPlace.decode(bytes.fromhex(sys.argv[3]))
with Registry.connect(sys.argv[1], namespace=sys.argv[2], timeout_s=60) as registry:
    with register(registry, descriptors=some(3, place=place)) as registration:
        print(registration.keeper_pid, flush=True)
        if sys.stdin.readline() == "fork\\n":
            if pid := os.fork():
                print(pid, flush=True)
                sys.stdin.readline()
            else:
                os.close(0)
                os.read(os.pipe()[0], 1)
"""


@contextmanager
def rank(
    processes: Processes, etcd: LocalEtcd, place: DescriptorPlace
) -> Iterator[tuple[int, int]]:
    """The pids of a rank, and of its keeper."""
    process = processes.start_anew("-c", RANK, etcd.endpoint, "/x", place.encode().hex())
    assert process.stdout is not None
    yield process.pid, int(process.stdout.readline())


def test_descriptors_can_be_had_while_the_rank_is_stopped_and_while_its_end_is_written(
    processes: Processes, own_etcd: LocalEtcd
) -> None:
    place = DescriptorPlace.new()
    with rank(processes, own_etcd, place) as (pid, keeper):
        signal_and_wait(pid, signal.SIGSTOP)
        assert texts(place, 0, 3) == expected(0, 3)
        own_etcd.pause()
        signal_and_wait(pid, signal.SIGKILL)
        assert texts(place, 0, 3) == expected(0, 3)
        own_etcd.resume()
        wait_until(lambda: not os.path.exists(f"/proc/{keeper}"))
        assert not are_handed_out(place)


def test_a_forked_child_of_a_rank_keeps_none_open(
    processes: Processes, own_etcd: LocalEtcd
) -> None:
    process = processes.start_anew(
        "-c", RANK, own_etcd.endpoint, "/x", DescriptorPlace.new().encode().hex()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.write("fork\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    try:
        assert kept_by(process.pid) == 3
        wait_until(lambda: kept_by(child) == 0)
    finally:
        os.kill(child, signal.SIGKILL)


# -- a keeper's desk, and its readers
# --------------------------------------------------------------------------------------------------


class Kept:
    """What a keeper hands out, in this process."""

    def __init__(self, stack: ExitStack, count: int = 3) -> None:
        self.rank, theirs = pair()
        stack.callback(theirs.close)
        stack.enter_context(self.rank)
        self.desk = Desk(theirs)
        self.desk.start()
        self.given = stack.enter_context(some(count))
        self.place = self.given.place
        assert pass_on(self.rank, self.given, 60.0, 1.0)
        stack.callback(self.desk.let_go)

    def connect(self) -> socket.socket:
        reader = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader.settimeout(60)
        reader.connect(self.place.address)
        return reader

    def answer(self, packet: bytes) -> bytes:
        with closing(self.connect()) as reader:
            reader.send(packet)
            with suppress(ConnectionResetError):
                return reader.recv(64)
            return b""

    def request(self, first: int = 0, count: int = 1, **other: bytes) -> bytes:
        secret = other.get("secret", self.place.secret)
        return REQUEST.pack(other.get("magic", MAGIC), secret, first, count)


@pytest.fixture
def kept() -> Iterator[Kept]:
    gc.collect()  # descriptors are counted, and garbage of other tests may have some
    with ExitStack() as stack:
        yield Kept(stack)


BAD: dict[str, Callable[[Kept], bytes]] = {
    "another secret": lambda kept: kept.request(secret=bytes(16)),
    "another protocol": lambda kept: kept.request(magic=b"GET "),
    "a number that there is not": lambda kept: kept.request(3),
    "more than there are": lambda kept: kept.request(1, 3),
    "numbers that overflow": lambda kept: kept.request(2**32 - 1, 1),
    "none": lambda kept: kept.request(0, 0),
    "too many at once": lambda kept: kept.request(0, 129),
    "too little": lambda kept: kept.request()[:-1],
    "too much": lambda kept: kept.request() + b"\0",
    "much too much": lambda kept: kept.request() + bytes(1 << 16),
    "one byte": lambda kept: b"+",
}


@pytest.mark.parametrize("packet", BAD.values(), ids=BAD)
def test_a_request_that_is_none_gets_nothing_and_costs_nothing(
    kept: Kept, packet: Callable[[Kept], bytes]
) -> None:
    before = descriptors_of(os.getpid())
    for _ in range(3):
        assert kept.answer(packet(kept)) == b""
    assert texts(kept.place, 0, 3) == expected(0, 3)
    wait_until(lambda: descriptors_of(os.getpid()) == before)


def test_a_place_whose_secret_is_wrong_is_an_error_that_says_so(kept: Kept) -> None:
    before = descriptors_of(os.getpid())
    for place, said in (
        (DescriptorPlace(kept.place.name, bytes(16)), "does not hand out these descriptors"),
        (
            DescriptorPlace(bytes(16), kept.place.secret),
            "the keeper that hands out the memory has ended",
        ),
    ):
        with pytest.raises(KeeperFailed, match=said):
            fetch(place, 0, 1)
    with pytest.raises(KeeperFailed, match="does not hand out these descriptors"):
        fetch(kept.place, 0, 4)
    wait_until(lambda: descriptors_of(os.getpid()) == before)


def test_descriptors_that_a_reader_sends_are_not_kept(kept: Kept) -> None:
    sent = memory(b"hostile")
    with closing(kept.connect()) as reader:
        socket.send_fds(reader, [kept.request()], [sent])
        assert reader.recv(64) == b"+"
    os.close(sent)
    wait_until(lambda: kept_by(os.getpid()) == 6)  # ours, and the keeper's


OTHER_USER = """
import os, sys
from contextlib import ExitStack
from engine_registry.errors import KeeperFailed
from engine_registry.registration.descriptors import DescriptorPlace, fetch
from tests.integration.test_descriptors import Kept

os.setgid(65534)
os.setuid(65534)
with ExitStack() as stack:
    if sys.argv[1] == "serves":
        print(Kept(stack).place.encode().hex(), flush=True)
        sys.stdin.read()
    else:
        try:
            print(fetch(DescriptorPlace.decode(bytes.fromhex(sys.argv[1])), 0, 1))
        except KeeperFailed as exc:
            print(exc)
"""


def run_as_other_user(argument: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OTHER_USER, argument]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_gets_nothing(kept: Kept) -> None:
    with run_as_other_user(kept.place.encode().hex()) as reader:
        said, _ = reader.communicate(timeout=60)
    assert "another user" in said
    assert texts(kept.place, 0, 1) == expected(0, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_is_another_user_and_trusts_no_keeper_of_one() -> None:
    with run_as_other_user("serves") as keeper:
        assert keeper.stdout is not None
        place = DescriptorPlace.decode(bytes.fromhex(keeper.stdout.readline()))
        with pytest.raises(KeeperFailed, match="a process of another user is where a keeper"):
            fetch(place, 0, 1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as reader:
            reader.settimeout(60)
            reader.connect(place.address)
            with suppress(ConnectionResetError, BrokenPipeError):
                reader.send(REQUEST.pack(MAGIC, place.secret, 0, 1))
                assert reader.recv(64) == b""
        keeper.communicate(timeout=60)


def test_readers_that_say_nothing_are_sent_away_and_those_that_wait_come_next(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_READER_S", 0.2)
    with ExitStack() as stack:
        silent = [stack.enter_context(kept.connect()) for _ in range(keeping._MOST_READERS + 5)]
        assert texts(kept.place, 0, 3) == expected(0, 3)
        for reader in silent:
            assert reader.recv(1) == b""


def test_a_reader_that_takes_no_answer_holds_up_nobody(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_READER_S", 0.5)
    with closing(kept.connect()) as reader:
        reader.setblocking(False)
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            for _ in range(10_000):
                reader.send(kept.request(0, 3))
        assert texts(kept.place, 0, 3) == expected(0, 3)
        reader.settimeout(60)
        with suppress(ConnectionResetError):
            while reader.recv(64):
                pass


def test_many_readers_at_once_each_get_theirs(kept: Kept) -> None:
    found: list[list[bytes]] = []
    readers = [
        threading.Thread(target=lambda: found.append(texts(kept.place, 0, 3))) for _ in range(100)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert found == [expected(0, 3)] * 100


def test_what_is_let_go_is_closed_and_what_comes_next_is_handed_out(kept: Kept) -> None:
    kept.desk.let_go()
    wait_until(lambda: not are_handed_out(kept.place))
    wait_until(lambda: kept_by(os.getpid()) == 3)  # our own
    with some(150, "n") as others:
        assert pass_on(kept.rank, others, 60.0, 1.0)
        assert texts(others.place, 0, 150) == expected(0, 150, "n")


def test_descriptors_that_may_not_be_on_their_way_now_are_sent_later(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts those of all processes of a user."""
    send, refused = Descriptors.send, iter(range(3))

    def busy(given: Descriptors, to: socket.socket, first: int, count: int) -> None:
        if next(refused, None) is not None:
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
        send(given, to, first, count)

    monkeypatch.setattr(Descriptors, "send", busy)
    with some(150, "n") as others:
        assert pass_on(kept.rank, others, 60.0, 1.0)
        assert texts(others.place, 0, 150) == expected(0, 150, "n")
        refused = iter(range(1000))
        with pytest.raises(KeeperFailed, match="cannot be sent to the keeper"):
            pass_on(kept.rank, others, 0.02, 1.0)


def test_what_a_rank_has_left_is_closed_after_a_while(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keeper may live for minutes, while etcd is away."""
    monkeypatch.setattr(keeping, "_DEAD_S", 0.5)
    kept.given.close()
    kept.rank.close()
    wait_until(lambda: not are_handed_out(kept.place))
    wait_until(lambda: kept_by(os.getpid()) == 0)


def test_a_keeper_that_answers_nothing_is_silent_for_so_long() -> None:
    rank, keeper = pair()
    with rank, keeper, some(1) as given:
        assert not pass_on(rank, given, 0.02, 0.01)
        keeper.close()
        assert pass_on(rank, given, 60.0, 1.0)  # it has ended, as others find out


# -- limits
# --------------------------------------------------------------------------------------------------


FEW = """
import os, resource, sys
from tests.integration.test_descriptors import ExitStack, Kept, some
from engine_registry.errors import KeeperFailed
from engine_registry.registration.descriptors import fetch
from engine_registry.registration.keeper.passing import pass_on

with ExitStack() as stack:
    kept = Kept(stack, 1)
    given = stack.enter_context(some(200))
    left = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (left + 100, left + 100))
    try:
        pass_on(kept.rank, given, 60.0, 1.0)
    except KeeperFailed as exc:
        print(exc)
    print(len(os.listdir("/proc/self/fd")) - left)
    with some(40) as fewer:
        assert pass_on(kept.rank, fewer, 60.0, 1.0)
        try:
            fetch(fewer.place, 0, 40)
        except KeeperFailed as exc:
            print(exc)
        for fd in fetch(fewer.place, 0, 5):
            os.close(fd)
"""


def test_where_no_more_descriptors_can_be_had_the_error_says_so_once_and_none_is_left() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FEW], capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr
    kept, left, fetched = ran.stdout.splitlines()
    assert kept.startswith(
        "the keeper cannot hold the descriptors of the memory: no file descriptors are left (limit "
    )
    assert "raise the limit of descriptors (ulimit -Hn)" in kept
    assert int(left) <= 0
    assert fetched.startswith("the memory cannot be had from its keeper: no file descriptors are")


def test_a_keeper_takes_as_many_as_its_hard_limit_lets_it(
    registry: Registry, product_keepers: None
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    given = some(300)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors_of(os.getpid()) + 100, hard))
    try:
        with register(registry, descriptors=given):
            assert texts(given.place, 250, 50) == expected(250, 50)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
