"""An engine that serves bytes of a known content: `served NBYTES ENGINE [WHERE]`.

ENGINE is `mooncake` or `socket`, with what MooncakeEngine or SocketEngine takes; `cuda_ipc`, with
a GPU that has the bytes; or `host gpus`, which is cuda_ipc with the host's memory. Prints its
session, the address of the bytes and what it exports. `again` on its input: the bytes are taken
back and offered anew. `fork`: it forks a child that outlives it, and prints its pid. Ends with its
input, or killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from engine_loader import MooncakeEngine
from engine_loader.engines.base import ClosableEngine
from engine_loader.engines.cuda_ipc.engine import CudaIpcEngine
from engine_loader.engines.sockets.engine import SocketEngine
from engine_registry import Region
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
    if engine == "cuda_ipc":
        tensor = torch.frombuffer(bytearray(content(nbytes)), dtype=torch.uint8).to(where[0])
        return CudaIpcEngine(), Region(tensor.data_ptr(), nbytes), tensor
    if engine == "host gpus":
        gpus = HostGpus()
        region = Region(gpus.allocate(nbytes), nbytes)
        ctypes.memmove(region.addr, content(nbytes), nbytes)
        return CudaIpcEngine(gpus=gpus), region, gpus
    kinds: dict[str, Callable[..., ClosableEngine]] = {
        "mooncake": MooncakeEngine,
        "socket": SocketEngine,
    }
    memory = ctypes.create_string_buffer(content(nbytes), nbytes)
    return kinds[engine](*where), Region(ctypes.addressof(memory), nbytes), memory


def fork() -> None:
    if pid := os.fork():
        print(pid, flush=True)
    else:
        signal.pause()


def main(nbytes: str, *where: str) -> None:
    engine, region, _kept = _served(int(nbytes), *where)
    with engine:
        parts = engine.register(region)
        exports = map(_printed, engine.exports(parts))
        print(engine.session_id, region.addr, *exports, flush=True)
        for line in sys.stdin:
            if line == "fork\n":
                fork()
                continue
            engine.unregister(region)
            engine.register(region)
            print("again", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
