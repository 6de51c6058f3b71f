"""Ranks that hold parts of the same tensors in memory that is only numbered, and what carrying out
a plan between them does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from hypothesis import strategies as st

from engine_loader.planning.boxes import Box, Lines
from engine_loader.planning.matching import Origin
from engine_loader.planning.reads import Costs, Span
from engine_registry import Manifest, Region, TensorEntry

DTYPES = {1: "uint8", 2: "int16", 4: "float32"}


@dataclass(frozen=True)
class Whole:
    """A tensor as nobody may have it in one piece; `content` is row by row."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    content: bytes

    def part(self, box: Box) -> bytes:
        """Element by element."""
        found = []
        for index in itertools.product(
            *(
                range(start, start + size)
                for start, size in zip(box.offsets, box.shape, strict=True)
            )
        ):
            at = 0
            for place, size in zip(index, self.shape, strict=True):
                at = at * size + place
            found.append(self.content[at * self.itemsize : (at + 1) * self.itemsize])
        return b"".join(found)


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
    parts: Iterable[tuple[Whole, Box]], base: int, gaps: Iterable[int], cuts: Iterable[bool]
) -> Memory:
    """The parts one after the other, with gaps between them, and where `cuts` says so in another
    region than the one before.
    """
    entries: list[TensorEntry] = []
    regions: list[Region] = []
    content = bytearray()
    start = 0  # of the region
    for (whole, box), gap, cut in zip(parts, gaps, cuts, strict=False):
        if cut and len(content) > start:
            regions.append(Region(base + start, len(content) - start))
            start = len(content)
        content += b"\xee" * gap
        part = whole.part(box)
        addr = base + len(content) if part else 0
        dtype = DTYPES[whole.itemsize]
        entries.append(
            TensorEntry(
                whole.name,
                dtype,
                box.shape,
                addr,
                len(part),
                whole.shape,
                box.offsets,
                opaque=False,
            )
        )
        content += part
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


def origins_of(memories: Sequence[Memory], own: bool = False) -> list[Origin]:
    return [Origin(f"a/{number}", memory.manifest, own) for number, memory in enumerate(memories)]


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
        some.append(Whole(f"t{number}", shape, itemsize, content))
    return some


@st.composite
def teams(draw: st.DrawFn, some: Sequence[Whole], base: int, most: int = 3) -> list[Memory]:
    """All ranks of a mesh of one dimension or two, each tensor in it as it likes."""
    mesh = draw(st.lists(st.integers(1, most), min_size=1, max_size=2))
    boxes = []
    for whole in some:
        axes = [draw(st.sampled_from([*range(len(whole.shape)), None])) for _ in mesh]
        boxes.append(shards(whole.shape, mesh, axes))
    memories = []
    for rank in range(prod(mesh)):
        parts = draw(
            st.permutations([(whole, held[rank]) for whole, held in zip(some, boxes, strict=True)])
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
    return Resharding(
        some, sources, draw(st.sampled_from(draw(teams(some, 9_000_000)))), draw(any_costs)
    )
