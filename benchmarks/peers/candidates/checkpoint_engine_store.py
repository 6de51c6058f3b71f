"""checkpoint-engine's P2PStore: one read of the source's block into the reader's, as its
ParameterServer does, and a copy from there into the tensors.

It asks CUDA and the routes of the machine where it is. `_NoDevices` answers for hosts without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import checkpoint_engine.p2p_store as product
import torch

from benchmarks.peers.sets import Tensors, flat, spread
from benchmarks.peers.work import Facts, Load, Work


class _NoDevices:
    transfer_engine_protocol = "tcp"

    class device_module:
        @staticmethod
        def device_count() -> int:
            return 1

    @staticmethod
    def rdma_device(rank: int) -> str:
        return ""


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    block = flat(tensors)
    tensors.clear()  # the copy holds them
    store = _store(work.host, block)
    yield {"address": store.addr, "block": block.data_ptr()}


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    block = torch.zeros(sum(work.sizes), dtype=torch.uint8)
    store = _store(work.host, block)

    def run() -> None:
        store.batch_transfer_sync_read(
            work.facts["address"], [block.data_ptr()], [work.facts["block"]], [block.nbytes]
        )
        spread(block, tensors)

    yield Load(run)


def _store(host: str, block: torch.Tensor) -> Any:
    product.get_ip = lambda: host
    store = product.P2PStore(_NoDevices())
    store.register_named_tensors({"memory_pool": block})
    return store
