"""Digests of tensors' bytes, computed where the tensors lie, and the table in registered memory in
which a source offers them.

The table holds 16 bytes a tensor, in the order of the names, and behind these 16 bytes for each
block of a longer tensor: see `DigestTable`. It is read over the transfer engine together with the
weights, so the header proves of both that they are of one version.

`xxh3_128` is for tensors in the host's memory. `multilinear_64` is for those of an accelerator,
which has no such hash: the bytes, as 32-bit words, are multiplied with fixed random 64-bit numbers
and summed up block by block modulo 2^64 (multilinear hashing, Lemire and Kaser,
doi:10.1093/comjnl/bxt070), and the sums are hashed with xxh3_128. Any machine can compute either.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
import xxhash

from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.usable import is_dense
from engine_registry.schema.manifest import DigestTable, Region
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
NBYTES = 16
_BLOCK_WORDS = 1 << 20  # 4 MiB, which on their way take five times as much
_SHORT_NBYTES = 64 << 10
THREADS = min(8, os.cpu_count() or 1)
# Of a block, which has a digest. Those of xxh3_128 fit into a core's cache, so that two
# digests of them take one pass over the memory; those of multilinear_64 have sums anyway.
BLOCK_NBYTES = {"xxh3_128": 1 << 20, "multilinear_64": 4 * _BLOCK_WORDS}
# Of bytes in a row; with True, those of the blocks behind it, if there are several.
Digest = Callable[[torch.Tensor, bool], bytes]
K = TypeVar("K")


class DigestCell:
    """A table's place in memory: the source's own, or a reader's buffer for another's."""

    @plain_torch()
    def __init__(
        self,
        names: Iterable[str],
        device: torch.device,
        algorithm: str,
        block_nbytes: int = 0,
        sizes: Iterable[int] = (),
        memory: torch.Tensor | None = None,
    ) -> None:
        """With `block_nbytes` there is room for the digests of blocks of tensors, whose `sizes`
        these are. It lies in `memory` if that is given: as many bytes as `table_nbytes` says.
        """
        self._names = sorted(names)
        if memory is None:
            nbytes = table_nbytes(len(self._names), sizes, block_nbytes)
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._bytes = memory.zero_()
        self.region = Region(self._bytes.data_ptr(), self._bytes.nbytes)
        self.table = DigestTable(algorithm, self.region.addr, block_nbytes)

    @classmethod
    def with_blocks(
        cls,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        algorithm: str,
        memory: torch.Tensor | None = None,
    ) -> DigestCell:
        """Of a source that offers these tensors. `memory` has the bytes that `nbytes_for` says."""
        sizes = [tensor.nbytes for tensor in tensors.values()]
        return cls(tensors, device, algorithm, BLOCK_NBYTES[algorithm], sizes, memory)

    @plain_torch()
    def write(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
        """The digests of the tensors as they are now, which are returned too."""
        found = digests_of(tensors, self.table.algorithm, blocks=self.table.block_nbytes > 0)
        return self.put(found)

    @plain_torch()
    def put(self, found: Mapping[str, bytes]) -> dict[str, bytes]:
        """Digests of all tensors, each with those of its blocks behind it, if the table has such.
        Returned are those of the tensors.
        """
        some = [found[name] for name in self._names]
        packed = bytearray(b"".join([one[:NBYTES] for one in some]))
        packed += b"".join([one[NBYTES:] for one in some])  # of blocks
        if packed:
            self._bytes.copy_(torch.frombuffer(packed, dtype=torch.uint8))
        return {name: one[:NBYTES] for name, one in found.items()}

    @plain_torch()
    def packed(self) -> bytes:
        """All digests, in the order of the names, and those of blocks behind them."""
        return bytes(self._bytes.cpu().numpy())

    def read(self) -> dict[str, bytes]:
        return unpacked(self._names, self.packed())


def unpacked(names: Iterable[str], packed: bytes) -> dict[str, bytes]:
    """The digests of the tensors with these names, from the bytes of their table."""
    return {name: packed[at * NBYTES : (at + 1) * NBYTES] for at, name in enumerate(sorted(names))}


def nbytes_for(tensors: Mapping[str, torch.Tensor], algorithm: str) -> int:
    """Of the table of a source that offers these tensors."""
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return table_nbytes(len(sizes), sizes, BLOCK_NBYTES[algorithm])


def table_nbytes(tensors: int, sizes: Iterable[int], block_nbytes: int) -> int:
    """Of a table for so many tensors, with blocks of those that have these sizes."""
    blocks = DigestTable("", 0, block_nbytes)
    # no region is empty
    return NBYTES * max(1, tensors + sum([blocks.blocks_of(nbytes) for nbytes in sizes]))


def algorithm_for(device: torch.device) -> str:
    return "xxh3_128" if device.type == "cpu" else "multilinear_64"


@plain_torch()
def digests_of(
    tensors: Mapping[K, torch.Tensor], algorithm: str, *, blocks: bool = False
) -> dict[K, bytes]:
    """Of the bytes of each as they lie in memory; row by row where they do not lie together, as
    those of a part of a tensor. With `blocks`, those of the blocks of a longer tensor come behind
    its own.

    KeyError for an algorithm that this version does not know.
    """
    tensors = {
        name: one if one.is_contiguous() else _as_it_lies(one) for name, one in tensors.items()
    }
    digest = ALGORITHMS[algorithm]
    if digest is _multilinear_64:
        quick = {name: tensor for name, tensor in tensors.items() if _fits_kernel(tensor)}
        if quick and (found := _by_kernel(quick, blocks)):
            slow = {name: tensor for name, tensor in tensors.items() if name not in quick}
            rest = digests_of(slow, algorithm, blocks=blocks)
            return {name: found[name] if name in quick else rest[name] for name in tensors}
    with ThreadPoolExecutor(THREADS) as pool:  # xxhash lets go of the GIL
        pending: dict[
            K, bytes | Future[bytes]
        ] = {  # a short one is done before another thread has begun
            name: digest(_as_bytes(tensor), blocks)
            if tensor.nbytes < _SHORT_NBYTES
            else pool.submit(digest, _as_bytes(tensor), blocks)
            for name, tensor in tensors.items()
        }
        return {
            name: one if isinstance(one, bytes) else one.result() for name, one in pending.items()
        }


def digest_of(tensor: torch.Tensor, algorithm: str) -> bytes:
    """Of a contiguous one."""
    with plain_torch():
        return ALGORITHMS[algorithm](_as_bytes(tensor), False)


@plain_torch()
def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of one that is dense, as they lie in its memory."""
    return _as_bytes(tensor if tensor.is_contiguous() else _as_it_lies(tensor))


def _as_it_lies(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where the tensor is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _xxh3_128(flat: torch.Tensor, blocks: bool) -> bytes:
    data = flat.cpu().numpy().data
    block_nbytes = BLOCK_NBYTES["xxh3_128"]
    if not blocks or len(data) <= block_nbytes:
        return xxhash.xxh3_128_digest(data)
    whole = xxhash.xxh3_128()
    each = []
    for start in range(0, len(data), block_nbytes):
        block = data[start : start + block_nbytes]
        whole.update(block)
        each.append(xxhash.xxh3_128_digest(block))
    return b"".join([whole.digest(), *each])


def _multilinear_64(flat: torch.Tensor, blocks: bool) -> bytes:
    block_nbytes = 4 * _BLOCK_WORDS
    sums = []
    for start in range(0, flat.numel(), block_nbytes):
        block = flat[start : start + block_nbytes]
        words = torch.zeros(-(-block.numel() // 4), dtype=torch.int32, device=flat.device)
        words.view(torch.uint8)[: block.numel()].copy_(block)  # aligned, and filled up with zeros
        sums.append((words.to(torch.int64) * _factors(flat.device)[: words.numel()]).sum())
    packed = torch.stack(sums).cpu().numpy().tobytes() if sums else b""
    return _digests_of_sums(flat.numel(), packed, blocks)


def digest_of_sums(nbytes: int, sums: bytes) -> bytes:
    """By `multilinear_64`, of so many bytes whose blocks have these sums."""
    return xxhash.xxh3_128(nbytes.to_bytes(8, "little") + sums).digest()


def _digests_of_sums(nbytes: int, sums: bytes, blocks: bool) -> bytes:
    whole = digest_of_sums(nbytes, sums)
    block_nbytes = 4 * _BLOCK_WORDS
    if not blocks or nbytes <= block_nbytes:
        return whole
    each = [
        digest_of_sums(min(block_nbytes, nbytes - start), sums[at : at + 8])
        for at, start in zip(range(0, len(sums), 8), range(0, nbytes, block_nbytes), strict=True)
    ]
    return b"".join([whole, *each])


def _fits_kernel(tensor: torch.Tensor) -> bool:
    return (
        tensor.is_cuda
        and tensor.is_contiguous()
        and tensor.data_ptr() % 4 == 0
        and tensor.nbytes % 4 == 0
    )


def _by_kernel(tensors: Mapping[K, torch.Tensor], blocks: bool) -> dict[K, bytes]:
    """Of contiguous tensors on GPUs, a launch for each GPU; nothing where there is no kernel."""
    try:
        from engine_loader.digests.sums import sum_blocks

        block_nbytes = 4 * _BLOCK_WORDS
        digests: dict[K, bytes] = {}
        for device in dict.fromkeys(tensor.device for tensor in tensors.values()):
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            sizes = np.array([tensor.nbytes for tensor in here.values()], np.int64)
            counts = -(-sizes // block_nbytes)
            firsts = np.cumsum(counts) - counts  # the number of each tensor's first block
            # of each block: the number of its tensor
            whose = np.repeat(np.arange(len(here)), counts)
            ahead = (np.arange(len(whose)) - firsts[whose]) * block_nbytes
            starts = np.array([tensor.data_ptr() for tensor in here.values()], np.int64)
            words = np.minimum(sizes[whose] - ahead, block_nbytes) // 4
            sums = sum_blocks(starts[whose] + ahead, words, device) if len(whose) else b""
            for name, nbytes, first, count in zip(
                here, sizes.tolist(), firsts.tolist(), counts.tolist(), strict=True
            ):
                of_tensor = sums[8 * first : 8 * (first + count)]
                digests[name] = _digests_of_sums(nbytes, of_tensor, blocks)
    except Exception as exc:  # noqa: BLE001  there is another way, whatever keeps us from this one
        log.info(
            "digests on the GPU take longer, as their kernel cannot be had: %s",
            exc,
            extra=fields("no_kernel", error=exc),
        )
        return {}
    return digests


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """The same on every machine: the first numbers of SplitMix64 from 0, in int64, whose products
    wrap around.
    """
    numbers = torch.arange(1, _BLOCK_WORDS + 1, dtype=torch.int64, device="cpu") * _signed(
        0x9E3779B97F4A7C15
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ _shifted(numbers, shift)) * _signed(factor)
    return (numbers ^ _shifted(numbers, 31)).to(device)


def _shifted(numbers: torch.Tensor, by: int) -> torch.Tensor:
    """Without the copies of the sign that int64 shifts in."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


ALGORITHMS: dict[str, Digest] = {"xxh3_128": _xxh3_128, "multilinear_64": _multilinear_64}
