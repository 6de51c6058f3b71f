"""A rank that sleeps and wakes: `sleeper INSTANCE NBYTES`.

Its weights say whose they are, by `words`. Each line on standard input is what it does next, and is
printed again when that is done:

    pause     gives its memory back, and writes words of nobody into it
    resume    writes the words of its version again, and offers them
    replace   offers other memory with the words of the next version, and unmaps the former

Ends with its input, or killed.
"""

from __future__ import annotations

import mmap
import sys

import torch

from engine_cli.options import engine_log
from engine_loader import MooncakeEngine, PublishOptions, publish
from engine_registry import ModelIdentity
from tests.support.launches import WORD, Origin, words
from tests.support.registry import connect

NOBODY = Origin(99, 99)


def memory(version: int, nbytes: int) -> dict[str, torch.Tensor]:
    """A separate mapping, which goes when the last tensor over it goes."""
    tensor = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.int64)
    tensor.copy_(words(Origin(0, version), nbytes // WORD))
    return {"w": tensor}


def main(instance: str, nbytes: str) -> None:
    tensors = memory(0, int(nbytes))
    with (
        engine_log(),
        connect() as registry,
        MooncakeEngine("127.0.0.1") as engine,
        publish(
            registry,
            engine,
            instance=instance,
            rank=0,
            world_size=1,
            tensors=tensors,
            model=ModelIdentity("m"),
            options=PublishOptions(ttl_s=2.0),
        ) as publication,
    ):
        print("published", flush=True)
        for line in sys.stdin:
            todo = line.strip()
            count = tensors["w"].numel() if tensors else int(nbytes) // WORD
            if todo == "pause":
                publication.pause()
                tensors["w"].copy_(words(NOBODY, count))
            elif todo == "resume":
                tensors["w"].copy_(words(Origin(0, publication.version), count))
                publication.resume()
            else:
                if publication.paused:
                    tensors.clear()  # unmapped before there is other memory
                tensors = memory(publication.version + 1, int(nbytes))
                publication.replace(tensors)
            print(todo, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
