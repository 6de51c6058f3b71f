"""Ranks in separate processes, which serve weights of one kind or another."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks import serving
from benchmarks.processes import another_process
from engine_cli.demo.checkpoint import find_checkpoint
from engine_loader.files.weights import read_weights
from engine_registry.etcd.local import LocalEtcd

SMALL, SMALL_NBYTES = 20_000, 4096


@contextmanager
def source(local: LocalEtcd, instance: str, *what: str) -> Iterator[subprocess.Popen[str]]:
    with another_process(__name__, "serve", local.endpoint, instance, *what) as (process, _):
        yield process


def serve(endpoint: str, instance: str, what: str, *sizes: str) -> None:
    tensors = weights(what, *map(int, sizes))
    serving.serve(endpoint, instance, tensors, digests=True)


def weights(what: str, nbytes: int = 0, count: int = 0) -> dict[str, torch.Tensor]:
    if what == "checkpoint":
        return read_weights([find_checkpoint()])
    if what == "blocks":
        return {
            f"t{number}": torch.randint(0, 255, (nbytes // count,), dtype=torch.uint8)
            for number in range(count)
        }
    return _small(what)


def _small(layout: str) -> dict[str, torch.Tensor]:
    """Views of one block, side by side or with gaps between them."""
    step = SMALL_NBYTES * (1 if layout == "adjacent" else 2)
    block = torch.randint(0, 255, (SMALL * step,), dtype=torch.uint8)
    return {
        f"t{number}": block[number * step : number * step + SMALL_NBYTES] for number in range(SMALL)
    }
