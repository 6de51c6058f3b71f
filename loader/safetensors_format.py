"""The safetensors format beside torch: names of dtypes, shapes, and the header of a file.

https://github.com/huggingface/safetensors defines it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from loader.errors import WeightsFileInvalid

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


# What safetensors raises, and what Python does where somebody made a header that only the former takes.
_ERRORS = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


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
        header.pop("__metadata__", None)
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
        return "float4_e2m1fn_x2", (*shape[:-1], shape[-1] // 2)
    return _TORCH_NAMES.get(dtype, dtype), shape
