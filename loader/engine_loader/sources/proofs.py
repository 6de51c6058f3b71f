"""Which tensors of sources have digests that prove those of a destination. Pure.

A source has digests of what it holds. So where a tensor is put together from parts, those parts
have to be whole at the source.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine_loader.errors import DigestsMissing, listed
from engine_loader.planning.matching import of_one_tensor
from engine_loader.planning.placed import boxes_of
from engine_loader.planning.tied import stand_ins
from engine_registry.collector import collector_paused
from engine_registry.schema.manifest import Manifest, Region, TensorEntry

Piece = TensorEntry  # a part of a tensor whose digest is known; its address does not matter


@dataclass(frozen=True, eq=False)
class Group:
    """Sources whose tables say the same.

    Attributes:
        numbers: Which of the sources.
        names: Of all tensors of theirs, sorted: the order of their tables.
        pieces: Those of them that prove something.
        slots: The place of each piece in the table.
        apart: The numbers of pieces that share no memory with others and are whole words, at each
            of the sources: their bytes may be summed up as they are read.
        regions: Where these pieces lie, at each of the sources.
    """

    numbers: tuple[int, ...]
    names: tuple[str, ...]
    pieces: tuple[Piece, ...]
    slots: tuple[int, ...]
    apart: tuple[int, ...]
    regions: tuple[tuple[Region, ...], ...]


@dataclass(frozen=True)
class Proofs:
    """`tied`: names whose memory is proven by another name."""

    groups: tuple[Group, ...]
    tied: Mapping[str, str]


@dataclass
class _Made:
    manifests: Sequence[Manifest]
    dst: Manifest
    proofs: Proofs


_KEPT: deque[_Made] = deque(maxlen=2)


@collector_paused
def proofs_of(manifests: Sequence[Manifest], dst: Manifest) -> Proofs:
    """DigestsMissing where they do not prove all of a tensor. Those that were made last are kept,
    as plans are.
    """
    for made in tuple(_KEPT):
        if len(made.manifests) == len(manifests) and all(
            one is other for one, other in zip(made.manifests, manifests, strict=True)
        ):
            if made.dst is not dst:
                if made.dst != dst:
                    continue
                made.dst = dst  # the same object may come again, and is compared at once
            return made.proofs
    proofs = _make(manifests, dst)
    _KEPT.append(_Made(list(manifests), dst, proofs))
    return proofs


def _make(manifests: Sequence[Manifest], dst: Manifest) -> Proofs:
    alike: defaultdict[object, list[int]] = defaultdict(list)
    for number, manifest in enumerate(manifests):
        alike[described(manifest) if len(manifests) > 1 else None].append(number)
    offered = {offer.name for manifest in manifests for offer in manifest.tensors}
    tied = stand_ins(dst.tensors, offered)
    wanted = {entry.name: entry for entry in dst.tensors if entry.nbytes and entry.name not in tied}
    groups = []
    for numbers in alike.values():
        group = _group(numbers, [manifests[number] for number in numbers], wanted)
        if group.pieces:
            groups.append(group)
    _check_that_all_is_proven(groups, wanted)
    return Proofs(tuple(groups), tied)


def described(manifest: Manifest) -> frozenset[object]:
    """What its table has digests of, wherever it lies."""
    return frozenset([replace(entry, addr=0) for entry in manifest.tensors])


def _group(
    numbers: Sequence[int], manifests: Sequence[Manifest], wanted: Mapping[str, TensorEntry]
) -> Group:
    names = sorted([offer.name for offer in manifests[0].tensors])
    place = {name: slot for slot, name in enumerate(names)}
    offers = [offer for offer in manifests[0].tensors if proves(offer, wanted.get(offer.name))]
    apart = set(range(len(offers)))
    places: list[list[Region]] = []
    for manifest in manifests:
        addrs = {entry.name: entry.addr for entry in manifest.tensors}
        places.append([Region(addrs[offer.name], offer.nbytes) for offer in offers])
        apart &= _apart(places[-1])
    some = tuple(sorted(apart))
    return Group(
        tuple(numbers),
        tuple(names),
        tuple([replace(offer, addr=0) for offer in offers]),
        tuple([place[offer.name] for offer in offers]),
        some,
        tuple([tuple([regions[number] for number in some]) for regions in places]),
    )


def _apart(regions: Sequence[Region]) -> set[int]:
    """The numbers of those that are whole words, and overlap none of the others that are."""
    found: set[int] = set()
    end = 0
    for number in sorted(range(len(regions)), key=lambda number: regions[number].addr):
        region = regions[number]
        if region.addr % 4 or region.nbytes % 4 or region.addr < end:
            continue
        found.add(number)
        end = region.end
    return found


def proves(offer: TensorEntry, entry: TensorEntry | None) -> bool:
    """It is a part of what is wanted, if that is."""
    if entry is None or not of_one_tensor(offer, entry):
        return False
    if same_part(offer, entry):
        return True
    ours = boxes_of(entry)
    return all(any(box.holds(part) for box in ours) for part in boxes_of(offer))


def same_part(offer: TensorEntry, entry: TensorEntry) -> bool:
    """Whether both are the same boxes of the whole, in the same order."""
    return (offer.offsets, offer.shape, offer.slices) == (
        entry.offsets,
        entry.shape,
        entry.slices,
    )


def _check_that_all_is_proven(groups: Sequence[Group], wanted: Mapping[str, TensorEntry]) -> None:
    missing = {name: boxes_of(entry) for name, entry in wanted.items()}
    for piece in {piece: None for group in groups for piece in group.pieces}:
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
