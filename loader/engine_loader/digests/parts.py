"""Digests of parts of memory, in any number. Used where what is there already is compared with what
a source holds.

Starts threads that end before the last digest is given.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import xxhash

from engine_loader.digests.table import THREADS, digests_of
from engine_loader.tensors.modes import plain_torch

_AT_ONCE_NBYTES = 16 << 20  # of parts in the host's memory, that a thread sees to
_ON_DEVICE_NBYTES = 1 << 30  # of others, that one launch sees to


class Part(NamedTuple):
    """`nbytes` of the bytes `flat`, which lie in a row, from `start` on."""

    flat: torch.Tensor
    start: int
    nbytes: int


def digests_of_parts(parts: Sequence[Part], algorithm: str) -> Generator[bytes, None, None]:
    """In their order. Some are given while others are still computed."""
    if algorithm == "xxh3_128" and all(part.flat.is_cpu for part in parts):
        pool = ThreadPoolExecutor(THREADS)
        try:
            pending = [pool.submit(_xxh3_128, some) for some in _cut(parts, _AT_ONCE_NBYTES)]
            for one in pending:
                yield from one.result()
        finally:
            pool.shutdown(cancel_futures=True)
    else:
        for some in _cut(parts, _ON_DEVICE_NBYTES):
            yield from _of_tensors(some, algorithm)


def _cut(parts: Iterable[Part], nbytes: int) -> Iterator[list[Part]]:
    """Into lists of about so many bytes."""
    some: list[Part] = []
    left = nbytes
    for part in parts:
        some.append(part)
        left -= part.nbytes
        if left <= 0:
            yield some
            some, left = [], nbytes
    if some:
        yield some


def _xxh3_128(parts: Iterable[Part]) -> list[bytes]:
    return [
        xxhash.xxh3_128_digest(part.flat.numpy().data[part.start : part.start + part.nbytes])
        for part in parts
    ]


@plain_torch()
def _of_tensors(parts: Iterable[Part], algorithm: str) -> list[bytes]:
    views = {
        number: part.flat[part.start : part.start + part.nbytes]
        for number, part in enumerate(parts)
    }
    return list(digests_of(views, algorithm).values())
