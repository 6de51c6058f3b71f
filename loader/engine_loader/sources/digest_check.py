"""Whether what was read is what the sources say that it is: tables of digests, read with the
weights, beside our own digests.

Ours are those of the bytes as they were read, where the engine sums these up on the way; else of
the memory that was filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch

from engine_loader import metrics
from engine_loader.digests.table import NBYTES, DigestCell, digests_of
from engine_loader.engines.base import Engine, lend
from engine_loader.engines.tally import Tally
from engine_loader.errors import DigestMismatch, listed
from engine_loader.planning.reads import Span
from engine_loader.publishing.header import peer_of_record
from engine_loader.sources.early_digests import EarlyDigests
from engine_loader.sources.pieces import part_of
from engine_loader.sources.proofs import Group, Piece, proofs_of, same_part
from engine_loader.sources.source import SourceRank
from engine_loader.sources.tallied import Tallied
from engine_loader.tensors.cuda import to_register
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Manifest


class DigestCheck:
    """Of one attempt: `lend`, read the `spans` with the weights, `compare`."""

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
        self._sources = sources
        self._algorithm = sources[0].algorithm
        self._proofs = proofs_of([source.manifest for source in sources], dst)
        self._cells: dict[Group, DigestCell] = {}  # its table
        self._tallied: dict[Group, Tallied] = {}  # where the engine sums up what it reads
        self._early: EarlyDigests | None = None  # unless the engine sums up what it reads
        self._proven: frozenset[str] = frozenset()
        self.spans: list[Span] = []
        for group in self._proofs.groups:
            cell = self._cells[group] = DigestCell(group.names, device, self._algorithm)
            srcs = [
                (number, table.addr)
                for number in group.numbers
                if (table := sources[number].manifest.digests) is not None
            ]
            self.spans.append(Span(cell.region.addr, cell.region.nbytes, tuple(srcs)))

    def lend(self, engine: Engine, undo: ExitStack) -> None:
        """Until `undo` is closed, the engine may read tables, and sums up what it reads; or the
        processor does.
        """
        for cell in self._cells.values():
            lend(engine, undo, to_register(cell.region, self._device.type), owner=cell)
        if engine.tallies == self._algorithm:
            self._tally(engine, undo)
        if not self.tallied:
            self._early = EarlyDigests(self._tensors, self._algorithm)
            undo.callback(self._early.close)

    def _tally(self, engine: Engine, undo: ExitStack) -> None:
        for group in self._proofs.groups:
            tallies: list[Tally] = []
            for number, regions in zip(group.numbers, group.regions, strict=True):
                peer = peer_of_record(self._sources[number].record)
                tally = engine.tally(peer, regions, self._device)
                if tally is not None:
                    undo.callback(tally.close)
                    tallies.append(tally)
            if tallies:
                self._tallied[group] = Tallied(group, tallies)

    def receive(self, spans: Sequence[Span]) -> None:
        """They are weights that have come for good. Tensors that are whole by now are summed up
        while the rest comes.
        """
        if self._early is not None:
            self._early.add(spans)

    def spare(self, names: Iterable[str]) -> None:
        """Of these tensors nothing is read, as digests have just proven what they hold."""
        self._proven = frozenset(names)

    @property
    def tallied(self) -> bool:
        """The engine sums up some of what it reads."""
        return bool(self._tallied)

    def look(self) -> None:
        """Makes digests of what the engine has summed up by now."""
        for tallied in self._tallied.values():
            tallied.look()

    def wants(self, span: Span) -> bool:
        """It brings a table, rather than weights."""
        return any(
            cell.region.addr <= span.dst_addr < cell.region.end for cell in self._cells.values()
        )

    @plain_torch()
    def compare(self, dst: Manifest) -> None:
        """When all has been read:

        DigestMismatch names the tensors that are not what was published.
        """
        differing: set[str] = set()
        for group, cell in self._cells.items():
            theirs = cell.packed()
            left = set(range(len(group.pieces)))
            if group in self._tallied:
                left -= self._tallied[group].equal_to(theirs)
            if self._proven:
                left -= {one for one in left if group.pieces[one].name in self._proven}
            ours = self._digests([group.pieces[number] for number in sorted(left)], dst)
            for number in left:
                at = NBYTES * group.slots[number]
                piece = group.pieces[number]
                if ours[piece] != theirs[at : at + NBYTES]:
                    differing.add(piece.name)
        tied = self._proofs.tied
        differing |= {name for name, other in tied.items() if other in differing}
        wrong = [name for name in self._tensors if name in differing]
        if wrong:
            metrics.DIGEST_MISMATCHES.inc(amount=len(wrong))
            names = " and ".join(source.record.key for source in self._sources)
            raise DigestMismatch(
                f"{len(wrong)} of {len(self._tensors)} tensors are not what {names} "
                f"published, though they were read whole: {listed(wrong)}",
                "check both machines' memory, and whether anything writes to the source's "
                "weights outside of `update`",
                tensors=wrong,
                complete=[name for name in self._tensors if name not in differing],
            )

    def _digests(self, pieces: Sequence[Piece], dst: Manifest) -> dict[Piece, bytes]:
        """Of our memory."""
        if not pieces:
            return {}
        wanted = {entry.name: entry for entry in dst.tensors}
        views: dict[Piece, torch.Tensor] = {}
        ours: dict[Piece, bytes] = {}
        for piece in pieces:
            tensor, entry = self._tensors[piece.name], wanted[piece.name]
            if same_part(piece, entry):
                digest = self._early.of(piece.name) if self._early is not None else None
                if digest is not None:
                    ours[piece] = digest
                else:
                    views[piece] = tensor
            elif piece.slices is None:
                views[piece] = part_of(tensor, entry.along, piece)
            else:  # a copy, so one at a time
                part = {piece: part_of(tensor, entry.along, piece)}
                ours |= digests_of(part, self._algorithm)
        return ours | digests_of(views, self._algorithm)
