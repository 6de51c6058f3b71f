"""The safetensors files of a whole model, written all or not at all. Used by `load_full`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from engine_loader.files.format import check_storable
from engine_loader.files.hidden import FORMER, hidden_folder
from engine_loader.files.writing import made_folder, save, writing
from engine_loader.planning.whole import INDEX, Whole, file_names, index_of, is_file_of_a_model
from engine_registry.errors import InvalidField


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
        self._hidden = folder / ".partial"  # there is none until the block begins
        self._undo = contextlib.ExitStack()
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
        self._names = file_names(len(files))
        self._written = 0
        with writing(self._folder):
            for path in self._hidden.iterdir():
                path.unlink()
            if len(files) > 1:
                self._names.append(INDEX)
                (self._hidden / INDEX).write_text(json.dumps(index_of(files), indent=2) + "\n")

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The next file. WeightsFileInvalid says why it cannot be written."""
        name = self._names[self._written]
        with writing(self._folder / name):
            # transformers refuses files that do not say so
            save(tensors, self._hidden / name, {"format": "pt"})
        self._written += 1

    def __enter__(self) -> WholeFiles:
        """WeightsFileInvalid says why nothing can be written there."""
        with contextlib.ExitStack() as undo:
            undo.enter_context(made_folder(self._folder))
            with writing(self._folder):
                self._hidden = undo.enter_context(hidden_folder(self._folder))
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with self._undo:
            if kind is None and self._names:
                self._show()

    def _show(self) -> None:
        """Moves the files to their places; back again if one cannot be."""
        moves = [(path, self._hidden / f"{FORMER}{path.name}") for path in self._former()]
        moves += [(self._hidden / path.name, path) for path in self.paths]
        try:
            for src, dst in moves:
                with writing(self._folder / src.name):
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
        with writing(self._folder):
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
