"""The engine that serves our memory, where it also reads from all peers.

Over rdma the library connects to a peer's device when it first reads from it, by a handshake with
the peer's process, in the one thread that begins all reads. A peer that has stopped by then holds
up the reads from all others, for a minute. So such an engine offers one page before anything else,
and each first contact reads a byte of it, while the peer is known to answer. Reads that follow
need the peer's device alone. Where both sides have several devices, that is true of one pair: the
library draws a pair at random for each read, near the memory on either side, and no call names one.
"""

from __future__ import annotations

import ctypes
import mmap
import time

from engine_loader.engines.mooncake.binding import Binding
from engine_loader.errors import ReadFailed
from engine_loader.planning.plan import ReadOp
from engine_registry.schema.manifest import Region

_NAP_S = 0.001


class SharedEngine:
    """`binding` must not end before this does: the library writes to the page."""

    def __init__(self, binding: Binding) -> None:
        """EngineFailed where the page cannot be registered."""
        self.binding = binding
        # A page that nothing else lies on: a forked child may lose the pages that are registered.
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._addr = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        binding.register(Region(self._addr, mmap.PAGESIZE))

    def meet(self, session_id: str, patience_s: float) -> bool:
        """As `Binding.meet`, and waits up to `patience_s` until a byte of the peer has come.

        That no byte comes is no failure: reads of the caller's say why.
        """
        if not self.binding.meet(session_id):
            return False
        addr = self.binding.first_address(session_id)
        if addr is not None:
            self._read_byte(session_id, addr, time.monotonic() + patience_s)
        return True

    def _read_byte(self, session_id: str, addr: int, until: float) -> None:
        try:
            batch = self.binding.begin(session_id, ReadOp("", addr, self._addr, 1))
            while batch is not None and self.binding.arrived(session_id, batch) is None:
                if time.monotonic() > until:
                    return
                time.sleep(_NAP_S)
        except ReadFailed:
            return
