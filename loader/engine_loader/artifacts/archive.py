"""The format of archives: the files of a folder in one run of bytes, the same bytes for the same
files. Pure.

    8 bytes     ENGARCH1
    8 bytes     N, the length of the index, little endian
    N bytes     the index, JSON: {"files": [["PATH", BYTES, EXECUTABLE], …]}
    the rest    the bytes of the files, in the order of the index

Paths are relative, in UTF-8, with `/`, and in order by their parts. There are no times, owners,
links and folders without files. Nothing is compressed, so an archive is as large as what comes out
of it, and a reader knows how large that is before it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import msgspec

from engine_loader.errors import ArtifactInvalid
from engine_registry.schema.printable import is_unicode, short
from engine_registry.schema.structs import Malformed, Natural, read, write

MAX_NBYTES = 8 << 30  # of an archive
MAX_INDEX_NBYTES = 64 << 20
_MAGIC = b"ENGARCH1"
_START = len(_MAGIC) + 8
_MAX_PART = 255  # bytes, as file systems have it
_MAX_PATH = 2048
_MAX_DEPTH = 64


class File(msgspec.Struct, frozen=True, array_like=True):
    """A file of an archive."""

    path: str
    nbytes: Natural
    executable: bool

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.path.split("/"))


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: Annotated[tuple[File, ...], msgspec.Meta(min_length=1)]


_DECODER = msgspec.json.Decoder(_Index)


def header_of(files: Sequence[File]) -> bytes:
    """What stands before the bytes of the files. They are in order. Raises ArtifactInvalid."""
    check(files)
    index = write(_Index(tuple(files)))
    header = _MAGIC + len(index).to_bytes(8, "little") + index
    nbytes = len(header) + sum(file.nbytes for file in files)
    if len(index) > MAX_INDEX_NBYTES or nbytes > MAX_NBYTES:
        raise ArtifactInvalid(
            f"{len(files)} files of {nbytes} bytes are too much for an artifact: its archive has "
            f"{MAX_NBYTES} bytes at most, and its index {MAX_INDEX_NBYTES}",
            "name a smaller folder",
        )
    return header


def files_in(archive: memoryview) -> tuple[int, tuple[File, ...]]:
    """Where the bytes of the first file begin, and all files. They fill the archive to its end.

    Raises ArtifactInvalid where it is damaged, or no file may be named like that.
    """
    if bytes(archive[: len(_MAGIC)]) != _MAGIC:
        raise ArtifactInvalid("the archive is damaged: it does not begin as archives do")
    length = int.from_bytes(archive[len(_MAGIC) : _START], "little")
    begin = _START + length
    if length > MAX_INDEX_NBYTES or begin > len(archive):
        raise ArtifactInvalid(f"the archive is damaged: its index cannot have {length} bytes")
    try:
        files = read(_DECODER, bytes(archive[_START:begin])).files
    except Malformed as exc:
        raise ArtifactInvalid(f"the index of the archive is damaged: {exc}") from exc
    check(files)
    nbytes = begin + sum(file.nbytes for file in files)
    if nbytes != len(archive):
        raise ArtifactInvalid(
            f"the archive is damaged: its index speaks of {nbytes} bytes, it has {len(archive)}"
        )
    return begin, files


def check(files: Sequence[File]) -> None:
    """ArtifactInvalid unless the paths stay within a folder, in order, and each is of one file."""
    for file in files:
        if reason := _why_not(file):
            raise ArtifactInvalid(f"no artifact can hold {short(repr(file.path))}: {reason}")
    for one, two in pairwise(files):
        if one.parts >= two.parts:
            raise ArtifactInvalid(
                f"the archive is damaged: {short(repr(two.path))} stands after "
                f"{short(repr(one.path))}"
            )
        if two.parts[: len(one.parts)] == one.parts:
            raise ArtifactInvalid(
                f"the archive is damaged: {short(repr(one.path))} is a file and a folder"
            )


def _why_not(file: File) -> str:
    if file.path.startswith("/"):
        return "the path is absolute"
    if not is_unicode(file.path) or "\0" in file.path:
        return "the name is no text"
    if len(file.path.encode()) > _MAX_PATH:
        return f"the path has more than {_MAX_PATH} bytes"
    if len(file.parts) > _MAX_DEPTH:
        return f"the path has more than {_MAX_DEPTH} parts"
    for part in file.parts:
        if part in ("", ".", ".."):
            return f"the path has the part {part!r}"
        if len(part.encode()) > _MAX_PART:
            return f"a name has more than {_MAX_PART} bytes"
    return ""
