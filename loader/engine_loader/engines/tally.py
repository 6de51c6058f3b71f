"""Sums for digests that an engine computes as it reads: what `Engine.tally` returns."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Tally(Protocol):
    """What the bytes of pieces of a source's memory sum up to, as they are read."""

    @property
    def firsts(self) -> npt.NDArray[np.int64]:
        """Of each piece, the number of the sum of its first block."""

    def has_news(self) -> bool:
        """Whether more has come since the last `sums`. Never waits."""

    def sums(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each block: the sum of what has come, and how many bytes that are for certain: other
        bytes may be in the sum already.
        """

    def close(self) -> None:
        """Sums up no more."""
