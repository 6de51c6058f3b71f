"""Text that may go to a terminal, and the time in it."""

from __future__ import annotations

from datetime import datetime


def printable(text: str) -> str:
    """One line without control characters, which could move the cursor or worse: each is shown as
    its escape.
    """
    return (
        text
        if text.isprintable()
        else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    )


def clock(at: datetime) -> str:
    """The time of day, to the millisecond."""
    return f"{at:%H:%M:%S}.{at.microsecond // 1000:03d}"
