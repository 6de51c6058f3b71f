"""How many loads read from each rank, and the order in which sources are preferred. Used by
searches and selections.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Sequence

from engine_loader.engines.base import Engine
from engine_registry import RankRecord, Registry
from engine_registry.errors import EtcdRefused
from engine_registry.schema.pull_ticket import Pull
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


def best_first(
    registry: Registry, engine: Engine, records: Sequence[RankRecord]
) -> list[RankRecord]:
    """Fewest readers first, then the nearest; loaders that see equal ones do not all choose the
    same.
    """
    here = socket.gethostname()

    def order(record: RankRecord) -> tuple[int, bool, bool, bytes]:
        near = bool(record.fabric) and record.fabric == engine.fabric
        return (
            _readers(registry, record),
            record.host != here,
            not near,
            order_of(record, engine.session_id),
        )

    return sorted(records, key=order) if len(records) > 1 else list(records)


def _readers(registry: Registry, record: RankRecord) -> int:
    try:
        return registry.pulls(record)
    except EtcdRefused as exc:  # a user that may not see tickets may load all the same
        _tickets_unseen(exc)
        return 0


def all_pulls(registry: Registry) -> Sequence[Pull]:
    try:
        return registry.all_pulls()
    except EtcdRefused as exc:
        _tickets_unseen(exc)
        return ()


def _tickets_unseen(exc: EtcdRefused) -> None:
    log.info(
        "not known how many read from each source: %s",
        exc,
        extra=fields("readers_unknown", error=exc),
    )


def order_of(record: RankRecord, session_id: str) -> bytes:
    """Orders equal ranks, for each loader, by its session, in another way: so they do not all read
    from the same.
    """
    return hashlib.blake2b(f"{session_id} {record.incarnation}".encode(), digest_size=8).digest()
