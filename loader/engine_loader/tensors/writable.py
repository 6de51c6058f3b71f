"""Which tensors must not be filled because their memory is read-only.

Used before a load or a read of files begins. Only the host's memory is looked at.

The kernel knows read-only mappings. Memory of a `bytes` object can be written to, but Python relies
on it that nobody does; it is found where a tensor's storage begins with the object, as
`torch.frombuffer` makes it. Memory that another object owns, or `bytes` from somewhere behind their
beginning, looks like a buffer that may be filled.
"""

from __future__ import annotations

import bisect
import ctypes
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engine_loader.errors import TensorsUnusable, listed
from engine_loader.tensors.modes import plain_torch
from engine_registry.schema.manifest import Manifest

_MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (..)", re.MULTILINE)
# from where to where, and whether it can be read and written: rw, r-, --
_Mappings = Sequence[tuple[int, int, bytes]]
# in front of the content: a count of references, the type, the size, a hash
_BYTES_HEADER = bytes.__basicsize__ - 1
_IS_CPYTHON = sys.implementation.name == "cpython" and _BYTES_HEADER == 32


@plain_torch()
def check_writable(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """TensorsUnusable names those that must not be filled. `manifest` describes the tensors."""
    mappings = _mappings()
    ends = [end for _, end, _ in mappings]
    problems = []
    for entry in manifest.tensors:
        tensor = tensors[entry.name]
        if not entry.nbytes or tensor.device.type != "cpu":
            continue
        first = bisect.bisect_right(ends, entry.addr)
        if _is_read_only(mappings, first, entry.addr, entry.addr + entry.nbytes):
            problems.append(
                f"{entry.name}: its memory is read-only (a mapping without the right to write)"
            )
        elif _is_of_bytes(tensor.untyped_storage(), mappings, first):
            problems.append(
                f"{entry.name}: its memory is that of a bytes object, which is immutable"
            )
    if problems:
        count = f"{len(problems)} tensor{'s' if len(problems) > 1 else ''}"
        raise TensorsUnusable(
            f"{count} cannot be filled: {listed(problems)}",
            "load into a copy, such as .clone()",
            problems=problems,
        )


def _mappings() -> _Mappings:
    """None where the kernel does not say."""
    try:
        maps = Path("/proc/self/maps").read_bytes()
    except OSError:
        return []
    return [(int(start, 16), int(end, 16), rights) for start, end, rights in _MAPPING.findall(maps)]


def _is_read_only(mappings: _Mappings, first: int, start: int, end: int) -> bool:
    """`first` is the number of the first mapping that ends behind `start`."""
    for number in range(first, len(mappings)):
        begin, stop, rights = mappings[number]
        if begin >= end:
            return False
        if stop > start and rights[1:] != b"w":
            return True
    return False


def _is_of_bytes(storage: torch.UntypedStorage, mappings: _Mappings, number: int) -> bool:
    """Whether a bytes object's header lies in front of it, in the mapping of that number."""
    head = storage.data_ptr() - _BYTES_HEADER
    if not _IS_CPYTHON or number == len(mappings) or head % 8 or head < mappings[number][0]:
        return False
    if ctypes.c_ssize_t.from_address(head + 8).value != id(bytes):
        return False
    references = ctypes.c_ssize_t.from_address(head).value
    return references > 0 and ctypes.c_ssize_t.from_address(head + 16).value >= storage.nbytes()
