"""What safetensors files hold, read from their headers, and where in the files it lies.

To the planner the files are one source, whose addresses are places in them: `files.disk` carries
its plans out.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine_loader.errors import WeightsFileInvalid, listed
from engine_loader.files.folder import WeightsFile
from engine_loader.files.format import read_header
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import plan
from engine_loader.planning.reads import Costs, Span
from engine_loader.planning.tied import tied_names
from engine_registry import Manifest, Region, TensorEntry

_COMPARED_NBYTES = 8 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, at a place that counts through all files."""

    dtype: str
    shape: tuple[int, ...]
    place: int
    nbytes: int


class Files:
    """What safetensors files hold. Their headers are read at once, all else when it is wanted."""

    def __init__(self, files: Sequence[WeightsFile]) -> None:
        """WeightsFileInvalid says which file is at fault."""
        self.paths = [file.path for file in files]
        self._starts: list[int] = []  # of each file's tensors, counted through all files
        self._ahead: list[int] = []  # bytes of each file before its tensors
        self._regions: list[Region] = []
        self._stored: list[dict[str, Stored]] = []  # what comes from each file
        origins: dict[str, Path] = {}
        start = 0
        for file in files:
            ahead, header = read_header(file.path)
            _check_promises(file, header)
            stored = {
                name: Stored(slot.dtype, slot.shape, start + slot.begin, slot.end - slot.begin)
                for name, slot in header.items()
                if file.gives(name)
            }
            for name in stored:
                other = origins.setdefault(name, file.path)
                if other != file.path:
                    what = f"tensor {name!r} is in {other} and in {file.path}"
                    raise WeightsFileInvalid(what, "name one of them", path=str(file.path))
            nbytes = max((slot.end for slot in header.values()), default=0)
            self._starts.append(start)
            self._ahead.append(ahead)
            self._regions.append(Region(start, nbytes))
            self._stored.append(stored)
            start += nbytes + 1  # so that no read goes from one into the next

    @property
    def name(self) -> str:
        """For a message."""
        if len(self.paths) == 1:
            return str(self.paths[0])
        folders = sorted({str(path.parent) for path in self.paths})
        return f"{len(self.paths)} files in {', '.join(folders)}"

    def layouts(self) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
        """dtype and shape of each tensor, by file, in the order in which they lie there."""
        layouts = []
        for stored in self._stored:
            by_place = sorted(stored.items(), key=lambda item: item[1].place)
            layouts.append({name: (one.dtype, one.shape) for name, one in by_place})
        return layouts

    def place(self, addr: int) -> tuple[int, int]:
        """The number of the file, and where in it."""
        number = bisect.bisect_right(self._starts, addr) - 1
        return number, self._ahead[number] + addr - self._starts[number]

    def plan(self, dst: Manifest, costs: Costs) -> tuple[Span, ...]:
        """What to read to fill all of `dst`, in the order in which it lies in the files. They may
        hold more.

        A tensor in the files is the whole one, or just the part of it that is wanted.
        WeightsMismatch names every difference.
        """
        stored = {name: one for tensors in self._stored for name, one in tensors.items()}
        for name in list(self._copies(dst, stored)):
            del stored[name]
        entries = [
            _entry(stored[entry.name], entry) for entry in dst.tensors if entry.name in stored
        ]
        origin = Origin(self.name, Manifest(tuple(entries), tuple(self._regions)))
        spans = plan([origin], dst, costs, partial=True)
        return tuple(sorted(spans, key=lambda span: span.srcs[0][1]))

    def _copies(self, dst: Manifest, stored: Mapping[str, Stored]) -> Iterator[str]:
        """Of tensors that are tied in `dst` but stored one by one, all but the first, if their
        bytes are the same.

        `engines load --out` stores them so. Others are left to the planner, which refuses them.
        """
        for names in tied_names(dst.tensors):
            first, *others = [name for name in names if name in stored] or [""]
            yield from (name for name in others if self._equal(stored[first], stored[name]))

    def _equal(self, one: Stored, other: Stored) -> bool:
        if replace(one, place=other.place) != other:
            return False
        for start in range(0, one.nbytes, _COMPARED_NBYTES):
            nbytes = min(_COMPARED_NBYTES, one.nbytes - start)
            if self._read(one.place + start, nbytes) != self._read(other.place + start, nbytes):
                return False
        return True

    def _read(self, place: int, nbytes: int) -> bytes:
        number, offset = self.place(place)
        path = self.paths[number]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(nbytes)
        except OSError as exc:
            raise WeightsFileInvalid(
                f"{path} cannot be read: {exc.strerror}", path=str(path)
            ) from exc


def _entry(stored: Stored, wanted: TensorEntry) -> TensorEntry:
    """The whole tensor; or the part that is wanted, row by row, if it has the shape of that."""
    part = stored.shape != wanted.global_shape and stored.shape == wanted.shape
    return TensorEntry(
        wanted.name,
        stored.dtype,
        stored.shape,
        stored.place,
        stored.nbytes,
        wanted.global_shape if part else stored.shape,
        wanted.offsets if part else (0,) * len(stored.shape),
        wanted.opaque,
        slices=wanted.slices if part else None,
    )


def _check_promises(file: WeightsFile, header: Mapping[str, object]) -> None:
    """WeightsFileInvalid where the file lacks what its index says that it holds."""
    lacking = [name for name in file.promised if name not in header]
    if file.index is not None and lacking:
        count = f"{len(lacking)} tensor{'s' if len(lacking) > 1 else ''}"
        names = listed([repr(name) for name in lacking])
        raise WeightsFileInvalid(
            f"{file.path} lacks {count} that {file.index.path.name} says it holds: {names}",
            "download both again",
            path=str(file.path),
            tensors=lacking,
        )
