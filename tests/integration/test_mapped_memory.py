"""Memory of other processes that cuda_ipc has mapped: it is let go when they have ended or taken it
back, and nothing of threads and connections stays. The host's memory stands for that of GPUs.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from engine_loader import CudaIpcEngine
from engine_loader.engines import dial
from engine_loader.engines.base import peer_of, read
from engine_loader.engines.cuda_ipc import link, sources
from engine_loader.errors import EngineUnavailable, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_loader.sharing.pieces import Pieces
from engine_registry import Region
from engine_registry.schema.manifest import Export
from tests.support.forkserver import ForkServer, Program
from tests.support.host_gpus import HostGpus
from tests.support.processes.served import content, export_of
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

NBYTES = 1 << 14


class Served:
    """A process that offers bytes of a known content."""

    def __init__(self, process: Program) -> None:
        self.process = process
        self.session_id, self.addr, *exports = self._say().split()
        self.exports = tuple(map(export_of, exports))

    def _say(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def offer_anew(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        assert self._say() == "again\n"

    def kill(self) -> None:
        signal_and_wait(self.process.pid, signal.SIGKILL)


class Reader:
    """An engine, and memory that it reads into."""

    def __init__(self) -> None:
        self.gpus = HostGpus()
        self.engine = CudaIpcEngine(gpus=self.gpus)
        self._memory = ctypes.create_string_buffer(NBYTES)
        self.addr = ctypes.addressof(self._memory)
        self.engine.lend(Region(self.addr, NBYTES))

    def op(self, source: Served) -> ReadOp:
        return ReadOp("a/0", int(source.addr), self.addr, NBYTES)

    def connect(self, source: Served) -> None:
        self.engine.connect(source.session_id, source.exports)

    def is_connected(self, source: Served) -> bool:
        return self.engine._sources.is_connected(source.session_id)

    def read(self, source: Served) -> bytes:
        self._memory.raw = bytes(NBYTES)
        self.connect(source)
        read(self.engine, source.session_id, self.op(source))
        return self._memory.raw


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the moments in which somebody may read on."""
    monkeypatch.setattr(sources, "LET_GO_S", 0.0)
    monkeypatch.setattr(sources, "_LOOK_S", 0.01)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended stays mapped, as long as a test may last."""
    monkeypatch.setattr(sources, "LET_GO_S", 1000.0)


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with closing(ForkServer(["engine_loader", "torch"])) as server:
        yield server


@pytest.fixture(params=["by handles", "by descriptors", "of an arena"])
def serve(
    request: pytest.FixtureRequest, fork_server: ForkServer
) -> Iterator[Callable[[], Served]]:
    where = {"by descriptors": ["pieces"], "of an arena": ["arena"]}.get(request.param, [])
    with ExitStack() as stack:

        def start() -> Served:
            args = ["-m", "tests.support.processes.served", str(NBYTES), "host gpus", *where]
            process = stack.enter_context(fork_server.start(args, Path.cwd(), os.environ))
            stack.callback(process.kill)
            return Served(process)

        yield start


@pytest.fixture
def source(serve: Callable[[], Served]) -> Served:
    return serve()


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    with reader.engine:
        yield reader


def descriptors() -> set[str]:
    """What they are of; those of memory and connections have numbers of their own."""
    found = set()
    for each in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{each}"))
        except OSError:  # the one of this listing
            continue
    return found


def cannot_be_met(reader: Reader, source: Served) -> bool:
    try:
        reader.connect(source)
    except ReadFailed as exc:
        return f"cannot read from {source.session_id}" in str(exc)
    return False


# -- sources that end
# --------------------------------------------------------------------------------------------------


def test_memory_of_a_process_that_was_killed_is_let_go(reader: Reader, source: Served) -> None:
    assert reader.read(source) == content(NBYTES)
    assert reader.gpus.opened == 1
    source.kill()
    wait_until(lambda: reader.gpus.opened == 0)
    wait_until(lambda: cannot_be_met(reader, source))  # its keeper may live a moment longer
    wait_until(lambda: reader.gpus.opened == 0)


def test_what_is_mapped_is_read_on_after_the_process_was_killed(
    reader: Reader, source: Served, late: None
) -> None:
    reader.read(source)
    source.kill()
    wait_until(lambda: not reader.is_connected(source))
    assert reader.read(source) == content(NBYTES)
    assert reader.gpus.opened == 1


def test_memory_is_kept_while_reads_from_it_are_under_way(
    reader: Reader, serve: Callable[[], Served]
) -> None:
    read_from, idle = serve(), serve()
    reader.connect(read_from)
    number = reader.engine.start(read_from.session_id, reader.op(read_from))
    reader.connect(idle)
    read_from.kill()
    wait_until(lambda: not reader.is_connected(read_from))
    idle.kill()
    wait_until(lambda: reader.gpus.opened == 1)
    wait_until(lambda: reader.engine.done(number))
    assert ctypes.string_at(reader.addr, NBYTES) == content(NBYTES)
    wait_until(lambda: reader.gpus.opened == 0)


def test_reads_that_were_given_up_do_not_keep_memory(reader: Reader, source: Served) -> None:
    reader.connect(source)
    numbers = [reader.engine.start(source.session_id, reader.op(source)) for _ in range(3)]
    source.kill()
    reader.engine.abandon(source.session_id)
    for number in numbers:
        with pytest.raises(ReadFailed, match="it was abandoned"):
            reader.engine.done(number)
    wait_until(lambda: reader.gpus.opened == 0)


def test_a_process_that_has_stopped_is_read_from_and_its_memory_stays(
    reader: Reader, serve: Callable[[], Served]
) -> None:
    stopped, killed = serve(), serve()
    reader.connect(stopped)
    reader.connect(killed)
    signal_and_wait(stopped.process.pid, signal.SIGSTOP)
    killed.kill()
    wait_until(lambda: reader.gpus.opened == 1)
    assert reader.is_connected(stopped)
    assert reader.read(stopped) == content(NBYTES)


# -- memory that is taken back
# --------------------------------------------------------------------------------------------------


def test_memory_that_its_process_takes_back_is_let_go_and_can_be_mapped_again(
    reader: Reader, source: Served
) -> None:
    for _ in range(3):
        assert reader.read(source) == content(NBYTES)
        assert reader.gpus.opened == 1
        source.offer_anew()
        wait_until(lambda: reader.gpus.opened == 0)


def test_a_contact_that_is_made_again_in_time_keeps_what_is_mapped(
    reader: Reader, source: Served, late: None
) -> None:
    reader.connect(source)
    mapped = reader.gpus.mapped
    for _ in range(3):
        source.offer_anew()
        wait_until(lambda: not reader.is_connected(source))
        assert reader.read(source) == content(NBYTES)
        assert reader.is_connected(source)
    assert reader.gpus.mapped == mapped


def test_each_registration_of_a_process_is_mapped_for_itself(
    reader: Reader, source: Served
) -> None:
    for incarnation in ("1" * 32, "2" * 32):
        reader.engine.connect(peer_of(source.session_id, incarnation), source.exports)
    assert reader.gpus.opened == 2
    source.kill()
    wait_until(lambda: reader.gpus.opened == 0)


# -- peers that are no engines, or answer nothing
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def full() -> Iterator[str]:
    """The session of a port at which contacts hang, as at an address that nobody has."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waits = stack.enter_context(socket.socket())
            waits.setblocking(False)
            waits.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_contact_that_hangs_ends_when_it_is_abandoned(reader: Reader, full: str) -> None:
    before = descriptors()
    with ThreadPoolExecutor(1) as pool:
        contact = pool.submit(reader.engine.connect, full)
        wait_until(lambda: bool(descriptors() - before))
        assert not contact.done()
        reader.engine.abandon(full)
        with pytest.raises(ReadFailed, match="the contact was broken off"):
            contact.result(60)
    assert not descriptors() - before


def test_a_contact_that_hangs_ends_when_the_engine_is_closed(full: str) -> None:
    reader = Reader()
    before = descriptors()
    with reader.engine, ThreadPoolExecutor(1) as pool:
        contact = pool.submit(reader.engine.connect, full)
        wait_until(lambda: bool(descriptors() - before))
        reader.engine.close()
        with pytest.raises(ReadFailed, match="the contact was broken off"):
            contact.result(60)


def test_a_contact_that_hangs_ends_by_itself(
    reader: Reader, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "_LIMIT_S", 0.0)
    with pytest.raises(ReadFailed, match="it does not answer"):
        reader.engine.connect(full)


def test_a_peer_that_sends_something_is_no_engine(reader: Reader, source: Served) -> None:
    """So nobody looks at its connection for ever."""
    with socket.create_server(("127.0.0.1", 0)) as talker:
        session_id = f"127.0.0.1:{talker.getsockname()[1]}"
        reader.engine.connect(session_id, source.exports)
        connection, _ = talker.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            wait_until(lambda: reader.gpus.opened == 0)


@pytest.mark.parametrize("handle", [b"x", b"/nowhere", bytes(64), b"/proc/self/fd/0"])
def test_a_handle_that_cannot_be_opened_fails_the_contact_and_leaves_nothing(
    reader: Reader, source: Served, handle: bytes
) -> None:
    bad = Export(source.exports[0].addr + (1 << 30), NBYTES, handle)
    before = descriptors()
    with pytest.raises(ReadFailed, match=f"cannot read from {source.session_id}"):
        reader.engine.connect(source.session_id, [*source.exports, bad])
    assert reader.gpus.opened == 0
    assert not descriptors() - before
    assert reader.read(source) == content(NBYTES)


@pytest.mark.parametrize("serve", ["of an arena"], indirect=True)
@pytest.mark.parametrize("more", [-4096, 4096])
def test_memory_of_the_host_of_another_size_than_is_said_is_not_mapped(
    reader: Reader, source: Served, more: int
) -> None:
    (export,) = source.exports
    nbytes = export.nbytes + more
    pieces = replace(Pieces.decode(export), sizes=(nbytes,))
    before = descriptors()
    with pytest.raises(ReadFailed, match=rf"{nbytes} bytes of the host are offered, in memory of"):
        reader.engine.connect(source.session_id, [Export(export.addr, nbytes, pieces.encode())])
    assert reader.gpus.opened == 0
    assert not descriptors() - before


@pytest.mark.parametrize("serve", ["by descriptors"], indirect=True)
def test_memory_of_the_host_that_its_process_can_cut_short_is_not_mapped(
    reader: Reader, source: Served
) -> None:
    """A read of what has been cut off would kill the reader."""
    (export,) = source.exports
    pieces = Pieces.decode(export)
    nbytes = pieces.sizes[0]
    pieces = replace(pieces, sizes=(nbytes,), on_host=True)
    with pytest.raises(ReadFailed, match="memory of the host is offered that can be cut short"):
        reader.engine.connect(source.session_id, [Export(export.addr, nbytes, pieces.encode())])
    assert reader.gpus.opened == 0


def test_addresses_that_no_export_holds_are_not_read(reader: Reader, source: Served) -> None:
    reader.connect(source)
    for start in (-1, 1, NBYTES, -(1 << 40)):
        with pytest.raises(ReadFailed, match="does not offer"):
            reader.engine.start(
                source.session_id, ReadOp("a/0", int(source.addr) + start, reader.addr, NBYTES)
            )


# -- many, and the end
# --------------------------------------------------------------------------------------------------


def test_a_thousand_readers_take_a_bounded_number_of_the_sources_descriptors(
    source: Served,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        readers = [
            stack.enter_context(dial.dial(source.session_id, lambda: False)) for _ in range(1000)
        ]
        most = link._MOST_READERS
        wait_until(lambda: sum(map(link.ended, readers)) == len(readers) - most)
        assert not any(map(link.ended, readers[-most:]))
        source.kill()
        wait_until(lambda: all(map(link.ended, readers)))


def test_readers_that_have_left_are_forgotten(source: Served) -> None:
    folder = Path(f"/proc/{source.process.pid}/fd")
    few = len(list(folder.iterdir()))
    for _ in range(50):
        dial.dial(source.session_id, lambda: False).close()
    with dial.dial(source.session_id, lambda: False):
        wait_until(lambda: len(list(folder.iterdir())) <= few + 2)


def test_a_closed_engine_leaves_neither_threads_nor_connections_nor_memory(
    serve: Callable[[], Served],
) -> None:
    threads, before = set(threading.enumerate()), descriptors()
    reader = Reader()
    with reader.engine:
        served = [serve() for _ in range(2)]
        during = descriptors()
        for each in served:
            reader.read(each)
        served[0].kill()
    assert reader.gpus.opened == 0
    wait_until(lambda: {each for each in threading.enumerate() if each.is_alive()} <= threads)
    assert not {each for each in descriptors() - before if each not in during}


def test_a_source_that_closes_its_engine_is_known_to_have_ended(reader: Reader) -> None:
    source = CudaIpcEngine(gpus=HostGpus())
    with source, dial.dial(source.session_id, lambda: False) as connection:
        assert not link.ended(connection)
        source.close()
        wait_until(lambda: link.ended(connection))
    with pytest.raises(ReadFailed, match="its process has ended"):
        reader.engine.connect(source.session_id)


def test_a_host_that_is_none_of_this_machine_is_refused_with_nothing_left() -> None:
    before = descriptors()
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(EngineUnavailable, match=f"nothing can listen at {host}"):
            CudaIpcEngine(host, gpus=HostGpus())
    assert not descriptors() - before


FORKS = """
import os, socket, sys, time
from engine_loader.engines.cuda_ipc.link import Listener

accept = socket.socket.accept

def slow_accept(listener):
    accepted = accept(listener)
    print("accepted", flush=True)
    time.sleep(0.2)
    return accepted

if sys.argv[1] == "accepts":
    socket.socket.accept = slow_accept
listener = Listener("127.0.0.1")
print(listener.session_id, flush=True)
sys.stdin.readline()
if child := os.fork():
    print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("meanwhile", ["rests", "accepts"])
def test_a_child_of_the_source_does_not_keep_its_connections(meanwhile: str) -> None:
    """As a worker that loads data is, which is forked and outlives it for a moment."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, meanwhile],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as source:
        assert source.stdin is not None
        assert source.stdout is not None
        session_id = source.stdout.readline().strip()
        with closing(dial.dial(session_id, lambda: False)) as connection:
            if meanwhile == "accepts":
                assert source.stdout.readline() == "accepted\n"
            source.stdin.write("fork\n")
            source.stdin.flush()
            child = int(source.stdout.readline())
            assert not link.ended(connection)
            source.kill()
            try:
                wait_until(lambda: link.ended(connection), timeout_s=30)
            finally:
                os.kill(child, signal.SIGKILL)


def test_memory_is_taken_back_also_from_a_reader_that_has_not_been_seen_yet() -> None:
    listener = link.Listener("127.0.0.1")
    with closing(listener):
        for _ in range(300):
            with dial.dial(listener.session_id, lambda: False) as connection:
                listener.cut()
                wait_until(lambda made=connection: link.ended(made))  # type: ignore[misc]
