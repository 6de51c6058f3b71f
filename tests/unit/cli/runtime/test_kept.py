"""Events that a watch keeps in a file, and those since a time."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from engine_cli.runtime.kept import KeptEvents, before, kept_since
from engine_registry.errors import InvalidField

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def event(number: int) -> dict[str, Any]:
    return {"at": (BEGAN + timedelta(seconds=number)).isoformat(), "text": f"event {number}"}


def texts(path: Path, seconds: float = 0) -> list[str]:
    return [one["text"] for one in kept_since(path, BEGAN + timedelta(seconds=seconds))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_events_are_those_since_the_time_over_several_watches(path: Path) -> None:
    for number in range(3):
        with KeptEvents(path) as kept:
            kept.put(event(number))
    assert texts(path) == ["event 0", "event 1", "event 2"]
    assert texts(path, 1) == ["event 1", "event 2"]
    assert texts(path, 2.5) == []


def test_two_files_of_bounded_size_hold_the_last_events(path: Path) -> None:
    with KeptEvents(path, max_nbytes=500) as kept:
        for number in range(100):
            kept.put(event(number))
            assert path.stat().st_size <= 500
    assert sorted(path.parent.iterdir()) == sorted([path, before(path)])
    found = texts(path)
    assert 8 < len(found) < 20
    assert found == [f"event {number}" for number in range(100 - len(found), 100)]


def test_an_event_larger_than_a_file_is_kept_all_the_same(path: Path) -> None:
    with KeptEvents(path, max_nbytes=500) as kept:
        for number in range(2):
            kept.put({**event(number), "filler": "x" * 1000})
    assert texts(path) == ["event 0", "event 1"]


@pytest.mark.parametrize(
    "junk",
    [b'{"at":"2026', b"[]", b"\xff", b"{}", b'{"at":"2026-01-02T03:04:05","text":"no zone"}', b"["],
)
def test_lines_that_hold_no_event_are_left_out_and_the_next_one_is_whole(
    path: Path, junk: bytes
) -> None:
    path.write_bytes(junk)
    with KeptEvents(path) as kept:
        kept.put(event(1))
    assert texts(path) == ["event 1"]


def test_one_watch_keeps_a_file_also_once_it_has_begun_another(path: Path) -> None:
    with KeptEvents(path, max_nbytes=100) as kept:
        for number in range(5):
            kept.put(event(number))
        with pytest.raises(InvalidField, match="another process keeps events in"), KeptEvents(path):
            pass
    with KeptEvents(path):
        pass


def test_a_file_that_cannot_be_written_or_read_is_refused_by_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidField, match=rf"cannot be kept in {tmp_path}: "),
        KeptEvents(tmp_path),
    ):
        pass
    with pytest.raises(InvalidField, match=f"{tmp_path} cannot be read: Is a directory"):
        list(kept_since(tmp_path, BEGAN))
    with pytest.raises(InvalidField, match="does not exist"):
        list(kept_since(tmp_path / "none", BEGAN))


def test_a_watch_goes_on_where_nothing_can_be_written_and_says_so_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, full = os.write, [True]

    def fail(descriptor: int, data: bytes) -> int:
        if full[0]:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fail)
    with KeptEvents(path) as kept:
        for number in range(3):
            kept.put(event(number))
        full[0] = False
        kept.put(event(3))
    assert [record.fields["event"] for record in caplog.records] == ["events_not_kept"]  # type: ignore[attr-defined]
    assert texts(path) == ["event 3"]
