"""How far a load is. Made by transfers and reads of files, for the caller's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Silence(NamedTuple):
    """A source that has brought nothing for a while, though it was asked.

    Attributes:
        source: Its key in etcd.
        seconds: For how long.
    """

    source: str
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a load is, in bytes that are read.

    The count goes back where a source is lost before its bytes could be checked.

    Attributes:
        nbytes: Bytes that have arrived.
        total_nbytes: Bytes that the whole load reads.
        silent: The sources that have brought nothing for a second or more, the longest first. Each
            has its key in `source`, and for how long in `seconds`.
    """

    nbytes: int
    total_nbytes: int
    silent: tuple[Silence, ...] = ()


OnProgress = Callable[[Progress], None]
