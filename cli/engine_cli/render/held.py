"""Ranks that are held, as people read of them: how much memory their keepers keep, and how long
still, by the clock of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone

from engine_cli.render.tables import size
from engine_registry import RankRecord
from engine_registry.schema.moment import moment
from engine_registry.schema.status import named

_STEP_S = 10.0  # the clocks of two hosts differ, so less than this is no news
_MINUTES_FROM_S, _HOURS_FROM_S = 600.0, 7200.0


def ranks_held(records: Sequence[RankRecord], now: datetime | None = None) -> str:
    """`rank 3 held 4.7 GB, 290 s left`; of several ranks all bytes, and the time of the first that
    goes. Empty where there is none.
    """
    if not records:
        return ""
    ranks = named([record.rank for record in records])
    nbytes = sum(record.manifest.nbytes for record in records)
    return f"{ranks} held {size(nbytes)}, {left(min(each.held_until for each in records), now)}"


def left(until: str, now: datetime | None = None) -> str:
    """How much time is left until this moment of a record, rounded: anybody may have written it."""
    try:
        at = moment(until)
    except ValueError:
        return f"until {until}"
    at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
    seconds = (at - (now or datetime.now(timezone.utc))).total_seconds()
    if seconds <= 0:
        return "its time is over"
    if seconds >= _HOURS_FROM_S:
        return f"{seconds / 3600:.0f} h left"
    if seconds >= _MINUTES_FROM_S:
        return f"{seconds / 60:.0f} min left"
    return f"{math.ceil(seconds / _STEP_S) * _STEP_S:.0f} s left"
