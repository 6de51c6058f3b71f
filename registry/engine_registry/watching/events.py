"""What a watch reports about ranks and instances. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from engine_registry.schema.eviction import Eviction
from engine_registry.schema.record import RankRecord
from engine_registry.schema.release import Release
from engine_registry.schema.status import InstanceStatus


@dataclass(frozen=True)
class RankJoined:
    """A rank has registered, or was there when the watch began."""

    record: RankRecord


@dataclass(frozen=True)
class RankUpdated:
    """The record of a rank has changed: its state, its version, or what it holds.

    Where it offers other memory now, its incarnation is another one.
    """

    record: RankRecord
    previous: RankRecord


@dataclass(frozen=True)
class RankLost:
    """`record` is the last one. `reason` is why: withdrawn, process ended, evicted, its source was
    evicted, lease expired or key deleted, replaced by another process, record damaged. `eviction`
    is who evicted it, from where and why, where that is known. `held_until` is a time in UTC, until
    which the rank's keeper keeps its memory for a process that takes its place; empty where it does
    not.
    """

    record: RankRecord
    reason: str
    eviction: Eviction | None = None
    held_until: str = ""


@dataclass(frozen=True)
class InstanceReady:
    """All ranks of the instance are registered, agree, and can be read."""

    status: InstanceStatus


@dataclass(frozen=True)
class InstanceDegraded:
    """Ranks of the instance are missing, disagree, or cannot be read now: `status` says which."""

    status: InstanceStatus


@dataclass(frozen=True)
class InstanceGone:
    """The last rank of the instance has left."""

    status: InstanceStatus


@dataclass(frozen=True)
class VersionReleased:
    """A version of the instance is released: every rank holds it. `previous` is the release that
    the watch has seen before it, which after a rollback is of a newer version.
    """

    release: Release
    previous: Release | None = None

    @property
    def instance(self) -> str:
        """The instance."""
        return self.release.instance

    @property
    def version(self) -> int:
        """The version."""
        return self.release.version


RankEvent = RankJoined | RankUpdated | RankLost
InstanceEvent = InstanceReady | InstanceDegraded | InstanceGone
Event = RankEvent | InstanceEvent | VersionReleased
