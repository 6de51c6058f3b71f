"""The safetensors format beside torch: names of dtypes, shapes, and the header of a file.

https://github.com/huggingface/safetensors defines it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from engine_loader.errors import WeightsFileInvalid, listed
from engine_loader.tensors.modes import plain_torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}

_PAIRS = "float4_e2m1fn_x2"
_FORMAT_NAMES = {ours: name for name, ours in _TORCH_NAMES.items()} | {_PAIRS: "F4"}
_METADATA = "__metadata__"
_MAX_HEADER_NBYTES = 100_000_000

# What safetensors raises; and what Python does with a header that only safetensors takes.
_ERRORS = (
    SafetensorError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)


class Slot(NamedTuple):
    """A tensor in a file, as torch has it; its bytes lie from `begin` to `end` behind the header.

    What torch has no dtype for keeps the format's name and shape, which are no tensor's.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[int, dict[str, Slot]]:
    """How many bytes come before the tensors, and where each of them lies. WeightsFileInvalid.

    safetensors checks all of it against the file's length, but does not say where tensors lie.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(nbytes))
        header.pop(_METADATA, None)
        return 8 + nbytes, {name: _slot(**entry) for name, entry in header.items()}
    except _ERRORS as exc:
        message = f"{path} cannot be read as safetensors: {exc}"
        raise WeightsFileInvalid(message, path=str(path)) from exc


def _slot(dtype: str, shape: Sequence[int], data_offsets: Sequence[int], **_: object) -> Slot:
    begin, end = data_offsets
    return Slot(*_as_torch(dtype, tuple(shape)), begin, end)


def _as_torch(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The format counts numbers of four bits, torch pairs of them along the last dimension."""
    if dtype == "F4" and shape and shape[-1] % 2 == 0:
        return _PAIRS, (*shape[:-1], shape[-1] // 2)
    return _TORCH_NAMES.get(dtype, dtype), shape


def check_storable(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """WeightsFileInvalid unless a safetensors file can hold such tensors, by name: dtype and shape.

    For callers that have yet to read them: else only the write would fail, or not even that.
    """
    found = {name: _unstorable(name, dtype, shape) for name, (dtype, shape) in tensors.items()}
    problems = [f"{name}: {problem}" for name, problem in found.items() if problem]
    what = f"cannot write {path}: safetensors cannot hold it"
    if problems:
        raise WeightsFileInvalid(f"{what}: {listed(problems)}", path=str(path), problems=problems)
    if (nbytes := _header_nbytes(tensors)) > _MAX_HEADER_NBYTES:
        problem, remedy = (
            f"the header would take {nbytes} bytes, {_MAX_HEADER_NBYTES} is the limit",
            "write several files",
        )
        raise WeightsFileInvalid(
            f"{what}: {problem}", remedy, path=str(path), problems=[f"{problem}: {remedy}"]
        )


def _unstorable(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    if name == _METADATA:
        return "the format keeps this name for itself: publish the tensor under another one"
    return _unwritable(dtype, (1,) * min(1, len(shape)))


@functools.cache
@plain_torch()
def _unwritable(dtype: str, shape: tuple[int, ...]) -> str:
    """Why the safetensors that is installed cannot write such a tensor."""
    if dtype not in _FORMAT_NAMES:
        return f"the format has no dtype {dtype}"
    try:
        save({"w": torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")})
    except (*_ERRORS, RuntimeError) as exc:
        writer = f"safetensors {safetensors.__version__}"
        return f"{writer} cannot write a {dtype} of shape {list(shape)}: {exc!r}"
    return ""


def _header_nbytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Nearly: some of the digits depend on the order of the tensors, which safetensors chooses."""
    end = 0
    header = {}
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * getattr(torch, dtype).itemsize
        header[name] = {"dtype": _FORMAT_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    return len(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
