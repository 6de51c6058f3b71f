"""Which files a path to weights means, and which tensors come from which of them.

Everything that reads weights from files asks here, so a folder means the same everywhere. Opens an
index, and looks at the kind of every other file; `files.stored` reads what the files hold.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_loader.errors import WeightsFileInvalid, listed
from engine_loader.planning.whole import INDEX, SINGLE
from engine_registry.schema.printable import is_unicode, short
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
Paths = str | Path | Sequence[str | Path]

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_SAMPLE = '{"weight_map": {"TENSOR": "FILE.safetensors"}}'
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Index:
    """`places`: from which file each tensor comes that the index names."""

    path: Path
    places: Mapping[str, Path]


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file; and if an index names it, the tensors that it has, as the index says."""

    path: Path
    index: Index | None = None
    promised: Sequence[str] = ()

    def gives(self, name: str) -> bool:
        """Whether the tensor comes from this file, if it is in there.

        A tensor that the index leaves out comes from the file that has it.
        """
        return self.index is None or self.index.places.get(name, self.path) == self.path


def files_of(paths: Paths, rank: int | None = None) -> list[WeightsFile]:
    """The files that `paths` mean. An index stands for the files that it names. A folder stands for
    the first of these that it has:

    1. `rank-R.safetensors` of this `rank`, as `engines load` writes it;
    2. what `model.safetensors.index.json`, or else its only `*.safetensors.index.json`, names: an
       index goes before `model.safetensors`, as in vLLM and SGLang (not in transformers);
    3. `model.safetensors`;
    4. all its `*.safetensors`.

    Raises WeightsFileInvalid where there is none, and where one of them cannot hold weights.
    """
    some = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not some:
        raise WeightsFileInvalid("no path of weights is given", "name a file or a folder")
    files: dict[Path, WeightsFile] = {}
    for path in some:
        for file in _files_at(path, rank):
            files.setdefault(file.path, file)
    for file in files.values():
        _check(file.path, file.index)
    return list(files.values())


def _files_at(path: Path, rank: int | None) -> list[WeightsFile]:
    if not os.path.isdir(path):  # False also where that cannot be looked at
        return _files_of_index(path) if path.suffix == ".json" else [WeightsFile(path)]
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as exc:
        raise _invalid(path, f"{path} cannot be listed: {exc.strerror}") from exc
    if rank is not None and f"rank-{rank}{_SUFFIX}" in names:
        return [WeightsFile(path / f"rank-{rank}{_SUFFIX}")]
    weights = [path / name for name in names if name.endswith(_SUFFIX)]
    indices = [path / name for name in names if name.endswith(_INDEX_SUFFIX)]
    if indices:
        files = _files_of_index(_one_of(path, indices))
    elif SINGLE in names:
        files = [WeightsFile(path / SINGLE)]
    else:
        files = [WeightsFile(file) for file in weights]
    if not files:
        raise _invalid(path, f"{path} holds no *{_SUFFIX} file", "name the folder of the weights")
    _report_unread(path, weights, files)
    return files


def _one_of(folder: Path, indices: Sequence[Path]) -> Path:
    if folder / INDEX in indices:
        return folder / INDEX
    if len(indices) > 1:
        names = listed([index.name for index in indices])
        raise _invalid(
            folder, f"{folder} has several indices", f"name one of them instead: {names}"
        )
    return indices[0]


def _report_unread(folder: Path, weights: Sequence[Path], files: Sequence[WeightsFile]) -> None:
    chosen = {file.path for file in files}
    unread = [path.name for path in weights if path not in chosen]
    if unread:
        source = files[0].index.path.name if files[0].index is not None else files[0].path.name
        log.warning(
            "%s holds more than %s, which decides, so these files are not read: %s",
            folder,
            source,
            listed(unread),
            extra=fields("files_unread", folder=str(folder), files=unread),
        )


def _files_of_index(path: Path) -> list[WeightsFile]:
    _check(path, None)
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=_each_once)
        places = {name: path.parent / _inside(file) for name, file in _weight_map(data).items()}
    except OSError as exc:
        raise _invalid(path, f"{path} cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        problem = f"{path} is no index of files, such as {_SAMPLE}: {short(exc)}"
        raise _invalid(path, problem) from exc
    promised: defaultdict[Path, list[str]] = defaultdict(list)
    for name, file in places.items():
        promised[file].append(name)
    index = Index(path, places)
    return [WeightsFile(file, index, names) for file, names in sorted(promised.items())]


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise ValueError(f"it has two values for {name!r}")
    return found


def _weight_map(data: Any) -> dict[str, Any]:
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map that names a tensor")
    return weight_map


def _inside(file: Any) -> str:
    """A file's name in an index; ValueError where it does not lie in the folder of the index.

    It may be a link to another place, as all files of a hub cache are.
    """
    if not isinstance(file, str) or not file or "\0" in file or not is_unicode(file):
        raise ValueError(f"{file!r} is no name of a file")
    if file.startswith("/") or ".." in file.split("/"):
        raise ValueError(f"{file!r} leads out of its folder")
    return file


def _check(path: Path, index: Index | None) -> None:
    """Raises WeightsFileInvalid unless weights may be in there. Does not open what could block."""
    what = f"{path}, which {index.path.name} names," if index is not None else str(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "device or a pipe"
            raise _invalid(
                path, f"{what} is a {kind}, not a file", "put the safetensors file there"
            )
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except FileNotFoundError as exc:
        why, remedy = _absent(path, index)
        raise _invalid(path, f"{what} {why}", remedy) from exc
    except OSError as exc:
        raise _invalid(path, f"{what} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise _invalid(path, f"{what!r} is no path: {exc}") from exc
    if start == _LFS_POINTER:
        raise _invalid(path, f"{what} is a git-lfs pointer", "run `git lfs pull` in its folder")


def _absent(path: Path, index: Index | None) -> tuple[str, str]:
    """What is wrong, and what to do."""
    if path.is_symlink():
        return f"is a link to {os.readlink(path)}, which does not exist", "download the file again"
    if index is not None:
        return "does not exist", "download it, or name the files that are there one by one"
    return "does not exist", "name a safetensors file, or a folder of them"


def _invalid(path: Path, what: str, remedy: str = "") -> WeightsFileInvalid:
    return WeightsFileInvalid(what, remedy, path=str(path))
