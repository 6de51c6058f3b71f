"""What a delta brings: tensors that had the content before it have, bit by bit, the one behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.deltas.apply import apply
from engine_loader.deltas.blocks import as_integers, block_of, by_torch
from engine_loader.deltas.encode import encode, erase
from engine_loader.deltas.format import (
    BLOCK_NBYTES,
    BYTES,
    DENSE,
    HEADER_NBYTES,
    SAME,
    SHORTS,
    capacity_of,
    header_of,
)
from engine_loader.tensors.regions import describe
from tests.support.deltas import (
    AFTER,
    BEFORE,
    Guarded,
    as_bytes,
    blocks_of,
    bring,
    bytes_of,
    delta,
    sections_of,
)

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


@st.composite
def versions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of any bits, in any order of its dimensions, and what becomes of it."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(1, 9), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def bits(like: torch.Tensor) -> torch.Tensor:
        high = 2 if dtype == torch.bool else 256
        return torch.randint(0, high, like.shape, dtype=torch.uint8, generator=generator)

    before = torch.empty([shape[axis] for axis in order], dtype=dtype)
    before = before.permute([order.index(axis) for axis in range(len(shape))])
    flat = as_integers(before)
    raw = flat.view(torch.uint8)
    raw.copy_(bits(raw))
    after = before.clone()
    assert describe({"w": after}).tensors[0].strides == describe({"w": before}).tensors[0].strides
    share = draw(st.sampled_from([0, 0.01, 0.1, 0.5, 0.9, 1]))
    changed = torch.rand(flat.shape, generator=generator) < share
    other = torch.empty_like(flat)
    other.view(torch.uint8).copy_(bits(raw))
    as_integers(after).copy_(torch.where(changed, other, flat))
    return before, after


@given(st.lists(versions(), max_size=4), st.sampled_from([8, 64, 1 << 12]), st.integers(1, 3))
def test_tensors_with_the_content_before_have_the_one_behind_afterwards(
    some: list[tuple[torch.Tensor, torch.Tensor]], block_nbytes: int, threads: int
) -> None:
    before = {f"w{number}": pair[0] for number, pair in enumerate(some)}
    after = {f"w{number}": pair[1] for number, pair in enumerate(some)}
    entries = describe(after).tensors
    ours = {name: Guarded(tensor) for name, tensor in before.items()}
    with blocks_of(block_nbytes):
        data = delta(entries, before, after, threads)
        bring(data, entries, {name: one.tensor for name, one in ours.items()})
        assert len(data) <= capacity_of(entries)
        changed = set(sections_of(data, entries))
    for name, one in ours.items():
        one.check()
        assert as_bytes(one.tensor) == as_bytes(after[name])
        assert (name in changed) == (as_bytes(before[name]) != as_bytes(after[name]))


def test_nan_and_the_sign_of_zero_count() -> None:
    nan = torch.tensor([0x7FC0, 0x7FC1, 0], dtype=torch.int16).view(torch.bfloat16)
    before, after = nan[[0, 0, 2, 0]], nan[[0, 1, 2, 0]]
    after[2] = -0.0
    entries = describe({"w": after}).tensors
    ours = before.clone()
    bring(delta(entries, {"w": before}, {"w": after}), entries, {"w": ours})
    assert as_bytes(ours) == as_bytes(after)


@st.composite
def changes(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A long row of integers, of which a few anywhere, or a share, change."""
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    count = draw(st.sampled_from([1, 7, 300, 70_000, 200_003]))
    before = torch.zeros(count, dtype=dtype)
    after = before.clone()
    after[draw(st.lists(st.integers(0, count - 1), max_size=6))] = 7
    share = draw(st.sampled_from([0, 0, 1e-4, 3e-3, 0.02, 0.3, 0.6, 0.8]))
    seed = draw(st.integers(0, 1000))
    after[torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share] = 5
    return before, after


@given(changes())
def test_numpy_and_torch_find_the_same_and_it_is_the_shortest(
    some: tuple[torch.Tensor, torch.Tensor],
) -> None:
    before, after = some
    ours, other = block_of(before, after), by_torch(before, after)
    assert ours.kind == other.kind
    for one, theirs in ((ours.gaps, other.gaps), (ours.values, other.values)):
        assert (one is None) == (theirs is None)
        assert one is None or theirs is None or torch.equal(one, theirs)
    nbytes = sum(part.nbytes for part in (ours.gaps, ours.values) if part is not None)
    differing = int((before != after).sum())
    assert (ours.kind == SAME) == (differing == 0)
    for most, width in ((255, 1), (65535, 2)):
        places = (before != after).nonzero().squeeze(1)
        gaps = places.diff(prepend=places.new_zeros(1))
        listed = sum(max(1, -(-gap // most)) for gap in gaps.tolist())
        assert nbytes <= min(after.nbytes, listed * (width + after.itemsize))


@given(changes(), st.sampled_from([1 << 10, 1 << 18, 1 << 24]), st.sampled_from([2000, 1 << 20]))
def test_far_changes_of_a_long_row_are_brought(
    some: tuple[torch.Tensor, torch.Tensor], block_nbytes: int, at_once: int
) -> None:
    before, after = some
    entries = describe({"w": after}).tensors
    ours = Guarded(before)
    with blocks_of(block_nbytes, at_once):
        bring(delta(entries, {"w": before}, {"w": after}), entries, {"w": ours.tensor})
    ours.check()
    assert torch.equal(ours.tensor, after)


@pytest.mark.parametrize(
    ("share", "kind"), [(0, SAME), (0.0005, SHORTS), (0.02, BYTES), (0.9, DENSE)]
)
def test_each_share_of_changes_has_its_kind(share: float, kind: int) -> None:
    before = torch.zeros(100_000, dtype=torch.int16)
    after = before.clone()
    after[torch.rand(before.shape, generator=torch.Generator().manual_seed(1)) < share] = 1
    assert block_of(before, after).kind == kind


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.3, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex128])
def test_a_buffer_for_a_share_is_enough_wherever_the_changes_lie(
    share: float, dtype: torch.dtype
) -> None:
    before = torch.zeros(50_001).to(dtype)
    count = int(share * before.numel())
    spread = torch.linspace(0, before.numel() - 1, max(count, 1)).long()[:count]
    for places in (torch.arange(count), spread):
        after = before.clone()
        as_integers(after).view(before.numel(), -1)[places] = 1
        entries = describe({"w": after}).tensors
        with blocks_of(1 << 12):
            buffer = torch.zeros(capacity_of(entries, share), dtype=torch.uint8)
            sides = {"w": before}, {"w": after}
            assert encode(entries, *sides, buffer, BEFORE, AFTER) is not None


@pytest.mark.parametrize("threads", [1, 3])
@given(missing=st.integers(1, 4000))
def test_a_delta_that_does_not_fit_leaves_the_buffer_without_one(
    threads: int, missing: int
) -> None:
    before, after = torch.zeros(1000), torch.ones(1000)
    entries = describe({"w": after}).tensors
    with blocks_of(256):
        sides = {"w": before}, {"w": after}
        whole = len(delta(entries, *sides))
        buffer = torch.full((max(HEADER_NBYTES, whole - missing) + 8,), 0xEE, dtype=torch.uint8)
        room = buffer[:-8]
        assert encode(entries, *sides, room, BEFORE, AFTER, threads) is None
    assert header_of(bytes(room[:HEADER_NBYTES].numpy()), entries) is None
    assert torch.all(buffer[-8:] == 0xEE)


def test_an_erased_buffer_has_no_delta() -> None:
    entries = describe({"w": torch.ones(9)}).tensors
    data = bytearray(delta(entries, {"w": torch.zeros(9)}, {"w": torch.ones(9)}))
    assert header_of(bytes(data[:HEADER_NBYTES]), entries) is not None
    erase(torch.frombuffer(data, dtype=torch.uint8))
    assert header_of(bytes(data[:HEADER_NBYTES]), entries) is None


def test_names_of_the_same_memory_are_written_once_and_found_by_each() -> None:
    old, new = torch.zeros(1000), torch.ones(1000)
    before = {"a": old, "z": torch.zeros(3), "b": old, "empty": torch.empty(0)}
    after = {"a": new, "z": torch.ones(3), "b": new, "empty": torch.empty(0)}
    entries = describe(after).tensors
    data = delta(entries, before, after)
    sections = sections_of(data, entries)
    assert sections["a"] == sections["b"]
    assert (sections["a"].number, sections["z"].number) == (0, 3)
    assert len(data) < 5000
    other = torch.zeros(1000)
    bring(data, entries, {"a": other, "z": torch.zeros(3), "b": other})
    assert torch.equal(other, new)


def test_a_tensor_that_is_not_as_its_entry_says_is_refused() -> None:
    tensors = {"w": torch.zeros(3, 4)}
    entries = describe(tensors).tensors
    buffer = torch.zeros(capacity_of(entries), dtype=torch.uint8)
    for other in (torch.zeros(4, 3), torch.zeros(4, 3).T, torch.zeros(3, 4).double()):
        with pytest.raises(ValueError, match="not as its entry says"):
            encode(entries, {"w": other}, tensors, buffer, BEFORE, AFTER)
        section = sections_of(delta(entries, tensors, {"w": torch.ones(3, 4)}), entries)["w"]
        data = bytes_of(delta(entries, tensors, {"w": torch.ones(3, 4)}), section)
        with pytest.raises(ValueError, match="not as its entry says"):
            apply(data, section, entries[0], other, entries[0])
    with pytest.raises(ValueError, match="contiguous tensor of uint8"):
        encode(entries, tensors, tensors, buffer[::2], BEFORE, AFTER)
    with pytest.raises(ValueError, match="128 bytes"):
        encode(entries, tensors, tensors, buffer[:127], BEFORE, AFTER)


def test_tensors_of_inference_mode_are_read_and_filled() -> None:
    with torch.inference_mode():
        before = {"w": torch.zeros(5)}
        after = {"w": torch.arange(5.0)}
    entries = describe(after).tensors
    bring(delta(entries, before, after), entries, before)
    assert torch.equal(before["w"], torch.arange(5.0))


def test_bytes_that_begin_at_an_odd_address_are_applied() -> None:
    before, after = {"w": torch.zeros(100)}, {"w": torch.arange(100.0)}
    entries = describe(after).tensors
    data = delta(entries, before, after)
    section = sections_of(data, entries)["w"]
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), bytes_of(data, section)])[3:]
    apply(shifted, section, entries[0], before["w"], entries[0])
    assert torch.equal(before["w"], after["w"])


def test_a_block_is_of_16_mib() -> None:
    """Which is part of the format."""
    before = torch.zeros(BLOCK_NBYTES + 1, dtype=torch.uint8)
    after = before.clone()
    after[-1] = 1
    entries = describe({"w": after}).tensors
    data = delta(entries, {"w": before}, {"w": after})
    section = sections_of(data, entries)["w"]
    table = np.zeros(2, "<u8")
    table[1] = DENSE << 32 | 1
    assert bytes(bytes_of(data, section).numpy()) == table.tobytes() + b"\1" + bytes(7)
