"""Ranks that hold parts of the same tensors in memory that is only numbered, and what carrying out
a plan between them does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from hypothesis import strategies as st

from engine_loader.planning.boxes import Box, Lines
from engine_loader.planning.matching import Origin
from engine_loader.planning.placed import Placed, placed
from engine_loader.planning.reads import Costs, Span
from engine_registry import Manifest, Region, TensorEntry
from engine_registry.schema.manifest import Slices, dense_strides

DTYPES = {1: "uint8", 2: "int16", 4: "float32"}


@dataclass(frozen=True)
class Whole:
    """A tensor as nobody may have it in one piece; `content` is row by row."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    content: bytes

    # of the axes in everybody's memory, the longest steps first; None: row by row
    order: tuple[int, ...] | None = None

    def part(self, along: Slices) -> bytes:
        """What a rank has that holds these slices along the axes, as it lies in its memory."""
        order = self.order or range(len(self.shape))
        indices = [[at for some in slices for at in range(*some)] for slices in along]
        found = []
        for place in itertools.product(*[indices[axis] for axis in order]):
            index = dict(zip(order, place, strict=True))
            at = 0
            for axis, size in enumerate(self.shape):
                at = at * size + index[axis]
            found.append(self.content[at * self.itemsize : (at + 1) * self.itemsize])
        return b"".join(found)

    def entry(self, along: Slices, addr: int) -> TensorEntry:
        shape = tuple(sum(stop - start for start, stop in some) for some in along)
        nbytes = prod(shape) * self.itemsize
        strides = [1] * len(shape)
        order = self.order or tuple(range(len(shape)))
        for axis, inner in reversed(list(itertools.pairwise(order))):
            strides[axis] = strides[inner] * shape[inner]
        one_box = all(len(some) == 1 for some in along) or not nbytes
        return TensorEntry(
            self.name,
            DTYPES[self.itemsize],
            shape,
            addr if nbytes else 0,
            nbytes,
            self.shape,
            tuple(some[0][0] for some in along),
            opaque=False,
            strides=dense_strides(shape, strides) if nbytes else None,
            slices=None if one_box else along,
        )


def slices_of(box: Box) -> Slices:
    return tuple(
        ((start, start + size),) for start, size in zip(box.offsets, box.shape, strict=True)
    )


@dataclass(frozen=True)
class Memory:
    """A rank's: its bytes begin at the address `base`."""

    manifest: Manifest
    base: int
    content: bytes

    def at(self, addr: int, nbytes: int) -> bytes:
        """Such bytes as one read may bring: they lie in one region."""
        assert any(
            region.addr <= addr and addr + nbytes <= region.end for region in self.manifest.regions
        )
        return self.content[addr - self.base : addr - self.base + nbytes]


def memory_of(
    parts: Iterable[tuple[Whole, Slices]], base: int, gaps: Iterable[int], cuts: Iterable[bool]
) -> Memory:
    """The parts one after the other, with gaps between them, and where `cuts` says so in another
    region than the one before.
    """
    entries: list[TensorEntry] = []
    regions: list[Region] = []
    content = bytearray()
    start = 0  # of the region
    for (whole, along), gap, cut in zip(parts, gaps, cuts, strict=False):
        if cut and len(content) > start:
            regions.append(Region(base + start, len(content) - start))
            start = len(content)
        content += b"\xee" * gap
        entries.append(whole.entry(along, base + len(content)))
        content += whole.part(along)
    if len(content) > start:
        regions.append(Region(base + start, len(content) - start))
    return Memory(Manifest(tuple(entries), tuple(regions)), base, bytes(content))


def shards(shape: tuple[int, ...], mesh: Sequence[int], axes: Sequence[int | None]) -> list[Box]:
    """The box of each rank of the mesh, as DTensors have it: cut along one axis after another as
    torch.chunk does, or not.
    """
    boxes = []
    for place in itertools.product(*map(range, mesh)):
        offsets, local = [0] * len(shape), list(shape)
        for ranks, rank, axis in zip(mesh, place, axes, strict=True):
            if axis is not None:
                size = -(-local[axis] // ranks)
                start = min(rank * size, local[axis])
                offsets[axis], local[axis] = offsets[axis] + start, min(size, local[axis] - start)
        boxes.append(Box(tuple(offsets), tuple(local)))
    return boxes


@st.composite
def fused(draw: st.DrawFn, shape: tuple[int, ...], ranks: int) -> list[Slices]:
    """What each rank has of a whole that is several tensors in a row, as queries, keys and values
    are: of each a part along one axis, or all. Along other axes, too, their order may be another.
    """
    cut_axis = draw(st.integers(0, max(0, len(shape) - 1)))
    along: list[list[tuple[tuple[int, int], ...]]] = []  # by axis, of each rank
    for axis, size in enumerate(shape):
        cuts = draw(st.sets(st.integers(1, max(1, size - 1)), max_size=3))
        sections = list(itertools.pairwise(sorted({0, size} | {at for at in cuts if at < size})))
        split = [axis == cut_axis and draw(st.booleans()) for _ in sections]
        order = draw(st.permutations(range(len(sections))))
        along.append(
            [
                tuple(
                    (start, stop)
                    for number in order
                    for start, stop in [_part(sections[number], rank, ranks, split[number])]
                    if start < stop
                )
                or ((0, 0),)
                for rank in range(ranks)
            ]
        )
    return [tuple(slices[rank] for slices in along) for rank in range(ranks)]


def _part(section: tuple[int, int], rank: int, ranks: int, split: bool) -> tuple[int, int]:
    """Of a section that is cut as torch.chunk does."""
    if not split:
        return section
    start, stop = section
    size = -(-(stop - start) // ranks)
    return min(start + rank * size, stop), min(start + (rank + 1) * size, stop)


def origins_of(memories: Sequence[Memory], own: bool = False) -> list[Origin]:
    return [Origin(f"a/{number}", memory.manifest, own) for number, memory in enumerate(memories)]


def in_rows(box: Box) -> Placed:
    """As it lies in memory that holds nothing else."""
    entry = TensorEntry("", "", box.shape, 0, 0, box.shape, box.offsets, opaque=False)
    ((some, _),) = placed(entry)
    return some


def lines_one_by_one(some: Lines) -> list[tuple[int, int]]:
    """(src, dst) of each run."""
    places = itertools.product(*map(range, some.counts))
    steps = list(zip(some.src_steps, some.dst_steps, strict=True))
    return [
        (
            some.src + sum(index * src for index, (src, _) in zip(place, steps, strict=True)),
            some.dst + sum(index * dst for index, (_, dst) in zip(place, steps, strict=True)),
        )
        for place in places
    ]


def carry_out(
    spans: Iterable[Span], sources: Sequence[Memory], dst: Memory
) -> tuple[bytearray, list[int]]:
    """The destination's memory afterwards, and how often each byte of it was written.

    All sources of a span have to agree.
    """
    content, times = bytearray(len(dst.content)), [0] * len(dst.content)

    def write(addr: int, some: bytes) -> None:
        assert any(
            region.addr <= addr and addr + len(some) <= region.end
            for region in dst.manifest.regions
        )
        at = addr - dst.base
        content[at : at + len(some)] = some
        for place in range(at, at + len(some)):
            times[place] += 1

    for span in spans:
        came, *others = (sources[number].at(addr, span.nbytes) for number, addr in span.srcs)
        if not span.lines:
            assert all(other == came for other in others)
            write(span.dst_addr, came)
        if span.direct and span.lines[0].counts:  # the engine finds its place in one region
            (some,) = span.lines
            assert (some.src, some.dst) == (0, span.dst_addr)
            assert any(
                region.addr <= some.dst and some.dst + some.dst_extent <= region.end
                for region in dst.manifest.regions
            )
        for some in span.lines:
            for src, addr in lines_one_by_one(some):
                assert src + some.nbytes <= span.nbytes
                assert all(
                    other[src : src + some.nbytes] == came[src : src + some.nbytes]
                    for other in others
                )
                write(addr, came[src : src + some.nbytes])
    return content, times


# -- any ranks
# --------------------------------------------------------------------------------------------------

any_costs = st.builds(
    Costs,
    read_nbytes=st.sampled_from([0, 8, 200, 5_000]),
    copied=st.sampled_from([0.0, 0.3, 2.0]),
    staged_nbytes=st.sampled_from([1, 24, 200, 100_000]),
)


@st.composite
def wholes(draw: st.DrawFn) -> list[Whole]:
    some = []
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(
            draw(
                st.lists(st.integers(2, 6), min_size=2, max_size=4)
                | st.lists(st.integers(0, 7), max_size=4)
            )
        )
        itemsize = draw(st.sampled_from(list(DTYPES)))
        content = draw(st.randoms(use_true_random=False)).randbytes(prod(shape) * itemsize)
        order = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
        some.append(Whole(f"t{number}", shape, itemsize, content, order))
    return some


@st.composite
def teams(draw: st.DrawFn, some: Sequence[Whole], base: int, most: int = 3) -> list[Memory]:
    """All ranks of a mesh of one dimension or two, each tensor in it as it likes."""
    mesh = draw(st.lists(st.integers(1, most), min_size=1, max_size=2))
    held_by_rank: list[list[Slices]] = []
    for whole in some:
        if draw(st.booleans()):
            held_by_rank.append(draw(fused(whole.shape, prod(mesh))))
            continue
        axes = [draw(st.sampled_from([*range(len(whole.shape)), None])) for _ in mesh]
        held_by_rank.append([slices_of(box) for box in shards(whole.shape, mesh, axes)])
    memories = []
    for rank in range(prod(mesh)):
        parts = draw(
            st.permutations(
                [(whole, held[rank]) for whole, held in zip(some, held_by_rank, strict=True)]
            )
        )
        gaps = [draw(st.sampled_from([0, 0, 3])) for _ in parts]
        memories.append(
            memory_of(parts, base + 100_000 * rank, gaps, [draw(st.booleans()) for _ in parts])
        )
    return memories


@dataclass(frozen=True)
class Resharding:
    wholes: list[Whole]
    sources: list[Memory]
    dst: Memory
    costs: Costs


@st.composite
def reshardings(draw: st.DrawFn) -> Resharding:
    """From one team, or two that need not be alike, to a rank of another."""
    some = draw(wholes())
    sources = draw(teams(some, 1_000_000))
    if draw(st.booleans()):
        sources += draw(teams(some, 5_000_000, most=2))
    costs = replace(draw(any_costs), strided=draw(st.booleans()), scattered=draw(st.booleans()))
    return Resharding(some, sources, draw(st.sampled_from(draw(teams(some, 9_000_000)))), costs)
