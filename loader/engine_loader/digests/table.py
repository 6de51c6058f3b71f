"""Digests of tensors' bytes, computed where the tensors lie, and the table in registered memory in
which a source offers them.

The table holds 16 bytes a tensor, in the order of the names. It is read over the transfer engine
together with the weights, so the header proves of both that they are of one version.

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
Digest = Callable[[torch.Tensor], bytes]
K = TypeVar("K")


class DigestCell:
    """A table's place in memory: the source's own, or a reader's buffer for another's."""

    @plain_torch()
    def __init__(
        self,
        names: Iterable[str],
        device: torch.device,
        algorithm: str,
        memory: torch.Tensor | None = None,
    ) -> None:
        """In `memory` if that is given: `nbytes_for` so many names, on the device."""
        self._names = sorted(names)
        if memory is None:
            nbytes = self.nbytes_for(len(self._names))
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._bytes = memory.zero_()
        self.region = Region(self._bytes.data_ptr(), self._bytes.nbytes)
        self.table = DigestTable(algorithm, self.region.addr)

    @staticmethod
    def nbytes_for(count: int) -> int:
        """Of a table of so many digests. No region is empty."""
        return max(1, count) * NBYTES

    @plain_torch()
    def write(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
        """The digests of the tensors as they are now, which are returned too."""
        digests = digests_of(tensors, self.table.algorithm)
        packed = bytearray(b"".join(digests[name] for name in self._names))
        if packed:
            self._bytes.copy_(torch.frombuffer(packed, dtype=torch.uint8))
        return digests

    @plain_torch()
    def packed(self) -> bytes:
        """All digests, in the order of the names."""
        return bytes(self._bytes.cpu().numpy())

    def read(self) -> dict[str, bytes]:
        packed = self.packed()
        return {
            name: packed[at * NBYTES : (at + 1) * NBYTES] for at, name in enumerate(self._names)
        }


def algorithm_for(device: torch.device) -> str:
    return "xxh3_128" if device.type == "cpu" else "multilinear_64"


@plain_torch()
def digests_of(tensors: Mapping[K, torch.Tensor], algorithm: str) -> dict[K, bytes]:
    """Of the bytes of each as they lie in memory; row by row where they do not lie together, as
    those of a part of a tensor.

    KeyError for an algorithm that this version does not know.
    """
    tensors = {
        name: one if one.is_contiguous() else _as_it_lies(one) for name, one in tensors.items()
    }
    digest = ALGORITHMS[algorithm]
    if digest is _multilinear_64:
        quick = {name: tensor for name, tensor in tensors.items() if _fits_kernel(tensor)}
        if quick and (found := _by_kernel(quick)):
            rest = digests_of(
                {name: tensor for name, tensor in tensors.items() if name not in quick}, algorithm
            )
            return {name: found[name] if name in quick else rest[name] for name in tensors}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # xxhash lets go of the GIL
        pending: dict[
            K, bytes | Future[bytes]
        ] = {  # a short one is done before another thread has begun
            name: digest(_as_bytes(tensor))
            if tensor.nbytes < _SHORT_NBYTES
            else pool.submit(digest, _as_bytes(tensor))
            for name, tensor in tensors.items()
        }
        return {
            name: one if isinstance(one, bytes) else one.result() for name, one in pending.items()
        }


def digest_of(tensor: torch.Tensor, algorithm: str) -> bytes:
    """Of a contiguous one."""
    with plain_torch():
        return ALGORITHMS[algorithm](_as_bytes(tensor))


def _as_it_lies(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where the tensor is not contiguous."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _xxh3_128(flat: torch.Tensor) -> bytes:
    return xxhash.xxh3_128(flat.cpu().numpy().data).digest()


def _multilinear_64(flat: torch.Tensor) -> bytes:
    block_nbytes = 4 * _BLOCK_WORDS
    sums = []
    for start in range(0, flat.numel(), block_nbytes):
        block = flat[start : start + block_nbytes]
        words = torch.zeros(-(-block.numel() // 4), dtype=torch.int32, device=flat.device)
        words.view(torch.uint8)[: block.numel()].copy_(block)  # aligned, and filled up with zeros
        sums.append((words.to(torch.int64) * _factors(flat.device)[: words.numel()]).sum())
    return digest_of_sums(flat.numel(), torch.stack(sums).cpu().numpy().tobytes() if sums else b"")


def digest_of_sums(nbytes: int, sums: bytes) -> bytes:
    """By `multilinear_64`, of so many bytes whose blocks have these sums."""
    return xxhash.xxh3_128(nbytes.to_bytes(8, "little") + sums).digest()


def _fits_kernel(tensor: torch.Tensor) -> bool:
    return (
        tensor.is_cuda
        and tensor.is_contiguous()
        and tensor.data_ptr() % 4 == 0
        and tensor.nbytes % 4 == 0
    )


def _by_kernel(tensors: Mapping[K, torch.Tensor]) -> dict[K, bytes]:
    """Of contiguous tensors on GPUs, a launch for each GPU; nothing where there is no kernel."""
    try:
        from engine_loader.digests.kernel import sum_blocks

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
                digests[name] = digest_of_sums(nbytes, sums[8 * first : 8 * (first + count)])
    except Exception as exc:  # noqa: BLE001  Triton has no common base of its errors, and needs a compiler at run time
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
