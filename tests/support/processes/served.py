"""An engine that serves bytes of a known content: `served NBYTES ENGINE [WHERE]`.

ENGINE is `mooncake` or `socket`, with what MooncakeEngine or SocketEngine takes; `cuda_ipc`, with
a device that has the bytes, and `arena` if they are in one; or `host gpus`, which is cuda_ipc with
the host's memory, with `pieces` that of several descriptors, with `arena` an arena of the host,
which a process like a keeper hands out.
Prints its session, the address of the bytes and what it exports. `again` on its input: the bytes
are taken back and offered anew. `fork`: it forks a child that outlives it, and prints its pid. Ends
with its input, or killed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from engine_loader import MooncakeEngine, arena_of
from engine_loader.engines.base import ClosableEngine
from engine_loader.engines.cuda_ipc.engine import CudaIpcEngine
from engine_loader.engines.sockets.engine import SocketEngine
from engine_registry import Region
from engine_registry.registration.descriptors import Descriptors
from engine_registry.registration.keeper.passing import pair, pass_on
from engine_registry.schema.manifest import Export
from tests.support.host_gpus import HostGpus


def content(nbytes: int) -> bytes:
    return bytes(range(256)) * (nbytes // 256)


def export_of(printed: str) -> Export:
    addr, nbytes, handle = printed.split(":")
    return Export(int(addr), int(nbytes), bytes.fromhex(handle))


def _printed(export: Export) -> str:
    return f"{export.addr}:{export.nbytes}:{export.handle.hex()}"


def _served(nbytes: int, engine: str, *where: str) -> tuple[ClosableEngine, Region, Any]:
    """The engine; the bytes; and what keeps them."""
    if engine == "cuda_ipc" or where == ("arena",):
        device = where[0] if engine == "cuda_ipc" else "cpu"
        tensor = torch.frombuffer(bytearray(content(nbytes)), dtype=torch.uint8).to(device)
        if "arena" in where:
            arena_of([tensor]).close()
        gpus = None if engine == "cuda_ipc" else HostGpus()
        return CudaIpcEngine(gpus=gpus), Region(tensor.data_ptr(), nbytes), tensor
    if engine == "host gpus":
        gpus = HostGpus()
        addr = gpus.allocate_pieces(*_sizes(nbytes)) if where else gpus.allocate(nbytes)
        region = Region(addr, nbytes)
        ctypes.memmove(region.addr, content(nbytes), nbytes)
        return CudaIpcEngine(gpus=gpus), region, gpus
    kinds: dict[str, Callable[..., ClosableEngine]] = {
        "mooncake": MooncakeEngine,
        "socket": SocketEngine,
    }
    memory = ctypes.create_string_buffer(content(nbytes), nbytes)
    return kinds[engine](*where), Region(ctypes.addressof(memory), nbytes), memory


def _sizes(nbytes: int) -> list[int]:
    """Of pieces, of which neighbours are equal or differ."""
    some = [max(nbytes // 8, mmap.PAGESIZE)] * 2
    return [*some, nbytes - sum(some)] if sum(some) < nbytes else [nbytes]


def hand_out(descriptors: Descriptors) -> subprocess.Popen[bytes]:
    """As a keeper does, in a process that ends with this one."""
    rank, keeper = pair()
    with rank, keeper, descriptors:
        number = str(keeper.fileno())
        command = [sys.executable, "-m", "tests.support.processes.desk", number]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[keeper.fileno()])
        assert pass_on(rank, descriptors, 60.0, 1.0)
    return process


def fork() -> None:
    if pid := os.fork():
        print(pid, flush=True)
    else:
        signal.pause()


def main(nbytes: str, *where: str) -> None:
    engine, region, _kept = _served(int(nbytes), *where)
    with engine:
        parts = engine.register(region)
        exports = engine.exports(parts)
        descriptors = engine.descriptors(exports)
        _holder = hand_out(descriptors) if descriptors is not None else None
        print(engine.session_id, region.addr, *map(_printed, exports), flush=True)
        for line in sys.stdin:
            if line == "fork\n":
                fork()
                continue
            engine.unregister(region)
            engine.register(region)
            print("again", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
