"""The naive way to load, for comparison: every address known beforehand, all tensors in a few
calls, nothing checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from benchmarks.serving import HOST
from engine_loader import MooncakeEngine
from engine_loader.errors import ReadFailed
from engine_loader.tensors.regions import describe
from engine_registry import Registry

MOST = 512  # reads in a call: more makes Mooncake refuse the peer for good


class NaiveLoad:
    """Of the instance's only rank, into tensors that are registered with a separate engine."""

    def __init__(
        self,
        raw: MooncakeEngine,
        registry: Registry,
        instance: str,
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        (record,) = registry.resolve(instance, 60)
        here = describe(tensors)
        addrs = {entry.name: entry.addr for entry in here.tensors}
        self._raw = raw
        self._session_id = record.session_id
        self._reads = [
            (addrs[each.name], each.addr, each.nbytes)
            for each in registry.manifest(record).tensors
            if each.nbytes
        ]
        for region in here.regions:
            raw.register(region)

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self._reads)

    def run(self, at_once: int = MOST) -> None:
        """With so many reads in a call."""
        for start in range(0, len(self._reads), at_once):
            dst, src, sizes = map(list, zip(*self._reads[start : start + at_once], strict=True))
            if (
                self._raw._open()._engine.batch_transfer_sync_read(
                    self._session_id, dst, src, sizes
                )
                != 0
            ):
                raise ReadFailed(
                    f"a naive read from {self._session_id} failed: nothing can be compared with"
                )


@contextmanager
def naive_load(
    registry: Registry, instance: str, tensors: Mapping[str, torch.Tensor], protocol: str = "tcp"
) -> Iterator[NaiveLoad]:
    with MooncakeEngine(HOST, protocol) as raw:
        yield NaiveLoad(raw, registry, instance, tensors)
