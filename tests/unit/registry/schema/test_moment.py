"""Moments as text."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from engine_registry.schema.moment import moment, utc


def test_a_moment_is_in_utc_to_the_millisecond_whatever_its_zone() -> None:
    zone = timezone(timedelta(hours=5, minutes=30))
    assert utc(datetime(2026, 1, 2, 3, 4, 5, 678_999, zone)) == "2026-01-01T21:34:05.678Z"
    assert utc(datetime(2026, 1, 2, tzinfo=timezone.utc)) == "2026-01-02T00:00:00.000Z"


def test_a_moment_is_read_as_it_is_written() -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 678_000, timezone.utc)
    assert moment(utc(at)) == at
    assert moment("2026-01-02T03:04:05.678+00:00") == at
    assert moment("2026-01-02T03:04:05").tzinfo is None
