"""One or several safetensors files as weights: read into tensors, and written from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from engine_loader.files.disk import DiskRead
from engine_loader.files.folder import Paths, files_of
from engine_loader.files.format import check_storable
from engine_loader.files.hidden import hidden_folder
from engine_loader.files.memory import memory_for
from engine_loader.files.stored import Files
from engine_loader.files.writing import save, writing
from engine_loader.tensors.dtypes import dtype_name
from engine_loader.tensors.regions import describe


def read_weights(paths: Paths, rank: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors of the files that `files.folder.files_of` finds, each file's in one block of
    memory.

    WeightsFileInvalid says which file is at fault.
    """
    files = Files(files_of(paths, rank))
    tensors = memory_for(files)
    DiskRead(files, tensors, describe(tensors)).read()
    return tensors


def write_weights(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes one safetensors file, complete or not at all.

    WeightsFileInvalid says why it cannot be written.
    """
    check_storable(
        path, {name: (dtype_name(one.dtype), tuple(one.shape)) for name, one in tensors.items()}
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with hidden_folder(path.parent) as hidden:
            save(tensors, hidden / path.name)
            os.replace(hidden / path.name, path)
