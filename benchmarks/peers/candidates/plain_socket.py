"""One connection of TCP, and nothing around it: the source sends all tensors for each byte that
comes.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from benchmarks.peers.sets import Tensors, views
from benchmarks.peers.work import Facts, Load, Work

_AT_ONCE = 64  # pieces of memory in a call


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    memory = views(tensors)
    with socket.create_server((work.host, 0)) as server:

        def serve() -> None:
            while True:
                peer, _ = server.accept()
                threading.Thread(target=_send_to, args=(peer, memory), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield {"address": server.getsockname()}


def _send_to(peer: socket.socket, memory: Sequence[memoryview]) -> None:
    with peer:
        while peer.recv(1):
            _all(memory, peer.sendmsg)


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    memory = views(tensors)
    with socket.create_connection(tuple(work.facts["address"])) as peer:

        def run() -> None:
            peer.sendall(b"!")
            _all(memory, lambda some: peer.recvmsg_into(some)[0])

        yield Load(run)


def _all(memory: Sequence[memoryview], move: Callable[[list[memoryview]], int]) -> None:
    """Moves all of it, by calls that each move some from the beginning of what they are given."""
    at, rest = 0, memory[0]
    while True:
        moved = move([rest, *memory[at + 1 : at + _AT_ONCE]])
        if not moved:
            raise ConnectionError("the source has closed its connection")
        while moved >= len(rest):
            moved -= len(rest)
            at += 1
            if at == len(memory):
                return
            rest = memory[at]
        rest = rest[moved:]
