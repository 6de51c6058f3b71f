"""torch.distributed's broadcast over gloo, of a flat copy of all tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.peers.work import free_port
from benchmarks.updates.candidates import Facts, Receiving, Sending, Work
from benchmarks.updates.weights import Tensors, nbytes_of

_TIMEOUT = timedelta(minutes=10)
_SOURCE, _READER = 0, 1


@contextmanager
def send(work: Work, tensors: Tensors) -> Iterator[Sending]:
    port = free_port(work.host)
    block = _block(tensors)

    def send_one(_: int) -> None:
        _join(work.host, port, _SOURCE)
        for tensor, part in _parts(block, tensors):
            part.copy_(tensor)
        dist.broadcast(block, _SOURCE)

    yield Sending({"host": work.host, "port": port}, send_one)
    _leave()


@contextmanager
def receive(work: Work, tensors: Tensors) -> Iterator[Receiving]:
    block = _block(tensors)

    def receive_one(_: int) -> Facts:
        _join(work.facts["host"], work.facts["port"], _READER)
        dist.broadcast(block, _SOURCE)
        for tensor, part in _parts(block, tensors):
            tensor.copy_(part)
        return {"nbytes": block.nbytes}

    yield Receiving(receive_one)
    _leave()


def _block(tensors: Tensors) -> torch.Tensor:
    return torch.zeros(nbytes_of(tensors) // 2, dtype=torch.bfloat16)


def _parts(block: torch.Tensor, tensors: Tensors) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    sizes = [tensor.numel() for tensor in tensors.values()]
    for tensor, part in zip(tensors.values(), block.split(sizes), strict=True):
        yield tensor, part.view(tensor.shape)


def _join(host: str, port: int, rank: int) -> None:
    """Once both sides have come so far, the first time."""
    if not dist.is_initialized():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo" if host.startswith("127.") else "eth0"
        dist.init_process_group(
            "gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=2, timeout=_TIMEOUT
        )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
