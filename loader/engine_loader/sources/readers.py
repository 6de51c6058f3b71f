"""How many loads read from each rank, and the order in which sources are preferred. Used by
searches and selections.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence

from engine_loader.engines.base import Engine
from engine_loader.engines.nearness import distance
from engine_registry import RankRecord, Registry
from engine_registry.errors import EtcdRefused
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


def best_first(
    records: Sequence[RankRecord], readers: Mapping[str, int], engine: Engine
) -> list[RankRecord]:
    """Those of our zone first, then those with the fewest readers, then the nearest: this node,
    this rack, this fabric, these rails. Loaders that see equal ones do not all choose the same.
    """

    def order(record: RankRecord) -> tuple[bool, float, bool, int, bytes]:
        leaves, far = distance(record, engine)
        same_fabric = bool(record.fabric) and record.fabric == engine.fabric
        return (
            leaves,
            readers.get(record.incarnation, 0) + far,
            not same_fabric,
            -_shared_rails(record.rails, engine.rails),
            order_of(record, engine.session_id),
        )

    return sorted(records, key=order)


def _shared_rails(ours: Mapping[str, str], theirs: Mapping[str, str]) -> int:
    """How near the nearest two network cards are: in one subnet, and of one name, as the cards of
    machines that are built alike have on one rail.
    """
    return max(
        (
            2 * bool(subnet and subnet == other_subnet) + (name == other)
            for name, subnet in ours.items()
            for other, other_subnet in theirs.items()
        ),
        default=0,
    )


def count_readers(registry: Registry, records: Sequence[RankRecord]) -> Mapping[str, int]:
    """How many loads read from each rank, by incarnation; of one alone it does not matter."""
    if len(records) < 2:
        return {}
    try:
        return registry.count_pulls(records)
    except EtcdRefused as exc:  # a user that may not see tickets may load all the same
        log_unseen(exc)
        return {}


def log_unseen(error: EtcdRefused | None = None) -> None:
    """Tickets cannot be read."""
    log.info(
        "not known how many read from each source%s",
        f": {error}" if error else "",
        extra=fields("readers_unknown", error=error),
    )


def order_of(record: RankRecord, session_id: str) -> bytes:
    """Orders equal ranks, for each loader, by its session, in another way: so they do not all read
    from the same.
    """
    return hashlib.blake2b(f"{session_id} {record.incarnation}".encode(), digest_size=8).digest()
