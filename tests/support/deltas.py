"""Deltas between two versions of a rank's tensors, and how a reader gets them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import torch

from engine_loader.deltas import apply as applying
from engine_loader.deltas import format as layout
from engine_loader.deltas.apply import apply
from engine_loader.deltas.encode import encode
from engine_loader.deltas.format import HEADER_NBYTES, Section, directory_of, header_of
from engine_loader.tensors.regions import describe
from engine_registry import TensorEntry

BEFORE, AFTER = "ab" * 16, "cd" * 16


def delta(
    entries: Sequence[TensorEntry],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    threads: int = 1,
) -> bytes:
    """All bytes of a delta."""
    buffer = torch.full((layout.capacity_of(entries),), 0xEE, dtype=torch.uint8)
    encoded = encode(entries, before, after, buffer, BEFORE, AFTER, threads)
    assert encoded is not None
    return bytes(buffer[: encoded.nbytes].numpy())


def sections_of(data: bytes, entries: Sequence[TensorEntry]) -> dict[str, Section]:
    """As a reader finds them: the header first, then the directory."""
    header = header_of(data[:HEADER_NBYTES], entries)
    assert header is not None
    begin = header.directory_offset
    return directory_of(header, data[begin : begin + header.directory_nbytes], entries)


def bytes_of(data: bytes, section: Section) -> torch.Tensor:
    """Of a section."""
    return torch.frombuffer(
        bytearray(data[section.offset : section.offset + section.nbytes]), dtype=torch.uint8
    )


def bring(data: bytes, entries: Sequence[TensorEntry], tensors: Mapping[str, torch.Tensor]) -> None:
    """Applies a delta to tensors of the same layout."""
    ours = {entry.name: entry for entry in describe(tensors).tensors}
    for name, section in sections_of(data, entries).items():
        (src,) = [entry for entry in entries if entry.name == name]
        apply(bytes_of(data, section), section, src, tensors[name], ours[name])


@contextmanager
def blocks_of(nbytes: int, at_once: int = 1 << 20) -> Iterator[None]:
    """So that little data takes several blocks, and is applied in several steps."""
    with (
        mock.patch.object(layout, "BLOCK_NBYTES", nbytes),
        mock.patch.object(applying, "_AT_ONCE", at_once),
    ):
        yield


class Guarded:
    """A tensor like another, with bytes around it that nobody may write to."""

    _NBYTES = 64

    def __init__(self, like: torch.Tensor) -> None:
        self._all = torch.full((like.nbytes + 2 * self._NBYTES,), 0xEE, dtype=torch.uint8)
        inside = self._all[self._NBYTES : self._NBYTES + like.nbytes].view(like.dtype)
        self.tensor = inside.as_strided(like.shape, like.stride())
        self.tensor.copy_(like)

    def check(self) -> None:
        around = torch.cat([self._all[: self._NBYTES], self._all[-self._NBYTES :]])
        assert torch.all(around == 0xEE)


def as_bytes(tensor: torch.Tensor) -> bytes:
    """As they lie in memory."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return bytes(flat.numpy())
