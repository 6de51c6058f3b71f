"""NCCL's send and receive of the same tensors, in two processes of torch.distributed; on CPUs, for
tests, those of Gloo.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial

import click
import torch
from torch import distributed

from benchmarks.gpu.loads import Place, use
from benchmarks.gpu.rows import ALL_NCCL, EACH_NCCL, Row, Target, in_turns
from benchmarks.gpu.sets import SETS, allocate, filled, nbytes_of
from benchmarks.processes import another_process
from benchmarks.serving import HOST
from engine_loader.tensors.cuda import wait_for

_GROUP = 256
_PATIENCE = timedelta(seconds=120)


def nccl(src: Place, dst: Place, backend: str, rounds: int) -> list[Row]:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = str(free.getsockname()[1])
    name, nbytes = dst.tensor_set, nbytes_of(dst.layout)
    with ExitStack() as stack:
        for rank, place in enumerate((src, dst)):
            args = (str(rank), port, backend, str(rounds), name, str(place.scale), place.device)
            _, line = stack.enter_context(another_process("benchmarks.gpu.nccl", "exchange", *args))
    return [Row(name, what, nbytes, tuple(some)) for what, some in json.loads(line).items()]


def exchange(
    rank: str, port: str, backend: str, rounds: str, tensor_set: str, scale: str, device: str
) -> None:
    """Rank 0 sends, rank 1 receives and prints the times."""
    use(device)
    layout = SETS[tensor_set](float(scale))
    wanted = filled(layout, device)
    if rank == "0":
        click.echo("sends")  # before it waits for the other one
    _join(rank, port, backend, device)
    if rank == "0":
        end: _End = _Sender(wanted, device)
    else:
        end = _Receiver(wanted, allocate(layout, device), device)
    moves = {EACH_NCCL: end.each, ALL_NCCL: end.grouped}
    took = in_turns(
        {what: partial(end.run, what, move) for what, move in moves.items()}, int(rounds)
    )
    distributed.destroy_process_group()  # at the same time as the other one, for whom it may wait
    if rank == "1":
        click.echo(json.dumps(took))
    sys.stdin.read()


def _join(rank: str, port: str, backend: str, device: str) -> None:
    os.environ["NCCL_SOCKET_IFNAME"] = (
        "lo"  # where the two find each other; what is sent goes from GPU to GPU
    )
    device_id = torch.device(device) if device.startswith("cuda") else None
    distributed.init_process_group(
        backend,
        init_method=f"tcp://{HOST}:{port}",
        rank=int(rank),
        world_size=2,
        timeout=_PATIENCE,
        device_id=device_id,
    )


class _End:
    def __init__(self, tensors: dict[str, torch.Tensor], device: str, sends: bool) -> None:
        self._tensors = list(tensors.values())
        self._device = torch.device(device)
        self._sends = sends

    def each(self) -> None:
        for tensor in self._tensors:
            if self._sends:
                distributed.send(tensor, 1)
            else:
                distributed.recv(tensor, 0)

    def grouped(self) -> None:
        move, peer = (distributed.isend, 1) if self._sends else (distributed.irecv, 0)
        for start in range(0, len(self._tensors), _GROUP):
            some = [
                distributed.P2POp(move, tensor, peer)
                for tensor in self._tensors[start : start + _GROUP]
            ]
            for work in distributed.batch_isend_irecv(some):
                work.wait()

    def run(self, what: str, move: Callable[[], None]) -> float:
        """Seconds from when both are ready."""
        distributed.barrier()
        wait_for([self._device])
        start = time.perf_counter()
        move()
        wait_for([self._device])
        return time.perf_counter() - start


class _Sender(_End):
    def __init__(self, tensors: dict[str, torch.Tensor], device: str) -> None:
        super().__init__(tensors, device, sends=True)


class _Receiver(_End):
    def __init__(
        self, wanted: dict[str, torch.Tensor], into: dict[str, torch.Tensor], device: str
    ) -> None:
        super().__init__(into, device, sends=False)
        self._target = Target(into, wanted)

    def run(self, what: str, move: Callable[[], None]) -> float:
        return self._target.time(what, lambda: super(_Receiver, self).run(what, move))[1]
