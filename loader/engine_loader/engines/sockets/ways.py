"""How the bytes of a peer come: over a connection, or from its memory, where it is on this host."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engine_loader.engines.sockets import wire
from engine_loader.engines.sockets.memory import Pieces, pieces_of
from engine_loader.engines.sockets.neighbour import Neighbour
from engine_loader.engines.sockets.offers import Offered
from engine_loader.engines.sockets.stream import Stream


class Way(Protocol):
    """For one thread. OSError and NotOurs say that it has come to an end."""

    ahead: int  # batches that are asked for before the first of them is taken

    def ask(self, remote: Pieces) -> None:
        """For some pieces of the peer's memory."""

    def take(self, local: Pieces, remote: Pieces) -> Offered:
        """Brings what was asked for first to its places. Of each piece, whether it is offered: the
        others do not come.
        """


class Connected(Way):
    ahead = 2  # while the bytes of one batch come, the peer prepares the next

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def ask(self, remote: Pieces) -> None:
        count = np.frombuffer(wire.COUNT.pack(len(remote)), np.uint8)
        self.stream.send(pieces_of(count, remote))

    def take(self, local: Pieces, remote: Pieces) -> Offered:
        head = self.stream.receive_bytes(wire.COUNT.size + len(remote))
        offered: Offered = np.frombuffer(head[wire.COUNT.size :], np.bool_)
        if wire.COUNT.unpack(head[: wire.COUNT.size])[0] != offered.sum():
            raise wire.NotOurs("its answer contradicts itself")
        self.stream.receive(local[offered])
        return offered


class Near(Way):
    ahead = 1

    def __init__(self, neighbour: Neighbour) -> None:
        self._neighbour = neighbour

    def ask(self, remote: Pieces) -> None:
        """The peer has no part in it."""

    def take(self, local: Pieces, remote: Pieces) -> Offered:
        return self._neighbour.read(local, remote)
