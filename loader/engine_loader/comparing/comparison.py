"""What differs between instances that should hold the same, by what their ranks publish. Pure.

Digests are of the parts that ranks hold, as the parts lie in memory. So bytes are compared where
two ranks hold the same part; of instances that are cut in other ways, only whole tensors are, by
name, dtype and shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from engine_loader.comparing.holding import HeldRank, Holding
from engine_loader.planning.layers import in_order
from engine_registry.schema.manifest import TensorEntry, shape_text

_SHOWN = 8  # digits of a digest that are enough to tell two apart


class Aspect(str, Enum):
    """In what a tensor differs."""

    NAME = "name"  # some have no tensor of that name
    DTYPE = "dtype"  # the dtypes differ
    SHAPE = "shape"  # the shapes of the whole tensors differ
    BYTES = "bytes"  # the digests differ


class Obstacle(str, Enum):
    """Why the bytes of a tensor could not be compared, and so what to do."""

    NO_DIGESTS = "no digests"  # a rank publishes none: publish it with digests
    ALGORITHM = "algorithm"  # hosts and accelerators have other digests: compare both with files
    LAYOUT = "layout"  # no two ranks hold the same part: compare both with files
    ORDER = "order"  # it lies in memory in other orders: compare both with files


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same everywhere.

    Attributes:
        tensor: Its name.
        aspect: In what it differs.
        values: What each side has, by its name, such as a shape; empty where it has no such tensor.
            For bytes: the first digits of the digest that each rank has, by the rank's name.
    """

    tensor: str
    aspect: Aspect
    values: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """What a comparison has found.

    Attributes:
        sides: The names of the instances, and of the files.
        tensors: How many tensors there are, by name.
        compared: How many of them had digests on several ranks, or in files, to compare.
        differences: Every tensor that differs, in order.
        unproven: The tensors whose bytes could not be compared, and why.
        without_digests: The ranks that publish none, by name.
    """

    sides: tuple[str, ...]
    tensors: int
    compared: int
    differences: tuple[Difference, ...]
    unproven: Mapping[str, Obstacle]
    without_digests: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether no tensor differs, and digests prove it."""
        return not self.differences and not self.unproven


def compare_holdings(sides: Sequence[Holding]) -> Comparison:
    """Compares the ranks of each side with each other, and all sides with each other."""
    names = {side.name: side.names for side in sides}
    missing = {name for side in sides for known in names.values() for name in side.beyond(known)}
    tensors = _tensors(sides)
    differences: list[Difference] = []
    unproven: dict[str, Obstacle] = {}
    compared = 0
    for name in in_order(tensors):
        tensor = tensors[name]
        found = tensor.absence(names) if name in missing else tensor.other_form()
        found = found or tensor.other_bytes()
        if found is not None:
            differences.append(found)
        elif obstacle := tensor.obstacle():
            unproven[name] = obstacle
        elif tensor.is_compared:
            compared += 1
    silent = {rank.name for side in sides for rank in side.ranks if rank.digests is None}
    return Comparison(
        tuple(names), len(tensors), compared, tuple(differences), unproven, tuple(in_order(silent))
    )


class _Part(NamedTuple):
    """What one rank holds of a tensor.

    `key` is equal for equal parts of the whole. `states_whole`: the rank says which part it is, or
    there is no other rank. Digests of one `kind` are equal for equal bytes.
    """

    side: str
    rank: str
    entry: TensorEntry
    states_whole: bool
    key: Hashable
    digest: bytes | None
    algorithm: str
    kind: Hashable


def _tensors(sides: Sequence[Holding]) -> dict[str, _Tensor]:
    parts: defaultdict[str, list[_Part]] = defaultdict(list)
    for side in sides:
        for rank in side.ranks:
            for part in _parts(side, rank):
                parts[part.entry.name].append(part)
    return {name: _Tensor(name, some) for name, some in parts.items()}


def _parts(side: Holding, rank: HeldRank) -> Iterator[_Part]:
    alone = len(side.ranks) == 1
    place = rank.place.rank, rank.place.world_size
    digests = rank.digests or {}
    for entry in rank.manifest.tensors:
        whole = alone or not entry.opaque
        yield _Part(
            side.name,
            rank.name,
            entry,
            whole,
            (entry.offsets, entry.shape, entry.slices) if whole else place,
            digests.get(entry.name),
            rank.algorithm,
            (rank.algorithm, _order(entry)),
        )


def _order(entry: TensorEntry) -> tuple[int, ...]:
    """The dimensions, from the one whose neighbours lie farthest apart in memory; empty where they
    lie row by row.
    """
    if entry.strides is None:
        return ()
    strides = entry.strides
    several = [axis for axis, size in enumerate(entry.shape) if size > 1]
    order = sorted(several, key=lambda axis: -strides[axis])
    return tuple(order) if order != several else ()


class _Tensor:
    """A tensor of one name, as all sides have it."""

    def __init__(self, name: str, parts: Sequence[_Part]) -> None:
        self._name = name
        self._parts = parts
        self._sides = dict.fromkeys(part.side for part in parts)
        groups: defaultdict[Hashable, list[_Part]] = defaultdict(list)
        for part in parts:
            groups[part.key].append(part)
        self._groups = list(groups.values())

    def absence(self, sides: Iterable[str]) -> Difference:
        """It lacks on some of the sides."""
        forms = {side: f"{self._dtypes(side)} {self._shapes(side)}" for side in self._sides}
        return Difference(self._name, Aspect.NAME, {side: forms.get(side, "") for side in sides})

    def other_form(self) -> Difference | None:
        """Another dtype, or another shape of the whole."""
        if len({part.entry.dtype for part in self._parts}) > 1:
            return self._of_sides(Aspect.DTYPE, self._dtypes)
        wholes = {part.entry.global_shape for part in self._parts if part.states_whole}
        shapes = ({part.entry.shape for part in group} for group in self._groups)
        if len(wholes) > 1 or any(len(some) > 1 for some in shapes):
            return self._of_sides(Aspect.SHAPE, self._shapes)
        return None

    def other_bytes(self) -> Difference | None:
        """Other digests of one part."""
        differing: dict[str, str] = {}
        for group in self._groups:
            if len({part.digest for part in group}) == 1:
                continue
            kinds: defaultdict[Hashable, dict[str, bytes]] = defaultdict(dict)
            for part in group:
                if part.digest is not None:
                    kinds[part.kind][part.rank] = part.digest
            for digests in kinds.values():
                if len(set(digests.values())) > 1:
                    differing |= {rank: one.hex()[:_SHOWN] for rank, one in digests.items()}
        return Difference(self._name, Aspect.BYTES, differing) if differing else None

    def obstacle(self) -> Obstacle | None:
        """Why its bytes are not proven to be the same on all sides."""
        for group in self._groups:
            if len({part.side for part in group}) < len(self._sides):
                return Obstacle.LAYOUT
            if any(part.digest is None for part in group):
                return Obstacle.NO_DIGESTS
            if len({part.algorithm for part in group}) > 1:
                return Obstacle.ALGORITHM
            if len({part.kind for part in group}) > 1:
                return Obstacle.ORDER
        return None

    @property
    def is_compared(self) -> bool:
        """Several ranks hold a part of it."""
        return any(len(group) > 1 for group in self._groups)

    def _of_sides(self, aspect: Aspect, value: Callable[[str], str]) -> Difference:
        return Difference(self._name, aspect, {side: value(side) for side in self._sides})

    def _dtypes(self, side: str) -> str:
        return _each({part.entry.dtype: None for part in self._parts if part.side == side})

    def _shapes(self, side: str) -> str:
        """Of the whole; or of each part where ranks do not state the whole."""
        parts = [part for part in self._parts if part.side == side]
        shapes = [
            part.entry.global_shape if part.states_whole else part.entry.shape for part in parts
        ]
        return _each(dict.fromkeys(map(shape_text, shapes)))


def _each(values: Iterable[str]) -> str:
    return ", ".join(values)
