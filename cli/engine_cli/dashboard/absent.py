"""What the page shows of ranks that are not there: missing, lost or held. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from engine_cli.render.states import HELD
from engine_cli.render.texts import loss
from engine_registry import RankLost, RankRecord
from engine_registry.schema.moment import utc
from engine_registry.schema.status import why_held

MISSING: dict[str, Any] = {"state": "missing", "reason": ""}  # it never came


def lost_row(event: RankLost, at: datetime) -> dict[str, Any]:
    return {
        "state": "lost",
        "reason": loss(event),
        "host": event.record.host,
        "device": event.record.device,
        "session": event.record.session_id,
        "since": utc(at),
    }


def held_row(record: RankRecord) -> dict[str, Any]:
    """What differs from its row as a lost one."""
    return {
        "state": HELD,
        "reason": why_held(record),
        "host": record.host,
        "device": record.device,
        "session": record.session_id,
        "nbytes": record.manifest.nbytes,
    }
