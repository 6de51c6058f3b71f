"""Whether what was read is what the sources say that it is: tables of digests, read with the
weights, beside our own digests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from engine_loader import metrics
from engine_loader.digests.table import DigestCell, digests_of
from engine_loader.engines.base import Engine, lend
from engine_loader.errors import DigestMismatch, DigestsMissing, listed
from engine_loader.planning.matching import of_one_tensor
from engine_loader.planning.placed import boxes_of, steps_of
from engine_loader.planning.reads import Span
from engine_loader.planning.tied import stand_ins
from engine_loader.sources.source import SourceRank
from engine_loader.tensors.cuda import to_register
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Manifest, Slices, TensorEntry

_Piece = TensorEntry  # a part of a tensor whose digest is known; its address does not matter


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
                replace(offer, addr=0)
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
        wanted = {entry.name: entry for entry in dst.tensors}
        views: dict[_Piece, torch.Tensor] = {}
        ours: dict[_Piece, bytes] = {}
        for piece in self._pieces:
            tensor, entry = self._tensors[piece.name], wanted[piece.name]
            if _same_part(piece, entry):
                views[piece] = tensor
            elif piece.slices is None:
                views[piece] = _part(tensor, entry.along, piece)
            else:  # a copy, so one at a time
                part = {piece: _part(tensor, entry.along, piece)}
                ours |= digests_of(part, self._algorithm)
        ours |= digests_of(views, self._algorithm)
        theirs = {cell: cell.read() for cell in self._cells}
        differing = {
            piece.name
            for piece, cell in self._pieces.items()
            if ours[piece] != theirs[cell][piece.name]
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
        missing = {name: boxes_of(entry) for name, entry in wanted.items()}
        for piece in self._pieces:
            for box in boxes_of(piece):
                missing[piece.name] = [
                    rest for part in missing[piece.name] if part != box for rest in part.minus(box)
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
    return frozenset([replace(entry, addr=0) for entry in source.manifest.tensors])


def _proves(offer: TensorEntry, entry: TensorEntry | None) -> bool:
    """It is a part of what is wanted, if that is."""
    if entry is None or not of_one_tensor(offer, entry):
        return False
    if _same_part(offer, entry):
        return True
    ours = boxes_of(entry)
    return all(any(box.holds(part) for box in ours) for part in boxes_of(offer))


def _same_part(offer: TensorEntry, entry: TensorEntry) -> bool:
    return (offer.offsets, offer.shape, offer.slices) == (
        entry.offsets,
        entry.shape,
        entry.slices,
    )


def _part(tensor: torch.Tensor, along: Slices, piece: _Piece) -> torch.Tensor:
    """What of the tensor, which holds these slices, is the piece: with its dimensions in the order
    in which they lie in the memory that the digest is of.
    """
    steps = steps_of(piece)
    order = sorted(range(tensor.ndim), key=lambda axis: -steps[axis])
    tensor = tensor.permute(order)
    for place, axis in enumerate(order):
        ours, theirs = along[axis], piece.along[axis]
        if ours != theirs:
            parts = [_slice(tensor, place, ours, *some) for some in theirs]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts, place).contiguous()
    return tensor


def _slice(
    tensor: torch.Tensor, axis: int, ours: Sequence[tuple[int, int]], start: int, stop: int
) -> torch.Tensor:
    """A view. It lies in one of the slices that the tensor holds along the axis."""
    ahead = 0
    for begin, end in ours:
        if begin <= start and stop <= end:
            return tensor.narrow(axis, ahead + start - begin, stop - start)
        ahead += end - begin
    raise ValueError(f"{start}:{stop} along dimension {axis} is not in the tensor")
