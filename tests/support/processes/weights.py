"""A rank that publishes weights:

`python -m tests.support.processes.weights INSTANCE RANK WORLD_SIZE SEED`; until killed.
"""

from __future__ import annotations

import sys

from engine_cli.options import engine_log
from engine_loader import MooncakeEngine, publish
from engine_registry import ModelIdentity
from tests.integration.test_load import weights
from tests.support.registry import connect


def main(instance: str, rank: str, world_size: str, seed: str) -> None:
    registry = connect()
    with (
        engine_log(),
        publish(
            registry,
            MooncakeEngine("127.0.0.1", protocol="tcp"),
            instance=instance,
            rank=int(rank),
            world_size=int(world_size),
            tensors=weights(int(seed)),
            model=ModelIdentity("m"),
        ),
    ):
        print("published", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
