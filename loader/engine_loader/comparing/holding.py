"""What one side of a comparison holds: an instance, or files that stand for one. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from engine_loader.planning.tied import stand_ins
from engine_registry import Manifest, Place


@dataclass(frozen=True)
class HeldRank:
    """A rank with the digests that it publishes: of each tensor by name. None: it publishes none.

    Equal algorithms make equal digests of equal bytes.
    """

    name: str
    place: Place
    manifest: Manifest
    digests: Mapping[str, bytes] | None
    algorithm: str = ""


@dataclass(frozen=True)
class Holding:
    """All ranks of an instance, by rank. `name` is that of the instance, or of the files."""

    name: str
    ranks: Sequence[HeldRank]

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return {entry.name for rank in self.ranks for entry in rank.manifest.tensors}

    def beyond(self, names: Collection[str]) -> set[str]:
        """The tensors that are not among these names. A further name of memory that has one of them
        is no other tensor.
        """
        beyond: set[str] = set()
        for rank in self.ranks:
            entries = rank.manifest.tensors
            others = {entry.name for entry in entries if entry.name not in names}
            beyond |= others - stand_ins(entries, names).keys() if others else set()
        return beyond
