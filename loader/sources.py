"""Whom to read from: of the ready instances that have what is wanted, those that can be reached, the best first."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from loader.engine import Engine
from loader.errors import SourceUnreachable, VersionUnavailable
from registry import InstanceStatus, RankRecord, Registry
from registry.errors import EtcdRefused, InvalidField
from registry.logs import fields
from registry.record import GATEWAY
from registry.waiting import Wanted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """`alike` hold, by their records, what the rank to be filled holds; `instances` are all ranks of each. The best first."""

    alike: list[RankRecord]
    instances: list[tuple[RankRecord, ...]]

    def __bool__(self) -> bool:
        return bool(self.alike or self.instances)


def find_sources(
    registry: Registry,
    engine: Engine,
    wanted: Wanted,
    rank: int | None,
    *,
    version: int | None,
    deadline: float,
    avoid: Collection[str],
    boxes: bool,
) -> Found:
    """Ranks to read from, all of one version. Waits until `deadline` for the first instance.

    Alike is that rank in each instance. With `boxes`, what is filled says which part of the whole it is: then those that differ
    from it along the axis dp may hold the same, all ranks together may have it, and there need not be such a rank. `avoid` holds
    incarnations. Raises what `Registry.ready` raises, InvalidField (no such rank), VersionUnavailable and SourceUnreachable; finds
    nothing only where all are to be avoided.
    """
    ready = list(registry.ready(wanted, max(0.0, deadline - time.monotonic())))
    ready = _of_one_version(ready, version)
    ready = [status for status in ready if status.records[0].model == ready[0].records[0].model]
    alike = [record for status in ready for record in _holders(status, rank, boxes)]
    if not boxes and not alike:
        sizes = ", ".join(f"{status.instance!r} has the ranks 0 to {status.world_size - 1}" for status in ready)
        raise InvalidField(f"there is no rank {rank}: {sizes}", field="rank")
    every = [record for status in ready for record in status.records] if boxes else alike
    obstacles = {record.key: obstacle for record in every if (obstacle := _obstacle(engine, record))}
    teams = [*((record,) for record in alike), *(status.records for status in ready if boxes)]
    if all(any(record.key in obstacles for record in team) for team in teams):
        told = "; ".join(f"{key} {obstacle}" for key, obstacle in obstacles.items())
        raise SourceUnreachable(f"no source can be reached from here: {told}", sources=list(obstacles))
    usable = {record.key for record in every if record.key not in obstacles and record.incarnation not in avoid}
    whole = [status.records for status in ready if boxes and all(record.key in usable for record in status.records)]
    firsts = _best_first(registry, engine, [records[0] for records in whole])
    return Found(
        _best_first(registry, engine, [record for record in alike if record.key in usable]),
        [next(records for records in whole if records[0] is first) for first in firsts],
    )


def _holders(status: InstanceStatus, rank: int | None, boxes: bool) -> list[RankRecord]:
    if rank is None or not 0 <= rank < len(status.records):
        return []
    own = status.records[rank]
    return [own] if not boxes else [own, *(other for other in status.records if other is not own and _replicas(own, other))]


def _replicas(one: RankRecord, other: RankRecord) -> bool:
    """They differ in their place along dp and nowhere else."""
    return "dp" in one.topology and all(place == other.topology.get(axis) for axis, place in one.topology.items() if axis != "dp")


def _of_one_version(ready: Sequence[InstanceStatus], version: int | None) -> list[InstanceStatus]:
    """Of the newest, if none is named. All ranks of one that is ready have the same."""
    served = sorted({status.records[0].version for status in ready})
    wanted = served[-1] if version is None else version
    if wanted not in served:
        raise VersionUnavailable(
            f"version {wanted} is not served: {', '.join(sorted(status.instance for status in ready))} "
            f"has {', '.join(map(str, served))}",
            version=wanted,
            served=served,
        )
    return [status for status in ready if status.records[0].version == wanted]


def _obstacle(engine: Engine, record: RankRecord) -> str:
    """Why its memory cannot be read from here, as far as labels tell."""
    if record.kept_by == GATEWAY:
        return "is an SGLang seed, which has no header to check reads by: load it with SGLang, through `engines gateway`"
    if record.protocol != engine.protocol:
        return f"is served over {record.protocol}, this engine speaks {engine.protocol}"
    if record.fabric and engine.fabric and record.fabric != engine.fabric:
        return f"is on the fabric {record.fabric!r}, this engine on {engine.fabric!r}"
    if record.protocol == "nvlink_intra" and not (record.fabric and engine.fabric) and record.host != socket.gethostname():
        return f"is on the host {record.host}, and {record.protocol} does not leave a host"
    return ""


def _best_first(registry: Registry, engine: Engine, records: Iterable[RankRecord]) -> list[RankRecord]:
    """Fewest readers first, then the nearest; loaders that see equal ones do not all choose the same."""
    here = socket.gethostname()

    def order(record: RankRecord) -> tuple[int, bool, bool, bytes]:
        near = bool(record.fabric) and record.fabric == engine.fabric
        return _readers(registry, record), record.host != here, not near, place_of(record, engine.session_id)

    some = list(records)
    return sorted(some, key=order) if len(some) > 1 else some


def _readers(registry: Registry, record: RankRecord) -> int:
    try:
        return registry.pulls(record)
    except EtcdRefused as exc:  # who may not see the tickets may read all the same
        log.info("not known how many read from %s: %s", record.key, exc, extra=fields("readers_unknown", key=record.key, error=exc))
        return 0


def place_of(record: RankRecord, session_id: str) -> bytes:
    """Orders equal ranks, for each loader, by its session, in another way: so they do not all read from the same."""
    return hashlib.blake2b(f"{session_id} {record.incarnation}".encode(), digest_size=8).digest()
