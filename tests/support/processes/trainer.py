"""A rank that publishes snapshots: `trainer INSTANCE RANK WORLD_SIZE [COUNT]`.

Its words say of which version and rank they are, see `tensors_of`. Takes lines on standard input:
`snapshot` makes the next version and prints `version N`; `release N` waits for the other ranks, and
prints `released N` or the name of the error. Ends with its input, or killed.
"""

from __future__ import annotations

import sys

import torch

from engine_loader import PublishOptions, Shard, Snapshots, publish
from engine_registry import ModelIdentity
from engine_registry.errors import RegistryError
from tests.support.launches import Origin, words
from tests.support.registry import connect
from tests.support.transfer import engine_at

MODEL = ModelIdentity("trained")
WORDS = 4096  # of each rank
Tensors = dict[str, torch.Tensor]


def tensors_of(version: int, rank: int) -> Tensors:
    return {"w": words(Origin(1, version, rank), WORDS, first=rank * WORDS)}


def shards_of(rank: int, world_size: int) -> dict[str, Shard]:
    return {"w": Shard((world_size * WORDS,), (rank * WORDS,))}


def main(instance: str, rank: str, world_size: str, count: str = "3") -> None:
    number, version = int(rank), 0
    tensors = tensors_of(0, number)
    with (
        connect() as registry,
        engine_at("127.0.0.1") as engine,
        publish(
            registry,
            engine,
            instance=instance,
            rank=number,
            world_size=int(world_size),
            tensors=tensors,
            shards=shards_of(number, int(world_size)),
            model=MODEL,
            options=PublishOptions(snapshots=Snapshots(count=int(count)), ttl_s=3.0),
        ) as publication,
    ):
        print("version 0", flush=True)
        for line in sys.stdin:
            command, *given = line.split()
            if command == "snapshot":
                version += 1
                tensors["w"].copy_(tensors_of(version, number)["w"])
                print("version", publication.snapshot(), flush=True)
                continue
            try:
                made = publication.release(int(given[0]), timeout_s=60.0)
                print("released", made.version, flush=True)
            except RegistryError as exc:
                print(type(exc).__name__, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
