"""Deltas between two versions of a rank's tensors, and how a reader gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch

from engine_loader import deltas
from engine_loader.deltas import apply as applying
from engine_loader.deltas import apply_on_gpu, encode_on_gpu
from engine_loader.deltas import encode as encoding
from engine_loader.deltas import format as layout
from engine_loader.deltas.apply import apply_all
from engine_loader.deltas.encode import encode
from engine_loader.deltas.format import HEADER_NBYTES, Section, directory_of, header_of
from engine_loader.deltas.stated import Change
from engine_loader.tensors.regions import describe
from engine_registry import TensorEntry
from tests.support.interpreted import copy_of, interpreted

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
    known = {entry.name: entry for entry in entries}
    apply_all(
        torch.frombuffer(bytearray(data), dtype=torch.uint8),
        [
            Change(section, known[name], tensors[name], ours[name])
            for name, section in sections_of(data, entries).items()
        ],
    )


@contextmanager
def blocks_of(nbytes: int, at_once: int = 1 << 20) -> Iterator[None]:
    """So that little data takes several blocks, and is applied in several steps."""
    with (
        mock.patch.object(layout, "BLOCK_NBYTES", nbytes),
        mock.patch.object(applying, "_AT_ONCE", at_once),
    ):
        yield


@contextmanager
def by_kernel(tile: int = 64, step: int = 16, tiles: int = 4) -> Iterator[None]:
    """As on a GPU: by the kernels, which Triton's interpreter runs on the host's memory, and by
    nothing else. They take tiles of so many elements, and so many tiles of a block at a time.
    """
    encode_kernel, apply_kernel = (
        copy_of(f"{deltas.__name__}.{name}") for name in ("encode_kernel", "apply_kernel")
    )
    with ExitStack() as stack:
        stack.enter_context(interpreted(encode_kernel.__name__))
        for module, name, value in (
            (encode_kernel, "_TILE", tile),
            (encode_kernel, "_STEP", step),
            (encode_kernel, "_SOME", step // 2),
            (encode_kernel, "_TILES", tiles),
            (apply_kernel, "_PART", step),
            (apply_kernel, "_PARTS", tiles),
            (deltas, "encode_kernel", encode_kernel),
            (deltas, "apply_kernel", apply_kernel),
            (encode_on_gpu, "on_one_gpu", lambda tensors: True),
            (apply_on_gpu, "on_one_gpu", lambda tensors: True),
            (encoding, "block_of", None),
            (applying, "apply", None),
        ):
            stack.enter_context(mock.patch.object(module, name, value, create=True))
        yield


Route = Callable[[], AbstractContextManager[None]]
_ROUTES: dict[str, Route] = {"CPU": nullcontext, "kernel": by_kernel}
routes = pytest.mark.parametrize("route", _ROUTES.values(), ids=list(_ROUTES))


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
