"""The memory that a rank has left with its keeper, or shares, as this process has it: by the
addresses that it had in the rank's process.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import torch

from engine_loader.adopting.finding import HeldRank
from engine_loader.adopting.matching import blocks_of
from engine_loader.digests.table import NBYTES as DIGEST_NBYTES
from engine_loader.digests.table import unpacked
from engine_loader.errors import EngineFailed
from engine_loader.publishing.header import NBYTES as HEADER_NBYTES
from engine_loader.publishing.header import Header, decode_header
from engine_loader.sharing.opening import Opened, gpus_named, open_export
from engine_loader.tensors.arena import bound
from engine_loader.tensors.cuda import wait_for
from engine_loader.tensors.modes import plain_torch
from engine_registry import TensorEntry
from engine_registry.registration.hold import HOST
from engine_registry.schema.manifest import Export


class OpenedRank:
    """What a rank has published, opened here. Tensors in it keep it."""

    def __init__(self, rank: HeldRank, shared: bool) -> None:
        """Opens all that holds weights, header or digests. EngineFailed where it cannot be had.

        With `shared`, it can only be read.
        """
        self._rank = rank
        self._exports = sorted(rank.manifest.exports, key=lambda export: export.addr)
        self._starts = [export.addr for export in self._exports]
        gpus = gpus_named([name for name in rank.kept.devices if name != HOST])
        needed = {self._export_at(addr, nbytes) for addr, nbytes in self._ranges()}
        self._opened: dict[Export, Opened] = {
            export: open_export(export, gpus, shared) for export in needed
        }

    def _ranges(self) -> list[tuple[int, int]]:
        record, manifest = self._rank.record, self._rank.manifest
        ranges = [(entry.addr, entry.nbytes) for entry in manifest.tensors if entry.nbytes]
        ranges.append((record.header_addr, HEADER_NBYTES))
        if manifest.digests is not None:
            ranges.append((manifest.digests.addr, DIGEST_NBYTES * len(manifest.tensors)))
        return ranges

    def _export_at(self, addr: int, nbytes: int) -> Export:
        number = bisect.bisect_right(self._starts, addr) - 1
        if number < 0 or addr + nbytes > self._exports[number].end:
            raise EngineFailed(
                f"{nbytes} bytes at {addr:#x} lie in no memory that {self._rank.record.key} exports"
            )
        return self._exports[number]

    def at(self, addr: int, nbytes: int) -> torch.Tensor:
        """The bytes that the rank had there, with a storage of their own."""
        export = self._export_at(addr, nbytes)
        return self._opened[export].tensor(addr - export.addr, nbytes)

    @property
    def device(self) -> torch.device:
        """Where its header lies, and the first of its weights."""
        return self.at(self._rank.record.header_addr, HEADER_NBYTES).device

    def header(self) -> Header | None:
        """As it is now; None where there is none."""
        return decode_header(self.at(self._rank.record.header_addr, HEADER_NBYTES))

    @plain_torch()
    def erase_header(self) -> None:
        """Whoever still reads the rank's memory finds out that it is not the rank's any more."""
        header = self.at(self._rank.record.header_addr, HEADER_NBYTES)
        header.zero_()
        wait_for([header.device])

    @plain_torch()
    def digests(self) -> dict[str, bytes]:
        """What the rank has published, by the names of its tensors; nothing where it has none."""
        table = self._rank.manifest.digests
        if table is None:
            return {}
        names = [entry.name for entry in self._rank.manifest.tensors]
        if not names:
            return {}
        return unpacked(names, bytes(self.at(table.addr, DIGEST_NBYTES * len(names)).cpu().numpy()))

    @plain_torch()
    def views(
        self, found: Mapping[str, TensorEntry], like: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Tensors of the rank's memory by the names of those that are wanted, which are `like`
        them. Those that share memory have one storage. One without elements is an empty one.
        """
        views: dict[str, torch.Tensor] = {}
        for block in blocks_of(found):
            start = min(entry.addr for entry in block.values())
            start -= start % max(like[name].itemsize for name in block)
            end = max(entry.addr + entry.nbytes for entry in block.values())
            storage = self.at(start, end - start).untyped_storage()
            for name, entry in block.items():
                ahead, rest = divmod(entry.addr - start, like[name].itemsize)
                if rest:  # it begins between two elements of the others' storage
                    alone = self.at(entry.addr, entry.nbytes).untyped_storage()
                    views[name] = bound(alone, 0, like[name])
                else:
                    views[name] = bound(storage, ahead, like[name])
        for name, entry in found.items():
            if not entry.nbytes:
                one = like[name]
                views[name] = torch.empty_strided(
                    one.shape, one.stride(), dtype=one.dtype, device=self.device
                )
        return views
