"""Whom to read from: of the ranks that have what is wanted, those that can be reached, the best first."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from loader.chain import costs
from loader.engine import Engine
from loader.errors import SourceUnreachable, VersionUnavailable
from registry import InstanceState, InstanceStatus, ModelIdentity, RankRecord, RankState, Registry
from registry.errors import EtcdRefused, InvalidField
from registry.logs import fields
from registry.record import GATEWAY
from registry.tickets import Pull
from registry.waiting import Wanted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """`alike` hold, by their records, what the rank to be filled holds; `instances` are all ranks of each. The best first.

    No more than `at_once` of `alike` should be read from at the same time.
    """

    alike: list[RankRecord]
    instances: list[tuple[RankRecord, ...]]
    at_once: int = 1

    def __bool__(self) -> bool:
        return bool(self.alike or self.instances)


@dataclass(frozen=True)
class Search:
    """What is looked for, however often.

    With `boxes`, what is filled says which part of the whole it is: then ranks that differ from `rank` along the axis dp may hold
    the same, all ranks together may have it, and there need not be such a rank. `by_rank`: of a model's instances the rank will do,
    whatever else of them there is. `pipelined`: so will ranks that are loading themselves; to read from one costs, besides, `hop`
    times what a load takes for each rank that its weights have gone through.
    """

    registry: Registry
    engine: Engine
    wanted: Wanted
    rank: int | None
    boxes: bool
    version: int | None = None
    max_sources: int = 4
    by_rank: bool = False
    pipelined: bool = False
    hop: float = 0.0

    def find(self, deadline: float, avoid: Collection[str] = (), me: str = "") -> Found:
        """Ranks to read from, all of one version of one model. Waits until `deadline` for the first.

        `avoid` holds incarnations, `me` is the one of the rank that is filled, if it is registered. Raises what `Registry.ready`
        raises, InvalidField (no such rank), VersionUnavailable and SourceUnreachable; finds nothing only where all are to be
        avoided.
        """
        found = self._look(max(0.0, deadline - time.monotonic()))
        every = {record.incarnation: record for status in found for record in status.records}
        ready, alike = self._of_one_version(found)
        if not self.boxes and not alike:
            sizes = ", ".join(f"{status.instance!r} has the ranks 0 to {status.world_size - 1}" for status in ready)
            raise InvalidField(f"there is no rank {self.rank}: {sizes}", field="rank")
        whole = [status.records for status in ready if self.boxes]
        alike = _before(every.get(me), alike) if me else alike
        usable = self._reachable(whole, alike) - set(avoid)
        whole = [records for records in whole if all(record.incarnation in usable for record in records)]
        alike = [record for record in alike if record.incarnation in usable]
        firsts = self._best_first([records[0] for records in whole])
        instances = sorted(whole, key=lambda records: firsts.index(records[0]))
        if any(record.state is RankState.LOADING for record in alike):
            some, at_once = self._in_chain(alike, every.keys() - set(avoid), me)
            return Found(some, instances, at_once)
        return Found(self._best_first(alike), instances, self.max_sources)

    def _look(self, timeout_s: float) -> Sequence[InstanceStatus]:
        if self.by_rank and isinstance(self.wanted, ModelIdentity) and self.rank is not None:
            return self.registry.holders(self.wanted, self.rank, timeout_s)
        return self.registry.ready(self.wanted, timeout_s)

    def _of_one_version(self, found: Sequence[InstanceStatus]) -> tuple[list[InstanceStatus], list[RankRecord]]:
        """The instances that are ready, and the ranks alike, of the newest version that such an instance has, or else such a rank,
        if none is named."""
        ready = [status for status in found if status.state is InstanceState.READY]
        holders = [record for status in found for record in self._holders(status)]
        complete = [record for record in holders if record.state is RankState.READY]
        firsts = [status.records[0] for status in ready]
        version = max([record.version for record in firsts or complete], default=0) if self.version is None else self.version
        served = sorted({record.version for record in [*firsts, *complete]})
        if version not in served:
            raise VersionUnavailable(
                f"version {version} is not served: {', '.join(sorted(status.instance for status in found))} "
                f"has {', '.join(map(str, served))}",
                version=version,
                served=served,
            )
        model = next(record.model for record in [*firsts, *complete] if record.version == version)
        kind = version, model
        some = [status for status in ready if (status.version, status.model) == kind]
        return some, [record for record in holders if (record.version, record.model) == kind]

    def _holders(self, status: InstanceStatus) -> list[RankRecord]:
        own = next((record for record in status.records if record.rank == self.rank), None)
        if own is None:
            return []
        others = [other for other in status.records if self.boxes and other is not own and _replicas(own, other)]
        states = (RankState.READY, RankState.LOADING) if self.pipelined else (RankState.READY,)
        return [record for record in [own, *others] if record.state in states]

    def _reachable(self, whole: Sequence[Sequence[RankRecord]], alike: Sequence[RankRecord]) -> set[str]:
        """Incarnations; SourceUnreachable where nobody can be read from."""
        every = [*(record for records in whole for record in records), *alike]
        obstacles = {record.key: obstacle for record in every if (obstacle := _obstacle(self.engine, record))}
        teams = [*((record,) for record in alike), *whole]
        if obstacles and all(any(record.key in obstacles for record in team) for team in teams):
            told = "; ".join(f"{key} {obstacle}" for key, obstacle in obstacles.items())
            raise SourceUnreachable(f"no source can be reached from here: {told}", sources=list(obstacles))
        return {record.incarnation for record in every if record.key not in obstacles}

    def _in_chain(self, alike: Sequence[RankRecord], registered: Collection[str], me: str) -> tuple[list[RankRecord], int]:
        """The cheapest first; and those that are complete and have no reader, at once."""
        cost = costs(alike, self._pulls(), registered, self.hop, me)
        some = sorted(
            [record for record in alike if record.incarnation in cost], key=lambda r: (cost[r.incarnation], r.create_revision)
        )
        idle = sum(record.state is RankState.READY and cost[record.incarnation] == 1 for record in some)
        return some, min(max(idle, 1), self.max_sources)

    def _best_first(self, records: Sequence[RankRecord]) -> list[RankRecord]:
        """Fewest readers first, then the nearest; loaders that see equal ones do not all choose the same."""
        here = socket.gethostname()

        def order(record: RankRecord) -> tuple[int, bool, bool, bytes]:
            near = bool(record.fabric) and record.fabric == self.engine.fabric
            return self._readers(record), record.host != here, not near, place_of(record, self.engine.session_id)

        return sorted(records, key=order) if len(records) > 1 else list(records)

    def _readers(self, record: RankRecord) -> int:
        try:
            return self.registry.pulls(record)
        except EtcdRefused as exc:  # who may not see the tickets may read all the same
            _tickets_unseen(exc)
            return 0

    def _pulls(self) -> Sequence[Pull]:
        try:
            return self.registry.all_pulls()
        except EtcdRefused as exc:
            _tickets_unseen(exc)
            return ()


def _tickets_unseen(exc: EtcdRefused) -> None:
    log.info("not known how many read from each source: %s", exc, extra=fields("readers_unknown", error=exc))


def _before(mine: RankRecord | None, alike: Sequence[RankRecord]) -> list[RankRecord]:
    """Those that are complete or began to load before me: so nobody reads, by way of whomever, from itself."""
    limit = mine.create_revision if mine is not None else 0
    return [record for record in alike if record.state is not RankState.LOADING or record.create_revision < limit]


def _replicas(one: RankRecord, other: RankRecord) -> bool:
    """They differ in their place along dp and nowhere else."""
    return "dp" in one.topology and all(place == other.topology.get(axis) for axis, place in one.topology.items() if axis != "dp")


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


def place_of(record: RankRecord, session_id: str) -> bytes:
    """Orders equal ranks, for each loader, by its session, in another way: so they do not all read from the same."""
    return hashlib.blake2b(f"{session_id} {record.incarnation}".encode(), digest_size=8).digest()
