"""All ranks of an instance with fused weights: `fused INSTANCE LAYOUT`. See `tests.support.fused`.

Prints `published`, and ends with its input.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from engine_cli.options import engine_log
from engine_loader import MooncakeEngine, PublishOptions, publish
from engine_registry import ModelIdentity
from tests.support.fused import ranks_of
from tests.support.registry import connect

MODEL = ModelIdentity("fused")


def main(instance: str, layout: str) -> None:
    ranks = ranks_of(layout)
    with engine_log(), connect() as registry, ExitStack() as stack:
        for rank, part in enumerate(ranks):
            tensors, shards = part.tensors()
            engine = stack.enter_context(MooncakeEngine("127.0.0.1"))
            stack.enter_context(
                publish(
                    registry,
                    engine,
                    instance=instance,
                    rank=rank,
                    world_size=len(ranks),
                    tensors=tensors,
                    shards=shards,
                    model=MODEL,
                    options=PublishOptions(digests=True),
                )
            )
        print("published", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
