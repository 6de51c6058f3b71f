"""Changes of a source's tensor go to the right places of ours, which holds another part of the
whole.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.deltas.apply import apply_all
from engine_loader.deltas.blocks import as_integers
from engine_loader.deltas.places import same_places
from engine_loader.deltas.stated import Change
from engine_loader.tensors.dtypes import dtype_named
from engine_registry import TensorEntry
from engine_registry.schema.manifest import Slices
from tests.support.deltas import Guarded, Route, as_bytes, blocks_of, delta, routes, sections_of
from tests.support.meshes import Whole, fused


def tensor_of(whole: Whole, along: Slices) -> torch.Tensor:
    """What a rank has that holds these slices."""
    entry = whole.entry(along, 4096)
    data = torch.frombuffer(bytearray(whole.part(along) or b"\0"), dtype=torch.uint8)
    strides = entry.strides or torch.empty(entry.shape, device="meta").stride()
    flat = data[: entry.nbytes].view(dtype_named(entry.dtype))
    return flat.as_strided(entry.shape, strides)


def mixed(old: Whole, new: Whole, along: Slices) -> Whole:
    """The new content in these slices, and the old one elsewhere."""
    held = [{at for some in slices for at in range(*some)} for slices in along]
    content = bytearray(old.content)
    for number, place in enumerate(itertools.product(*map(range, old.shape))):
        if all(at in some for at, some in zip(place, held, strict=True)):
            some = slice(number * old.itemsize, (number + 1) * old.itemsize)
            content[some] = new.content[some]
    return replace(old, content=bytes(content))


@st.composite
def reshardings(draw: st.DrawFn) -> tuple[Whole, Whole, Slices, Slices]:
    """A whole before and after, and what the source and we hold of it."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    itemsize = draw(st.sampled_from([1, 2, 4]))
    order = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    numbers = torch.randint(0, 200, (*shape, itemsize), dtype=torch.uint8, generator=generator)
    changed = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.05, 0.4, 0.9, 1]))
    contents = [bytes(some.flatten().tolist()) for some in (numbers, numbers + changed[..., None])]
    old, new = (Whole("w", shape, itemsize, content, order) for content in contents)
    sides = [
        draw(st.sampled_from(draw(fused(shape, draw(st.integers(1, 3)))))) for _ in ("src", "dst")
    ]
    return old, new, sides[0], sides[1]


def bring(
    route: Route,
    old: torch.Tensor,
    new: torch.Tensor,
    src: TensorEntry,
    ours: torch.Tensor,
    dst: TensorEntry,
) -> None:
    data = delta([src], {src.name: old}, {src.name: new})
    changes = [Change(one, src, ours, dst) for one in sections_of(data, [src]).values()]
    with route():
        apply_all(torch.frombuffer(bytearray(data), dtype=torch.uint8), changes)


@routes
@given(reshardings(), st.sampled_from([8, 64, 1 << 20]), st.sampled_from([3, 1 << 20]), st.data())
def test_we_get_what_changed_of_what_we_hold_and_nothing_else(
    route: Route,
    some: tuple[Whole, Whole, Slices, Slices],
    block_nbytes: int,
    at_once: int,
    data: st.DataObject,
) -> None:
    old, new, theirs, ours = some
    order = data.draw(st.sampled_from([old.order, None, tuple(range(len(old.shape)))[::-1]]))
    here = replace(old, order=order)
    src, dst = old.entry(theirs, 4096), here.entry(ours, 1 << 20)
    guarded = Guarded(tensor_of(here, ours))
    with blocks_of(block_nbytes, at_once):
        bring(route, tensor_of(old, theirs), tensor_of(new, theirs), src, guarded.tensor, dst)
    guarded.check()
    assert as_bytes(guarded.tensor) == mixed(here, new, theirs).part(ours)


@routes
@pytest.mark.parametrize("share", [0.05, 1])
def test_a_part_that_we_hold_twice_is_written_twice(route: Route, share: float) -> None:
    """As heads that several ranks have, and one rank for two heads that it alone has."""
    old = torch.zeros(8, 16)
    new = torch.where(torch.rand(old.shape) < share, torch.rand(old.shape), old)
    src = TensorEntry("w", "float32", (8, 16), 4096, old.nbytes, (8, 16), (0, 0), opaque=False)
    slices = (((2, 4), (0, 1), (2, 4)), ((3, 16),))
    shape = (5, 13)
    dst = TensorEntry("w", "float32", shape, 4096, 260, (8, 16), (2, 3), False, None, slices)
    ours = torch.zeros(shape)
    bring(route, old, new, src, ours, dst)
    assert torch.equal(ours, new[[2, 3, 0, 2, 3], 3:])


@routes
@pytest.mark.parametrize("share", [0.05, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_a_part_of_one_row_goes_to_its_row(route: Route, dtype: torch.dtype, share: float) -> None:
    """As the last rank has where rows are divided with a rest."""
    old = torch.zeros(7, 30, dtype=dtype)
    new = old + (torch.rand(old.shape) < share).to(dtype)
    name = str(dtype).removeprefix("torch.")
    whole = TensorEntry("w", name, (7, 30), 4096, old.nbytes, (7, 30), (0, 0), opaque=False)
    for along, part in [((6, 0), (slice(6, 7),)), ((0, 29), (slice(7), slice(29, 30)))]:
        shape, nbytes = tuple(old[part].shape), old[part].nbytes
        src = replace(whole, shape=shape, nbytes=nbytes, offsets=along)
        ours, wanted = old.clone(), old.clone()
        wanted[part] = new[part]
        bring(route, old[part].contiguous(), new[part].contiguous(), src, ours, whole)
        assert torch.equal(ours, wanted)


@routes
@pytest.mark.parametrize("share", [0.05, 1])
def test_elements_of_16_bytes_stay_together(route: Route, share: float) -> None:
    old = torch.zeros(30, 40, dtype=torch.complex128)
    new = old + (torch.rand(old.shape) < share) * (1.5 + 2j)
    src = TensorEntry("w", "complex128", (30, 40), 4096, old.nbytes, (30, 40), (0, 0), opaque=False)
    shape = (30, 7)
    dst = TensorEntry("w", "complex128", shape, 4096, 30 * 7 * 16, (30, 40), (0, 9), opaque=False)
    ours = old[:, 9:16].clone()
    bring(route, old, new, src, ours, dst)
    assert torch.equal(ours, new[:, 9:16])
    slices = (((0, 30),), ((20, 23), (9, 16)))
    shape = (30, 10)
    dst = TensorEntry("w", "complex128", shape, 4096, 4800, (30, 40), (0, 20), False, None, slices)
    ours = torch.cat([old[:, 20:23], old[:, 9:16]], 1)
    bring(route, old, new, src, ours, dst)
    assert torch.equal(ours, torch.cat([new[:, 20:23], new[:, 9:16]], 1))


@routes
def test_a_source_that_has_one_row_reaches_its_place(route: Route) -> None:
    old, new = torch.zeros(1, 6), torch.ones(1, 6)
    src = TensorEntry("w", "float32", (1, 6), 4096, 24, (8, 6), (5, 0), opaque=False)
    dst = TensorEntry("w", "float32", (4, 6), 4096, 96, (8, 6), (4, 0), opaque=False)
    ours = torch.zeros(4, 6)
    bring(route, old, new, src, ours, dst)
    assert torch.equal(ours.nonzero()[:, 0].unique(), torch.tensor([1]))
    assert ours[1].all()


@routes
def test_a_source_that_has_one_element_reaches_its_place(route: Route) -> None:
    old, new = torch.zeros(1, 1), torch.ones(1, 1)
    src = TensorEntry("w", "float32", (1, 1), 4096, 4, (8, 6), (5, 3), opaque=False)
    dst = TensorEntry("w", "float32", (4, 6), 4096, 96, (8, 6), (4, 0), opaque=False)
    ours = torch.zeros(4, 6)
    bring(route, old, new, src, ours, dst)
    assert ours.nonzero().tolist() == [[1, 3]]


def test_parts_are_at_the_same_places_only_if_boxes_and_order_are_the_same() -> None:
    entry = TensorEntry("w", "uint8", (4, 6), 4096, 24, (8, 6), (0, 0), opaque=False)
    assert same_places(entry, replace(entry, name="v", addr=1, slices=(((0, 4),), ((0, 6),))))
    assert not same_places(entry, replace(entry, offsets=(4, 0)))
    assert not same_places(entry, replace(entry, strides=(1, 4)))
    assert not same_places(entry, replace(entry, slices=(((0, 2), (4, 6)), ((0, 6),))))


@routes
def test_a_part_of_another_whole_is_refused(route: Route) -> None:
    old, new = torch.zeros(4, 6), torch.ones(4, 6)
    src = TensorEntry("w", "float32", (4, 6), 4096, 96, (8, 6), (0, 0), opaque=False)
    ours = old.clone()
    for other in (replace(src, global_shape=(4, 12)), replace(src, dtype="int32")):
        with pytest.raises(ValueError, match="not of one whole"):
            bring(route, old, new, src, ours, other)
    assert not as_integers(ours).any()
