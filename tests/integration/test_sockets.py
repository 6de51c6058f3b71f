"""Over `socket`: peers that are none, hostile ones, and processes that end, stop or fork."""

from __future__ import annotations

import ctypes
import http.server
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_loader.engines.base import peer_of, read
from engine_loader.engines.machine import this_host
from engine_loader.engines.sockets import server as server_module
from engine_loader.engines.sockets.engine import SocketEngine
from engine_loader.engines.sockets.neighbour import Place
from engine_loader.engines.sockets.ways import Connected, Near
from engine_loader.engines.sockets.wire import COUNT, MOST_PIECES, NO_PROOF, Hello, Welcome
from engine_loader.errors import EngineFailed, EngineUnavailable, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_registry import Region
from tests.integration.conftest import Processes, line_of
from tests.support.checkout import ROOT
from tests.support.processes.served import content
from tests.support.signals import signal_and_wait
from tests.support.socket_peers import (
    CHALLENGE,
    BareReader,
    BareSource,
    Behaviour,
    answers,
    greets,
    keeps_still,
    says,
)
from tests.support.waiting import wait_until

NBYTES = 64 << 10
WITHIN = pytest.mark.parametrize(
    "same_host", [True, False], ids=["within the host", "over connections"]
)


class Block:
    """Memory, and a region of it."""

    def __init__(self, nbytes: int, byte: int = 0) -> None:
        self.tensor = torch.full((nbytes,), byte, dtype=torch.uint8)
        self.region = Region(self.tensor.data_ptr(), nbytes)

    def __bytes__(self) -> bytes:
        return self.tensor.numpy().tobytes()


@pytest.fixture
def source() -> Iterator[SocketEngine]:
    with SocketEngine("127.0.0.1") as engine:
        yield engine


@pytest.fixture
def reader() -> Iterator[SocketEngine]:
    with SocketEngine("127.0.0.1") as engine:
        yield engine


def bring(reader: SocketEngine, peer: str, addr: int, nbytes: int) -> bytes:
    """One read."""
    block = Block(nbytes)
    reader.lend(block.region)
    try:
        read(reader, peer, ReadOp("a/0", addr, block.region.addr, nbytes))
    finally:
        reader.abandon(peer)
        reader.take_back(block.region)
    return bytes(block)


def assert_it_serves(source: SocketEngine) -> None:
    block = Block(NBYTES, 7)
    source.register(block.region)
    for same_host in (True, False):
        with SocketEngine("127.0.0.1", same_host=same_host) as reader:
            assert bring(reader, source.session_id, block.region.addr, NBYTES) == bytes(block)
    source.unregister(block.region)


def connections_of(source: SocketEngine) -> int:
    return len(source._server._connections)


# -- peers that are no engines
# -------------------------------------------------------------------------------------------------

STRANGERS: dict[str, Behaviour] = {
    "garbage": says(os.urandom(1000)),
    "the end": lambda _: None,
    "half a hello": says(Hello(False, CHALLENGE).packed()[:20]),
    "another protocol": says(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" + bytes(64)),
    "the end after a hello": says(Hello(False, CHALLENGE).packed()),
    "a refusal": greets(Welcome(False), lambda _: None),
}


@pytest.mark.parametrize("behave", STRANGERS.values(), ids=STRANGERS)
def test_a_peer_that_is_no_engine_is_not_read_and_others_are(
    reader: SocketEngine, source: SocketEngine, behave: Behaviour
) -> None:
    with BareSource(behave) as stranger:
        for _ in range(2):
            with pytest.raises(ReadFailed, match=f"cannot read from {stranger.session_id}: "):
                bring(reader, stranger.session_id, 4096, 64)
    block = Block(NBYTES, 3)
    source.register(block.region)
    assert bring(reader, source.session_id, block.region.addr, NBYTES) == bytes(block)


def abandoned(reader: SocketEngine, session_id: str, met: threading.Event) -> str:
    """What a contact with it fails with that is given up once it has met somebody."""
    failed: list[str] = []

    def connect() -> None:
        try:
            reader.connect(session_id)
        except ReadFailed as exc:
            failed.append(exc.what)

    thread = threading.Thread(target=connect)
    thread.start()
    assert met.wait(60)
    reader.abandon(session_id)
    thread.join(60)
    assert reader.settled(session_id)
    return failed[0]


def test_a_web_server_is_no_engine(reader: SocketEngine) -> None:
    """It waits for the end of the line that we have begun."""
    met = threading.Event()

    class Web(http.server.ThreadingHTTPServer):
        def process_request(self, *what: Any) -> None:
            met.set()
            super().process_request(*what)

    with Web(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        session_id = f"127.0.0.1:{web.server_port}"
        assert f"cannot read from {session_id}" in abandoned(reader, session_id, met)
        web.shutdown()
        thread.join()


def test_a_contact_with_a_peer_that_says_nothing_ends_when_it_is_abandoned(
    reader: SocketEngine,
) -> None:
    met = threading.Event()

    def behave(connection: socket.socket) -> None:
        connection.recv(1)
        met.set()
        keeps_still(connection)

    with BareSource(behave) as silent:
        assert "cannot read from" in abandoned(reader, silent.session_id, met)


# -- hostile sources
# -------------------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[Behaviour, str]] = {
    "none of it": (answers(COUNT.pack(0) + b"\0"), "it does not offer 64 bytes at 0x1000"),
    "more than was asked for": (answers(COUNT.pack(9) + b"\1" + bytes(64)), "contradicts itself"),
    "fewer than it says": (answers(COUNT.pack(0) + b"\1" + bytes(64)), "contradicts itself"),
    "half of the head": (answers(COUNT.pack(1)), "the connection is broken"),
    "half of the bytes": (answers(COUNT.pack(1) + b"\1" + bytes(32)), "the connection is broken"),
    "the end": (answers(b""), "the connection is broken"),
}


@pytest.mark.parametrize(("answer", "why"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_none_fails_the_read(
    reader: SocketEngine, answer: Behaviour, why: str
) -> None:
    with BareSource(greets(Welcome(True), answer)) as source:
        with pytest.raises(ReadFailed, match=why):
            bring(reader, source.session_id, 4096, 64)


def test_more_bytes_than_were_asked_for_go_nowhere(reader: SocketEngine) -> None:
    block = Block(3 * 4096, 9)
    reader.lend(block.region)
    answer = answers(COUNT.pack(1) + b"\1" + bytes(1 << 20))
    with BareSource(greets(Welcome(True), answer)) as source:
        op = ReadOp("a/0", 4096, block.region.addr + 4096, 64)
        read(reader, source.session_id, op)
        with pytest.raises(ReadFailed):
            read(reader, source.session_id, op)
        reader.abandon(source.session_id)
    assert bytes(block)[:4096] == b"\x09" * 4096
    assert bytes(block)[4096 + 64 :] == b"\x09" * (2 * 4096 - 64)


def places() -> dict[str, Place]:
    processes, here = os.stat("/proc/self/ns/pid").st_ino, this_host()
    mine = ctypes.create_string_buffer(64)
    at = ctypes.addressof(mine)
    return {
        "a process that is none": Place(here, processes, (1 << 32) - 1, at, bytes(16)),
        "the first process": Place(here, processes, 1, at, bytes(16)),
        "this process, a name that it has not": Place(here, processes, os.getpid(), at, b"x" * 16),
        "this process, nowhere": Place(here, processes, os.getpid(), 8, bytes(16)),
        "this process, beyond all": Place(here, processes, os.getpid(), (1 << 64) - 8, bytes(16)),
        "another host": Place("no boot of this host", processes, os.getpid(), at, bytes(16)),
        "another namespace": Place(here, processes + 1, os.getpid(), at, bytes(16)),
    }


@pytest.mark.parametrize("name", places())
def test_a_place_that_leads_elsewhere_is_not_read_from(reader: SocketEngine, name: str) -> None:
    """The bytes come over the connection then."""
    welcome = Welcome(True, NO_PROOF, places()[name])
    sent = bytes(range(64))
    with BareSource(greets(welcome, answers(COUNT.pack(1) + b"\1" + sent))) as source:
        reader.connect(source.session_id)
        assert not reader.reads_within_host(source.session_id)
        assert bring(reader, source.session_id, 4096, 64) == sent


# -- hostile readers
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, MOST_PIECES + 1, (1 << 32) - 1])
def test_a_question_for_none_or_too_many_pieces_ends_the_connection(
    source: SocketEngine, count: int
) -> None:
    with BareReader(source.session_id).greet() as reader:
        reader.ask((4096, 1), count=count)
        assert reader.ended
    assert_it_serves(source)


def test_memory_that_is_not_offered_is_not_sent(source: SocketEngine) -> None:
    block = Block(3 * 4096, 5)
    addr = block.region.addr + 4096
    source.register(Region(addr, 4096))
    top = (1 << 64) - 1
    bad = [
        *((addr - 1, 1), (addr - 1, 2), (addr + 4095, 2), (addr + 4096, 1), (addr, 4097)),
        *((0, 1), (0, top), (addr, top), (addr, top - addr + 1), (addr, top - addr + 2)),
        *((top, top), (top, 1), (top - 4096, 4097), (4096, top)),
    ]
    with BareReader(source.session_id).greet() as reader:
        for piece in bad:
            reader.ask(piece)
            assert reader.hear(5) == COUNT.pack(0) + b"\0"
        reader.ask(*bad, (addr, 4096), (addr + 4000, 96))
        assert reader.hear(4 + len(bad) + 2) == COUNT.pack(2) + bytes(len(bad)) + b"\1\1"
        assert reader.hear(4096 + 96) == b"\5" * (4096 + 96)


STRANGE: dict[str, bytes] = {
    "garbage": os.urandom(4096),
    "a request of HTTP": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + bytes(64),
    "a request of TLS": bytes.fromhex("160301020001") + bytes(200),
}


@pytest.mark.parametrize("words", STRANGE.values(), ids=STRANGE)
def test_a_stranger_gets_nothing_but_a_hello(source: SocketEngine, words: bytes) -> None:
    with BareReader(source.session_id) as stranger:
        stranger.socket.sendall(words)
        assert len(stranger.hear_all()) <= len(Hello(False, CHALLENGE).packed())
    assert_it_serves(source)


def test_who_does_not_finish_its_handshake_is_cut_off_however_slowly_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, source: SocketEngine
) -> None:
    monkeypatch.setattr(server_module, "_HANDSHAKE_S", 0.5)
    with BareReader(source.session_id) as silent, BareReader(source.session_id) as slow:

        def drip() -> None:
            with suppress(OSError):
                while True:
                    slow.socket.sendall(b"E")
                    slow.socket.recv(1)

        drips = threading.Thread(target=drip)
        drips.start()
        silent.hear_all()
        wait_until(lambda: connections_of(source) == 0)
        drips.join(60)


@contextmanager
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_strangers_however_many_do_not_keep_readers_out(
    monkeypatch: pytest.MonkeyPatch, source: SocketEngine
) -> None:
    monkeypatch.setattr(server_module, "_HANDSHAKE_S", 100)  # which they need on a busy machine
    with many_files(), ExitStack() as stack:
        strangers = [stack.enter_context(BareReader(source.session_id)) for _ in range(1100)]
        wait_until(lambda: connections_of(source) == 1024)
        assert_it_serves(source)
        assert connections_of(source) <= 1024
        strangers[0].hear_all()  # the first made room
    wait_until(lambda: connections_of(source) == 0)


def test_readers_are_limited_and_those_that_read_go_on(source: SocketEngine) -> None:
    block = Block(4096, 6)
    source.register(block.region)
    with many_files(), ExitStack() as stack:
        readers = [stack.enter_context(BareReader(source.session_id)).greet() for _ in range(1024)]
        with BareReader(source.session_id) as late:
            assert late.ended
        for each in readers:
            each.ask((block.region.addr, 4096))
        for each in readers:
            assert each.hear(5 + 4096) == COUNT.pack(1) + b"\1" + bytes(block)
        for each in readers[:8]:
            each.socket.close()
        wait_until(lambda: connections_of(source) == 1024 - 8)
        assert_it_serves(source)


def test_a_reader_that_takes_nothing_keeps_no_memory_from_being_taken_back(
    source: SocketEngine,
) -> None:
    nbytes = 64 << 20
    block, other = Block(nbytes, 1), Block(4096, 3)
    source.register(block.region)
    source.register(other.region)
    with (
        BareReader(source.session_id).greet() as stuck,
        BareReader(source.session_id).greet() as well,
    ):
        stuck.ask((block.region.addr, nbytes))
        (connection,) = wait_for_a_sender(source, block.region)
        source.unregister(block.region)
        assert not connection.sends(block.region)
        block.tensor.fill_(2)
        sent = stuck.hear_all()
        assert sent.strip(b"\1") in (b"", COUNT.pack(1), COUNT.pack(1)[1:])
        assert b"\2" not in sent[5:]
        assert len(sent) < nbytes
        well.ask((other.region.addr, 4096))
        assert well.hear(5 + 4096)[5:] == bytes(other)


def wait_for_a_sender(source: SocketEngine, region: Region) -> list[server_module._Connection]:
    found: list[server_module._Connection] = []

    def sends() -> bool:
        found[:] = [one for one in list(source._server._connections) if one.sends(region)]
        return bool(found)

    wait_until(sends)
    return found


def test_where_no_thread_is_left_a_reader_is_sent_away_and_the_next_is_served(
    source: SocketEngine,
) -> None:
    threading.stack_size(1 << 46)  # which no thread can get
    try:
        with BareReader(source.session_id) as reader:
            assert reader.ended
    finally:
        threading.stack_size(0)
    wait_until(lambda: connections_of(source) == 0)
    assert_it_serves(source)


def test_closing_waits_for_no_reader(source: SocketEngine) -> None:
    block = Block(64 << 20, 1)
    source.register(block.region)
    with BareReader(source.session_id).greet() as stuck, BareReader(source.session_id) as silent:
        stuck.ask((block.region.addr, 64 << 20))
        wait_for_a_sender(source, block.region)
        source.close()
        assert len(stuck.hear_all()) < 64 << 20
        silent.hear_all()


# -- memory that is taken back while it is read
# -------------------------------------------------------------------------------------------------


@WITHIN
def test_what_was_taken_back_never_counts(processes: Processes, same_host: bool) -> None:
    """The source's memory is offered only while it is whole."""
    served = processes.start("-m", "tests.support.processes.flicker", str(NBYTES))
    session_id, addr = line_of(served).split()
    came = 0
    with SocketEngine("127.0.0.1", same_host=same_host) as reader:
        while came < 50:
            try:
                some = bring(reader, session_id, int(addr), NBYTES)
            except ReadFailed:
                continue
            came += 1
            assert some == some[:1] * NBYTES
            assert some[:1] != b"\0"


# -- processes
# -------------------------------------------------------------------------------------------------


@dataclass
class Served:
    process: subprocess.Popen[str]
    session_id: str
    addr: int
    nbytes: int

    def fork(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write("fork\n")
        self.process.stdin.flush()
        return int(line_of(self.process))

    def read(self, reader: SocketEngine) -> None:
        wanted = content(self.nbytes)
        assert bring(reader, self.session_id, self.addr, self.nbytes) == wanted


Serve = Callable[..., Served]


@pytest.fixture
def serve(processes: Processes) -> Serve:
    def serve(nbytes: int = NBYTES) -> Served:
        process = processes.start(
            "-m", "tests.support.processes.served", str(nbytes), "socket", "127.0.0.1"
        )
        session_id, addr = line_of(process).split()
        return Served(process, session_id, int(addr), nbytes)

    return serve


def test_a_source_of_the_same_host_and_user_is_read_without_the_network(
    reader: SocketEngine, serve: Serve
) -> None:
    served = serve()
    reader.connect(served.session_id)
    assert reader.reads_within_host(served.session_id)
    served.read(reader)


def test_either_side_may_keep_to_the_network(reader: SocketEngine, serve: Serve) -> None:
    served = serve()
    with SocketEngine("127.0.0.1", same_host=False) as apart:
        apart.connect(served.session_id)
        assert not apart.reads_within_host(served.session_id)
        served.read(apart)
        block = Block(NBYTES, 4)
        apart.register(block.region)
        reader.connect(apart.session_id)
        assert not reader.reads_within_host(apart.session_id)
        assert bring(reader, apart.session_id, block.region.addr, NBYTES) == bytes(block)


def test_the_environment_keeps_engines_to_the_network(
    monkeypatch: pytest.MonkeyPatch, source: SocketEngine
) -> None:
    for value, within in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv("ENGINES_SOCKET_SAME_HOST", value)
        with SocketEngine("127.0.0.1") as reader:
            reader.connect(source.session_id)
            assert reader.reads_within_host(source.session_id) == within
    monkeypatch.setenv("ENGINES_SOCKET_SAME_HOST", "no")
    with pytest.raises(EngineUnavailable, match="ENGINES_SOCKET_SAME_HOST is 'no': say 0 or 1"):
        SocketEngine("127.0.0.1")


@WITHIN
def test_a_source_that_is_killed_under_a_read_fails_it(serve: Serve, same_host: bool) -> None:
    served = serve(256 << 20)
    block = Block(served.nbytes)
    with SocketEngine("127.0.0.1", same_host=same_host) as reader:
        reader.lend(block.region)
        reader.connect(served.session_id)
        step = 1 << 20
        numbers = [
            reader.start(
                served.session_id, ReadOp("a/0", served.addr + at, block.region.addr + at, step)
            )
            for at in range(0, served.nbytes, step)
        ]
        served.process.kill()
        served.process.wait()
        for number, at in zip(numbers, range(0, served.nbytes, step), strict=True):
            try:
                wait_until(lambda number=number: reader.done(number))  # type: ignore[misc]
            except ReadFailed:
                continue
            assert block.tensor[at : at + step].numpy().tobytes() == content(step)
        with pytest.raises(ReadFailed):
            bring(reader, served.session_id, served.addr, 64)
        reader.take_back(block.region)


def test_a_source_that_has_stopped_is_read_within_the_host_once_it_was_met(
    reader: SocketEngine, serve: Serve
) -> None:
    served = serve()
    reader.connect(served.session_id)
    signal_and_wait(served.process.pid, signal.SIGSTOP)
    try:
        served.read(reader)
    finally:
        served.process.send_signal(signal.SIGCONT)


@WITHIN
def test_a_child_of_a_source_does_not_stand_for_it(serve: Serve, same_host: bool) -> None:
    served = serve()
    with SocketEngine("127.0.0.1", same_host=same_host) as reader:
        served.read(reader)
        child = served.fork()
        served.read(reader)
        served.process.kill()
        served.process.wait()
        assert Path(f"/proc/{child}").exists()
        for _ in range(2):
            with pytest.raises(ReadFailed):
                bring(reader, served.session_id, served.addr, NBYTES)
        with SocketEngine("127.0.0.1", same_host=same_host) as other, pytest.raises(ReadFailed):
            other.connect(served.session_id)
        os.kill(child, signal.SIGKILL)


FORKING_READER = """
import os, sys, time
from engine_loader.engines.sockets.engine import SocketEngine
from engine_loader.errors import EngineFailed
session_id, ends = sys.argv[1:]
engine = SocketEngine("127.0.0.1", same_host=False)
engine.connect(session_id)
def say(*words):  # at once, as both processes write to one pipe
    os.write(1, " ".join(map(str, words)).encode() + b"\\n")

if child := os.fork():
    say(child)
    sys.stdin.readline()
    engine.connect(session_id)
    reader = engine._readers[session_id]
    assert not reader.over
    say("ok")
    sys.stdin.readline()
    os._exit(0)
try:
    engine.connect(session_id)
except EngineFailed as exc:
    say(exc)
engine.close()
if ends == "ends":
    sys.exit()
time.sleep(3600)
"""


@pytest.mark.parametrize("ends", ["ends", "stays"])
def test_a_child_of_a_reader_neither_breaks_its_connections_nor_keeps_them(
    processes: Processes, source: SocketEngine, ends: str
) -> None:
    forking = processes.start_anew("-c", FORKING_READER, source.session_id, ends)
    said = {line_of(forking).strip(), line_of(forking).strip()}
    assert "the transfer engine is that of the process that was forked" in said
    child = int(next(line for line in said if line.isdigit()))
    if ends == "ends":
        stat = Path(f"/proc/{child}/stat")
        wait_until(lambda: stat.read_text().split()[2] == "Z")
    assert forking.stdin is not None
    forking.stdin.write("\n")
    forking.stdin.flush()
    assert line_of(forking) == "ok\n"
    assert connections_of(source) == 1
    forking.stdin.write("\n")
    forking.stdin.flush()
    wait_until(lambda: connections_of(source) == 0)
    if ends == "stays":
        assert Path(f"/proc/{child}").exists()
        os.kill(child, signal.SIGKILL)


TWO_USERS = """
import ctypes, os
from engine_loader.engines.base import read
from engine_loader.engines.sockets.engine import SocketEngine
from engine_loader.planning.plan import ReadOp
from engine_registry import Region
from tests.support.processes.served import content

def become(uid):
    os.setgroups([]); os.setgid(uid); os.setuid(uid)

SocketEngine("127.0.0.1").close()  # what it imports may lie where only root looks
say, hear = os.pipe(), os.pipe()
if source := os.fork():
    become(65534)
    with SocketEngine("127.0.0.1") as engine:
        session_id, addr = os.read(say[0], 200).decode().split()
        memory = ctypes.create_string_buffer({nbytes})
        here = Region(ctypes.addressof(memory), {nbytes})
        engine.lend(here)
        read(engine, session_id, ReadOp("a/0", int(addr), here.addr, {nbytes}))
        assert memory.raw == content({nbytes})
        way = "within the host" if engine.reads_within_host(session_id) else "over a connection"
        print(way + ", all bytes", flush=True)
    os.close(hear[1])
    os.waitpid(source, 0)
else:
    os.close(hear[1])
    become(65533)
    memory = ctypes.create_string_buffer(content({nbytes}), {nbytes})
    with SocketEngine("127.0.0.1") as engine:
        engine.register(Region(ctypes.addressof(memory), {nbytes}))
        os.write(say[1], f"{{engine.session_id}} {{ctypes.addressof(memory)}}".encode())
        os.read(hear[0], 1)
    os._exit(0)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_a_source_of_another_user_is_read_over_a_connection() -> None:
    """The reader is no root either: that may read everybody's memory."""
    program = TWO_USERS.format(nbytes=NBYTES)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "over a connection, all bytes\n"), done.stderr


# -- one engine
# -------------------------------------------------------------------------------------------------


@WITHIN
def test_registrations_of_one_process_are_read_as_different_peers(
    source: SocketEngine, same_host: bool
) -> None:
    block = Block(NBYTES, 8)
    source.register(block.region)
    with SocketEngine("127.0.0.1", same_host=same_host) as reader:
        for incarnation in ("one", "two"):
            peer = peer_of(source.session_id, incarnation)
            assert bring(reader, peer, block.region.addr, NBYTES) == bytes(block)


def test_memory_that_is_none_is_not_registered(source: SocketEngine) -> None:
    with pytest.raises(EngineFailed, match="are not memory of this host"):
        source.register(Region(8, 64))


# -- a reader that lacks something
# -------------------------------------------------------------------------------------------------


@WITHIN
def test_a_reader_that_can_start_no_thread_fails_to_connect_and_connects_later(
    source: SocketEngine, same_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(NBYTES, 3)
    source.register(block.region)
    with SocketEngine("127.0.0.1", same_host=same_host) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse_threads_that_read)
            with pytest.raises(ReadFailed, match="no thread is left"):
                reader.connect(source.session_id)
        assert bring(reader, source.session_id, block.region.addr, NBYTES) == bytes(block)


START = threading.Thread.start


def refuse_threads_that_read(thread: threading.Thread) -> None:
    if thread.name.startswith("reads from"):
        raise RuntimeError("can't start new thread")
    START(thread)


@WITHIN
def test_a_lane_that_fails_for_a_reason_of_its_own_ends_what_waits(
    source: SocketEngine,
    same_host: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def take(*_: object) -> None:
        raise MemoryError("no memory is left")

    for way in (Connected, Near):
        monkeypatch.setattr(way, "take", take)
    block, into = Block(1 << 20, 3), Block(1 << 20)
    source.register(block.region)
    with SocketEngine("127.0.0.1", same_host=same_host) as reader:
        reader.lend(into.region)
        op = ReadOp("a/0", block.region.addr, into.region.addr, block.region.nbytes)
        with pytest.raises(ReadFailed, match="this engine has failed"):
            read(reader, source.session_id, op)
        assert "MemoryError" in caplog.text
        reader.abandon(source.session_id)
        assert reader.settled(source.session_id)


def test_memory_of_a_neighbour_that_is_gone_is_not_read(
    source: SocketEngine, reader: SocketEngine
) -> None:
    """It has freed what it offers, which it must not do."""
    mapped = mmap.mmap(-1, NBYTES)
    region = Region(np.frombuffer(mapped, np.uint8).ctypes.data, NBYTES)
    source.register(region)
    assert bring(reader, source.session_id, region.addr, NBYTES) == bytes(NBYTES)
    mapped.close()
    with pytest.raises(ReadFailed, match="memory that it offers is gone"):
        bring(reader, source.session_id, region.addr, NBYTES)
