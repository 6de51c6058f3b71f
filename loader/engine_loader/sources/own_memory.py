"""The memory of tensors that are filled, by address. Used where what they hold already is compared
with what a source holds.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping

import torch

from engine_loader.digests.parts import Part
from engine_loader.digests.table import bytes_of
from engine_loader.planning.reads import Span
from engine_registry.schema.manifest import Manifest, TensorEntry


class OwnMemory:
    """Of tensors that share memory it knows the one that holds the others."""

    def __init__(self, dst: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._entries: list[TensorEntry] = []
        end = 0
        for entry in sorted(dst.tensors, key=lambda entry: (entry.addr, -entry.nbytes)):
            if entry.nbytes and entry.addr >= end:
                self._entries.append(entry)
                end = entry.addr + entry.nbytes
        self._starts = [entry.addr for entry in self._entries]
        self._bytes: dict[str, torch.Tensor] = {}

    def _at(self, addr: int) -> TensorEntry | None:
        """The one that holds the byte at the address."""
        place = bisect.bisect_right(self._starts, addr) - 1
        if place < 0:
            return None
        entry = self._entries[place]
        return entry if addr < entry.addr + entry.nbytes else None

    def part(self, addr: int, nbytes: int) -> Part | None:
        """These bytes; None where they do not lie in one tensor."""
        entry = self._at(addr)
        if entry is None or addr + nbytes > entry.addr + entry.nbytes:
            return None
        flat = self._bytes.get(entry.name)
        if flat is None:
            flat = self._bytes[entry.name] = bytes_of(self._tensors[entry.name])
        return Part(flat, addr - entry.addr, nbytes)

    def strided(self, spans: Iterable[Span]) -> list[TensorEntry]:
        """Those that the spans bring in runs at equal distances."""
        found = {
            entry.name: entry
            for span in spans
            for some in span.lines
            if some.counts and (entry := self._at(some.dst)) is not None
        }
        return list(found.values())
