"""`Seat`: which rank of which instance a process of an engine is. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from engine_registry import Place


@dataclass(frozen=True)
class Seat:
    """Which rank of which instance the process is.

    Attributes:
        instance: The name of the instance. All ranks of one replica have the same, and no other.
        generation: An id that these ranks share, and no other launch.
        place: The number of the rank, how many there are, and the parallel axes.
    """

    instance: str
    generation: str
    place: Place

    def __str__(self) -> str:
        return f"{self.instance}/{self.place.rank}"
