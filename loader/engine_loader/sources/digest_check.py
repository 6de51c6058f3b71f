"""Whether what was read is what the sources say that it is: tables of digests, read with the
weights, beside our own digests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from engine_loader import metrics
from engine_loader.digests.table import DigestCell, digests_of
from engine_loader.engines.base import Engine, lend
from engine_loader.errors import DigestMismatch, DigestsMissing, listed
from engine_loader.planning.boxes import Box
from engine_loader.planning.matching import entry_box, of_one_tensor
from engine_loader.planning.reads import Span
from engine_loader.planning.tied import stand_ins
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.cuda import to_register
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Manifest, TensorEntry

_Piece = tuple[str, Box]  # a tensor, and the part of it whose digest is known


class DigestCheck:
    """A source has digests of what it holds.

    So where a tensor is put together from parts, those parts have to be whole there.
    """

    def __init__(
        self,
        sources: Sequence[SourceRank],
        dst: Manifest,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        """DigestsMissing where they do not prove all of a tensor."""
        self._tensors = tensors
        self._device = device
        self._algorithm = sources[0].algorithm
        self._sources = " and ".join(source.record.key for source in sources)
        # sources whose tables say the same
        groups: defaultdict[object, list[int]] = defaultdict(list)
        for number, source in enumerate(sources):
            groups[_content(source) if len(sources) > 1 else None].append(number)
        offered = {offer.name for source in sources for offer in source.manifest.tensors}
        self._tied = stand_ins(dst.tensors, offered)  # the digest of the other name proves them
        wanted = {
            entry.name: entry
            for entry in dst.tensors
            if entry.nbytes and entry.name not in self._tied
        }
        self._pieces: dict[_Piece, DigestCell] = {}  # the table that has its digest
        self.spans: list[Span] = []
        self._cells: list[DigestCell] = []
        for numbers in groups.values():
            content = sources[numbers[0]].manifest.tensors
            pieces = [
                (offer.name, entry_box(offer))
                for offer in content
                if _proves(offer, wanted.get(offer.name))
            ]
            if not pieces:
                continue
            cell = DigestCell([offer.name for offer in content], device, self._algorithm)
            self._cells.append(cell)
            self._pieces.update(dict.fromkeys(pieces, cell))
            srcs = [
                (number, table.addr)
                for number in numbers
                if (table := sources[number].manifest.digests) is not None
            ]
            self.spans.append(Span(cell.region.addr, cell.region.nbytes, tuple(srcs)))
        self._check_that_all_is_proven(wanted)

    def lend(self, engine: Engine, undo: ExitStack) -> None:
        for cell in self._cells:
            lend(engine, undo, to_register(cell.region, self._device.type), owner=cell)

    def wants(self, span: Span) -> bool:
        """It brings a table, rather than weights."""
        return any(cell.region.addr <= span.dst_addr < cell.region.end for cell in self._cells)

    @plain_torch()
    def compare(self, dst: Manifest) -> None:
        """When all has been read:

        DigestMismatch names the tensors that are not what was published.
        """
        offsets = {entry.name: entry.offsets for entry in dst.tensors}
        parts = {
            (name, box): _part(self._tensors[name], offsets[name], box)
            for name, box in self._pieces
        }
        ours = digests_of(parts, self._algorithm)
        theirs = {cell: cell.read() for cell in self._cells}
        differing = {
            name
            for (name, box), cell in self._pieces.items()
            if ours[name, box] != theirs[cell][name]
        }
        differing |= {name for name, other in self._tied.items() if other in differing}
        wrong = [name for name in self._tensors if name in differing]
        if wrong:
            metrics.DIGEST_MISMATCHES.inc(amount=len(wrong))
            raise DigestMismatch(
                f"{len(wrong)} of {len(self._tensors)} tensors are not what {self._sources} "
                "published, though they were read "
                f"whole: {listed(wrong)}",
                "check both machines' memory, and whether anything writes to the source's "
                "weights outside of `update`",
                tensors=wrong,
                complete=[name for name in self._tensors if name not in differing],
            )

    def _check_that_all_is_proven(self, wanted: Mapping[str, TensorEntry]) -> None:
        missing = {name: [entry_box(entry)] for name, entry in wanted.items()}
        for name, box in self._pieces:
            missing[name] = [
                rest for part in missing[name] if part != box for rest in part.minus(box)
            ]
        unproven = [name for name, parts in missing.items() if parts]
        if unproven:
            raise DigestsMissing(
                f"{len(unproven)} of {len(wanted)} tensors take only a part of what a rank "
                "of the source holds, and digests are of "
                f"all of that: {listed(unproven)}",
                'load with `verify="header"`, or into the same layout',
                tensors=unproven,
            )


def _content(source: SourceRank) -> frozenset[object]:
    """What its table has digests of, wherever it lies."""
    return frozenset(
        (
            entry.name,
            entry.dtype,
            entry.shape,
            entry.nbytes,
            entry.global_shape,
            entry.offsets,
            entry.opaque,
            entry.strides,
        )
        for entry in source.manifest.tensors
    )


def _proves(offer: TensorEntry, entry: TensorEntry | None) -> bool:
    """It is a part of what is wanted, if that is."""
    if entry is None or not of_one_tensor(offer, entry):
        return False
    return (offer.offsets, offer.shape) == (entry.offsets, entry.shape) or entry_box(entry).holds(
        entry_box(offer)
    )


def _part(tensor: torch.Tensor, offsets: tuple[int, ...], box: Box) -> torch.Tensor:
    """A view of the part that is that box of the whole."""
    if tensor.shape == box.shape:
        return tensor
    for axis, (whole, start, size) in enumerate(zip(offsets, box.offsets, box.shape, strict=True)):
        tensor = tensor.narrow(axis, start - whole, size)
    return tensor
