"""The whole tensors that a source holds, and the loads that bring them: one group after another
into the same memory.

Used by `load_full`, `Catalogue` and `Mirror`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine_loader.engines.base import Engine, lend
from engine_loader.errors import LoaderError, WeightsMismatch, listed
from engine_loader.files.memory import allocate, block_of, extent, with_strides
from engine_loader.loading.load import load
from engine_loader.loading.report import LoadReport
from engine_loader.options import LoadOptions, number_of
from engine_loader.planning.whole import Whole, whole_tensors
from engine_loader.sources.manifests import fetch_manifests
from engine_loader.sources.released import pinned
from engine_loader.sources.search import Search
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.dtypes import dtype_named
from engine_loader.tensors.shards import Shard
from engine_loader.transfer.progress import OnProgress
from engine_registry import Manifest, RankRecord, Registry
from engine_registry.watching.waiting import Wanted

Groups = Sequence[Sequence[Whole]]
Loaded = tuple[dict[str, torch.Tensor], LoadReport]
Loads = Generator[Loaded, None, None]


@dataclass(frozen=True)
class Reader:
    """What is read from where, however often. `names` are the tensors that are wanted; None wants
    all.
    """

    registry: Registry
    engine: Engine
    wanted: Wanted
    options: LoadOptions
    names: Collection[str] | None = None
    device: str = "cpu"

    def find(self, timeout_s: float) -> WholeSource:
        """The best instance that has them whole. Waits until one is ready.

        Raises WeightsMismatch where none has, and what `pinned` and `Search.find` raise.
        """
        deadline = time.monotonic() + timeout_s
        options = pinned(self.registry, self.wanted, self.options, timeout_s)
        search = Search(
            self.registry,
            self.engine,
            self.wanted,
            None,
            Manifest((), ()),
            boxes=True,
            version=number_of(options),
            contents=options.contents,
            cancel=options.cancel,
        )
        found = search.find(deadline)
        reader = replace(self, options=options)
        misfits: list[LoaderError] = []
        for records in [team for group in found.instances for team in group.teams]:
            try:
                return WholeSource(reader, records, tuple(self._wholes_of(records)))
            except LoaderError as exc:
                misfits.append(exc)
        raise misfits[0]

    def _wholes_of(self, records: Sequence[RankRecord]) -> list[Whole]:
        instance, manifests = records[0].instance, fetch_manifests(self.registry, records)
        if self.names is None:
            return whole_tensors(instance, manifests)
        names = set(self.names)
        wanted = [_only(manifest, names) for manifest in manifests]
        found = {entry.name for manifest in wanted for entry in manifest.tensors}
        if missing := [name for name in self.names if name not in found]:
            raise WeightsMismatch(
                f"{instance!r} does not have {len(missing)} of the {len(names)} tensors that are "
                f"wanted, nothing was read: {listed(missing)}",
                "name tensors that it has",
                tensors=missing,
            )
        return whole_tensors(instance, wanted)


def _only(manifest: Manifest, names: Collection[str]) -> Manifest:
    return replace(
        manifest, tensors=tuple(entry for entry in manifest.tensors if entry.name in names)
    )


@dataclass(frozen=True)
class WholeSource:
    """The tensors of the ranks of one instance, in the contents that the ranks had.

    `wholes` are in the order in which they lie in the ranks' memory.
    """

    reader: Reader
    records: Sequence[RankRecord]
    wholes: Sequence[Whole]

    @property
    def contents(self) -> tuple[str, ...]:
        return tuple(record.content for record in self.records)

    def fill(self, groups: Groups, timeout_s: float) -> Loads:
        """Loads each group when it is its turn, and all of them into one block of memory: what a
        group's tensors hold is over when the next one is asked for.

        Raises what `load` does: VersionUnavailable, too, where the source does not have these
        contents any more.
        """
        layouts = [
            {whole.name: (dtype_named(whole.dtype), whole.shape) for whole in group}
            for group in groups
        ]
        with ExitStack() as undo:
            memory = block_of(max(map(extent, layouts)), self.reader.device)
            # Lent until the end, the memory is registered once and not for each group.
            lent = Destination({"memory": memory}).manifest.regions
            began = time.monotonic()
            lend(self.reader.engine, undo, *lent, owner=memory)
            register_s = time.monotonic() - began
            total_nbytes = sum(whole.nbytes for group in groups for whole in group)
            done_nbytes = 0
            for group, layout in zip(groups, layouts, strict=True):
                tensors = with_strides(
                    allocate(layout, memory=memory), {whole.name: whole.strides for whole in group}
                )
                nbytes = sum(whole.nbytes for whole in group)
                progress = self._part_of_progress(done_nbytes, nbytes, total_nbytes)
                report = self.load(
                    group, destination_of(group, tensors), timeout_s, progress=progress
                )
                yield tensors, replace(report, register_s=report.register_s + register_s)
                register_s = 0.0
                done_nbytes += nbytes

    def load(
        self, wholes: Sequence[Whole], tensors: Destination, timeout_s: float, **options: Any
    ) -> LoadReport:
        """Fills tensors that `destination_of` has made for these wholes, with the contents of the
        source. Other options take the place of the reader's.

        Raises what `load` does.
        """
        reader = self.reader
        return load(
            reader.registry,
            reader.engine,
            reader.wanted,
            rank=0 if any(whole.opaque for whole in wholes) else None,  # there is no other
            tensors=tensors,
            timeout_s=timeout_s,
            options=replace(reader.options, contents=self.contents, partial=True, **options),
        )

    def _part_of_progress(
        self, done_nbytes: int, nbytes: int, total_nbytes: int
    ) -> OnProgress | None:
        """A load counts what it reads, which may be more than the tensors have."""
        on_progress = self.reader.options.progress
        if on_progress is None:
            return None
        return lambda part: on_progress(
            replace(
                part,
                nbytes=done_nbytes + nbytes * part.nbytes // max(1, part.total_nbytes),
                total_nbytes=total_nbytes,
            )
        )


def destination_of(wholes: Sequence[Whole], tensors: Mapping[str, torch.Tensor]) -> Destination:
    """Tensors that are these wholes, as they are loaded."""
    shards = {
        whole.name: Shard(whole.shape, (0,) * len(whole.shape))
        for whole in wholes
        if not whole.opaque
    }
    return Destination(tensors, shards)
