"""A process that adopts the weights of `arena`: `adopter ENDPOINT NAMESPACE HOW`.

HOW is `adopt`, `share`, or `hang`, which stays where all has been checked and nothing is adopted
yet. Prints what it has adopted, as JSON, then each command once it is done. `publish`: publishes
the weights as `a`, whose keeper holds them for a minute. `write`: writes to a tensor. Ends with its
input.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack

import torch

from engine_loader import PublishOptions, SocketEngine, adopt
from engine_registry import Registry, failpoints
from tests.support.processes.arena import CHANGING, MODEL, weights


def hang() -> None:
    print("hangs", flush=True)
    time.sleep(1000)


def main(endpoint: str, namespace: str, how: str) -> None:
    if how == "hang":
        failpoints.ACTIONS["adopt.before_finish"] = hang
    tensors = weights()
    with (
        Registry.connect(endpoint, namespace=namespace, timeout_s=60) as registry,
        SocketEngine("127.0.0.1") as engine,
        ExitStack() as stack,
    ):
        for tensor in tensors.values():
            tensor.zero_()
        adopted = adopt(registry, MODEL, tensors, rank=0, world_size=1, shared=how == "share")
        if adopted is None:
            print("null", flush=True)
            return
        stack.enter_context(adopted)
        added = {
            name: int((tensors[name] - weights()[name]).flatten()[0].item()) for name in CHANGING
        }
        equal = all(
            torch.equal(tensors[name], tensor + added[name]) if name in added else True
            for name, tensor in weights().items()
        )
        print(
            json.dumps(
                {
                    "version": adopted.version,
                    "content": adopted.content,
                    "verified": adopted.verified,
                    "equal": equal,
                    "added": sorted(set(added.values())),
                }
            ),
            flush=True,
        )
        for line in sys.stdin:
            if line == "publish\n":
                options = PublishOptions(hold_s=60)
                stack.enter_context(
                    adopted.publish(registry, engine, instance="a", options=options)
                )
            elif line == "write\n":
                tensors["matrix"].add_(1)
            print(line, end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
