"""Which rank of how many a process is, and where it stands along each parallel axis. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine_registry.schema.numbers import whole, whole_or_none
from engine_registry.schema.record import RankRecord
from engine_registry.schema.topology import check_topology


@dataclass(frozen=True)
class Place:
    """A rank's number, and as far as it is known its world size and its (index, size) along each
    parallel axis.

    Tensors that do not say which part of the whole they are mean the same only at one place: rank 0
    of 2 along `ep` holds other experts than rank 1 of 2, in tensors of the same names and shapes.
    """

    rank: int
    world_size: int | None = None
    topology: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        object.__setattr__(self, "rank", whole("rank", self.rank))
        object.__setattr__(self, "world_size", whole_or_none("world_size", self.world_size, 1))
        object.__setattr__(self, "topology", check_topology(self.topology))

    @classmethod
    def of(cls, record: RankRecord) -> Place:
        """The place of a registered rank."""
        return cls(record.rank, record.world_size, record.topology)

    def fits(self, other: Place) -> bool:
        """Whether both may be the same place: they agree in all that both state."""
        sizes = {self.world_size, other.world_size} - {None}
        topologies_agree = (
            not self.topology or not other.topology or dict(self.topology) == dict(other.topology)
        )
        return self.rank == other.rank and len(sizes) <= 1 and topologies_agree

    def __str__(self) -> str:
        size = "" if self.world_size is None else f" of {self.world_size}"
        axes = "".join(
            f", {axis} {index}/{count}" for axis, (index, count) in sorted(self.topology.items())
        )
        return f"rank {self.rank}{size}{axes}"
