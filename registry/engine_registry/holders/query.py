"""What is asked of the index of holders, and what comes of it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine_registry.schema.location import UNKNOWN, Location
from engine_registry.schema.place import Place
from engine_registry.schema.record import ModelIdentity, RankRecord
from engine_registry.schema.status import InstanceStatus


def everything(_: object) -> bool:
    """Any record, or any instance, will do."""
    return True


@dataclass(frozen=True)
class HolderQuery:
    """Ranks at a place that hold the weights of a model.

    Attributes:
        model: The model.
        place: Which rank, and as far as it matters its world size and topology.
        usable: Whether a record will do. Where none of a sample will, more are read.
        version: The version that is looked for first. None: the newest.
        loading: Whether ranks that still load the weights will do, too.
        me: The rank that is to be filled, if it is registered. Then only ranks that began before it
            count of those that load.
        chain: How many ranks may load one from the other in a row. If more load before `me`, those
            that come are spread over all of them, instead of being those just before it.
        near: Where whoever asks stands. If its zone has ranks of the newest version, only ranks of
            that zone come, of those that are ready and of those that load, each for themselves.
    """

    model: ModelIdentity
    place: Place
    usable: Callable[[RankRecord], bool] = everything
    version: int | None = None
    loading: bool = False
    me: RankRecord | None = None
    chain: int = 0
    near: Location = UNKNOWN


@dataclass(frozen=True)
class Holders:
    """A few of the ranks that hold the weights, as they were at one revision of etcd.

    Attributes:
        ready: Ranks that have all. Those that are usable; where there are none, some that fit.
        all_ready: Whether these are all that there are of their version, in the zone that was
            asked for if they are from there.
        loading: Usable ranks that load, the last one to begin first: those just before `me`, or
            some that are spread over all.
        ahead: How many load that began before `me`, or at all: in the zone that was asked for if
            `loading` is from there.
        readers: How many loads read from each, by incarnation. None where etcd does not let us see.
        revision: At which they were counted.
        instances: Instances of the model that are ready, where no rank is.
        scanned: Whether all records were read, for ranks that are not in the index.
    """

    ready: tuple[RankRecord, ...] = ()
    all_ready: bool = True
    loading: tuple[RankRecord, ...] = ()
    ahead: int = 0
    readers: Mapping[str, int] | None = field(default_factory=dict)
    revision: int = 0
    instances: tuple[InstanceStatus, ...] = ()
    scanned: bool = False

    def __bool__(self) -> bool:
        """Whether the weights can be had somewhere."""
        return bool(self.ready or self.instances)
