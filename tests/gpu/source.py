"""A rank on two GPUs: `python -m tests.gpu.source ENDPOINT PROTOCOL`.

Does what each line on standard input says, then prints the line. `publish N`: leaves, frees its
memory and publishes the content of number N. `copy N`: loads the content of number N, from whoever
has it, and serves it as another instance, from then on. `large N`: as `publish`, of tensors of 30
MiB. `arena N`: as `publish`, on the first GPU and in an arena. `host N`: in an arena of the host.
`both N`: every second tensor on the first GPU, the others in an arena of the host. `held N`: as
`arena N`, held for a minute once this process has ended. `segments N`: so without an arena.
`layers N`: as `held`, 4 GiB of tensors of 64 MiB.
`late N`: publishes another instance besides, from memory that is new. `update`: adds one to every
element, on a separate stream. `pause`, `resume`: as a publication does. `replace N`: frees its
memory, for which it must be paused, and serves the content of number N. Ends with its input.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch

from engine_loader import Publication, PublishOptions, Replica, arena_of, load, open_engine, publish
from engine_registry import ModelIdentity, Registry

Tensors = dict[str, torch.Tensor]
MODEL = ModelIdentity("on GPUs")
_HOLDS = ("held", "segments", "layers")
_PUBLISHES = ("publish", "large", "arena", "host", "both", *_HOLDS)


def content(number: int, device: str | None = None) -> Tensors:
    """Short tensors that share segments of torch's allocator, on both GPUs in turns unless one is
    named, and a long one.
    """
    tensors = {
        f"t{place}": torch.full(
            (1000 + place,), 100.0 * number + place, device=device or f"cuda:{place % 2}"
        )
        for place in range(20)
    }
    return {
        **tensors,
        "long": torch.full((40 << 20,), number, dtype=torch.uint8, device=device or "cuda:0"),
    }


def large_content(number: int, device: str = "cuda:0") -> Tensors:
    """Of which each lies in several pieces of an expandable segment, as a rule."""
    return {
        f"large{place}": torch.arange(
            1000 * number + place,
            (30 << 18) + 1000 * number + place,
            dtype=torch.int32,
            device=device,
        )
        for place in range(100)
    }


def layers_content(number: int, device: str = "cuda:0") -> Tensors:
    """As parameters of a model of 64 layers."""
    return {
        f"{place}.weight": torch.full(
            (1 << 12, 1 << 13), 100.0 * number + place, dtype=torch.bfloat16, device=device
        )
        for place in range(64)
    }


def made(command: str, number: int) -> Tensors:
    if command == "large":
        return large_content(number)
    if command == "layers":
        layers = layers_content(number)
        arena_of(layers).close()
        return layers
    if command == "publish":
        return content(number)
    if command == "segments":
        return content(number, "cuda:0")
    tensors = content(number, "cuda:0" if command in ("arena", "held") else "cpu")
    on_gpu = [*tensors][::2] if command == "both" else []
    arena_of([tensor for name, tensor in tensors.items() if name not in on_gpu]).close()
    return tensors | {name: tensors[name].to("cuda:0") for name in on_gpu}


def late_content(number: int, device: str = "cuda:0") -> Tensors:
    return {
        f"late{place}": torch.full((999,), float(number + place), device=device)
        for place in range(3)
    }


def change(publication: Publication, tensors: Tensors, command: str, number: str) -> None:
    if command == "update":
        with publication.update(), torch.cuda.stream(torch.cuda.Stream("cuda:0")):
            for tensor in tensors.values():
                tensor.add_(1)
    elif command == "pause":
        publication.pause()
    elif command == "resume":
        publication.resume()
    elif command == "replace":
        tensors.clear()
        torch.cuda.empty_cache()
        # The header and the table of digests stay.
        assert torch.cuda.memory_allocated("cuda:0") < 1 << 20
        assert torch.cuda.memory_reserved("cuda:0") < 40 << 20
        tensors.update(content(int(number)))
        publication.replace(tensors)


def main(endpoint: str, protocol: str) -> None:
    with (
        Registry.connect(endpoint) as registry,
        open_engine("127.0.0.1", protocol) as engine,
    ):
        stack, tensors, publication = ExitStack(), Tensors(), None
        for line in sys.stdin:
            command, _, number = line.strip().partition(" ")
            if command in _PUBLISHES:
                stack.close()
                tensors.clear()
                torch.cuda.empty_cache()
                tensors.update(made(command, int(number)))
                publication = stack.enter_context(
                    publish(
                        registry,
                        engine,
                        instance="a",
                        rank=0,
                        world_size=1,
                        tensors=tensors,
                        model=MODEL,
                        options=PublishOptions(digests=True, hold_s=60 if command in _HOLDS else 0),
                    )
                )
            elif command == "copy":
                tensors.update(
                    {
                        name: torch.zeros_like(tensor)
                        for name, tensor in content(int(number)).items()
                    }
                )
                report = load(
                    registry,
                    engine,
                    MODEL,
                    rank=0,
                    tensors=tensors,
                    publish=Replica("copy", options=PublishOptions(digests=True)),
                )
                if report.publication is not None:
                    publication = stack.enter_context(report.publication)
            elif command == "late":
                late = late_content(int(number))
                stack.enter_context(
                    publish(
                        registry,
                        engine,
                        instance="late",
                        rank=0,
                        world_size=1,
                        tensors=late,
                        model=MODEL,
                    )
                )
            elif publication is not None:
                change(publication, tensors, command, number)
            print(line, end="", flush=True)
        stack.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
