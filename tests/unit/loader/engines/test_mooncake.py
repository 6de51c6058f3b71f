"""The adapter of the transfer engine, with a stand-in for the library: what it is asked, and what
is made of its answers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader import MooncakeEngine
from engine_loader.engines.mooncake.binding import _what_to_install
from engine_loader.engines.mooncake.choice import choose
from engine_loader.engines.region_book import Regions
from engine_loader.errors import EngineFailed, EngineUnavailable, ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_registry import Region
from tests.support.machines import Machine

WAY = ("pci0000:10", "0000:10:01.0")  # the bridges before the RDMA device


class LibraryEngine:
    """One engine of the library, of which a test sees what it is asked about peers; all else they
    have in common.
    """

    def __init__(self, library: Library, number: int) -> None:
        self._library = library
        self._number = number

    def batch_transfer_async_read(
        self, session_id: str, dst: Sequence[int], src: Sequence[int], nbytes: Sequence[int]
    ) -> int:
        self._library.asked.append((self._number, session_id, len(dst)))
        return self._library.batch_transfer_async_read(session_id, dst, src, nbytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


class Library:
    """mooncake's TransferEngine: registers, and refuses to register a byte twice."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, int]] = []  # by which engine, about whom, how many reads
        self.registered: dict[int, int] = {}
        self.initialized: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        self.code = 0  # of every answer but those about reads
        self.engines = 0
        self.batches: dict[int, list[int]] = {}  # what the next questions about each are answered
        self.answers = [1]
        self.first_address = 0  # of what peers have registered; 0: nothing
        self.read: list[tuple[int, int]] = []  # from which addresses, how many bytes

    def TransferEngine(self) -> LibraryEngine:
        self.engines += 1
        return LibraryEngine(self, self.engines)

    def initialize(self, *args: str) -> int:
        self.initialized, self.environment = args, dict(os.environ)
        return self.code

    def get_rpc_port(self) -> int:
        return 15000

    def register_memory(self, addr: int, nbytes: int) -> int:
        if self.code == 0:
            assert all(
                addr + nbytes <= other or other + size <= addr
                for other, size in self.registered.items()
            )
            self.registered[addr] = nbytes
        return self.code

    def unregister_memory(self, addr: int) -> int:
        del self.registered[addr]
        return 0

    def batch_transfer_async_read(
        self, session_id: str, dst: Sequence[int], src: Sequence[int], nbytes: Sequence[int]
    ) -> int:
        if session_id == "127.0.0.99:1":
            return 0
        batch = 1 << 40 | len(self.batches)
        self.batches[batch] = list(self.answers)
        self.read += zip(src, nbytes, strict=True)
        return batch

    def get_first_buffer_address(self, session_id: str) -> int:
        return self.first_address

    def transfer_check_status(self, batch: int) -> int:
        # asking about one that is over ends the real library's process
        answers = self.batches[batch]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer in (1, -1):
            del self.batches[batch]
        return answer


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr("engine_loader.engines.mooncake.start.import_library", lambda: library)
    return library


@pytest.fixture
def opened(library: Library) -> Iterator[Callable[[], MooncakeEngine]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(MooncakeEngine("127.0.0.1"))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """The machine that engines find themselves on, with one RDMA device."""
    monkeypatch.setattr(
        "engine_loader.engines.mooncake.engine.choose", partial(choose, root=tmp_path)
    )
    machine = Machine(tmp_path)
    machine.nic(
        "mlx5_0", *WAY, "0000:11:00.0", link="Ethernet", address="10.1.0.7/24", netdev="eth0"
    )
    return machine


@pytest.mark.parametrize(
    ("protocol", "wanted"),
    [
        ("tcp", {"MC_FORCE_TCP": "1", "MC_INTRANODE_NVLINK": None}),
        ("rdma", {"MC_FORCE_TCP": None, "MC_INTRANODE_NVLINK": None}),
        ("nvlink_intra", {"MC_FORCE_TCP": None, "MC_INTRANODE_NVLINK": "1"}),
    ],
)
def test_the_protocol_is_set_through_the_environment_which_is_then_as_before(
    library: Library, monkeypatch: pytest.MonkeyPatch, protocol: str, wanted: dict[str, str | None]
) -> None:
    for name in ("MC_FORCE_TCP", "MC_INTRANODE_NVLINK", "MC_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with MooncakeEngine("127.0.0.2", protocol, device="mlx5_0", fabric="rack-1") as engine:
        assert (engine.session_id, engine.protocol, engine.fabric) == (
            "127.0.0.2:15000",
            protocol,
            "rack-1",
        )
    device = "mlx5_0" if protocol == "rdma" else ""
    assert library.initialized == ("127.0.0.2", "P2PHANDSHAKE", protocol, device)
    assert {name: library.environment.get(name) for name in wanted} == wanted
    assert library.environment["MC_LOG_LEVEL"] == "ERROR"
    assert dict(os.environ) == before


def test_a_log_level_that_the_user_has_set_stays(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_LOG_LEVEL", "INFO")
    MooncakeEngine("127.0.0.1").close()
    assert library.environment["MC_LOG_LEVEL"] == os.environ["MC_LOG_LEVEL"] == "INFO"


def test_an_engine_that_does_not_start_is_unavailable_and_says_what_to_check(
    library: Library,
) -> None:
    library.code = -1
    with pytest.raises(
        EngineUnavailable,
        match=r"cannot start on '127.0.0.1' with protocol 'tcp' and device '' \(code -1\)",
    ):
        MooncakeEngine("127.0.0.1")


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "no-such-host.invalid", "a" * 64 + ".b", "", "fe80::1"]
)
def test_a_host_that_is_not_this_machine_is_refused(library: Library, host: str) -> None:
    with pytest.raises(
        EngineUnavailable, match=r"is no address of this machine .*: give an address of"
    ):
        MooncakeEngine(host)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "0",
        "::",
        "[::]",
        "255.255.255.255",
        "127.255.255.255",
        "224.0.0.1",
        "ff02::1",
        "fe80::1%lo",
    ],
)
def test_a_host_that_leads_nobody_to_this_machine_is_refused(library: Library, host: str) -> None:
    with pytest.raises(
        EngineUnavailable, match="give an address of this machine that peers can reach"
    ):
        MooncakeEngine(host)
    assert library.engines == 0


@pytest.mark.parametrize(
    ("host", "session_id", "given", "setting"),
    [
        ("127.0.0.1", "127.0.0.1:15000", "127.0.0.1", None),
        ("localhost", "localhost:15000", "localhost", None),
        ("::1", "[::1]:15000", "::1", "1"),
        ("[::1]", "[::1]:15000", "::1", "1"),
    ],
)
def test_the_family_of_the_host_is_set_through_the_environment(
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    session_id: str,
    given: str,
    setting: str | None,
) -> None:
    monkeypatch.setenv("MC_USE_IPV6", "yes")
    with MooncakeEngine(host) as engine:
        assert engine.session_id == session_id
    assert library.initialized[0] == given
    assert library.environment.get("MC_USE_IPV6") == setting
    assert os.environ["MC_USE_IPV6"] == "yes"


@pytest.mark.parametrize(
    ("device", "given", "rails"),
    [
        ("", "", {"mlx5_0": "10.1.0.0/24", "mlx5_1": ""}),
        ("mlx5_1", "mlx5_1", {"mlx5_1": ""}),
        ("auto", "mlx5_0", {"mlx5_0": "10.1.0.0/24"}),
    ],
)
def test_an_engine_uses_the_devices_that_it_is_given_and_says_which_networks_they_are_on(
    library: Library,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    given: str,
    rails: dict[str, str],
) -> None:
    machine.nic("mlx5_1", "pci0000:20", "0000:21:00.0")
    gpu = machine.gpu(*WAY, "0000:12:00.0")
    monkeypatch.setattr("engine_loader.engines.mooncake.engine.pci_address", lambda: gpu)
    with MooncakeEngine("127.0.0.1", "rdma", device) as engine:
        assert engine.rails == rails
    assert library.initialized[3] == given
    with MooncakeEngine("127.0.0.1", "tcp", device) as engine:
        assert engine.rails == {}
    assert library.initialized[3] == ""


def test_rdma_without_a_device_is_refused_before_mooncake_starts(
    library: Library, machine: Machine
) -> None:
    (machine.root / "sys/class/infiniband/mlx5_0").unlink()
    with pytest.raises(EngineUnavailable, match="no RDMA device is here"):
        MooncakeEngine("127.0.0.1", "rdma")
    assert library.engines == 0


def test_an_unknown_protocol_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        EngineUnavailable,
        match="protocol 'pigeon' is unknown: use one of tcp, socket, rdma, nvlink_intra, cuda_ipc",
    ):
        MooncakeEngine("127.0.0.1", protocol="pigeon")


@pytest.mark.parametrize("protocol", ["socket", "cuda_ipc"])
def test_a_protocol_of_another_engine_is_refused_with_what_opens_that(
    library: Library, protocol: str
) -> None:
    with pytest.raises(
        EngineUnavailable, match=f"Mooncake does not read over {protocol}: use `open_engine`"
    ):
        MooncakeEngine("127.0.0.1", protocol)
    assert library.engines == 0


def test_a_library_that_cannot_be_imported_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(
        EngineUnavailable, match=r"the transfer engine (is not installed|cannot be imported): "
    ):
        MooncakeEngine("127.0.0.1")


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [
        ("No module named 'mooncake'", "pip install 'engine-registry[cpu]'"),
        (
            "libibverbs.so.1: cannot open shared object file: No such file or directory",
            "apt-get install libibverbs1",
        ),
        (
            "libcudart.so.12: cannot open shared object file: No such file or directory",
            "pip install 'engine-registry[cpu]' instead",
        ),
        (
            "libcuda.so.1: cannot open shared object file: No such file or directory",
            "pip install 'engine-registry[cpu]' instead",
        ),
        ("undefined symbol: xyz", "undefined symbol: xyz"),
        ("[Errno 24] Too many open files: '/x'", "raise ulimit -n"),
    ],
)
def test_what_is_missing_is_reported_with_the_package_that_has_it(
    complaint: str, advice: str
) -> None:
    assert advice in str(EngineUnavailable(*_what_to_install(complaint)))


def test_memory_that_the_library_refuses_is_not_taken_for_registered(
    library: Library, opened: Callable[[], MooncakeEngine]
) -> None:
    engine, region = opened(), Region(4096, 64)
    library.code = -202
    with pytest.raises(
        EngineFailed,
        match=r"cannot register 64 bytes at 0x1000 \(code -202\): check the limit on locked memory",
    ):
        engine.register(region)
    library.code = 0
    engine.register(region)
    assert library.registered == {4096: 64}
    engine.close()


def test_only_other_protocols_than_tcp_have_the_library_register_what_is_lent(
    library: Library,
) -> None:
    for protocol, wanted in (("tcp", {}), ("rdma", {4096: 64})):
        with MooncakeEngine("127.0.0.1", protocol) as engine:
            before = dict(library.registered)
            engine.lend(Region(4096, 64))
            assert library.registered == {**before, **wanted}
            engine.take_back(Region(4096, 64))
            assert library.registered == before


def test_more_pieces_of_memory_than_peers_can_learn_of_are_refused(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_loader.engines.mooncake.engine._MAX_REGIONS", 2)
    with MooncakeEngine("127.0.0.1") as engine:
        for addr in (4096, 8192):
            engine.register(Region(addr, 64))
        with pytest.raises(
            EngineFailed,
            match="more than 2 pieces, of which no peer could learn: put the tensors into fewer",
        ):
            engine.register(Region(0, 64))
        engine.register(Region(4096, 32))
        engine.unregister(Region(8192, 64))
        engine.register(Region(0, 64))
        assert library.registered == {0: 64, 4096: 64}


def test_every_registering_with_a_closed_engine_is_an_error(library: Library) -> None:
    engine = MooncakeEngine("127.0.0.1")
    engine.close()
    for _ in range(2):
        with pytest.raises(EngineFailed, match="the transfer engine is closed"):
            engine.register(Region(4096, 64))


def test_closing_takes_back_all_memory(library: Library) -> None:
    with MooncakeEngine("127.0.0.1") as engine:
        for addr in (4096, 8192):
            engine.register(Region(addr, 64))
    assert library.registered == {}


OP = ReadOp("a/0", 0, 4096, 64)
PEER = "127.0.0.1:1"


@pytest.fixture(params=["tcp", "rdma"])
def engine(library: Library, request: pytest.FixtureRequest) -> Iterator[MooncakeEngine]:
    with MooncakeEngine("127.0.0.1", request.param) as engine:
        engine.lend(Region(4096, 64))
        yield engine


def test_over_tcp_each_peer_has_an_engine_of_its_own_and_over_rdma_one_reads_from_all(
    engine: MooncakeEngine, library: Library
) -> None:
    """And over both the first contact with a peer is made on a separate engine."""
    other = "127.0.0.2:1"
    for session_id in (PEER, other, PEER):
        engine.connect(session_id)
        engine.start(session_id, OP)
    if engine.protocol == "tcp":
        wanted = [(2, PEER, 0), (2, PEER, 1), (3, other, 0), (3, other, 1), (2, PEER, 1)]
    else:
        wanted = [
            (2, PEER, 0),
            (1, PEER, 0),
            (1, PEER, 1),
            (3, other, 0),
            (1, other, 0),
            (1, other, 1),
            (1, PEER, 1),
        ]
        assert library.environment["MC_FORCE_TCP"] == "1"  # a first contact needs no more
    assert library.asked == wanted


def test_over_rdma_the_first_contact_reads_a_byte_of_what_the_peer_registered_first(
    engine: MooncakeEngine, library: Library
) -> None:
    """So the connection between the devices is made while the peer is known to answer."""
    library.first_address = 7 << 12
    library.answers = [0, 0, 1]
    engine.connect(PEER)
    engine.connect(PEER)
    assert library.read == ([] if engine.protocol == "tcp" else [(7 << 12, 1)])


@pytest.mark.parametrize("answer", [0, -1], ids=["does not come", "fails"])
def test_a_contact_is_made_though_the_byte_does_not_come(
    engine: MooncakeEngine, library: Library, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    monkeypatch.setattr("engine_loader.engines.mooncake.reader._BYTE_S", 0.01)
    library.first_address = 7 << 12
    library.answers = [answer]
    engine.connect(PEER)
    library.answers = [1]
    assert engine.done(engine.start(PEER, OP))


def test_over_rdma_an_engine_whose_page_cannot_be_registered_is_unavailable(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "register_memory", lambda addr, nbytes: -1)
    with pytest.raises(EngineUnavailable, match="check the limit on locked memory"):
        MooncakeEngine("127.0.0.1", "rdma")
    MooncakeEngine("127.0.0.1", "tcp").close()


def test_the_way_to_a_peer_is_cut_for_as_long_as_reads_from_it_linger(
    engine: MooncakeEngine, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handshake that holds up all others is tried again some times after it was cut."""
    cuts: list[tuple[Sequence[str], int]] = []
    monkeypatch.setattr("engine_loader.engines.mooncake.reader.cut", lambda *way: cuts.append(way))
    monkeypatch.setattr("engine_loader.engines.mooncake.reader._CUT_EVERY_S", 0.0)
    library.answers = [0, 0, 0, 1]
    engine.connect(PEER)
    engine.start(PEER, OP)
    engine.abandon(PEER)
    while not engine.settled(PEER):
        pass
    assert cuts == ([] if engine.protocol == "tcp" else [(["127.0.0.1"], 1)] * 4)


def test_a_read_is_asked_about_until_it_is_over_and_never_again(
    engine: MooncakeEngine, library: Library
) -> None:
    library.answers = [0, 0, 1]
    engine.connect(PEER)
    number = engine.start(PEER, OP)
    assert [engine.done(number) for _ in range(3)] == [False, False, True]
    with pytest.raises(KeyError):
        engine.done(number)


def test_a_read_that_failed_is_reported_and_one_that_timed_out_may_still_write(
    engine: MooncakeEngine, library: Library
) -> None:
    library.answers = [-2, -1]
    engine.connect(PEER)
    number = engine.start(PEER, OP)
    assert not engine.done(number)
    with pytest.raises(ReadFailed, match=r"cannot read from 127\.0\.0\.1:1"):
        engine.done(number)


def test_first_contacts_made_at_once_each_start_under_the_right_environment_and_leave_it_as_it_was(
    library: Library, opened: Callable[[], MooncakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    engine = opened()
    seen: list[str | None] = []

    def initialize(*args: str) -> int:
        time.sleep(0.005)  # as long as others need to get here too
        seen.append(os.environ.get("MC_FORCE_TCP"))
        return 0

    monkeypatch.setattr(library, "initialize", initialize)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(engine.connect, [f"127.0.0.{number}:1" for number in range(16)]))
    assert seen == ["1"] * 16
    assert "MC_FORCE_TCP" not in os.environ


def test_an_address_where_nobody_listens_is_found_by_the_first_contact(
    engine: MooncakeEngine,
) -> None:
    with pytest.raises(ReadFailed, match=r"cannot read from 127\.0\.0\.99:1"):
        engine.connect("127.0.0.99:1")
    with pytest.raises(ReadFailed):
        engine.start("127.0.0.99:1", OP)


def test_abandoned_reads_end_with_their_engine_and_where_that_is_shared_when_the_library_says_so(
    engine: MooncakeEngine, library: Library
) -> None:
    library.answers = [0, 0, -2, 1]
    engine.connect(PEER)
    numbers = [engine.start(PEER, OP) for _ in range(3)]
    engine.abandon(PEER)
    assert engine.settled(PEER) is (engine.protocol == "tcp")
    engine.connect(PEER)
    while not engine.settled(PEER):
        assert not engine.done(numbers[0])
        with pytest.raises(
            EngineFailed,
            match=r"a read from 127\.0\.0\.1:1 .* may still write 64 bytes to 0x1000",
        ):
            engine.start(PEER, OP)
    for number in numbers:
        with pytest.raises(ReadFailed):
            engine.done(number)
    assert not engine.done(engine.start(PEER, OP))


@pytest.mark.parametrize("call", ["batch_transfer_async_read", "transfer_check_status"])
def test_a_read_of_which_an_interrupt_hid_whether_it_is_over_may_still_write(
    engine: MooncakeEngine, library: Library, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    library.answers = [0]
    engine.connect(PEER)
    hidden: Callable[[], object] = partial(engine.start, PEER, OP)
    if call == "transfer_check_status":
        hidden = partial(engine.done, engine.start(PEER, OP))
    with monkeypatch.context() as patch:
        patch.setattr(library, call, lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            hidden()
    engine.abandon(PEER)
    if engine.protocol == "tcp":
        engine.take_back(Region(4096, 64))
    else:
        with pytest.raises(EngineFailed, match="may still write 64 bytes"):
            engine.take_back(Region(4096, 64))
    engine.close()
    assert engine.settled(PEER)


def test_a_contact_for_which_there_is_no_thread_fails_and_is_forgotten(
    engine: MooncakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(
            EngineFailed, match=r"no thread can be started for a contact with .*: raise ulimit -u"
        ):
            engine.connect(PEER)
    engine.connect(PEER)
    engine.start(PEER, OP)


def test_contacts_that_are_kept_have_a_limit_and_those_in_use_stay(
    library: Library, opened: Callable[[], MooncakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_loader.engines.mooncake.engine._MAX_READERS", 2)
    engine = opened()
    engine.lend(Region(4096, 64))
    engine.connect(PEER)
    number = engine.start(PEER, OP)
    for peer in range(2, 9):
        engine.connect(f"127.0.0.{peer}:1")
    assert engine.done(number)
    engine.start(PEER, OP)
    engine.start("127.0.0.8:1", OP)
    with pytest.raises(ReadFailed):
        engine.start("127.0.0.2:1", OP)
    engine.close()


# -- what the library raises
# --------------------------------------------------------------------------------------------------

RAISED = [
    RuntimeError("stackLimit"),
    TypeError("int"),
    ValueError("x"),
    OverflowError("int"),
    IndexError("x"),
    MemoryError(),
]


def raises(library: Library, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(library, call, fail)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["initialize", "get_rpc_port", "TransferEngine"])
def test_an_engine_that_fails_to_start_is_unavailable(
    library: Library, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    raises(library, monkeypatch, call, error)
    with pytest.raises(EngineUnavailable, match=r"cannot start on '127\.0\.0\.1'") as failed:
        MooncakeEngine("127.0.0.1")
    assert str(error) in str(failed.value)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_the_library_raises_about_a_peer_is_a_read_that_failed(
    engine: MooncakeEngine, library: Library, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    library.answers = [0]
    engine.connect(PEER)
    number = engine.start(PEER, OP)
    for call in ("batch_transfer_async_read", "transfer_check_status"):
        raises(library, monkeypatch, call, error)
    for read in (
        lambda: engine.start(PEER, OP),
        lambda: engine.done(number),
        lambda: engine.connect("127.0.0.2:1"),
    ):
        with pytest.raises(ReadFailed, match=r"cannot read from 127\.0\.0\.[12]:1: "):
            read()
    with pytest.raises(KeyError):
        engine.done(number)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_the_library_raises_about_our_memory_is_a_failed_engine(
    library: Library, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with MooncakeEngine("127.0.0.1") as engine:
        engine.register(Region(0, 64))
        raises(library, monkeypatch, "register_memory", error)
        raises(library, monkeypatch, "unregister_memory", error)
        with pytest.raises(EngineFailed, match="cannot register 64 bytes at 0x1000"):
            engine.register(Region(4096, 64))
        with pytest.raises(EngineFailed, match="cannot unregister 64 bytes at 0x0"):
            engine.unregister(Region(0, 64))
        monkeypatch.undo()


REGIONS = st.builds(Region, st.integers(0, 12), st.integers(1, 12))


@given(st.lists(st.tuples(st.booleans(), REGIONS), max_size=25))
def test_the_library_never_holds_a_byte_twice_and_holds_what_is_in_use(
    steps: list[tuple[bool, Region]],
) -> None:
    """Steps register a region, or take back one that is registered; none but the library knows what
    that comes to.
    """
    library = Library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine_loader.engines.mooncake.start.import_library", lambda: library)
        engine = MooncakeEngine("127.0.0.1")
    held: list[tuple[Region, Regions]] = []
    for registering, region in steps:
        if registering:
            held.append((region, engine.register(region)))
        elif held:
            engine.unregister(held.pop(region.addr % len(held))[0])
        for _, parts in held:
            for part in parts:
                assert any(
                    addr <= part.addr and part.end <= addr + size
                    for addr, size in library.registered.items()
                )
    for region, _ in held:
        engine.unregister(region)
    assert library.registered == {}
    engine.close()


def test_a_region_of_which_the_library_refuses_a_part_leaves_nothing_behind(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MooncakeEngine("127.0.0.1") as engine:
        engine.register(Region(4096, 64))
        register, before = library.register_memory, dict(library.registered)
        monkeypatch.setattr(
            library,
            "register_memory",
            lambda addr, size: register(addr, size) if addr < 4096 else -1,
        )
        with pytest.raises(EngineFailed, match="cannot register 64 bytes at 0x1040"):
            engine.register(Region(4032, 192))
        assert library.registered == before
        monkeypatch.undo()
