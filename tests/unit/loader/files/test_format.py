"""Headers of safetensors files, as torch has their tensors; dtypes that one of the two lacks."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine_loader import Shard
from engine_loader.errors import TensorsUnusable, WeightsFileInvalid, WeightsMismatch
from engine_loader.files.disk import read_into
from engine_loader.files.format import check_storable, read_header
from engine_loader.files.memory import allocate
from engine_loader.files.weights import read_weights, write_weights
from engine_loader.files.whole_files import WholeFiles
from engine_loader.planning.whole import Whole
from engine_loader.tensors.dtypes import dtype_name, dtype_named
from tests.unit.loader.files.test_weights import STORABLE, content, same


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def a_tensor(dtype: str, shape: list[int], nbytes: int, begin: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}


# -- numbers of four bits --------------------------------------------------------------------------


def pairs(*shape: int) -> torch.Tensor:
    nbytes = torch.Size(shape).numel()
    return torch.arange(nbytes).to(torch.uint8).view(torch.float4_e2m1fn_x2).view(shape)


def test_numbers_of_four_bits_have_the_same_shape_whoever_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    wanted = {"w": pairs(4, 16), "row": pairs(3), "empty": pairs(0, 5)}
    save_file(wanted, path)
    assert json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")["w"]["shape"] == [4, 32]
    assert same(load_file(path), wanted)
    assert same(read_weights(path), wanted)
    _, header = read_header(path)
    assert {name: slot.shape for name, slot in header.items()} == {
        "w": (4, 16),
        "row": (3,),
        "empty": (0, 5),
    }
    found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    read_into(path, found)
    assert same(found, wanted)
    write_weights(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_part_of_numbers_of_four_bits_is_cut_out_of_the_whole(tmp_path: Path) -> None:
    whole = pairs(4, 16)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    found = {"w": pairs(2, 8)}
    read_into(tmp_path, found, shards={"w": Shard((4, 16), (2, 8))})
    assert content(found["w"]) == bytes(whole.view(torch.uint8)[2:, 8:].flatten().tolist())


# -- dtypes that torch lacks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("F6_E2M3", [4], 3), ("F6_E3M2", [2, 4], 6), ("F4", [2, 3], 3), ("F4", [6, 1], 3)],
)
def test_a_dtype_that_torch_lacks_is_refused_with_the_name_of_the_tensor(
    dtype: str, shape: list[int], nbytes: int, tmp_path: Path
) -> None:
    header = {"odd": a_tensor(dtype, shape, nbytes), "w": a_tensor("U8", [2], 2, nbytes)}
    path = write_raw(tmp_path / "w.safetensors", header, bytes(range(nbytes + 2)))
    words = f"has no dtype for odd: {dtype} {shape}: upgrade torch"
    with pytest.raises(WeightsFileInvalid, match=re.escape(words)):
        read_weights(path)
    found = {"w": torch.zeros(2, dtype=torch.uint8)}
    read_into(path, found)
    assert found["w"].tolist() == [nbytes, nbytes + 1]
    odd = {"odd": torch.zeros(nbytes, dtype=torch.uint8)}
    with pytest.raises(WeightsMismatch, match=f"odd: dtype {dtype} in the source, uint8 here"):
        read_into(path, odd)


# -- headers that somebody made by hand
# -------------------------------------------------------------

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
sizes = st.integers(0, 3) | st.sampled_from([1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
entries: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BOOL", "F4", "F6_E2M3", "E8M0"]),
        "shape": st.lists(sizes, max_size=5),
        "data_offsets": st.tuples(st.integers(0, 12), st.integers(0, 12)),
    },
    optional={"more": junk},
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """As JSON, and how many bytes of data follow. Most have the right offsets."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=3, unique=True)):
        entry = draw(entries)
        bits = {"F4": 4, "F6_E2M3": 6, "F32": 32}.get(entry["dtype"], 8) * prod(entry["shape"])
        if draw(st.integers(0, 9)) and bits < 8000:
            entry["data_offsets"] = (end, end := end + bits // 8)
        if not draw(st.integers(0, 9)):
            entry[draw(st.sampled_from(list(entry)))] = draw(junk)
        header[name] = entry
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(), st.text()) | junk)
    if not draw(st.integers(0, 19)):
        return json.dumps(draw(junk)).encode(), end
    return json.dumps(header).encode() + b" " * draw(st.integers(0, 8)), end


@given(headers())
@example((json.dumps({"w": a_tensor("U8", [0, 1 << 63], 0)}).encode(), 0))
@example((json.dumps({"__metadata__": a_tensor("U8", [4], 4)}).encode(), 4))
@example((b'{"w": ["U8", [4], [0, 4]]}', 4))
def test_any_header_gives_the_same_as_safetensors_or_one_error(
    scratch: Path, made: tuple[bytes, int]
) -> None:
    header, nbytes = made
    write_raw(scratch, header, b"\1" * nbytes)
    try:
        found = read_weights(scratch)
    except (WeightsFileInvalid, TensorsUnusable):
        return
    assert same(found, load_file(scratch))
    again = {name: torch.empty_like(tensor) for name, tensor in found.items()}
    read_into(scratch, again)
    assert same(again, found)


@given(st.binary(max_size=100), st.integers(0, 200))
def test_any_bytes_that_are_no_safetensors_file_give_one_error(
    scratch: Path, data: bytes, length: int
) -> None:
    scratch.write_bytes(struct.pack("<Q", length) + data)
    with contextlib.suppress(WeightsFileInvalid):
        assert read_weights(scratch) == {}


# -- what the format cannot hold
# --------------------------------------------------------------------

Layout = dict[str, tuple[str, tuple[int, ...]]]


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "words"),
    [
        ("__metadata__", "float32", (2,), "__metadata__: the format keeps this name for itself"),
        ("w", "complex128", (2,), "w: the format has no dtype complex128"),
        ("w", "bits8", (2,), "w: the format has no dtype bits8"),
        ("w", "float4_e2m1fn_x2", (), "cannot write a float4_e2m1fn_x2 of shape []"),
    ],
)
def test_what_no_file_can_hold_is_refused(
    name: str, dtype: str, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(WeightsFileInvalid, match=re.escape(words)) as caught:
        check_storable(path, {"other": ("uint8", (3,)), name: (dtype, shape)})
    assert str(caught.value).startswith(f"cannot write {path}: ")


def test_names_that_take_more_room_than_a_header_has_are_refused() -> None:
    layout: Layout = {letter * 25_000_000: ("float32", (2,)) for letter in "abcd"}
    with pytest.raises(WeightsFileInvalid) as caught:
        check_storable(Path("w"), layout)
    assert "the header would take 100000" in str(caught.value)
    assert len(str(caught.value)) < 500
    check_storable(Path("w"), dict(list(layout.items())[:3]))


def test_nothing_is_written_where_a_tensor_has_the_name_of_the_metadata(tmp_path: Path) -> None:
    tensors = {"__metadata__": torch.zeros(3), "w": torch.zeros(3)}
    with pytest.raises(WeightsFileInvalid, match="__metadata__"):
        write_weights(tensors, tmp_path / "new" / "w.safetensors")
    wholes = [Whole(name, "float32", (3,), 12, opaque=False) for name in tensors]
    with WholeFiles(tmp_path / "new") as files, pytest.raises(WeightsFileInvalid, match="__metad"):
        files.begin([wholes[1:], wholes[:1]])
    assert list(tmp_path.iterdir()) == []


shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
dtypes = st.sampled_from([*map(dtype_name, STORABLE), "float4_e2m1fn_x2", "complex128", "uint4"])
names = st.text(max_size=20) | st.just("__metadata__")


@given(st.dictionaries(names, st.tuples(dtypes, shapes)))
def test_what_is_not_refused_can_be_written_and_read_again(scratch: Path, layout: Layout) -> None:
    try:
        check_storable(scratch, layout)
    except WeightsFileInvalid as exc:
        strange = {"__metadata__", "complex128", "uint4", "float4_e2m1fn_x2"}
        assert any(word in str(exc) for word in strange)  # noqa: PT017
        return
    tensors = allocate(
        {name: (dtype_named(dtype), shape) for name, (dtype, shape) in layout.items()}
    )
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8).fill_(1)
    write_weights(tensors, scratch)
    assert same(read_weights(scratch), tensors)
    assert same(load_file(scratch), tensors)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("format") / "w.safetensors"
