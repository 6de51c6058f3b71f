"""A rank whose weights lie in an arena of the host: `arena ENDPOINT NAMESPACE ENGINE`.

ENGINE is `host gpus`, which is cuda_ipc with the host's memory, or `socket`. Prints the pid of its
keeper, and each command once it is done. `update`: adds one to every element. `pause` and `resume`:
as a publication does. Ends with its input.
"""

from __future__ import annotations

import sys

import torch

from engine_loader import (
    CudaIpcEngine,
    PublishOptions,
    SocketEngine,
    arena_of,
    publish,
)
from engine_registry import ModelIdentity, Registry
from tests.support.host_gpus import HostGpus

MODEL = ModelIdentity("in an arena")


def weights() -> dict[str, torch.Tensor]:
    whole = torch.arange(30_000, dtype=torch.float32)
    return {
        "matrix": torch.arange(64 * 48, dtype=torch.float32).view(64, 48),
        "transposed": torch.arange(64 * 48, dtype=torch.int16).view(64, 48).t(),
        "tied": whole,
        "tied too": whole.view(300, 100),
        "short": torch.tensor(7, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
    }


def main(endpoint: str, namespace: str, engine: str) -> None:
    tensors = weights()
    with (
        arena_of(tensors),
        Registry.connect(endpoint, namespace=namespace, timeout_s=60) as registry,
        CudaIpcEngine(gpus=HostGpus())
        if engine == "host gpus"
        else SocketEngine("127.0.0.1", same_host=engine == "socket, same host") as served,
        publish(
            registry,
            served,
            instance="a",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=PublishOptions(digests=True, ttl_s=5.0),
        ) as publication,
    ):
        print(publication.registration.keeper_pid, flush=True)
        for line in sys.stdin:
            if line == "update\n":
                with publication.update():
                    for name in ("matrix", "transposed", "tied", "short"):
                        tensors[name].add_(1)
            else:
                getattr(publication, line.strip())()
            print(line, end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
