"""Weights that say where they come from: every 8-byte word names a launch, a version, a rank and
its place.

So a mix of two launches, versions or ranks cannot pass for one of them, however little of either it
has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

WORD = 8
_PLACE_BITS, _RANK_BITS, _VERSION_BITS, _LAUNCH_BITS = 32, 8, 12, 11  # 63 in all: the sign stays


@dataclass(frozen=True)
class Origin:
    """Whose a word is. Launches of one number hold the same weights."""

    launch: int = 0
    version: int = 0
    rank: int = 0

    @property
    def _tag(self) -> int:
        return (
            (self.launch << (_VERSION_BITS + _RANK_BITS)) | (self.version << _RANK_BITS) | self.rank
        )


def words(origin: Origin, count: int, first: int = 0) -> torch.Tensor:
    """So many words from the place `first` on, as int64."""
    return torch.arange(first, first + count, dtype=torch.int64) + (origin._tag << _PLACE_BITS)


def origins(found: torch.Tensor, places: torch.Tensor | None = None) -> Counter[Origin | None]:
    """How many words of the int64 tensor are whose. Those that are not in their places are
    nobody's: None.

    `places` are where in the whole the words belong; without it they are the whole.
    """
    flat = found.reshape(-1)
    places = torch.arange(flat.numel()) if places is None else places.reshape(-1)
    tags = torch.where((flat & ((1 << _PLACE_BITS) - 1)) == places, flat >> _PLACE_BITS, -1)
    if tags.numel() and bool((tags == tags[0]).all()):  # as a rule, and sooner seen than sorted
        return Counter({_origin(int(tags[0])): tags.numel()})
    values, counts = torch.unique(tags, return_counts=True)
    return Counter(
        {_origin(int(tag)): int(count) for tag, count in zip(values, counts, strict=True)}
    )


def _origin(tag: int) -> Origin | None:
    if tag < 0:
        return None
    return Origin(
        tag >> (_VERSION_BITS + _RANK_BITS),
        (tag >> _RANK_BITS) & ((1 << _VERSION_BITS) - 1),
        tag & ((1 << _RANK_BITS) - 1),
    )


def origins_of_bytes(parts: Mapping[str, torch.Tensor]) -> Counter[Origin | None]:
    """Of a run of words that was cut into tensors of bytes, in their order, anywhere."""
    whole = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts.values()])
    return origins(whole[: whole.numel() // WORD * WORD].view(torch.int64))


def the_origin(found: Counter[Origin | None]) -> Origin:
    """AssertionError unless all words are of one origin."""
    assert len(found) == 1, f"a mix: {dict(found)}"
    (origin,) = found
    assert origin is not None, "not one word is where it belongs"
    return origin
