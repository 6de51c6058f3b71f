"""Memory that is lent to an engine, and what becomes of it where reads cannot be ended."""

from __future__ import annotations

import ctypes
import gc
import weakref
from contextlib import ExitStack

import pytest

from engine_loader import InProcessEngine
from engine_loader.engines.base import lend
from engine_loader.errors import EngineFailed
from engine_loader.planning.plan import ReadOp
from engine_registry import Region


class Memory:
    def __init__(self, content: bytes) -> None:
        self._block = ctypes.create_string_buffer(content, len(content))
        self.region = Region(ctypes.addressof(self._block), len(content))

    def __bytes__(self) -> bytes:
        return self._block.raw


def test_memory_that_a_read_may_still_write_to_stays_though_its_owner_is_forgotten() -> None:
    with InProcessEngine() as peer, InProcessEngine(can_end_reads=False) as reader:
        source, owner = Memory(b"\1" * 64), Memory(bytes(64))
        peer.register(source.region)
        kept = weakref.ref(owner)
        undo = ExitStack()
        lend(reader, undo, owner.region, owner=owner)
        reader.connect(peer.session_id)
        peer.pause()
        reader.start(peer.session_id, ReadOp("a/0", source.region.addr, owner.region.addr, 64))
        reader.abandon(peer.session_id)
        with pytest.raises(EngineFailed, match="may still write 64 bytes"):
            undo.close()
        del owner, undo
        gc.collect()
        still = kept()
        assert still is not None
        peer.resume()
        assert reader.settled(peer.session_id)
        assert bytes(still) == b"\1" * 64
