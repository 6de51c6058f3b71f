"""Reads that were given up and may still write, as their engine cannot end them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine_loader.engines.base import session_of
from engine_loader.errors import EngineFailed
from engine_loader.planning.plan import ReadOp


@dataclass(frozen=True)
class _Read:
    peer: str
    op: ReadOp
    ended: Callable[[], bool]


class Lingering:
    """Memory that such reads go to is nobody's until they have ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads: list[_Read] = []

    def add(self, peer: str, op: ReadOp, ended: Callable[[], bool]) -> None:
        """`ended` says, at once, whether the read cannot write any more. It is asked until then."""
        with self._lock:
            self._reads.append(_Read(peer, op, ended))

    def settled(self, peer: str) -> bool:
        return not any(read.peer == peer for read in self._left())

    def check(self, addr: int, nbytes: int) -> None:
        """EngineFailed where one of them may still write to that memory."""
        for read in self._left():
            start = read.op.dst_addr
            if start < addr + nbytes and addr < start + read.op.nbytes:
                raise EngineFailed(
                    f"a read from {session_of(read.peer)} that was given up may still write "
                    f"{read.op.nbytes} bytes to {start:#x}",
                    "use that memory again when the peer has answered or ended, or close "
                    "this engine first",
                )

    def _left(self) -> list[_Read]:
        if self._reads:
            with self._lock:
                self._reads = [read for read in self._reads if not read.ended()]
        return self._reads

    def clear(self) -> None:
        """All of them have ended with their engine."""
        with self._lock:
            self._reads = []
