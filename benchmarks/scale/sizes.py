"""How much of everything there is, in a whole run and in a quick one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Series grow; the last number is what goals are about."""

    ranks: tuple[int, ...]  # of other models
    instances: tuple[int, ...]  # complete, of the model that is joined
    joiners: tuple[int, ...]  # at the same time
    complete: int  # the most joiners that go on to the end of their loads


WHOLE = Sizes(
    ranks=(100, 1_000, 10_000, 30_000),
    instances=(1, 10, 100, 1_000, 3_000),
    joiners=(8, 32, 128, 512, 1_024),
    complete=64,
)
QUICK = Sizes(
    ranks=(16, 64, 256),
    instances=(1, 10, 40),
    joiners=(2, 4, 8),
    complete=8,
)
