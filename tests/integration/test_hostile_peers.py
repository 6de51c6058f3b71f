"""Peers on the data plane that answer nonsense, half of it, or nothing: real engines, and servers
that only look like one.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from engine_cli.exits import Exit
from engine_loader import (
    LoadOptions,
    MooncakeEngine,
    Pace,
    PublishOptions,
    load,
    load_or_seed,
    publish,
)
from engine_loader.engines.base import read
from engine_loader.errors import ReadFailed, SourceLost
from engine_loader.files.weights import write_weights
from engine_loader.planning.plan import ReadOp
from engine_registry import ModelIdentity, Region, Registry
from tests.integration.conftest import Processes
from tests.support.hostile_peer import (
    Behaviour,
    HostilePeer,
    Impostor,
    described,
    drips,
    framed,
    keeps_still,
    says,
    says_and_keeps_still,
)
from tests.support.waiting import wait_until

MODEL = ModelIdentity("m")
Tensors = dict[str, torch.Tensor]

# Answers to a first contact, each of which ends it.
NONSENSE = {
    "a list": says(framed(b"[]")),
    "a number": says(framed(b"3")),
    "null": says(framed(b"null")),
    "an empty object": says(framed(b"{}")),
    "a text for a port": says(described(tcp_data_port="x")),
    "a huge port": says(described(tcp_data_port=1 << 70)),
    "a port that is none": says(described(tcp_data_port=70_000)),
    "a negative port": says(described(tcp_data_port=-1)),
    "huge addresses": says(described(buffers=[{"addr": 1 << 80, "length": -5, "name": "x"}])),
    "buffers in an object": says(described(buffers={"a": 1})),
    "a list for a name": says(described(name=[])),
    "protocols in a list": says(described(protocol=["tcp", "rdma"])),
    "an unknown protocol": says(described(protocol="pigeon")),
    "deep lists": says(framed(b"[" * 500_000)),
    "deep objects": says(framed(b'{"a":' * 100_000)),
    "no JSON": says(framed(b"\xff\x00\xfe")),
    "another kind of message": says(framed(b"{}", kind=0)),
    "an unknown kind of message": says(framed(b"{}", kind=77)),
    "no length": says(framed(b"", length=0)),
    "a huge length": says(framed(b"", length=1 << 60)),
    "half an answer": says(described()[:40]),
    "nothing": says(),
    "a closed data port": says(described()),
}


@pytest.fixture(scope="module")
def reader() -> Iterator[MooncakeEngine]:
    with MooncakeEngine("127.0.0.1") as engine:
        yield engine


@pytest.fixture
def cell(reader: MooncakeEngine) -> Iterator[Region]:
    memory = torch.zeros(64, dtype=torch.uint8)
    region = Region(memory.data_ptr(), 64)
    reader.lend(region)
    yield region
    reader.take_back(region)


@pytest.mark.parametrize("behaviour", NONSENSE.values(), ids=NONSENSE.keys())
def test_whatever_a_peer_answers_a_read_from_it_fails_and_others_can_be_read(
    reader: MooncakeEngine, cell: Region, behaviour: Behaviour
) -> None:
    with HostilePeer(behaviour) as peer:
        for _ in range(2):
            with pytest.raises(ReadFailed, match=f"cannot read from {peer.session_id}") as failed:
                read(reader, peer.session_id, ReadOp("a/0", 8192, cell.addr, cell.nbytes))
            assert failed.value.details["session_id"] == peer.session_id
    memory = torch.arange(64, dtype=torch.uint8)
    with MooncakeEngine("127.0.0.1") as source:
        source.register(Region(memory.data_ptr(), 64))
        read(reader, source.session_id, ReadOp("a/0", memory.data_ptr(), cell.addr, 64))


def test_a_contact_that_has_failed_leaves_no_engine_behind_whoever_keeps_the_error(
    reader: MooncakeEngine,
) -> None:
    errors = []
    with HostilePeer(says(framed(b"[]"))) as peer:
        before = descriptors()
        for _ in range(3):
            with pytest.raises(ReadFailed) as failed:
                reader.connect(peer.session_id)
            errors.append(failed.value)
        wait_until(lambda: descriptors() <= before + len(errors))  # those of the server


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- peers that keep a contact waiting
# -------------------------------------------------------------------------------------------

HANGING = {
    "nothing": keeps_still,
    "half a length": says_and_keeps_still(framed(b"")[:4]),
    "half an answer": says_and_keeps_still(described()[:100]),
    "a byte now and then": drips,
}


@pytest.fixture(params=[False, True], ids=["an engine for each peer", "one engine for all"])
def any_reader(request: pytest.FixtureRequest) -> Iterator[MooncakeEngine]:
    with MooncakeEngine("127.0.0.1", shared=request.param) as engine:
        yield engine


@pytest.mark.parametrize("behaviour", HANGING.values(), ids=HANGING.keys())
def test_a_contact_that_hangs_ends_by_itself_in_time_and_leaves_no_thread(
    any_reader: MooncakeEngine, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour
) -> None:
    monkeypatch.setattr("engine_loader.engines.mooncake.contact._LIMIT_S", 0.3)
    with HostilePeer(behaviour) as peer:
        with pytest.raises(
            ReadFailed, match=f"cannot read from {peer.session_id}: it does not answer"
        ):
            any_reader.connect(peer.session_id)
        wait_until(lambda: not contacts())


@pytest.mark.parametrize("behaviour", HANGING.values(), ids=HANGING.keys())
def test_a_contact_that_hangs_ends_when_it_is_abandoned(
    any_reader: MooncakeEngine, behaviour: Behaviour
) -> None:
    with HostilePeer(behaviour) as peer, ThreadPoolExecutor(1) as pool:
        contact = pool.submit(any_reader.connect, peer.session_id)
        peer.wait_until_met()
        any_reader.abandon(peer.session_id)
        with pytest.raises(ReadFailed):
            contact.result(60)
        wait_until(lambda: not contacts())


def test_a_contact_whose_connection_is_not_even_accepted_ends_when_it_is_abandoned(
    any_reader: MooncakeEngine,
) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # as many as it lets wait
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        session_id = f"127.0.0.1:{full.getsockname()[1]}"
        contact = stack.enter_context(ThreadPoolExecutor(1)).submit(any_reader.connect, session_id)
        # SYN_SENT: that of the test, and ours
        wait_until(lambda: connections_to(session_id).count("02") >= 2)
        any_reader.abandon(session_id)
        with pytest.raises(ReadFailed):
            contact.result(60)
        wait_until(lambda: not contacts())


def test_a_peer_that_stops_after_its_first_answer_holds_up_others_for_a_moment_only(
    cell: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one engine reads from all, that engine meets it after another has."""
    monkeypatch.setattr("engine_loader.engines.mooncake.reader._AGAIN_S", 0.3)
    monkeypatch.setattr("engine_loader.engines.mooncake.contact._LIMIT_S", 3600.0)
    memory = torch.arange(64, dtype=torch.uint8)
    with (
        MooncakeEngine("127.0.0.1") as source,
        MooncakeEngine("127.0.0.1", shared=True) as reader,
        HostilePeer(says(described()), keeps_still) as peer,
        ThreadPoolExecutor(1) as pool,
    ):
        source.register(Region(memory.data_ptr(), 64))
        reader.lend(cell)
        reader.connect(source.session_id)
        contact = pool.submit(reader.connect, peer.session_id)
        for _ in range(2):
            peer.wait_until_met()
        read(reader, source.session_id, ReadOp("a/0", memory.data_ptr(), cell.addr, 64))
        with pytest.raises(ReadFailed, match=f"cannot read from {peer.session_id}"):
            contact.result(60)


def test_giving_up_a_peer_cuts_a_handshake_that_a_shared_engine_still_has_open_with_it(
    cell: Region,
) -> None:
    """As over rdma, where the first read is one: here it is a connection of the test's own that
    waits for an answer.
    """
    with (
        HostilePeer(says(described()), says(described()), keeps_still) as peer,
        MooncakeEngine("127.0.0.1", shared=True) as reader,
        ThreadPoolExecutor(1) as pool,
    ):
        reader.lend(cell)
        reader.connect(peer.session_id)
        host, _, port = peer.session_id.partition(":")
        with socket.create_connection((host, int(port))) as handshake:
            handshake.sendall(b"?")
            answer = pool.submit(handshake.recv, 1)
            reader.start(peer.session_id, ReadOp("a/0", 8192, cell.addr, cell.nbytes))
            reader.abandon(peer.session_id)
            assert answer.result(60) == b""
        wait_until(lambda: reader.settled(peer.session_id))


def contacts() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith("contact with")
    ]


def connections_to(session_id: str) -> list[str]:
    """The states of this process's connections there, as the kernel writes them."""
    port = int(session_id.partition(":")[2])
    rows = map(str.split, Path("/proc/self/net/tcp").read_text().splitlines())
    return [row[3] for row in rows if row[2].endswith(f":{port:04X}")]


# -- loads
# --------------------------------------------------------------------------------------------------


def weights() -> Tensors:
    return {
        f"t{number}": torch.full((1 << 18,), number, dtype=torch.int32) for number in range(1, 9)
    }


class Sources:
    """Instances of one model, with the same weights."""

    def __init__(self, registry: Registry, namespace: str, stack: ExitStack) -> None:
        self.namespace = namespace
        self._registry = registry
        self._stack = stack

    def healthy(self, instance: str) -> None:
        self._publish(instance, MooncakeEngine("127.0.0.1"))

    def hostile(self, instance: str, *behaviours: Behaviour) -> HostilePeer:
        peer = self._stack.enter_context(HostilePeer(*behaviours))
        self._publish(instance, Impostor(peer.session_id))
        return peer

    def _publish(self, instance: str, engine: MooncakeEngine) -> None:
        self._stack.enter_context(engine)
        self._stack.enter_context(
            publish(
                self._registry,
                engine,
                instance=instance,
                rank=0,
                world_size=1,
                model=MODEL,
                tensors=weights(),
                options=PublishOptions(digests=True),  # which prove that they are the same
            )
        )


@pytest.fixture
def sources(registry: Registry, namespace: str) -> Iterator[Sources]:
    with ExitStack() as stack:
        yield Sources(registry, namespace, stack)


def assert_whole(tensors: Tensors) -> None:
    for name, wanted in weights().items():
        assert torch.equal(tensors[name], wanted), name


PACE = Pace(256 << 10, 4, stall_s=1.0, patience_s=1.5)
LOADS = {
    **{
        name: NONSENSE[name]
        for name in ("a list", "a text for a port", "a huge port", "deep objects", "no length")
    },
    **HANGING,
}


@pytest.mark.parametrize("behaviour", LOADS.values(), ids=LOADS.keys())
def test_a_load_goes_on_without_a_source_that_answers_nonsense(
    registry: Registry, sources: Sources, any_reader: MooncakeEngine, behaviour: Behaviour
) -> None:
    sources.healthy("good")
    peer = sources.hostile("bad", behaviour)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    report = load(
        registry,
        any_reader,
        ["bad", "good"],
        rank=0,
        tensors=tensors,
        options=LoadOptions(pace=PACE),
    )
    peer.wait_until_met()
    assert_whole(tensors)
    assert {share.name: share.nbytes for share in report.shares}["/engines/bad/0"] == 0
    wait_until(lambda: not contacts())


@pytest.mark.parametrize("behaviour", LOADS.values(), ids=LOADS.keys())
def test_a_load_from_nobody_but_a_source_that_answers_nonsense_names_that_source(
    registry: Registry, sources: Sources, reader: MooncakeEngine, behaviour: Behaviour
) -> None:
    peer = sources.hostile("bad", behaviour)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    with pytest.raises(SourceLost, match=f"/engines/bad/0 .*from {peer.session_id}"):
        load(registry, reader, "bad", rank=0, tensors=tensors, options=LoadOptions(pace=PACE))
    assert not any(tensor.any() for tensor in tensors.values())


def test_a_start_reads_its_files_where_the_only_peer_answers_nonsense(
    registry: Registry, sources: Sources, reader: MooncakeEngine, tmp_path: Path
) -> None:
    peer = sources.hostile("bad", says(framed(b"[]")))
    write_weights(weights(), tmp_path / "model.safetensors")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    with load_or_seed(
        registry,
        reader,
        MODEL,
        tensors,
        fallback=tmp_path,
        instance="mine",
        rank=0,
        world_size=1,
    ) as seeded:
        assert_whole(tensors)
    assert seeded.source == "disk"
    assert f"cannot read from {peer.session_id}" in seeded.reason


# -- the end of a process
# --------------------------------------------------------------------------------------------------

CONTACTS_AT_EXIT = """
import sys, threading
import torch  # so that the end of Python takes its time
from engine_loader import MooncakeEngine
from engine_loader.errors import LoaderError
engine = MooncakeEngine("127.0.0.1")
def connect(number):
    try:
        engine.connect(f"{sys.argv[1]}@{number}")
    except LoaderError:
        pass
for number in range(30):
    thread = threading.Thread(target=connect, args=(number,), daemon=True)
    thread.start()
    thread.join(0.02)
    if sys.argv[2] == "abandons":
        engine.abandon(f"{sys.argv[1]}@{number}")
if sys.argv[2] == "closes":
    engine.close()
"""


@pytest.mark.parametrize("manner", ["abandons", "closes", "leaves all as it is"])
def test_a_process_ends_in_order_though_its_contacts_come_to_an_end_at_that_very_time(
    processes: Processes, manner: str
) -> None:
    """Each lasts for 0.4 s, and one is begun every 20 ms, so that there is always one that is just
    over.
    """
    slow = framed(b" " * 200)
    with HostilePeer(says(*(bytes([byte]) for byte in slow), pause_s=0.002)) as peer:
        process = processes.start("-c", CONTACTS_AT_EXIT, peer.session_id, manner)
        _, err = process.communicate(timeout=100)
    assert (process.returncode, "terminate called" in err) == (0, False)


READS_AT_EXIT = """
import ctypes, threading
import torch  # so that the end of Python takes its time
from engine_loader import MooncakeEngine
from engine_loader.errors import LoaderError
from engine_loader.planning.plan import ReadOp
from engine_registry import Region
memory = [ctypes.create_string_buffer(4096) for _ in range(2)]
src, dst = [Region(ctypes.addressof(block), 4096) for block in memory]
source, reader = MooncakeEngine("127.0.0.1"), MooncakeEngine("127.0.0.1")
source.register(src)
reader.lend(dst)
reader.connect(source.session_id)
under_way = threading.Semaphore(0)
def read_on():
    try:
        while True:
            number = reader.start(source.session_id, ReadOp("a/0", src.addr, dst.addr, 4096))
            while not reader.done(number):
                under_way.release()
    except LoaderError:
        pass
for _ in range(8):
    threading.Thread(target=read_on, daemon=True).start()
for _ in range(1000):
    under_way.acquire()
"""


@pytest.mark.parametrize("time", range(3))
def test_a_process_ends_in_order_though_threads_are_in_the_middle_of_reads(
    processes: Processes, time: int
) -> None:
    process = processes.start("-c", READS_AT_EXIT)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, "terminate called" in err) == (0, False)


def test_the_command_fails_with_its_exit_code_where_the_only_source_keeps_it_waiting(
    sources: Sources, processes: Processes
) -> None:
    peer = sources.hostile("bad", drips)
    done = processes.run(
        "load", "bad", "--rank", "0", "--host", "127.0.0.1", "--namespace", sources.namespace
    )
    assert done.returncode == Exit.INSTANCE
    assert f"nothing has come from {peer.session_id}" in done.stderr
