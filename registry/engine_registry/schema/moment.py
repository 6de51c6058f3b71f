"""Moments as records, tickets, logs and tables write them. Pure."""

from __future__ import annotations

import re
from datetime import datetime, timezone


def utc(at: datetime | None = None) -> str:
    """RFC 3339, in UTC, to the millisecond: `2026-01-02T03:04:05.678Z`. Without `at`: now.

    A time without a zone is one of this machine's.
    """
    at = datetime.now(timezone.utc) if at is None else at.astimezone(timezone.utc)
    return at.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def moment(text: str) -> datetime:
    """Reads what `utc` writes, and other texts in ISO 8601, which may have no zone; ValueError."""
    return datetime.fromisoformat(re.sub("Z$", "+00:00", text))  # Python 3.10 reads no Z
