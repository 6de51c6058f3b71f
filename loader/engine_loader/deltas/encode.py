"""Writes the delta between two versions of a rank's tensors into a buffer. Pure.

Called by a publisher that keeps both versions. Where these and the buffer lie on one GPU, kernels
do the work. Elsewhere threads work on blocks if several are wanted; they end before `encode`
returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import xxhash

from engine_loader.deltas.blocks import Block, block_of
from engine_loader.deltas.encode_on_gpu import sections_by_kernel
from engine_loader.deltas.format import (
    BLOCK,
    BLOCK_NBYTES,
    HEADER_NBYTES,
    DeltaHeader,
    DoesNotFit,
    Section,
    packed_directory,
    padded,
)
from engine_loader.deltas.pairs import Pair, Sides, pairs_of
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import TensorEntry


@dataclass(frozen=True)
class Encoded:
    """How long a delta is, and how many tensors changed."""

    nbytes: int
    tensors: int


_MOST = 64  # blocks that a thread takes at a time


@plain_torch()
def encode(
    entries: Sequence[TensorEntry],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    buffer: torch.Tensor,
    from_content: str,
    to_content: str,
    threads: int = 1,
) -> Encoded | None:
    """Writes what differs between two versions of tensors that do not change meanwhile.

    The header is erased first and written last. A reader that has the header already sees by the
    digests that the rest has changed.

    Args:
        entries: all tensors of the manifest. Names that have the same memory in it have the same
            memory in `after`.
        before: the tensors of the content that readers have, by name.
        after: the tensors of the content that the delta leads to.
        buffer: uint8, one dimension, contiguous; on any device. See `capacity_of`.
        from_content: the content of `before`, 32 hexadecimal digits.
        to_content: the content of `after`.
        threads: how many work at the same time, if the tensors lie in the host's memory.

    Returns:
        None if the delta does not fit into the buffer, which then has none.

    Raises:
        ValueError: a tensor is not as its entry says, or the buffer is too short for a header.
    """
    if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous():
        raise ValueError("a delta goes into a contiguous tensor of uint8 with one dimension")
    if buffer.numel() < HEADER_NBYTES:
        raise ValueError(f"a delta takes {HEADER_NBYTES} bytes at least")
    erase(buffer)
    pairs = pairs_of(entries, before, after)
    try:
        sections = sections_by_kernel(pairs, buffer)
        if sections is None:
            sections = _sections(pairs, buffer, threads)
        packed = packed_directory(sections)
        start = sections[-1].end if sections else HEADER_NBYTES
        if packed:  # torch makes no tensor of nothing
            _put(_tensor(packed), buffer, start)
    except DoesNotFit:
        return None
    header = DeltaHeader(
        from_content,
        to_content,
        start + len(packed),
        len(entries),
        len(sections),
        start,
        xxhash.xxh3_128_digest(packed),
    )
    wait_for([buffer.device])
    buffer[:HEADER_NBYTES].copy_(_tensor(header.packed()))
    wait_for([buffer.device])
    return Encoded(header.nbytes, header.sections)


@plain_torch()
def erase(buffer: torch.Tensor) -> None:
    """No reader takes the buffer for a delta's, until one is written again."""
    buffer[:HEADER_NBYTES].zero_()
    wait_for([buffer.device])


def _sections(pairs: Sequence[Pair], buffer: torch.Tensor, threads: int) -> list[Section]:
    """Writes them behind the header's place, block by block."""
    if not all(one.is_cpu for pair in pairs for one in (pair.before, pair.after)):
        threads = 1  # the device works by itself
    writer = _Writer(buffer)
    with closing(_in_order((each for pair in pairs for each in pair.blocks()), threads)) as found:
        for pair in pairs:
            writer.write(pair, islice(found, pair.length))
    return writer.sections


def _in_order(sides: Iterable[Sides], threads: int) -> Generator[Block]:
    """What changed in each. Threads are a few batches ahead, and no more."""
    if threads <= 1:
        yield from (block_of(*each) for each in sides)
        return
    pending: deque[Future[list[Block]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in _batches(sides):
                pending.append(pool.submit(_blocks_of, batch))
                if len(pending) > 2 * threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _batches(sides: Iterable[Sides]) -> Iterator[list[Sides]]:
    """Each is of as much as a block, or of several small ones."""
    batch: list[Sides] = []
    for each in sides:
        batch.append(each)
        if len(batch) == _MOST or sum(after.nbytes for _, after in batch) >= BLOCK_NBYTES:
            yield batch
            batch = []
    if batch:
        yield batch


@plain_torch()
def _blocks_of(batch: Sequence[Sides]) -> list[Block]:
    return [block_of(*each) for each in batch]


class _Writer:
    def __init__(self, buffer: torch.Tensor) -> None:
        self.sections: list[Section] = []
        self._buffer = buffer
        self._end = HEADER_NBYTES

    def write(self, pair: Pair, blocks: Iterator[Block]) -> None:
        """A section, unless the tensor is the same."""
        elements, itemsize = pair.after.numel(), pair.after.itemsize
        start, table = self._end, []
        self._end += BLOCK.itemsize * pair.length
        for block in blocks:
            table.append((block.count, block.kind, b""))
            for part in (block.gaps, block.values):
                if part is not None:
                    self._put(part)
        if not any(count for count, _, _ in table):
            self._end = start
            return
        _put(_tensor(np.array(table, BLOCK).tobytes()), self._buffer, start)
        digest = xxhash.xxh3_128_digest(self._buffer[start : self._end].cpu().numpy().data)
        self.sections.append(
            Section(pair.number, itemsize, start, self._end - start, elements, digest)
        )

    def _put(self, part: torch.Tensor) -> None:
        """Filled up with zeros to a multiple of 8 bytes."""
        _put(part, self._buffer, self._end)
        end = self._end + part.nbytes
        self._end = padded(end)
        if self._end > end:
            self._buffer[end : self._end].zero_()


def _put(part: torch.Tensor, buffer: torch.Tensor, start: int) -> None:
    if start + padded(part.nbytes) > buffer.numel():
        raise DoesNotFit
    into, data = buffer[start : start + part.nbytes], part.view(torch.uint8)
    if into.is_cpu and data.is_cpu:  # torch would have all of its threads copy each part
        np.copyto(into.numpy(), data.numpy())
    else:
        into.copy_(data)


def _tensor(packed: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)
