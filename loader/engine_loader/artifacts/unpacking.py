"""From an archive in memory into a folder, in which others may read and write meanwhile. Used by
`pull_artifact`.

All files are written into a hidden folder first. Then they are moved to their places: a whole
folder at once where there is none of its name yet, else file by file. So whoever looks there sees
whole files, and a folder that was not there before with all that belongs into it. Files that are
there already stay: they are another compiler's.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from engine_loader.artifacts.archive import File, files_in
from engine_loader.errors import ArtifactInvalid, WeightsFileInvalid
from engine_loader.files.hidden import hidden_folder
from engine_loader.files.writing import made_folder, writing
from engine_registry import failpoints


@dataclass
class Unpacked:
    """How many files of an archive were not in the folder before, were there with the same bytes,
    and were there with other bytes or as something else, and so have stayed as they were.
    """

    new: int = 0
    unchanged: int = 0
    kept: int = 0


def unpack(
    archive: memoryview, folder: Path, check: Callable[[], object] = lambda: None
) -> Unpacked:
    """Puts the files of the archive into the folder, which is made if it is not there.

    What killed calls of this host have left in it is deleted. If the call raises, nothing of the
    archive is there, but for files that were moved before a move has failed.

    Args:
        archive: All of its bytes.
        folder: Where to.
        check: Called before each file is written. Its error ends the call.

    Raises:
        ArtifactInvalid: The archive is damaged, names files outside of the folder, or the folder
            cannot take them.
    """
    begin, files = files_in(archive)
    found = Unpacked()
    with _ours(), made_folder(folder):
        wanted = list(_absent(archive, begin, files, folder, found))
        nbytes = sum(file.nbytes for file, _ in wanted)
        with writing(folder):
            if (free_nbytes := shutil.disk_usage(folder).free) < nbytes:
                raise OSError(
                    errno.ENOSPC,
                    f"{os.strerror(errno.ENOSPC)}: it takes {nbytes} bytes, {free_nbytes} are free",
                )
            with hidden_folder(folder) as hidden:
                for file, data in wanted:
                    check()
                    _write(hidden / file.path, data, file.executable)
                failpoints.reach("artifact.written")
                check()
                _move(hidden, folder, found)
    return found


@contextmanager
def _ours() -> Iterator[None]:
    """The errors of files as those of artifacts."""
    try:
        yield
    except WeightsFileInvalid as exc:
        raise ArtifactInvalid(exc.what, exc.remedy, **exc.details) from exc


def _absent(
    archive: memoryview, begin: int, files: tuple[File, ...], folder: Path, found: Unpacked
) -> Iterator[tuple[File, memoryview]]:
    """The files that are not there, with their bytes. The others are counted."""
    end = begin
    for file in files:
        start, end = end, end + file.nbytes
        there = folder / file.path
        if not os.path.lexists(there):
            yield file, archive[start:end]
        elif _holds(there, archive[start:end]):
            found.unchanged += 1
        else:
            found.kept += 1


def _holds(path: Path, data: memoryview) -> bool:
    """Whether it is a file with these bytes."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_file() or path.stat().st_size != len(data):
            return False
        return path.read_bytes() == data
    return False


def _write(path: Path, data: memoryview, executable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o777 if executable else 0o666), "wb") as stream:
        stream.write(data)


def _move(src: Path, dst: Path, found: Unpacked) -> None:
    """All that is in the folder `src` into the folder `dst`."""
    for entry in sorted(src.iterdir()):
        target, is_folder = dst / entry.name, entry.is_dir()
        count = _count(entry) if is_folder else 1
        if is_folder:
            try:
                os.rename(entry, target)  # onto an empty folder, or where there is nothing
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                if target.is_dir() and not target.is_symlink():
                    _move(entry, target, found)
                else:
                    found.kept += count
                continue
        elif os.path.lexists(target):  # it has come meanwhile
            if _holds(target, memoryview(entry.read_bytes())):
                found.unchanged += 1
            else:
                found.kept += 1
            continue
        else:
            os.rename(entry, target)
        found.new += count


def _count(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))
