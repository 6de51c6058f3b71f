"""How far a load is. Made by transfers and reads of files, for the caller's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a load is, in bytes that are read.

    The count goes back where a source is lost before its bytes could be checked.

    Attributes:
        nbytes: Bytes that have arrived.
        total_nbytes: Bytes that the whole load reads.
    """

    nbytes: int
    total_nbytes: int


OnProgress = Callable[[Progress], None]
