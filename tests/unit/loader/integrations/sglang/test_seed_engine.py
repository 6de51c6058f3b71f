"""SGLang's transfer engine as one that serves: it registers nothing twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine_loader.errors import EngineFailed
from engine_loader.integrations.sglang.seed_engine import SeedEngine
from engine_loader.planning.plan import ReadOp
from engine_registry import Region


class Library:
    """Mooncake's calls for memory."""

    def __init__(self, code: int = 0) -> None:
        self.registered: dict[int, int] = {}
        self._code = code

    def register_memory(self, addr: int, nbytes: int) -> int:
        self.registered[addr] = nbytes
        return self._code

    def unregister_memory(self, addr: int) -> int:
        del self.registered[addr]
        return 0


WEIGHTS = [Region(4096, 100), Region(4196, 28), Region(8192, 64), Region(8200, 8), Region(9000, 0)]


PIECES = (Region(4096, 100), Region(4196, 28))


def engine(library: Library | None = None) -> SeedEngine:
    return SeedEngine(library or Library(), "10.0.0.7:15001", "rdma", WEIGHTS)


def test_peers_read_from_the_session_of_sglang() -> None:
    assert (engine().session_id, engine().protocol, engine().fabric) == (
        "10.0.0.7:15001",
        "rdma",
        "",
    )


def test_weights_are_served_in_the_pieces_that_sglang_has_registered() -> None:
    library = Library()
    seed = engine(library)
    assert seed.register(Region(4096, 128)) == PIECES
    assert seed.register(Region(8192, 4096)) == (Region(8192, 64),)
    assert seed.register(Region(4000, 9000)) == (*PIECES, Region(8192, 64))
    assert seed.register(Region(4190, 10)) == (Region(4190, 6), Region(4196, 4))
    seed.unregister(Region(4096, 128))
    assert library.registered == {}


def test_other_memory_is_registered_and_taken_back() -> None:
    library = Library()
    seed = engine(library)
    for addr in (12288, 4224, 4032):  # the last two touch weights, and have no byte of them
        assert seed.register(Region(addr, 64)) == (Region(addr, 64),)
        assert library.registered == {addr: 64}
        seed.unregister(Region(addr, 64))
        assert library.registered == {}


def test_memory_that_is_refused_is_an_error_with_its_code() -> None:
    with pytest.raises(EngineFailed, match=r"cannot register 64 bytes at 0x3000 \(code -5\)"):
        engine(Library(-5)).register(Region(12288, 64))


@pytest.mark.parametrize(
    "call",
    [
        lambda seed: seed.connect("peer"),
        lambda seed: seed.start("peer", ReadOp("k", 1, 2, 3)),
        lambda seed: seed.done(1),
        lambda seed: seed.lend(Region(1, 1)),
        lambda seed: seed.take_back(Region(1, 1)),
    ],
)
def test_it_reads_nothing(call: Callable[[SeedEngine], object]) -> None:
    with pytest.raises(EngineFailed, match="SGLang reads with it"):
        call(engine())
    engine().abandon("peer")
    assert engine().settled("peer")
