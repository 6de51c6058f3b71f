"""Copies of many tensors, by several threads."""

from __future__ import annotations

import pytest
import torch

from engine_loader.publishing import copies

PIECE_NBYTES = copies._PIECE_NBYTES
SIZES = (0, 1, 511, PIECE_NBYTES - 1, PIECE_NBYTES, 2 * PIECE_NBYTES + 3, *[4096] * 50)


@pytest.mark.parametrize("threads", [1, 4])
def test_every_byte_of_tensors_of_any_length_is_copied(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "THREADS", threads)
    sources = [torch.randint(256, (size,), dtype=torch.uint8) for size in SIZES]
    memory = torch.zeros(sum(SIZES), dtype=torch.uint8)
    parts = memory.split(list(SIZES))
    copies.copy(zip(sources, parts, strict=True))
    assert torch.equal(memory, torch.cat(sources))


def test_nothing_is_copied_where_there_is_nothing() -> None:
    copies.copy([])


def test_tensors_of_inference_mode_are_copied() -> None:
    with torch.inference_mode():
        source = torch.arange(100, dtype=torch.uint8)
    to = torch.zeros(100, dtype=torch.uint8)
    with torch.inference_mode():
        copies.copy([(source, to)])
    assert torch.equal(to, source)
