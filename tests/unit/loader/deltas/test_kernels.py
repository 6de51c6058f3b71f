"""The kernels, run by Triton's interpreter: they write the bytes that the CPU writes, and bring
what it brings. What is damaged, and other places, are tested for both in `test_damaged` and
`test_places`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import triton
from hypothesis import event, given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine_loader import deltas
from engine_loader.deltas import apply_kernel, apply_on_gpu, encode_kernel, encode_on_gpu, on_gpu
from engine_loader.deltas.blocks import as_integers, block_of
from engine_loader.deltas.encode import encode
from engine_loader.deltas.format import (
    BYTES,
    DENSE,
    HEADER_NBYTES,
    SAME,
    SHORTS,
    capacity_of,
    header_of,
)
from engine_loader.errors import DeltaDamaged
from engine_loader.tensors.regions import describe
from tests.support.deltas import (
    AFTER,
    BEFORE,
    Guarded,
    as_bytes,
    blocks_of,
    bring,
    by_kernel,
    delta,
    sections_of,
)

Tensors = dict[str, torch.Tensor]
DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
KINDS = {SAME: "same", BYTES: "bytes", SHORTS: "shorts", DENSE: "dense"}


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of any bits, of which runs change with any density, and single elements."""
    dtype = draw(st.sampled_from(DTYPES))
    count = draw(st.sampled_from([0, 1, 2, 31, 64, 65, 300, 555]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    before = torch.zeros(count, dtype=dtype)
    after = before.clone()
    if count:
        raw = as_integers(before).view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))
        after = before.clone()
        old, new = as_integers(before), as_integers(after)
        changed = torch.zeros(len(new), dtype=torch.bool)
        for _ in range(draw(st.integers(0, 3))):
            start = draw(st.integers(0, len(new) - 1))
            some = changed[start : start + draw(st.sampled_from([1, 30, 300, 1000]))]
            share = draw(st.sampled_from([0.005, 0.02, 0.3, 1]))
            some |= torch.rand(some.shape, generator=generator) < share
        new[changed] = old[changed] ^ 3
    return before, after


def check(before: Tensors, after: Tensors, tile: int = 64, step: int = 16) -> None:
    """By kernels as without; the tensors have it afterwards, and nothing else has changed."""
    entries = describe(after).tensors
    wanted = delta(entries, before, after)
    ours = {name: Guarded(tensor) for name, tensor in before.items()}
    with by_kernel(tile, step):
        assert delta(entries, before, after) == wanted
        bring(wanted, entries, {name: one.tensor for name, one in ours.items()})
    for name, one in ours.items():
        one.check()
        assert as_bytes(one.tensor) == as_bytes(after[name])


@settings(max_examples=25)
@given(st.lists(rows(), max_size=2), st.sampled_from([512, 4096]), st.booleans())
def test_they_write_the_same_bytes_and_bring_the_same(
    some: list[tuple[torch.Tensor, torch.Tensor]], block_nbytes: int, cut: bool
) -> None:
    before, after = ({f"w{at}": pair[side] for at, pair in enumerate(some)} for side in (0, 1))
    for old, new in some:
        if len(old):
            event(KINDS[block_of(as_integers(old), as_integers(new)).kind])
    with ExitStack() as stack:
        stack.enter_context(blocks_of(block_nbytes))
        if cut:  # some tensors follow the others, and the host looks at few bytes at a time
            for module, name, value in (
                (encode_on_gpu, "_AT_ONCE", 200),
                (encode_on_gpu, "_ALSO", 0),
                (apply_on_gpu, "_AT_ONCE_NBYTES", 1000),
                (on_gpu, "_PIECE_NBYTES", 100),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
        check(before, after)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize(
    ("places", "kind"),
    [
        ([0], BYTES),
        ([255, 511, 766], None),  # two of the gaps are the longest without a bridge
        ([*range(50), 800, 801, 1199], BYTES),  # bridged over steps and tiles
        ([*range(600, 650), 1199], BYTES),
        ([1199], SHORTS),
        (range(0, 1200, 9), BYTES),
        (range(1200), DENSE),
    ],
    ids=["first", "long", "bridges", "end", "far", "ninth", "all"],
)
@pytest.mark.parametrize(("tile", "step"), [(1024, 512), (128, 32)])
def test_far_changes_are_bridged(
    dtype: torch.dtype, places: Iterable[int], kind: int | None, tile: int, step: int
) -> None:
    before = torch.arange(1200).to(dtype)
    after = before.clone()
    after[list(places)] ^= 1
    assert kind is None or block_of(before, after).kind == kind
    check({"w": before}, {"w": after}, tile, step)


def test_changes_may_be_farther_apart_than_gaps_of_16_bits_are_long() -> None:
    before = torch.zeros(140_000, dtype=torch.int16)
    after = before.clone()
    after[[3, 65_538, 139_999]] = 1
    check({"w": before}, {"w": after}, 4096, 512)


def test_tensors_that_share_memory_are_brought_once() -> None:
    with torch.inference_mode():
        old, new, ours = torch.zeros(100), torch.ones(100), torch.zeros(100)
        before = {"a": old, "b": torch.zeros(3), "c": old, "empty": torch.empty(0)}
        after = {"a": new, "b": torch.ones(3), "c": new, "empty": torch.empty(0)}
    entries = describe(after).tensors
    wanted = delta(entries, before, after)
    with by_kernel():
        assert delta(entries, before, after) == wanted
        bring(wanted, entries, {"a": ours, "b": before["b"], "c": ours})
    assert torch.equal(ours, new)
    assert torch.equal(before["b"], after["b"])


@pytest.mark.parametrize("missing", [1, 8, 48, 49, 500, 1800])
def test_a_delta_that_does_not_fit_leaves_the_buffer_without_one(missing: int) -> None:
    before, after = torch.zeros(400), torch.ones(400)
    entries = describe({"w": after}).tensors
    with blocks_of(1024), by_kernel():
        whole = len(delta(entries, {"w": before}, {"w": after}))
        buffer = torch.full((max(HEADER_NBYTES, whole - missing) + 8,), 0xEE, dtype=torch.uint8)
        room = buffer[:-8]
        assert encode(entries, {"w": before}, {"w": after}, room, BEFORE, AFTER) is None
    assert header_of(bytes(room[:HEADER_NBYTES].numpy()), entries) is None
    assert torch.all(buffer[-8:] == 0xEE)


def test_nothing_is_written_where_one_of_several_tensors_is_damaged() -> None:
    before = {"a": torch.zeros(100), "b": torch.zeros(100)}
    entries = describe(before).tensors
    data = bytearray(delta(entries, before, {name: torch.ones(100) for name in before}))
    data[sections_of(bytes(data), entries)["b"].offset + 50] ^= 1
    with by_kernel(), pytest.raises(DeltaDamaged, match="b: its changes differ"):
        bring(bytes(data), entries, before)
    assert not before["a"].any()


POINTERS = {
    "blocks": "*i64",
    "whose": "*i32",
    "changed": "*i16",
    "found": "*i32",
    "places": "*i32",
    "sums": "*i32",
    "starts": "*i64",
    "ends": "*i64",
}
CONSTANTS = {
    "TILE": 4096,
    "STEP": 512,
    "SOME": 128,
    "TILES": 512,
    "PART": 1024,
    "PARTS": 512,
    "DIMENSIONS": 2,
}


@pytest.mark.parametrize("itemsize", [1, 8])
@pytest.mark.parametrize(
    ("module", "name", "columns"),
    [
        (encode_kernel, "_compare", 4),
        (encode_kernel, "_look", 4),
        (encode_kernel, "_add_up", 4),
        (encode_kernel, "_write", 9),
        (apply_kernel, "_measure", 4),
        (apply_kernel, "_add_up", 4),
        (apply_kernel, "_place", 13),
    ],
)
def test_they_compile_for_a_gpu(
    module: ModuleType,
    name: str,
    columns: int,
    itemsize: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter accepts more than the compiler does."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(module, name)
    element = module._ELEMENTS[itemsize].value
    constants = CONSTANTS | {"COLUMNS": columns, "ELEMENT": element}
    signature = {each: POINTERS.get(each, "constexpr") for each in kernel.arg_names}
    source = ASTSource(
        kernel, signature, {each: constants[each] for each in signature if each in constants}
    )
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_without_kernels_the_bytes_are_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, after = torch.zeros(1000), torch.ones(1000)
    entries = describe({"w": after}).tensors
    wanted = delta(entries, {"w": before}, {"w": after})
    with ExitStack() as stack:
        for module, name, value in (
            (encode_on_gpu, "on_one_gpu", lambda tensors: True),
            (apply_on_gpu, "on_one_gpu", lambda tensors: True),
            (deltas, "encode_kernel", None),
            (deltas, "apply_kernel", None),
        ):
            stack.enter_context(mock.patch.object(module, name, value, create=True))
        stack.enter_context(caplog.at_level(logging.INFO))
        assert delta(entries, {"w": before}, {"w": after}) == wanted
        bring(wanted, entries, {"w": before})
    assert torch.equal(before, after)
    assert caplog.text.count("its kernel cannot be had") == 2


def test_memory_that_is_not_aligned_is_not_for_a_kernel() -> None:
    """As elements are read and written as integers."""
    before, after = torch.zeros(100), torch.ones(100)
    entries = describe({"w": after}).tensors
    wanted = delta(entries, {"w": before}, {"w": after})
    with mock.patch.object(encode_on_gpu, "on_one_gpu", return_value=True):
        buffer = torch.zeros(capacity_of(entries) + 8, dtype=torch.uint8)[1:]
        assert encode(entries, {"w": before}, {"w": after}, buffer, BEFORE, AFTER) is not None
    assert bytes(buffer[: len(wanted)].numpy()) == wanted
