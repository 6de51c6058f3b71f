"""Safetensors files as sources and results: read into memory that registers as one region a file,
and written from tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine_loader.errors import (
    LoaderError,
    TensorsUnusable,
    WeightsFileInvalid,
    WeightsMismatch,
    listed,
)
from engine_loader.files.disk import DiskRead
from engine_loader.files.folder import Paths, files_of
from engine_loader.files.format import check_storable
from engine_loader.files.stored import Files
from engine_loader.planning.whole import INDEX, Whole, file_names, index_of, is_file_of_a_model
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.regions import Shard, describe, dtype_name, dtype_named
from engine_registry import Manifest
from engine_registry.errors import InvalidField

Strides = tuple[int, ...] | None  # as in TensorEntry
_Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def read_weights(paths: Paths, rank: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors of the files that `files.folder.files_of` finds, each file's in one block of
    memory.

    WeightsFileInvalid says which file is at fault.
    """
    files = Files(files_of(paths, rank))
    tensors = memory_for(files)
    DiskRead(files, tensors, describe(tensors)).run()
    return tensors


def memory_for(files: Files) -> dict[str, torch.Tensor]:
    """Uninitialised tensors for all that the files hold, each file's in one block, in the order in
    which it lies there.

    WeightsFileInvalid names the tensors for which torch has no dtype.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, layout in zip(files.paths, files.layouts(), strict=True):
        unknown = [
            f"{name}: {dtype} {list(shape)}"
            for name, (dtype, shape) in layout.items()
            if not isinstance(getattr(torch, dtype, None), torch.dtype)
        ]
        if unknown:
            raise WeightsFileInvalid(
                f"{path} cannot be read: torch {torch.__version__} has no dtype for "
                f"{listed(unknown)}",
                "upgrade torch, or store such bytes as U8",
                path=str(path),
                tensors=unknown,
            )
        tensors |= allocate(
            {name: (dtype_named(dtype), shape) for name, (dtype, shape) in layout.items()}
        )
    return tensors


@plain_torch()
def allocate(
    layout: _Layout, device: str = "cpu", memory: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Uninitialised tensors that lie one after another in a single block, in the order of `layout`;
    in `memory`, where it is given.

    Two blocks of one layout have their tensors at the same distances, so a load between them needs
    few, long reads. LoaderError where there is no such memory, or no such tensor.
    """
    block = block_of(extent(layout), device) if memory is None else memory
    return {
        name: _view(name, block[start:stop], dtype, shape)
        for (name, (dtype, shape)), (start, stop) in zip(
            layout.items(), _places(layout), strict=True
        )
    }


def _view(
    name: str, memory: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """TensorsUnusable where the shape has a size that torch cannot count to, which no bytes need
    where another is 0.
    """
    try:
        return memory.view(dtype).view(shape)
    except (RuntimeError, TypeError, OverflowError) as exc:
        raise TensorsUnusable(
            f"{name}: torch has no tensor of shape {list(shape)}", "give it another"
        ) from exc


@plain_torch()
def block_of(nbytes: int, device: str = "cpu") -> torch.Tensor:
    """Uninitialised bytes; LoaderError where there are not as many."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (
        RuntimeError,
        MemoryError,
        TypeError,
        ValueError,
        OverflowError,
    ) as exc:  # torch has no one kind for it
        raise LoaderError(
            f"there is no memory for {nbytes} bytes of weights on {device}: nothing was read"
        ) from exc


def extent(layout: _Layout) -> int:
    """How many bytes `allocate` needs."""
    return max((stop for _, stop in _places(layout)), default=0)


def _places(layout: _Layout) -> Iterator[tuple[int, int]]:
    end = 0
    for dtype, shape in layout.values():
        start = (
            -(-end // dtype.itemsize) * dtype.itemsize
        )  # no gaps but those that the dtypes need: gaps end a read
        end = start + prod(shape) * dtype.itemsize
        yield start, end


def allocate_like(manifest: Manifest, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors to load a rank into that has this manifest, in the order in which they lie in its
    memory.

    WeightsMismatch where one does not have as many bytes as its shape takes: before there is memory
    for what it claims.
    """
    entries = sorted(manifest.tensors, key=lambda entry: (entry.addr, entry.name))
    layout = {entry.name: (dtype_named(entry.dtype), entry.shape) for entry in entries}
    for entry in entries:
        nbytes = prod(entry.shape) * layout[entry.name][0].itemsize
        if nbytes != entry.nbytes:
            raise WeightsMismatch(
                f"{entry.name}: the source has {entry.nbytes} bytes of it, its shape "
                f"{list(entry.shape)} of {entry.dtype} takes "
                f"{nbytes}: nothing was read",
                problems=[entry.name],
            )
    return with_strides(allocate(layout, device), {entry.name: entry.strides for entry in entries})


@plain_torch()
def with_strides(
    tensors: Mapping[str, torch.Tensor], strides: Mapping[str, Strides]
) -> dict[str, torch.Tensor]:
    """The same memory, in which those tensors that have strides lie as these say."""
    return {
        name: tensor if (some := strides[name]) is None else tensor.as_strided(tensor.shape, some)
        for name, tensor in tensors.items()
    }


def shards_like(manifest: Manifest) -> dict[str, Shard]:
    """Which part of the whole the rank's tensors are, where it says so."""
    return {
        entry.name: Shard(entry.global_shape, entry.offsets)
        for entry in manifest.tensors
        if not entry.opaque
    }


def write_weights(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes one safetensors file, complete or not at all.

    WeightsFileInvalid says why it cannot be written.
    """
    check_storable(
        path, {name: (dtype_name(one.dtype), tuple(one.shape)) for name, one in tensors.items()}
    )
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(tensors, unfinished)
            os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
    ) as exc:  # safetensors has no one kind of its own
        reason = " ".join(str(exc).split())  # safetensors has some of several lines
        raise WeightsFileInvalid(f"cannot write {path}: {reason}", path=str(path)) from exc


@plain_torch()
def _save(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    path.touch()
    mode = (
        path.stat().st_mode
    )  # as the user's umask has it: safetensors makes files for the owner alone
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


class WholeFiles:
    """The files of a whole model in a folder: one, or several with an index. A context manager,
    used once.

    They are in the folder, in place of those of a model that was there, when the block has ended
    well: all of them. Until then they are in a hidden folder within it, of which nothing stays when
    the block ends with an exception.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        """`force`: the files of another model may be there already.

        InvalidField if they are and may not.
        """
        self._folder = folder
        self._force = force
        self._hidden = (
            folder / ".model.partial"
        )  # until it is made, when it gets a name that no other process has
        self._made: list[Path] = []
        self._names: list[str] = []  # the index last, where there is one
        self._written = 0
        self._former()

    @property
    def paths(self) -> list[Path]:
        """The files as they are named in the folder, the index last."""
        return [self._folder / name for name in self._names]

    def begin(self, files: Sequence[Sequence[Whole]]) -> None:
        """From here on these are written, from the first on; what has been written before is
        forgotten.

        WeightsFileInvalid where safetensors cannot hold them.
        """
        for name, wholes in zip(file_names(len(files)), files, strict=True):
            check_storable(
                self._folder / name, {whole.name: (whole.dtype, whole.shape) for whole in wholes}
            )
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._names = file_names(len(files))
        self._written = 0
        with _writing(self._folder):
            self._hidden.mkdir()
            if len(files) > 1:
                self._names.append(INDEX)
                (self._hidden / INDEX).write_text(json.dumps(index_of(files), indent=2) + "\n")

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The next file. WeightsFileInvalid says why it cannot be written."""
        name = self._names[self._written]
        with _writing(self._folder / name):
            _save(
                tensors, self._hidden / name, {"format": "pt"}
            )  # transformers refuses files that do not say so
        self._written += 1

    def __enter__(self) -> WholeFiles:
        """WeightsFileInvalid says why nothing can be written there."""
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        try:
            with _writing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._hidden = Path(
                    tempfile.mkdtemp(prefix=".model.", suffix=".partial", dir=self._folder)
                )
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._names:
                self._show()
        finally:
            shutil.rmtree(self._hidden, ignore_errors=True)
            self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # there is something in it
            for path in self._made:
                path.rmdir()

    def _show(self) -> None:
        """Moves the files to their places; back again if one cannot be."""
        moves = [(path, self._hidden / f"former-{path.name}") for path in self._former()]
        moves += [(self._hidden / path.name, path) for path in self.paths]
        try:
            for src, dst in moves:
                with _writing(self._folder / src.name):
                    os.replace(src, dst)
        except BaseException:
            for src, dst in reversed(moves):
                if os.path.lexists(dst) and not os.path.lexists(src):
                    os.replace(dst, src)
            raise

    def _former(self) -> list[Path]:
        """What readers of a model would look for here, and may be replaced; the index first, as it
        goes first.
        """
        with _writing(self._folder):
            some = (
                [path for path in self._folder.iterdir() if is_file_of_a_model(path.name)]
                if self._folder.is_dir()
                else []
            )
        former = sorted(some, key=lambda path: (path.name != INDEX, path))
        if former and not self._force:
            raise InvalidField(
                f"{former[0]} is there already", "choose another `out`, or `force`", field="out"
            )
        folder = next((path for path in former if path.is_dir()), None)
        if folder is not None:
            raise InvalidField(
                f"{folder} is a folder, and would be replaced by a file",
                "choose another `out`",
                field="out",
            )
        return former
