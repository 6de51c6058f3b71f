"""One tensor of a manifest, from JSON that may be anything. Pure.

Used by `schema.manifest_format`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from engine_registry.schema.manifest import Slices, TensorEntry, dense_strides
from engine_registry.schema.printable import is_unicode, short

MAX_DIMENSIONS = 64  # as torch
END_OF_MEMORY = 1 << 63  # no process has more, and what reads counts with signs in places


def entry_of(
    name: Any, dtype: Any, shape: Any, addr: Any, nbytes: Any, box: Any, strides: Any, slices: Any
) -> TensorEntry:
    """The tensor of which these are the columns; ValueError, or TypeError, where it is none."""
    if not isinstance(name, str) or not isinstance(dtype, str):
        raise ValueError("a tensor's name or dtype is not a string")
    if not is_unicode(name) or not dtype.isprintable():
        raise ValueError(f"a tensor's name or dtype is not text: {short(name)!r}, {short(dtype)!r}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"tensor {short(name)!r} has {len(shape)} dimensions, {MAX_DIMENSIONS} are the limit"
        )
    own = tuple([natural(size) for size in shape])
    whole, offsets = own, (0,) * len(own)
    if box is not None:
        whole, offsets = (tuple(map(natural, side)) for side in box)
        if slices is not None:
            slices = _slices(name, own, whole, offsets, slices)
        elif not len(own) == len(whole) == len(offsets) or any(
            offset + size > limit for offset, size, limit in zip(offsets, own, whole, strict=True)
        ):
            raise ValueError(
                f"tensor {short(name)!r} has a box {offsets}+{own} that is not inside {whole}"
            )
    elif slices is not None:
        raise ValueError(f"tensor {short(name)!r} has slices of a whole that it does not state")
    volume = prod(own)
    if (volume == 0) != (nbytes == 0) or max(volume, prod(whole)) >= END_OF_MEMORY:
        raise ValueError(
            f"tensor {short(name)!r} of shape {own}, of {whole}, cannot take {nbytes} bytes"
        )
    if strides is not None:
        strides = tuple(map(natural, strides))
        if dense_strides(own, strides) != strides or not volume:
            raise ValueError(f"tensor {short(name)!r} of shape {own} cannot have strides {strides}")
    return TensorEntry(
        name,
        dtype,
        own,
        natural(addr),
        natural(nbytes),
        whole,
        offsets,
        box is None,
        strides,
        slices,
    )


def _slices(
    name: str, own: Sequence[int], whole: Sequence[int], offsets: Sequence[int], value: Any
) -> Slices:
    """ValueError unless they fill the tensor along each dimension, and lie in the whole."""
    slices = tuple([tuple([(natural(a), natural(b)) for a, b in some]) for some in value])
    if not len(own) == len(whole) == len(offsets) == len(slices) or not all(
        some
        and some[0][0] == offset
        and all(start < stop <= limit for start, stop in some)
        and sum([stop - start for start, stop in some]) == size
        for some, size, limit, offset in zip(slices, own, whole, offsets, strict=True)
    ):
        raise ValueError(
            f"tensor {short(name)!r} of shape {tuple(own)} cannot be slices {short(slices)} of "
            f"{tuple(whole)}"
        )
    return slices


def natural(value: Any) -> int:
    """ValueError for what is not a natural number of 64 bits."""
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{short(value)!r} is not a natural number of 64 bits")
    return value
