"""Whether the memory of a rank can be read from here, as far as its record says. Used by
searches.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import NamedTuple

from engine_loader.engines.base import Engine
from engine_loader.errors import SourceUnreachable
from engine_registry import RankRecord
from engine_registry.schema.address import family_of, host_of
from engine_registry.schema.record import GATEWAY, WITHIN_HOST


def reachable(
    engine: Engine, whole: Sequence[Sequence[RankRecord]], alike: Sequence[RankRecord]
) -> set[str]:
    """Incarnations; SourceUnreachable where nobody can be read from."""
    every = [*(record for records in whole for record in records), *alike]
    obstacles = {
        record.key: obstacle for record in every if (obstacle := _obstacle(engine, record))
    }
    teams = [*((record,) for record in alike), *whole]
    if obstacles and all(any(record.key in obstacles for record in team) for team in teams):
        named = "; ".join(f"{key} {obstacle.what}" for key, obstacle in obstacles.items())
        remedies = dict.fromkeys(one.remedy for one in obstacles.values() if one.remedy)
        raise SourceUnreachable(
            f"no source can be reached from here: {named}",
            "; ".join(remedies),
            sources=list(obstacles),
        )
    return {record.incarnation for record in every if record.key not in obstacles}


def is_reachable(engine: Engine, record: RankRecord) -> bool:
    """Whether the rank can be read from here, as far as labels say."""
    return _obstacle(engine, record) is None


class _Obstacle(NamedTuple):
    """Why the memory of a rank cannot be read from here, and what to do, if there is something."""

    what: str
    remedy: str = ""


def _obstacle(engine: Engine, record: RankRecord) -> _Obstacle | None:
    """As far as labels say."""
    if record.kept_by == GATEWAY:
        return _Obstacle(
            "is an SGLang seed, which has no header to check reads by",
            "load SGLang seeds with SGLang, through a gateway",
        )
    if record.protocol != engine.protocol:
        return _Obstacle(f"is served over {record.protocol}, this engine speaks {engine.protocol}")
    ours, theirs = (
        family_of(host_of(session_id)) for session_id in (engine.session_id, record.session_id)
    )
    if ours and theirs and ours != theirs:
        return _Obstacle(
            f"is served over {theirs}, this engine speaks {ours}",
            f"use a `host` of {theirs}",
        )
    if record.fabric and engine.fabric and record.fabric != engine.fabric:
        return _Obstacle(f"is on the fabric {record.fabric!r}, this engine on {engine.fabric!r}")
    if (
        record.protocol in WITHIN_HOST
        and not (record.fabric and engine.fabric)
        and record.host != socket.gethostname()
    ):
        return _Obstacle(
            f"is on the host {record.host}, and {record.protocol} does not leave a host"
        )
    return None
