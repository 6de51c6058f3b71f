"""Whom to read from: of the ready instances that have what is wanted, those that can be reached, the best first."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Collection, Iterable, Sequence

from loader.engine import Engine
from loader.errors import SourceUnreachable, VersionUnavailable
from registry import InstanceStatus, RankRecord, Registry
from registry.errors import InvalidField
from registry.waiting import Wanted


def find_sources(
    registry: Registry,
    engine: Engine,
    wanted: Wanted,
    rank: int,
    *,
    version: int | None,
    deadline: float,
    avoid: Collection[str],
    replicas: bool,
) -> list[RankRecord]:
    """Ranks that hold, by their records, the same weights: those of `rank`, in one version. Waits until `deadline` for the first.

    It is that rank in each instance and, with `replicas`, those that differ from it along the axis dp: whether they hold the same
    boxes their manifests tell. `avoid` holds incarnations. Raises what `Registry.ready` raises, InvalidField (no such rank),
    VersionUnavailable and SourceUnreachable; returns nothing only where all are to be avoided.
    """
    ready = registry.ready(wanted, max(0.0, deadline - time.monotonic()))
    found = [record for status in ready for record in _holders(status, rank, replicas)]
    if not found:
        sizes = ", ".join(f"{status.instance!r} has the ranks 0 to {status.world_size - 1}" for status in ready)
        raise InvalidField(f"there is no rank {rank}: {sizes}", field="rank")
    found = _of_one_version(found, version)
    found = [record for record in found if record.model == found[0].model]
    reachable = [record for record in found if not _obstacle(engine, record)]
    if not reachable:
        obstacles = "; ".join(f"{record.key} {_obstacle(engine, record)}" for record in found)
        raise SourceUnreachable(f"no source can be reached from here: {obstacles}", sources=[record.key for record in found])
    usable = [record for record in reachable if record.incarnation not in avoid]
    return _best_first(registry, engine, usable)


def _holders(status: InstanceStatus, rank: int, replicas: bool) -> list[RankRecord]:
    if not 0 <= rank < len(status.records):
        return []
    own = status.records[rank]
    return [own] if not replicas else [own, *(other for other in status.records if other is not own and _replicas(own, other))]


def _replicas(one: RankRecord, other: RankRecord) -> bool:
    """They differ in their place along dp and nowhere else."""
    return "dp" in one.topology and all(place == other.topology.get(axis) for axis, place in one.topology.items() if axis != "dp")


def _of_one_version(records: Sequence[RankRecord], version: int | None) -> list[RankRecord]:
    """Of the newest, if none is named."""
    served = sorted({record.version for record in records})
    wanted = served[-1] if version is None else version
    if wanted not in served:
        raise VersionUnavailable(
            f"version {wanted} is not served: {', '.join(sorted({record.instance for record in records}))} "
            f"has {', '.join(map(str, served))}",
            version=wanted,
            served=served,
        )
    return [record for record in records if record.version == wanted]


def _obstacle(engine: Engine, record: RankRecord) -> str:
    """Why its memory cannot be read from here, as far as labels tell."""
    if record.protocol != engine.protocol:
        return f"is served over {record.protocol}, this engine speaks {engine.protocol}"
    if record.fabric and engine.fabric and record.fabric != engine.fabric:
        return f"is on the fabric {record.fabric!r}, this engine on {engine.fabric!r}"
    if record.protocol == "nvlink_intra" and record.host != socket.gethostname():
        return f"is on the host {record.host}, and {record.protocol} does not leave a host"
    return ""


def _best_first(registry: Registry, engine: Engine, records: Iterable[RankRecord]) -> list[RankRecord]:
    """Fewest readers first, then the nearest; loaders that see equal ones do not all choose the same."""
    here = socket.gethostname()

    def order(record: RankRecord) -> tuple[int, bool, bool, bytes]:
        spread = hashlib.blake2b(f"{engine.session_id} {record.incarnation}".encode(), digest_size=8).digest()
        near = bool(record.fabric) and record.fabric == engine.fabric
        return registry.pulls(record), record.host != here, not near, spread

    some = list(records)
    return sorted(some, key=order) if len(some) > 1 else some
