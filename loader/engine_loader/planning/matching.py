"""Which part of each tensor comes from which source, or why it cannot be had. Pure.

Sources have numbers, their places in the sequence that the planner was given.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_loader.planning.assembly import Assemblies
from engine_loader.planning.boxes import Box
from engine_loader.planning.near_name import near_name
from engine_loader.planning.placed import boxes_of, in_one_order
from engine_loader.planning.reads import Span, span_of
from engine_loader.planning.tied import stand_ins
from engine_registry.schema.manifest import Manifest, TensorEntry, shape_text

_MOST_NEAR_NAMES = 8  # that are looked for, as no more problems are shown


@dataclass(frozen=True)
class Origin:
    """A rank that may be read from.

    `own`: it has the rank that is being filled, so tensors without a box are the same there.
    """

    name: str
    manifest: Manifest
    own: bool = True


def needed(
    origins: Sequence[Origin], dst: Manifest, most: int, far: Collection[int] = ()
) -> list[int]:
    """Numbers of origins, the first ones first, that together hold all that is wanted, and each box
    of it up to `most` times. Those that are `far` only bring what none before them has.
    """
    wanted = {entry.name: (entry, boxes_of(entry)) for entry in dst.tensors if entry.nbytes}
    held: Counter[tuple[str, Box]] = Counter()
    some = []
    for number, origin in enumerate(origins):
        has = [
            (offer.name, box)
            for offer in origin.manifest.tensors
            if offer.name in wanted
            for entry, parts in [wanted[offer.name]]
            if of_one_tensor(offer, entry) and (origin.own or not entry.opaque)
            for box in boxes_of(offer)
            if entry.opaque or any(box.meet(part) is not None for part in parts)
        ]
        if any(held[box] < (1 if number in far else most) for box in has):
            some.append(number)
            held.update(has)
    return some or [0]


class Offers:
    """What there is of each tensor, and where."""

    def __init__(self, origins: Sequence[Origin]) -> None:
        self._origins = origins
        self._by_name: defaultdict[str, list[tuple[int, TensorEntry]]] = defaultdict(list)
        for number, origin in enumerate(origins):
            for entry in origin.manifest.tensors:
                self._by_name[entry.name].append((number, entry))
        self._assemblies = Assemblies()
        self._missing = 0

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def unexpected(self, dst: Manifest) -> list[str]:
        """One line for each tensor that is not wanted, by any of its names."""
        wanted = {entry.name for entry in dst.tensors}
        others = [name for name in self._by_name if name not in wanted]
        strange: set[str] = set()
        for origin in self._origins if others else ():
            tied = stand_ins(origin.manifest.tensors, wanted)
            strange |= {entry.name for entry in origin.manifest.tensors} - tied.keys()
        return [f"{name}: in the source, but not here" for name in others if name in strange]

    def parts_of(self, entry: TensorEntry) -> tuple[list[Span], str]:
        """Where its bytes come from, one span for each box that holds a part of them; or why that
        is not known.
        """
        offers = self._by_name.get(entry.name)
        if not offers:
            return [], self._why_missing(entry.name)
        same = [
            (number, offer.addr)
            for number, offer in offers
            if _same(offer, entry) and self._comparable(number, entry)
        ]
        if same:
            return ([Span(entry.addr, entry.nbytes, tuple(same))] if entry.nbytes else []), ""
        return self._parts_of_boxes(entry, offers)

    def _why_missing(self, name: str) -> str:
        self._missing += 1
        near = near_name(name, self._by_name) if self._missing <= _MOST_NEAR_NAMES else ""
        return f"here, but not in the source{f', which has {near}' if near else ''}"

    def _comparable(self, number: int, entry: TensorEntry) -> bool:
        return not entry.opaque or self._origins[number].own

    def _parts_of_boxes(
        self, entry: TensorEntry, offers: Sequence[tuple[int, TensorEntry]]
    ) -> tuple[list[Span], str]:
        own = [offer for number, offer in offers if self._origins[number].own]
        dtypes = {offer.dtype for _, offer in offers} - {entry.dtype}
        if dtypes:
            return [], f"dtype {', '.join(sorted(dtypes))} in the source, {entry.dtype} here"
        if entry.opaque or any(offer.opaque for _, offer in offers):
            return [], _why_not_as_is(own[0] if own else offers[0][1], entry)
        wholes = {offer.global_shape for _, offer in offers} - {entry.global_shape}
        if wholes:
            found = ", ".join(map(shape_text, sorted(wholes)))
            return [], f"part of {found} in the source, of {shape_text(entry.global_shape)} here"
        in_order = [(number, offer) for number, offer in offers if in_one_order(offer, entry)]
        if not in_order:
            return [], _why_not_in_order(own[0] if own else offers[0][1], entry)
        pieces, problem = self._assemblies.of(entry, in_order)
        return [
            span_of(
                tuple(
                    [
                        (in_order[which][0], in_order[which][1].addr + ahead)
                        for which, ahead in piece.srcs
                    ]
                ),
                piece.lines.at(0, entry.addr),
            )
            for piece in pieces
        ], problem


def of_one_tensor(offer: TensorEntry, entry: TensorEntry) -> bool:
    """They may be different boxes of it. Their elements lie in the same order."""
    return (
        offer.dtype == entry.dtype
        and offer.opaque == entry.opaque
        and offer.global_shape == entry.global_shape
        and in_one_order(offer, entry)
    )


def _same(offer: TensorEntry, entry: TensorEntry) -> bool:
    """They hold the same boxes of the same tensor, in the same way."""
    return (
        offer.offsets == entry.offsets
        and offer.shape == entry.shape
        and offer.nbytes == entry.nbytes
        and offer.strides == entry.strides
        and offer.slices == entry.slices
        and of_one_tensor(offer, entry)
    )


def _why_not_as_is(offer: TensorEntry, entry: TensorEntry) -> str:
    """Why one without a statement of what it is part of does not fit."""
    if offer.opaque != entry.opaque:
        return (
            f"{_describe_box(offer)} in the source, {_describe_box(entry)} here: say `shards` on "
            "both sides, or on neither"
        )
    if offer.shape != entry.shape:
        return f"shape {shape_text(offer.shape)} in the source, {shape_text(entry.shape)} here"
    if offer.nbytes != entry.nbytes:
        return f"{offer.nbytes} bytes in the source, {entry.nbytes} here"
    if offer.strides != entry.strides:
        return _why_not_in_order(offer, entry)
    return (
        "only other ranks have it, and it does not say what it is part of: publish and load it "
        "with `shards`"
    )


def _why_not_in_order(offer: TensorEntry, entry: TensorEntry) -> str:
    """Why one of two that are not both contiguous does not fit."""
    here, there = _describe_order(entry), _describe_order(offer)
    return (
        f"{there} in the source, {here} here: give both sides the same strides, or call "
        ".contiguous() on both"
    )


def _describe_order(entry: TensorEntry) -> str:
    return "contiguous" if entry.strides is None else f"strides {list(entry.strides)}"


def _describe_box(entry: TensorEntry) -> str:
    if entry.opaque:
        return "no statement of what it is part of"
    if entry.slices is not None:
        return f"{entry.boxes} boxes of {shape_text(entry.global_shape)}"
    return f"box at {list(entry.offsets)} of {shape_text(entry.global_shape)}"
