"""The XOR of the weights with those of the step before, compressed, over HTTP: what is simple.

Both sides work on pieces with as many threads as there are cores. The reader does so while the
rest still comes. Nothing is checked.

A file begins with a u32 for each piece, the length of its frame; the frames follow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.updates.candidates import Receiving, Sending, Work
from benchmarks.updates.candidates.codec import compress, decompress
from benchmarks.updates.candidates.files import Answer, asking, serving
from benchmarks.updates.weights import Tensors, copied

_PIECE_NBYTES = 4 << 20
_Piece = npt.NDArray[Any]


def _pieces(tensors: Tensors) -> list[_Piece]:
    flats = [tensor.view(-1).view(torch.uint8).numpy() for tensor in tensors.values()]
    return [
        flat[at : at + _PIECE_NBYTES] for flat in flats for at in range(0, len(flat), _PIECE_NBYTES)
    ]


def _encode(now: _Piece, before: _Piece) -> bytes | memoryview:
    np.bitwise_xor(now, before, out=before)
    frame = compress(before.data)
    np.copyto(before, now)
    return frame


def _apply(piece: _Piece, frame: bytearray) -> None:
    piece ^= np.frombuffer(decompress(frame, len(piece)), np.uint8)


@contextmanager
def send(work: Work, tensors: Tensors) -> Iterator[Sending]:
    now, before = _pieces(tensors), _pieces(copied(tensors))
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def write(path: Path) -> None:
            frames = list(pool.map(_encode, now, before))
            with path.open("wb") as file:
                file.write(np.array([len(one) for one in frames], "<u4").data)
                for frame in frames:
                    file.write(frame)

        with serving(work, write) as sending:
            yield sending


@contextmanager
def receive(work: Work, tensors: Tensors) -> Iterator[Receiving]:
    pieces = _pieces(tensors)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def fill(answer: Answer) -> None:
            lengths = np.frombuffer(answer.read(4 * len(pieces)), "<u4").tolist()
            begun = [
                pool.submit(_apply, piece, answer.read(length))
                for piece, length in zip(pieces, lengths, strict=True)
            ]
            for one in begun:
                one.result()

        with asking(work, fill, keeps=True) as receiving:
            yield receiving
