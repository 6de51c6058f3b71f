"""A rank whose weights say whose they are: `source INSTANCE NBYTES [HOST [TTL_S [LAUNCH
[COUNT
[UNRESPONSIVE_AFTER_S]]]]]`.

They are cut into COUNT tensors. Sources of one launch hold the same in the same version, see
`content`, and digests prove it. Each
line on standard input makes it go on to the next version; it prints `version N` when it serves one.
A line `begin` begins that update, and the next line ends it: it prints `begun` in between. A line
`hold` makes it hold the GIL until the next byte comes. Ends with its input, or killed.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterator

import torch

from engine_cli.options import engine_log
from engine_loader import PublishOptions, publish
from engine_registry import ModelIdentity
from tests.support.launches import WORD, Origin, words
from tests.support.registry import connect
from tests.support.transfer import engine_at

MODEL = ModelIdentity("served", "r1")
COUNT = 16


def content(
    version: int, nbytes: int, launch: int = 0, count: int = COUNT
) -> dict[str, torch.Tensor]:
    """Words that name their origin, in several tensors of odd sizes."""
    whole = words(Origin(launch, version), -(-nbytes // WORD)).view(torch.uint8)[:nbytes]
    return {name: whole[low:high].clone() for name, low, high in _bounds(nbytes, count)}


def empty(nbytes: int, count: int = COUNT) -> dict[str, torch.Tensor]:
    bounds = _bounds(nbytes, count)
    return {name: torch.zeros(high - low, dtype=torch.uint8) for name, low, high in bounds}


def _bounds(nbytes: int, count: int) -> Iterator[tuple[str, int, int]]:
    """The name of each tensor, and where it begins and ends in the whole."""
    size = nbytes // count
    ends = [size * number + 7 * (number % 3) for number in range(count)] + [nbytes]
    for number, (low, high) in enumerate(itertools.pairwise(ends)):
        yield f"t{number}", low, high


def main(
    instance: str,
    nbytes: str,
    host: str = "127.0.0.1",
    ttl_s: str = "10",
    launch: str = "0",
    count: str = str(COUNT),
    unresponsive_after_s: str = "30",
) -> None:
    tensors = content(0, int(nbytes), int(launch), int(count))
    with (
        engine_log(),  # what the tests show of a process that failed is what it has to say
        connect() as registry,
        engine_at(host) as engine,
        publish(
            registry,
            engine,
            instance=instance,
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=PublishOptions(
                digests=True, ttl_s=float(ttl_s), unresponsive_after_s=float(unresponsive_after_s)
            ),
        ) as publication,
    ):
        print("version 0", flush=True)
        for line in sys.stdin:
            if line == "hold\n":
                # unlike CDLL, PyDLL keeps the lock: no thread of this process runs meanwhile
                ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)
                continue
            with publication.update():
                for name, tensor in content(
                    publication.record.version + 1, int(nbytes), int(launch), int(count)
                ).items():
                    tensors[name].copy_(tensor)
                if line == "begin\n":
                    print("begun", flush=True)
                    sys.stdin.readline()
            print(f"version {publication.record.version}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
