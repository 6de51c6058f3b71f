"""Who has evicted a rank: as it is written in a mark, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.errors import InvalidField
from engine_registry.schema.eviction import MAX_LENGTH, Eviction, was_evicted

BY_ALICE = Eviction("alice@node-9", "2026-01-02T03:06:00.000+00:00", "bad bytes")
TEXT = st.text(max_size=MAX_LENGTH).filter(str.isprintable)


@given(TEXT, TEXT, TEXT)
def test_a_mark_says_what_was_written(by: str, at: str, reason: str) -> None:
    try:
        eviction = Eviction(by, at, reason)
        value = eviction.encode()
    except (InvalidField, UnicodeEncodeError):
        return
    assert Eviction.decode(value) == eviction


@given(st.binary(max_size=100))
def test_a_mark_that_anybody_may_have_written_says_nothing_or_what_can_be_printed(
    value: bytes,
) -> None:
    eviction = Eviction.decode(value)
    assert eviction is None or str(eviction).isprintable()


@pytest.mark.parametrize(
    "changes",
    [
        {"reason": "two\nlines"},
        {"reason": "\x1b[2J"},
        {"reason": "x" * (MAX_LENGTH + 1)},
        {"reason": None},
        {"by": "alice\x00"},
        {"at": "\u202e"},
    ],
)
def test_a_text_that_cannot_be_printed_in_a_line_is_refused_by_its_name(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(InvalidField, match="is not valid") as caught:
        Eviction(**{"by": "alice@node-9", "at": "", "reason": "", **changes})
    assert caught.value.details["field"] == next(iter(changes))
    assert str(caught.value).isprintable()


def test_the_rank_is_told_who_has_evicted_it_when_and_why() -> None:
    error = was_evicted("/engines/qwen/0", BY_ALICE)
    assert str(error) == (
        "/engines/qwen/0 was evicted by alice@node-9 at 2026-01-02T03:06:00.000+00:00: bad bytes"
    )
    assert error.details["reason"] == "bad bytes"
    assert str(was_evicted("/engines/qwen/0", None)) == "/engines/qwen/0 was evicted"
