"""Names of torch's dtypes, as manifests have them."""

from __future__ import annotations

import functools

import torch

from engine_loader.errors import TensorsUnusable


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """TensorsUnusable where this torch has no dtype of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TensorsUnusable(
            f"dtype {name!r} is unknown to torch {torch.__version__}", "upgrade torch", dtype=name
        )
    return dtype
