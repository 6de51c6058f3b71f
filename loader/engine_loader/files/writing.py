"""Writes safetensors files, with errors of ours, into folders that it makes and sweeps. Used by
`write_weights`, `WholeFiles` and `copy_rank`.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine_loader.errors import WeightsFileInvalid
from engine_loader.files.hidden import sweep
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
        said = (
            exc.strerror if isinstance(exc, OSError) else None
        )  # without number and temporary name
        reason = " ".join((said or str(exc)).split())  # safetensors has some of several lines
        raise WeightsFileInvalid(
            f"cannot write {path}: {reason}",
            "choose another folder, or make this one take the file" if said else "",
            path=str(path),
        ) from exc


@contextmanager
def room_for(path: Path, nbytes: int) -> Iterator[None]:
    """Makes the folder of the file. If the block fails, folders that were made go again.

    WeightsFileInvalid, before the block begins, where the folder takes no file, or has less room.
    """
    with made_folder(path.parent):
        with writing(path):
            tempfile.TemporaryFile(dir=path.parent).close()
            free_nbytes = shutil.disk_usage(path.parent).free
            if free_nbytes < nbytes:
                raise OSError(
                    errno.ENOSPC,
                    f"{os.strerror(errno.ENOSPC)}: it takes {nbytes} bytes, {free_nbytes} are free",
                )
        yield


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and those above it. Those that were made and are empty at the end go again.

    What killed writers have left in it is deleted. WeightsFileInvalid where it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        yield
    finally:
        with suppress(OSError):  # there is something in it
            for path in made:
                path.rmdir()


@plain_torch()
def save(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    path.touch()
    # as the user's umask has it: safetensors makes files for the owner alone
    mode = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)
