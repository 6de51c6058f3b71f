"""Writes safetensors files, with errors of ours. Used by `write_weights` and `WholeFiles`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine_loader.errors import WeightsFileInvalid
from engine_loader.tensors.modes import plain_torch


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """WeightsFileInvalid where the block cannot write the file."""
    try:
        yield
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
    ) as exc:  # safetensors has no common base of its errors
        reason = " ".join(str(exc).split())  # safetensors has some of several lines
        raise WeightsFileInvalid(f"cannot write {path}: {reason}", path=str(path)) from exc


@plain_torch()
def save(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    path.touch()
    # as the user's umask has it: safetensors makes files for the owner alone
    mode = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)
