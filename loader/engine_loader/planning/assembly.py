"""How a tensor is put together from tensors that hold parts of it, wherever they all lie. Pure.

The layers of a model are alike: where one is put together from, all are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from engine_loader.planning.boxes import Box, Lines, Nearby, check_partition
from engine_loader.planning.placed import Placed, lines, placed
from engine_registry.schema.manifest import TensorEntry, shape_text

Offered = Sequence[tuple[int, TensorEntry]]  # each with the number of its source


class Piece(NamedTuple):
    """Bytes of the tensor, and who holds them: for each source, which of the tensors that are
    offered, and how many bytes before them lie in it. `lines` count from the beginning of the
    tensor that is filled.
    """

    srcs: tuple[tuple[int, int], ...]
    lines: Lines


class Assemblies:
    """Those that were made are kept."""

    def __init__(self) -> None:
        self._made: dict[object, tuple[list[Piece], str]] = {}

    def of(self, entry: TensorEntry, offers: Offered) -> tuple[list[Piece], str]:
        """The pieces, or why there are none. All are of one tensor, in one order of dimensions."""
        question = _layout(entry), tuple([(number, _layout(offer)) for number, offer in offers])
        if question not in self._made:
            self._made[question] = _assemble(entry, offers)
        return self._made[question]


def _layout(entry: TensorEntry) -> object:
    """All that matters of one but where it lies."""
    return entry.nbytes, entry.shape, entry.offsets, entry.strides, entry.slices


def _assemble(entry: TensorEntry, offers: Offered) -> tuple[list[Piece], str]:
    volume = prod(entry.shape)
    if not volume:
        return [], ""
    itemsize = entry.nbytes // volume
    if entry.nbytes % volume or any(
        offer.nbytes != prod(offer.shape) * itemsize for _, offer in offers
    ):
        return (
            [],
            f"{offers[0][1].nbytes} bytes in the source, {entry.nbytes} here, though the dtype is "
            "the same",
        )
    holders: defaultdict[Placed, list[tuple[int, int]]] = defaultdict(list)
    for which, (_, offer) in enumerate(offers):
        for part, ahead in placed(offer):
            holders[part].append((which, ahead * itemsize))
    nearby: Nearby[Placed] = Nearby([some.box for some in holders])
    for some in holders:
        nearby.add(some.box, some)
    pieces: list[Piece] = []
    for part, ahead in placed(entry):
        cut, missing = _cut(part, [some for _, some in nearby.of(part.box)], itemsize)
        if missing is not None:
            return (
                [],
                f"no rank of the source holds the box at {list(missing.offsets)} of shape "
                f"{shape_text(missing.shape)}",
            )
        for held, run in cut:
            srcs = {  # one for each source
                offers[which][0]: (which, at + src)
                for where, src in held
                for which, at in holders[where]
            }
            in_order = tuple([src for _, src in sorted(srcs.items())])
            pieces.append(Piece(in_order, run.at(0, ahead * itemsize)))
    return pieces, ""


# Boxes that hold the same bytes, with where these begin in each; and where they come to lie.
_Cut = tuple[list[tuple[Placed, int]], Lines]


def _cut(wanted: Placed, held: Sequence[Placed], itemsize: int) -> tuple[list[_Cut], Box | None]:
    """What to take from which of the boxes, as much as possible from one, and a part of `wanted`
    that none holds, if any.
    """
    overlaps = {some: common for some in held if (common := wanted.box.meet(some.box)) is not None}
    there: Nearby[Placed] = Nearby(list(overlaps.values()))
    taken: Nearby[None] = Nearby(list(overlaps.values()))
    for some, common in overlaps.items():
        there.add(common, some)
    used: list[Box] = []
    cut: list[_Cut] = []
    for some in sorted(overlaps, key=lambda some: (-overlaps[some].volume, some.box.offsets)):
        for common in _without(overlaps[some], taken):
            used.append(common)
            taken.add(common, None)
            ways = {
                other: lines(common, other, wanted, itemsize)
                for box, other in there.of(common)
                if other is some or box.holds(common)
            }
            best = ways[some]._replace(src=0)
            alike = [(at, way.src) for at, way in ways.items() if way._replace(src=0) == best]
            cut.append((alike, best))
    if sum([box.volume for box in used]) < wanted.box.volume:
        return [], _without(wanted.box, taken)[0]
    check_partition(wanted.box, used)
    return cut, None


def _without(box: Box, taken: Nearby[None]) -> list[Box]:
    """What is left of the box."""
    left, parts = [], [box]
    while parts:
        part = parts.pop()
        other = next((other for other, _ in taken.of(part) if other.meet(part) is not None), None)
        if other is None:
            left.append(part)
        else:
            parts += part.minus(other)
    return left
