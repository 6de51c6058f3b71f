"""torch.distributed's broadcast over gloo. `variant`: of each tensor, or of a flat copy of all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.peers.sets import Tensors, flat, spread
from benchmarks.peers.work import Facts, Load, Work, free_port

TENSOR, FLAT = "tensor", "flat"
_TIMEOUT = timedelta(minutes=30)
_SOURCE, _READER = 0, 1


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    """Broadcasts everything for each broadcast of the reader's."""
    port = free_port(work.host)
    blocks = [flat(tensors)] if work.variant == FLAT else list(tensors.values())
    if work.variant == FLAT:
        tensors.clear()  # the copy holds them

    def serve() -> None:
        _join(work.host, port, _SOURCE)
        while True:
            dist.broadcast(torch.zeros(1), _READER)
            for block in blocks:
                dist.broadcast(block, _SOURCE)

    threading.Thread(target=serve, daemon=True).start()
    yield {"port": port, "host": work.host}


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    _join(work.facts["host"], work.facts["port"], _READER)
    block = torch.zeros(sum(work.sizes) if work.variant == FLAT else 0, dtype=torch.uint8)

    def run() -> None:
        dist.broadcast(torch.zeros(1), _READER)
        if work.variant == FLAT:
            dist.broadcast(block, _SOURCE)
            spread(block, tensors)
        else:
            for tensor in tensors.values():
                dist.broadcast(tensor, _SOURCE)

    yield Load(run)


def _join(host: str, port: int, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if host.startswith("127.") else "eth0"
    dist.init_process_group(
        "gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=2, timeout=_TIMEOUT
    )
