"""Safetensors files as sources and results: read into memory that registers as one region a file, and written from tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loader.errors import WeightsFileInvalid
from loader.regions import dtype_named
from registry import Manifest


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The safetensors files among `paths`; a folder stands for all that lie in it."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.glob("*.safetensors"))
            if not inside:
                raise WeightsFileInvalid(f"{path} holds no *.safetensors file: name the folder of the weights", path=str(path))
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise WeightsFileInvalid(f"{path} does not exist: check --weights", path=str(path))
    return files


def read_weights(paths: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """All tensors of the files, each file's in one block of memory; WeightsFileInvalid says which file is at fault."""
    tensors: dict[str, torch.Tensor] = {}
    origins: dict[str, Path] = {}
    for path in find_files(paths):
        try:
            mapped = load_file(path)
        except (SafetensorError, OSError, ValueError) as exc:
            raise WeightsFileInvalid(f"{path} cannot be read as safetensors: {exc}", path=str(path)) from exc
        twice = next((name for name in mapped if name in origins), None)
        if twice is not None:
            raise WeightsFileInvalid(f"tensor {twice!r} is in {origins[twice]} and in {path}: serve one of them", path=str(path))
        copies = allocate({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in mapped.items()})
        for name, tensor in mapped.items():
            copies[name].copy_(tensor)
        tensors.update(copies)
        origins.update(dict.fromkeys(mapped, path))
    return tensors


def allocate(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Uninitialised tensors that lie one after another in a single block, in the order of `layout`.

    Two blocks of one layout have their tensors at the same distances, so a load between them needs few, long reads.
    """
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start = -(-end // dtype.itemsize) * dtype.itemsize  # no gaps but those that the dtypes need: gaps end a read
        end = start + prod(shape) * dtype.itemsize
        places[name] = (start, end)
    block = torch.empty(end, dtype=torch.uint8, device=device)
    return {
        name: block[start:stop].view(dtype).view(shape)
        for (name, (dtype, shape)), (start, stop) in zip(layout.items(), places.values(), strict=True)
    }


def allocate_like(manifest: Manifest, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors to load a rank into that has this manifest, in the order in which they lie in its memory."""
    entries = sorted(manifest.tensors, key=lambda entry: (entry.addr, entry.name))
    return allocate({entry.name: (dtype_named(entry.dtype), entry.shape) for entry in entries}, device)


def write_weights(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes one safetensors file, complete or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as the user's umask has it: safetensors makes files for the owner alone
        save_file(dict(tensors), unfinished)
        unfinished.chmod(mode)
        os.replace(unfinished, path)
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError) as exc:  # it has no one kind of its own
        raise WeightsFileInvalid(f"cannot write {path}: {exc}", path=str(path)) from exc
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
