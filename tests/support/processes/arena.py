"""A rank whose weights lie in an arena of the host: `arena ENDPOINT NAMESPACE ENGINE HOLD_S
INSTANCE`. The last two may be left out.

ENGINE is `host gpus`, which is cuda_ipc with the host's memory, `tcp` or `socket`. Its keeper holds
the weights for HOLD_S. Prints the pid of its keeper, and each command once it is done. `update`:
adds one to every element. `begin`: begins an update, and changes some of them. `updates`: goes on
updating. `pause` and `resume`: as a publication does. `box`: publishes the same tensors anew, one
of them as the lower half of a whole. `offer others`: publishes other tensors. `load`: loads what
`source` publishes, and publishes that as `b`. Ends with its input.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch

from engine_loader import (
    CudaIpcEngine,
    MooncakeEngine,
    Publication,
    PublishOptions,
    Replica,
    Shard,
    SocketEngine,
    arena_of,
    load,
    publish,
)
from engine_loader.engines.base import ClosableEngine
from engine_registry import ModelIdentity, Registry
from tests.support.host_gpus import HostGpus

MODEL = ModelIdentity("in an arena")
LOWER_HALF = {"matrix": Shard((128, 48), (64, 0))}
CHANGING = ("matrix", "transposed", "tied", "short")


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


def opened(engine: str) -> ClosableEngine:
    if engine == "host gpus":
        return CudaIpcEngine(gpus=HostGpus())
    if engine == "tcp":
        return MooncakeEngine("127.0.0.1")
    return SocketEngine("127.0.0.1", same_host=engine == "socket, same host")


def update(publication: Publication, tensors: dict[str, torch.Tensor]) -> None:
    with publication.update():
        for name in CHANGING:
            tensors[name].add_(1)


def main(
    endpoint: str, namespace: str, engine: str, hold_s: str = "0", instance: str = "a"
) -> None:
    tensors = weights()
    options = PublishOptions(digests=True, ttl_s=5.0, hold_s=float(hold_s), values={"step": 7})
    with (
        arena_of(tensors),
        Registry.connect(endpoint, namespace=namespace, timeout_s=60) as registry,
        opened(engine) as served,
        publish(
            registry,
            served,
            instance=instance,
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=options,
        ) as publication,
        ExitStack() as stack,
    ):
        print(publication.registration.keeper_pid, flush=True)
        for line in sys.stdin:
            if line == "update\n":
                update(publication, tensors)
            elif line == "begin\n":
                stack.enter_context(publication.update())
                tensors["matrix"].add_(1)
            elif line == "box\n":
                publication.replace(tensors, LOWER_HALF)
            elif line == "offer others\n":
                others = {"long": torch.zeros(3000)}
                arena_of(others).close()
                publication.replace(others)
            elif line == "updates\n":
                print(line, end="", flush=True)
                while True:
                    update(publication, tensors)
            elif line == "load\n":
                found = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
                found["tied too"] = found["tied"].view(300, 100)
                arena_of(found).close()
                print(line, end="", flush=True)
                report = load(
                    registry,
                    served,
                    "source",
                    rank=0,
                    tensors=found,
                    publish=Replica("b", options=options),
                )
                if report.publication is not None:
                    stack.enter_context(report.publication)
                continue
            else:
                getattr(publication, line.strip())()
            print(line, end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
