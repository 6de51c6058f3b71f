"""All ranks of an instance whose ranks hold rows: `shards INSTANCE NBYTES [HOST [TTL_S [LAUNCH]]]`.

Every rank has its rows of one matrix of words, which name their launch and version (see
`launches`), and their place in the whole. Lines on standard input mean what they mean to a
`source`. Ends with its input, or killed.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch

from engine_cli.options import engine_log
from engine_loader import PublishOptions, Shard, publish
from engine_registry import ModelIdentity
from tests.support.launches import WORD, Origin, words
from tests.support.registry import connect
from tests.support.transfer import engine_at

MODEL = ModelIdentity("served in rows", "r1")
RANKS = 2
COLUMNS = 64
NAME = "matrix"


def shape_of(nbytes: int) -> tuple[int, int]:
    """Of the whole: as many rows as the bytes fill, and each rank has as many as the other."""
    return nbytes // (WORD * COLUMNS * RANKS) * RANKS, COLUMNS


def rows_of(rank: int, nbytes: int, origin: Origin) -> torch.Tensor:
    rows, columns = shape_of(nbytes)
    count = rows // RANKS * columns
    return words(origin, count, rank * count).view(-1, columns)


def main(
    instance: str, nbytes: str, host: str = "127.0.0.1", ttl_s: str = "2", launch: str = "0"
) -> None:
    shape = shape_of(int(nbytes))
    parts = [rows_of(rank, int(nbytes), Origin(int(launch))) for rank in range(RANKS)]
    with ExitStack() as stack:
        stack.enter_context(engine_log())
        registry = stack.enter_context(connect())
        engine = stack.enter_context(engine_at(host))
        ranks = [
            stack.enter_context(
                publish(
                    registry,
                    engine,
                    instance=instance,
                    rank=rank,
                    world_size=RANKS,
                    tensors={NAME: part},
                    shards={NAME: Shard(shape, (rank * len(part), 0))},
                    model=MODEL,
                    options=PublishOptions(ttl_s=float(ttl_s)),
                )
            )
            for rank, part in enumerate(parts)
        ]
        print("version 0", flush=True)
        for line in sys.stdin:
            version = ranks[0].record.version + 1
            for rank, (publication, part) in enumerate(
                zip(ranks, parts, strict=True)
            ):  # one after another, so that they differ
                with publication.update():
                    part.copy_(rows_of(rank, int(nbytes), Origin(int(launch), version)))
                    if rank == 0 and line == "begin\n":
                        print("begun", flush=True)
                        sys.stdin.readline()
            print(f"version {version}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
