"""Which sets are moved, by name."""

from __future__ import annotations

from collections.abc import Callable

from safetensors import safe_open

from benchmarks.peers.sets import TensorSet
from engine_cli.demo.checkpoint import find_checkpoint


def _count(count: int, scale: float) -> int:
    return max(1, int(count * scale))


def blocks(scale: float) -> TensorSet:
    """500 tensors of 2 MiB."""
    return TensorSet([2 << 20] * _count(500, scale))


def checkpoint(scale: float) -> TensorSet:
    """As many tensors as the demo's checkpoint has, as large as those."""
    with safe_open(find_checkpoint(), "pt") as file:
        sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118  no mapping
    return TensorSet([_count(size, scale) for size in sizes])


def small(scale: float) -> TensorSet:
    """20,000 tensors of 4 KiB, side by side in one block."""
    return TensorSet([4 << 10] * _count(20_000, scale), joined=True)


def single(scale: float) -> TensorSet:
    """One tensor of 1 GiB."""
    return TensorSet([_count(1 << 30, scale)])


def for_links(scale: float) -> TensorSet:
    """64 tensors of 2 MiB: what a link of 1 Gbit/s moves in about a second."""
    return TensorSet([2 << 20] * _count(64, scale))


Make = Callable[[float], TensorSet]
SETS: dict[str, Make] = {
    "blocks": blocks,
    "checkpoint": checkpoint,
    "small": small,
    "single": single,
}
