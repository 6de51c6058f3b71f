"""The adapter of the transfer engine, with a stand-in for the library: what it is asked, and what is made of its answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import MooncakeEngine
from loader.engine import _what_to_install
from loader.errors import EngineFailed, EngineUnavailable
from loader.plan import ReadOp
from registry import Region


class Library:
    """mooncake's TransferEngine: registers, and refuses to register a byte twice."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.initialized: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        self.code = 0  # of every answer
        self.asked = 0

    def TransferEngine(self) -> Library:
        return self

    def initialize(self, *args: str) -> int:
        self.initialized, self.environment = args, dict(os.environ)
        return self.code

    def get_rpc_port(self) -> int:
        return 15000

    def register_memory(self, addr: int, nbytes: int) -> int:
        self.asked += 1
        if self.code == 0:
            assert all(addr + nbytes <= other or other + size <= addr for other, size in self.registered.items())
            self.registered[addr] = nbytes
        return self.code

    def unregister_memory(self, addr: int) -> int:
        del self.registered[addr]
        return 0

    def batch_transfer_sync_read(self, session_id: str, dst: Sequence[int], src: Sequence[int], nbytes: Sequence[int]) -> int:
        self.asked += 1
        return self.code


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr("loader.engine._import_mooncake", lambda: library)
    return library


@pytest.mark.parametrize(
    ("protocol", "wanted"),
    [
        ("tcp", {"MC_FORCE_TCP": "1", "MC_INTRANODE_NVLINK": None}),
        ("rdma", {"MC_FORCE_TCP": None, "MC_INTRANODE_NVLINK": None}),
        ("nvlink_intra", {"MC_FORCE_TCP": None, "MC_INTRANODE_NVLINK": "1"}),
    ],
)
def test_the_protocol_is_told_through_the_environment_which_is_then_as_before(
    library: Library, monkeypatch: pytest.MonkeyPatch, protocol: str, wanted: dict[str, str | None]
) -> None:
    for name in ("MC_FORCE_TCP", "MC_INTRANODE_NVLINK", "MC_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with MooncakeEngine("10.0.0.1", protocol, device="mlx5_0", fabric="rack-1") as engine:
        assert (engine.session_id, engine.protocol, engine.fabric) == ("10.0.0.1:15000", protocol, "rack-1")
    assert library.initialized == ("10.0.0.1", "P2PHANDSHAKE", protocol, "mlx5_0")
    assert {name: library.environment.get(name) for name in wanted} == wanted
    assert library.environment["MC_LOG_LEVEL"] == "ERROR"
    assert dict(os.environ) == before


def test_a_log_level_that_the_user_has_set_stays(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_LOG_LEVEL", "INFO")
    MooncakeEngine("127.0.0.1").close()
    assert library.environment["MC_LOG_LEVEL"] == os.environ["MC_LOG_LEVEL"] == "INFO"


def test_an_engine_that_does_not_start_is_unavailable_and_says_what_to_check(library: Library) -> None:
    library.code = -1
    with pytest.raises(EngineUnavailable, match=r"cannot start on '10.0.0.1' with protocol 'tcp' \(code -1\): check that the host"):
        MooncakeEngine("10.0.0.1")


def test_an_unknown_protocol_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EngineUnavailable, match="protocol 'pigeon' is unknown: use one of tcp, rdma, nvlink_intra"):
        MooncakeEngine("127.0.0.1", protocol="pigeon")


def test_a_library_that_cannot_be_imported_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(EngineUnavailable, match=r"the transfer engine (is not installed|cannot be imported): "):
        MooncakeEngine("127.0.0.1")


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [
        ("No module named 'mooncake'", "pip install 'engine-registry[cpu]'"),
        ("libibverbs.so.1: cannot open shared object file: No such file or directory", "apt-get install libibverbs1"),
        (
            "libcudart.so.12: cannot open shared object file: No such file or directory",
            "pip install 'engine-registry[cpu]' instead",
        ),
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "pip install 'engine-registry[cpu]' instead"),
        ("undefined symbol: xyz", "undefined symbol: xyz"),
    ],
)
def test_what_is_missing_is_told_with_the_package_that_has_it(complaint: str, advice: str) -> None:
    assert advice in _what_to_install(complaint)


def test_memory_that_the_library_refuses_is_not_taken_for_registered(library: Library) -> None:
    engine, region = MooncakeEngine("127.0.0.1"), Region(4096, 64)
    library.code = -202
    with pytest.raises(EngineFailed, match=r"cannot register 64 bytes at 0x1000 \(code -202\): check the limit on locked memory"):
        engine.register(region)
    library.code = 0
    with pytest.raises(EngineFailed, match="not registered"):
        engine.read("h:1", [ReadOp("a/0", 0, 4096, 64)])
    engine.register(region)
    assert library.registered == {4096: 64}
    engine.close()


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


def test_a_batch_of_nothing_does_not_bother_the_library(library: Library) -> None:
    with MooncakeEngine("127.0.0.1") as engine:
        engine.read("h:1", [])
    assert library.asked == 0


REGIONS = st.builds(Region, st.integers(0, 12), st.integers(1, 12))


@given(st.lists(st.tuples(st.booleans(), REGIONS), max_size=25))
def test_the_library_never_holds_a_byte_twice_and_holds_what_is_in_use(steps: list[tuple[bool, Region]]) -> None:
    """Steps register a region, or take back one that is registered; none but the library knows what that comes to."""
    library = Library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loader.engine._import_mooncake", lambda: library)
        engine = MooncakeEngine("127.0.0.1")
    held: list[Region] = []
    for registering, region in steps:
        if registering:
            before = dict(library.registered)
            try:
                engine.register(region)
            except EngineFailed:
                assert library.registered == before
                assert any(region.addr < addr + size and addr < region.end for addr, size in before.items())
            else:
                held.append(region)
        elif held:
            engine.unregister(held.pop(region.addr % len(held)))
        for use in held:
            assert any(addr <= use.addr and use.end <= addr + size for addr, size in library.registered.items())
    for use in held:
        engine.unregister(use)
    assert library.registered == {}
    engine.close()
