"""A rank whose keeper holds its memory: `python -m tests.support.processes.held [MODEL TOPOLOGY]`,
both as JSON. It prints a line when it serves its weights, and waits to be killed.
"""

from __future__ import annotations

import json
import signal
import sys

import torch

from engine_loader import InProcessEngine, PublishOptions, arena_of, publish
from engine_registry import ModelIdentity
from tests.support.registry import connect

MODEL = ModelIdentity("held", "r1")


def content() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {f"t{number}": torch.rand(1000, generator=generator) for number in range(4)}


def main(model: str = "", topology: str = "{}") -> None:
    tensors = content()
    arena_of(tensors).close()
    with (
        connect() as registry,
        InProcessEngine() as engine,
        publish(
            registry,
            engine,
            instance="a",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=ModelIdentity(**json.loads(model)) if model else MODEL,
            topology={axis: (index, size) for axis, (index, size) in json.loads(topology).items()},
            options=PublishOptions(version=7, hold_s=60),
        ),
    ):
        print("serves", flush=True)
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
