"""A rank whose weights say whose they are: `source INSTANCE NBYTES [HOST [TTL_S [LAUNCH]]]`.

Sources of one launch hold the same in the same version, see `content`, and digests prove it. Each
line on standard input makes it go on to the next version; it prints `version N` when it serves one.
A line `begin` begins that update, and the next line ends it: it prints `begun` in between. Ends
with its input, or killed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch

from engine_cli.options import engine_log
from engine_loader import MooncakeEngine, PublishOptions, publish
from engine_registry import ModelIdentity
from tests.support.launches import WORD, Origin, words
from tests.support.registry import connect

MODEL = ModelIdentity("served", "r1")
COUNT = 16


def content(version: int, nbytes: int, launch: int = 0) -> dict[str, torch.Tensor]:
    """Words that name their origin, in several tensors of odd sizes."""
    whole = words(Origin(launch, version), -(-nbytes // WORD)).view(torch.uint8)[:nbytes]
    return {name: whole[low:high].clone() for name, low, high in _bounds(nbytes)}


def empty(nbytes: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(high - low, dtype=torch.uint8) for name, low, high in _bounds(nbytes)}


def _bounds(nbytes: int) -> Iterator[tuple[str, int, int]]:
    """The name of each tensor, and where it begins and ends in the whole."""
    size = nbytes // COUNT
    ends = [size * number + 7 * (number % 3) for number in range(COUNT)] + [nbytes]
    for number, (low, high) in enumerate(itertools.pairwise(ends)):
        yield f"t{number}", low, high


def main(
    instance: str, nbytes: str, host: str = "127.0.0.1", ttl_s: str = "10", launch: str = "0"
) -> None:
    tensors = content(0, int(nbytes), int(launch))
    with (
        engine_log(),  # what the tests show of a process that failed is what it has to say
        connect() as registry,
        MooncakeEngine(host) as engine,
        publish(
            registry,
            engine,
            instance=instance,
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=PublishOptions(digests=True, ttl_s=float(ttl_s)),
        ) as publication,
    ):
        print("version 0", flush=True)
        for line in sys.stdin:
            with publication.update():
                for name, tensor in content(
                    publication.record.version + 1, int(nbytes), int(launch)
                ).items():
                    tensors[name].copy_(tensor)
                if line == "begin\n":
                    print("begun", flush=True)
                    sys.stdin.readline()
            print(f"version {publication.record.version}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
