"""How near the machine of a rank is to this one. Used to choose sources, and to report them."""

from __future__ import annotations

import socket
from enum import Enum

from engine_loader.engines.base import Engine
from engine_registry.schema.record import RankRecord


class Nearness(str, Enum):
    """How near a source is, the nearest first. All but the last two are in the reader's zone."""

    NODE = "node"  # nothing crosses the network
    RACK = "rack"
    ZONE = "zone"
    UNKNOWN = "unknown"  # one of the two does not say where it is
    ELSEWHERE = "elsewhere"  # another zone

    @classmethod
    def of(cls, record: RankRecord, engine: Engine) -> Nearness:
        """Of the rank, to the engine that reads from it.

        Host names tell whether two processes share a machine only where one of them does not know
        its node: in containers of one machine they differ.
        """
        here, there = engine.location, record.location
        if here.zone and there.zone and here.zone != there.zone:
            return cls.ELSEWHERE
        if here.node == there.node if here.node and there.node else _is_this_host(record):
            return cls.NODE
        if here.rack and (here.zone, here.rack) == (there.zone, there.rack):
            return cls.RACK
        return cls.ZONE if here.zone and here.zone == there.zone else cls.UNKNOWN


# What it costs to read from farther away, in loads. Less than 1, so that a source without a reader
# is preferred to a nearer one that has a reader.
_FAR = {Nearness.NODE: 0.0, Nearness.RACK: 0.25}
_FARTHEST = 0.5


def distance(record: RankRecord, engine: Engine) -> tuple[bool, float]:
    """Whether to read from the rank leaves the zone, and what the distance costs within it: from 0
    to less than 1, where 1 is the time of a load.

    A rank that does not say where it is counts as one of another zone.
    """
    near = Nearness.of(record, engine)
    leaves = bool(engine.location.zone) and near in (Nearness.UNKNOWN, Nearness.ELSEWHERE)
    return leaves, _FAR.get(near, _FARTHEST)


def _is_this_host(record: RankRecord) -> bool:
    return record.host == socket.gethostname()
