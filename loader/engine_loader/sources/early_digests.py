"""Digests of tensors that are whole already, while the rest of a load still comes. Used by
`DigestCheck`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from engine_loader.digests.table import digest_of
from engine_loader.planning.reads import Span

_THREADS = 2


class EarlyDigests:
    """Of tensors in the host's memory. The bytes of each are counted as they come. Of one that
    begins with another, or inside one, some are not, so it never counts as whole.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], algorithm: str) -> None:
        self._algorithm = algorithm
        self._tensors = {
            one.data_ptr(): (name, one)
            for name, one in tensors.items()
            if one.is_cpu and one.is_contiguous() and one.nbytes
        }
        self._starts = sorted(self._tensors)
        self._left = {start: one.nbytes for start, (_, one) in self._tensors.items()}
        self._pool = ThreadPoolExecutor(_THREADS, "digests")
        self._digests: dict[str, Future[bytes]] = {}

    def add(self, spans: Iterable[Span]) -> None:
        """They have come for good, and none of them came before."""
        for span in spans:
            if not span.lines:
                self._add(span.dst_addr, span.nbytes)
            for some in span.lines:
                if not some.counts:  # of others not all bytes are counted, and so none matter
                    self._add(some.dst, some.nbytes)

    def _add(self, addr: int, nbytes: int) -> None:
        end = addr + nbytes
        place = max(0, bisect.bisect_right(self._starts, addr) - 1)
        while place < len(self._starts) and (start := self._starts[place]) < end:
            name, tensor = self._tensors[start]
            came = min(end, start + tensor.nbytes) - max(addr, start)
            if came > 0:
                self._left[start] -= came
                if not self._left[start]:
                    self._digests[name] = self._pool.submit(digest_of, tensor, self._algorithm)
            place += 1

    def of(self, name: str) -> bytes | None:
        """None where it was not whole before all was."""
        digest = self._digests.get(name)
        return digest.result() if digest is not None else None

    def close(self) -> None:
        """Nothing looks at the tensors any more when this returns."""
        self._pool.shutdown(cancel_futures=True)
