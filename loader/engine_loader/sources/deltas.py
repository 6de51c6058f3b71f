"""Deltas that sources keep: they bring tensors that hold one content to the next, as far as there
is a way. Nothing of it is believed: what the tensors hold then is compared with digests, block by
block, and what differs is read. So it does not matter which source has proven what it brought.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from engine_loader.deltas.apply import apply_all
from engine_loader.deltas.format import HEADER_NBYTES, DeltaHeader, directory_of, header_of
from engine_loader.deltas.kept import KeptDelta
from engine_loader.deltas.stated import Change
from engine_loader.engines.base import Engine, lend
from engine_loader.errors import DeltaDamaged, SourceLost, TornRead
from engine_loader.planning.matching import of_one_tensor
from engine_loader.planning.reads import Span
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.cuda import to_register, wait_for
from engine_loader.tensors.modes import plain_torch
from engine_loader.transfer.scheduler import OnChecked
from engine_registry import RankState
from engine_registry.schema.manifest import Manifest, Region
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class _Delta(NamedTuple):
    """Of the source with that number, in a buffer of its."""

    number: int
    region: Region
    header: DeltaHeader


class Deltas:
    """Of one attempt: what leads from contents that the tensors may have to those of sources.

    `look` for them, read the `spans`, then `apply` what these have brought.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Sequence[SourceRank],
        base: Collection[str],
        device: torch.device,
    ) -> None:
        """The device is the one that reads write to."""
        self._engine = engine
        self._sources = sources
        self._base = set(base)
        self._device = device
        self._found: list[list[tuple[_Delta, torch.Tensor]]] = []  # each with what is read of it
        self.spans: list[Span] = []

    @property
    def nbytes(self) -> int:
        """That the spans bring."""
        return sum(span.nbytes for span in self.spans)

    @plain_torch()
    def look(
        self, dst: Manifest, bring: Callable[[Sequence[Span], OnChecked], None], undo: ExitStack
    ) -> None:
        """Reads the headers of deltas by `bring`, and raises what that does. No spans where it is
        as quick to read all of `dst`.
        """
        chains = self._chains(bring, undo)
        nbytes = sum(delta.header.nbytes for chain in chains for delta in chain)
        if not nbytes or nbytes >= dst.nbytes:
            return
        memory = self._memory(nbytes, undo)
        at = 0
        for chain in chains:
            some = []
            for delta in chain:
                some.append((delta, memory[at : at + delta.header.nbytes]))
                self.spans.append(self._span(delta.number, delta.region.addr, some[-1][1]))
                at += delta.header.nbytes
            self._found.append(some)

    @plain_torch()
    def apply(self, dst: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Changes the tensors as far as the deltas say how."""
        wait_for([self._device])
        for chain in self._found:
            try:
                for delta, data in chain:
                    self._apply(delta, data, dst, tensors)
            except DeltaDamaged as exc:  # it was overwritten while it was read
                log.info("%s; all that differs is read", exc, extra=fields("delta_unused"))
                chain.clear()  # nobody else shall have it
        wait_for({tensor.device for tensor in tensors.values()})

    def applied(self) -> list[KeptDelta]:
        """Those that have been applied as a whole, in this order."""
        return [
            KeptDelta(delta.header, self._sources[delta.number].manifest.tensors, data)
            for chain in self._found
            for delta, data in chain
        ]

    def _chains(
        self, bring: Callable[[Sequence[Span], OnChecked], None], undo: ExitStack
    ) -> list[list[_Delta]]:
        """For each content of the sources that our tensors do not have: one delta after the other
        that leads there, if there are such. The next source of a content is asked where those
        before it lack a part of the way.
        """
        left = self._holders()
        found: dict[str, _Delta] = {}  # by what it leads to
        chains = []
        while left:
            asked = [numbers.pop(0) for numbers in left.values()]
            try:
                deltas = list(self._headers(asked, bring, undo))
            except (SourceLost, TornRead) as exc:
                if not any(left.values()):
                    raise
                log.info("%s; others are asked for deltas", exc, extra=fields("delta_unused"))
                deltas = []
            for delta in deltas:
                if delta.header.after not in found or delta.header.before in self._base:
                    found[delta.header.after] = delta
            for content, numbers in list(left.items()):
                chain = self._way_to(content, found)
                if chain:
                    chains.append(chain)
                if chain or not numbers:
                    del left[content]
        return chains

    def _holders(self) -> dict[str, list[int]]:
        """For each content that our tensors do not have: the sources of it that may keep deltas."""
        holders: dict[str, list[int]] = {}
        for number, source in enumerate(self._sources):
            record = source.record
            keeps = source.manifest.deltas and record.state is not RankState.LOADING
            if self._base and keeps and record.content not in self._base:
                holders.setdefault(record.content, []).append(number)
        return holders

    def _headers(
        self,
        numbers: Sequence[int],
        bring: Callable[[Sequence[Span], OnChecked], None],
        undo: ExitStack,
    ) -> Iterator[_Delta]:
        """The deltas that these sources have now."""
        buffers = [
            (number, region)
            for number in numbers
            for region in self._sources[number].manifest.deltas
            if region.nbytes >= HEADER_NBYTES
        ]
        if not buffers:
            return
        memory = self._memory(len(buffers) * HEADER_NBYTES, undo)
        cells = memory.split(HEADER_NBYTES)
        bring(
            [
                self._span(number, region.addr, cell)
                for (number, region), cell in zip(buffers, cells, strict=True)
            ],
            _ignore,
        )
        wait_for([self._device])
        for (number, region), cell in zip(buffers, cells, strict=True):
            header = self._header(number, cell)
            if header is not None and header.nbytes <= region.nbytes:
                yield _Delta(number, region, header)

    def _way_to(self, content: str, found: Mapping[str, _Delta]) -> list[_Delta]:
        """From a content that our tensors have; nothing where there is no way."""
        way: list[_Delta] = []
        seen = {content}
        while (delta := found.get(content)) is not None:
            way.append(delta)
            content = delta.header.before
            if content in self._base:
                return way[::-1]
            if content in seen:
                break
            seen.add(content)
        return []

    def _header(self, number: int, cell: torch.Tensor) -> DeltaHeader | None:
        try:
            return header_of(bytes(cell.cpu().numpy()), self._sources[number].manifest.tensors)
        except DeltaDamaged as exc:
            log.info("%s", exc, extra=fields("delta_unused"))
            return None

    def _apply(
        self,
        delta: _Delta,
        data: torch.Tensor,
        dst: Manifest,
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        """DeltaDamaged where it is not whole; then some tensors may have been changed."""
        source = self._sources[delta.number]
        entries = {entry.name: entry for entry in source.manifest.tensors}
        header = self._header(delta.number, data[:HEADER_NBYTES])
        if header != delta.header:
            raise DeltaDamaged("a delta was overwritten while it was read")
        behind = data[header.directory_offset : header.nbytes]
        sections = directory_of(header, bytes(behind.cpu().numpy()), entries.values())
        changes = []
        for entry in dst.tensors:
            section = sections.get(entry.name)
            if section is None or (entry.opaque and not source.origin.own):
                continue
            offer = entries[entry.name]
            if of_one_tensor(offer, entry):
                changes.append(Change(section, offer, tensors[entry.name], entry))
        apply_all(data, changes)

    def _memory(self, nbytes: int, undo: ExitStack) -> torch.Tensor:
        """That the engine may write to until `undo` is closed."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        region = to_register(Region(memory.data_ptr(), nbytes), self._device.type)
        lend(self._engine, undo, region, owner=memory)
        return memory

    def _span(self, number: int, addr: int, memory: torch.Tensor) -> Span:
        return Span(memory.data_ptr(), memory.nbytes, ((number, addr),))


def _ignore(number: int, spans: Sequence[Span]) -> None:
    pass
