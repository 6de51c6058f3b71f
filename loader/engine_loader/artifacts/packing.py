"""From a folder to its archive in memory. Used by `publish_artifact`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from stat import S_ISREG

import torch

from engine_loader.artifacts.archive import File, header_of
from engine_loader.errors import ArtifactInvalid
from engine_loader.files.hidden import is_hidden
from engine_loader.files.memory import block_of

_TRIES = 5  # of a folder in which others write


class _Changed(Exception):
    """A file is not any more what it was when it was listed."""


def pack(folder: Path, only: Collection[str] | None = None) -> torch.Tensor:
    """The archive of a folder, or of its entries in `only`.

    Others may write in the folder meanwhile, as compilers do: then each file is whole, as it was
    at some time.

    Returns:
        The archive, of dtype uint8 and shape (bytes,).

    Raises:
        ArtifactInvalid: The folder cannot be read, has no files, links or too much; or its files
            change all the time.
        LoaderError: There is no memory for it.
    """
    for _ in range(_TRIES):
        try:
            return _packed(folder, only)
        except _Changed as exc:
            changed = str(exc)
        except OSError as exc:
            if isinstance(exc, FileNotFoundError) and folder.is_dir():
                changed = str(exc.filename)  # a compiler has moved it
                continue
            raise ArtifactInvalid(
                f"cannot read {exc.filename or folder}: {exc.strerror}", "name a folder of files"
            ) from exc
    raise ArtifactInvalid(
        f"{changed} changes while it is read, {_TRIES} times now", "pack it when it is complete"
    )


def _packed(folder: Path, only: Collection[str] | None) -> torch.Tensor:
    files = sorted(_files(folder, only), key=lambda file: file.parts)
    if not files:
        raise ArtifactInvalid(f"there are no files in {folder}", "name a folder of files")
    header = header_of(files)
    archive = block_of(len(header) + sum(file.nbytes for file in files))
    memory = archive.numpy().data
    memory[: len(header)] = header
    end = len(header)
    for file in files:
        start, end = end, end + file.nbytes
        _read(folder / file.path, memory[start:end], file)
    return archive


def _files(folder: Path, only: Collection[str] | None) -> Iterator[File]:
    """Of all folders below; those that nothing is in are left out."""
    todo = [""]
    while todo:
        above = todo.pop()
        with os.scandir(folder / above) as entries:
            for entry in entries:
                path = f"{above}{entry.name}"
                if is_hidden(entry.name) or not _is_in(path, only):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    todo.append(f"{path}/")
                    continue
                found = entry.stat(follow_symlinks=False)
                if not S_ISREG(found.st_mode):
                    kind = "a link" if entry.is_symlink() else "neither a file nor a folder"
                    raise ArtifactInvalid(
                        f"no artifact can hold {folder / path}: it is {kind}",
                        "put files in its place, or name another folder",
                    )
                yield File(path, found.st_size, bool(found.st_mode & 0o100))


def _is_in(path: str, only: Collection[str] | None) -> bool:
    """Whether it is one of these, below one, or above one."""
    return only is None or any(
        f"{path}/".startswith(f"{some}/") or f"{some}/".startswith(f"{path}/") for some in only
    )


def _read(path: Path, memory: memoryview, file: File) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as stream:
        before = os.fstat(descriptor)
        done = 0
        while done < len(memory) and (count := stream.readinto(memory[done:])):
            done += count
        after = os.fstat(descriptor)
    same = before.st_size == after.st_size == file.nbytes == done
    if not same or before.st_mtime_ns != after.st_mtime_ns:
        raise _Changed(path)
