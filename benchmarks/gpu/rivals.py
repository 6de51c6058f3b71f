"""What else moves the same bytes to a GPU: torch's copies, naive calls of the transfer engine.

Everything here knows its addresses and sizes beforehand, and asks nobody whether the bytes are of
one version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.rows import ALL_CALL, EACH_CALL, EACH_COPY, FLAT_COPY, Target
from benchmarks.gpu.sets import Layout, allocate, filled
from benchmarks.naive import naive_load
from engine_registry import Registry

if TYPE_CHECKING:
    from benchmarks.gpu.loads import Place

Action = Callable[[], float]
BLOCK_NBYTES = 8 << 30


# -- torch's copies
# --------------------------------------------------------------------------------------------------


@contextmanager
def copies(src: Place, target: Target) -> Iterator[dict[str, Action]]:
    """Within one process, from copies of the tensors on the source's device."""
    theirs = filled(src.layout, src.device)
    block: Layout = {"block": (torch.uint8, (min(target.nbytes, BLOCK_NBYTES),))}
    device = str(next(iter(target.tensors.values())).device)
    there = filled(block, src.device)["block"]
    whole = Target(allocate(block, device), filled(block, device), [src.device])

    def each() -> None:
        for name, tensor in target.tensors.items():
            tensor.copy_(theirs[name], non_blocking=True)

    yield {
        EACH_COPY: lambda: target.time(EACH_COPY, each)[0],
        FLAT_COPY: lambda: whole.time(
            FLAT_COPY, lambda: whole.tensors["block"].copy_(there, non_blocking=True)
        )[0],
    }


# -- naive calls of the transfer engine
# ------------------------------------------------------------------------------------------


@contextmanager
def naive(
    registry: Registry, instance: str, protocol: str, target: Target
) -> Iterator[dict[str, Action]]:
    with naive_load(registry, instance, target.tensors, protocol) as load:
        yield {
            EACH_CALL: lambda: target.time(EACH_CALL, lambda: load.run(1))[0],
            ALL_CALL: lambda: target.time(ALL_CALL, load.run)[0],
        }
